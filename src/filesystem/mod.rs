//! What it takes to look into a file system and leave it as it is: the kernel's drivers and
//! the options that keep them from replaying a journal, what a superblock says of changes
//! that are pending, and the options of mount(8).

mod options;
mod unclean;
mod xfs_log;

pub use options::{AccessTimes, Item, MountOptions, split};
pub use unclean::{Unclean, unclean};

/// A driver of the kernel with the options that keep it from writing and from replaying a
/// journal. A read-only mount alone does not: ext4, XFS, btrfs and others replay all the
/// same, or refuse where the device takes no writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Driver<'a> {
    /// Its name, as in /proc/filesystems.
    pub name: &'a str,
    /// Its options; all of them are flags or `key=value`.
    pub options: &'static [&'static str],
    /// Those that it takes where it may write, and replay its journal: on an overlay.
    pub writable: &'static [&'static str],
}

/// The drivers for a file system of libblkid's type `kind` (or of the kernel's name for a
/// driver), in the order in which they are to be tried: the next one where the kernel has
/// no such driver, or where it does not know the options.
///
/// Of a type that is not known here, the driver of that name, without options.
pub fn drivers(kind: &str) -> Vec<Driver<'_>> {
    let known = |list: &[(&'static str, &'static [&'static str])]| {
        // The UUID is that of the original, of a snapshot, or of another copy.
        let writable = |name| if name == "xfs" { &["nouuid"][..] } else { &[] };
        let driver = |&(name, options)| Driver { name, options, writable: writable(name) };
        list.iter().map(driver).collect()
    };
    match kind {
        // ext4's driver reads all three; those of old kernels know no `noload` for ext2.
        "ext2" => known(&[("ext4", &["noload"]), ("ext2", &[])]),
        "ext3" => known(&[("ext4", &["noload"]), ("ext3", &["noload"])]),
        "ext4" => known(&[("ext4", &["noload"])]),
        "xfs" => known(&[("xfs", &["norecovery", "nouuid"])]),
        // Since Linux 5.9, and before.
        "btrfs" => known(&[("btrfs", &["rescue=nologreplay"]), ("btrfs", &["nologreplay"])]),
        "f2fs" => known(&[("f2fs", &["norecovery"])]),
        "nilfs2" => known(&[("nilfs2", &["norecovery"])]),
        // Neither replays for a read-only mount. The old driver is gone since Linux 6.9.
        "ntfs" => known(&[("ntfs3", &[]), ("ntfs", &[])]),
        // These have no journal, or do not replay it for a read-only mount. Of reiserfs, one
        // that is to be replayed cannot be mounted from a read-only device at all.
        _ => vec![Driver { name: kind, options: &[], writable: &[] }],
    }
}

/// Whether the kernel had a driver for this type of libblkid's at any time: for some there
/// is none, whatever modules are installed.
pub fn has_driver(kind: &str) -> bool {
    !matches!(kind, "apfs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_replays_a_journal_is_told_not_to() {
        for kind in ["ext3", "ext4", "xfs", "btrfs", "f2fs", "nilfs2"] {
            for driver in drivers(kind) {
                assert!(!driver.options.is_empty(), "{driver:?}");
                let keeps = |option: &&str| {
                    option.contains("load") || option.contains("recov") || option.contains("replay")
                };
                assert!(!driver.writable.iter().any(keeps), "{driver:?}");
            }
        }
    }

    #[test]
    fn what_is_not_known_is_mounted_by_the_driver_of_its_name() {
        assert_eq!(drivers("udf"), [Driver { name: "udf", options: &[], writable: &[] }]);
    }
}
