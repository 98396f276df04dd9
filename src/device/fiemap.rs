//! Unwritten extents: preallocated space, which reads as zero whatever lies there.

use std::cell::RefCell;
use std::fs::File;
use std::io;

use nix::errno::Errno;

use super::sys::{FiemapBuffer, FiemapExtent, Writers, writers};
use crate::source::UnwrittenProbe;
use crate::units::{ByteLen, HostOffset};

// Flags of an extent (linux/fiemap.h).
const LAST: u32 = 0x0001;
const UNWRITTEN: u32 = 0x0800;

/// Asks the file system by FIEMAP, with its dirty pages written out first.
///
/// Only an extent that is called unwritten and nothing else is taken for zeros: one
/// that is also delayed, encoded, inline, shared or unknown is data. To be used only on
/// a file that nobody writes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fiemap;

thread_local! {
    static BUFFER: RefCell<Box<FiemapBuffer>> = RefCell::new(FiemapBuffer::new());
}

impl UnwrittenProbe for Fiemap {
    fn unwritten(
        &self,
        file: &File,
        start: HostOffset,
        end: HostOffset,
    ) -> io::Result<Vec<(HostOffset, HostOffset)>> {
        BUFFER.with(|buffer| {
            let mut buffer = buffer.try_borrow_mut().map_err(|_| Errno::EBUSY)?;
            let mut found = Vec::new();
            let mut at = start;
            while at < end {
                let extents = buffer.ask(file, at.get(), end.since(at).get())?;
                let next = collect(extents, start, end, &mut found);
                match next {
                    Some(next) if next > at => at = next,
                    _ => break,
                }
            }
            Ok(found)
        })
    }

    fn nobody_writes(&self, file: &File) -> bool {
        writers(file) == Writers::Nobody
    }
}

/// Adds the unwritten ranges of one answer; where to ask on, `None` after the last.
fn collect(
    extents: &[FiemapExtent],
    start: HostOffset,
    end: HostOffset,
    found: &mut Vec<(HostOffset, HostOffset)>,
) -> Option<HostOffset> {
    for extent in extents {
        if extent.flags & !LAST != UNWRITTEN {
            continue;
        }
        let first = HostOffset::new(extent.logical);
        let past = first.saturating_add(ByteLen::new(extent.length));
        let (first, past) = (first.max(start), past.min(end));
        if first >= past {
            continue;
        }
        match found.last_mut() {
            Some((_, last)) if *last >= first => *last = past.max(*last),
            _ => found.push((first, past)),
        }
    }
    let last = extents.last()?;
    if last.flags & LAST != 0 {
        return None;
    }
    Some(HostOffset::new(last.logical).saturating_add(ByteLen::new(last.length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(logical: u64, length: u64, flags: u32) -> FiemapExtent {
        FiemapExtent { logical, length, flags, ..FiemapExtent::default() }
    }

    fn numbers(found: &[(HostOffset, HostOffset)]) -> Vec<(u64, u64)> {
        found.iter().map(|(a, b)| (a.get(), b.get())).collect()
    }

    #[test]
    fn only_plain_unwritten_extents_count() {
        let mut found = Vec::new();
        let next = collect(
            &[
                extent(0, 4096, 0),
                extent(4096, 4096, UNWRITTEN),
                extent(8192, 4096, UNWRITTEN),
                extent(16384, 4096, UNWRITTEN | 0x0004), // delayed
                extent(20480, 4096, UNWRITTEN | 0x2000), // shared
                extent(24576, 4096, UNWRITTEN | 0x0002), // unknown
                extent(28672, 4096, UNWRITTEN | 0x1000), // merged
            ],
            HostOffset::new(5000),
            HostOffset::new(1 << 20),
            &mut found,
        );
        assert_eq!(numbers(&found), [(5000, 12288)]);
        assert_eq!(next, Some(HostOffset::new(32768)));
    }

    #[test]
    fn the_last_extent_ends_the_asking() {
        let mut found = Vec::new();
        let end = HostOffset::new(1 << 20);
        let last = [extent(0, 4096, UNWRITTEN | LAST)];
        assert_eq!(collect(&last, HostOffset::ZERO, end, &mut found), None);
        assert_eq!(numbers(&found), [(0, 4096)]);
        assert_eq!(collect(&[], HostOffset::ZERO, end, &mut found), None);
    }

    #[test]
    fn preallocated_space_is_found_where_the_file_system_has_fiemap() {
        let dir =
            std::env::var_os("CARGO_TARGET_TMPDIR").map_or_else(std::env::temp_dir, Into::into);
        let file = tempfile::tempfile_in(dir).unwrap();
        let flags = nix::fcntl::FallocateFlags::empty();
        if nix::fcntl::fallocate(&file, flags, 0, 1 << 20).is_err() {
            return;
        }
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 65536], 65536).unwrap();
        let (start, end) = (HostOffset::ZERO, HostOffset::new(1 << 20));
        let Ok(found) = Fiemap.unwritten(&file, start, end) else { return };
        assert!(
            found.iter().all(|&(a, b)| b.get() <= 65536 || a.get() >= 131_072),
            "what was just written is data: {found:?}"
        );
    }

    #[cfg(feature = "sandbox")]
    #[test]
    fn a_thread_that_is_shut_asks_for_extents_all_the_same() {
        use nix::libc::{EACCES, ENOSYS, EPERM};

        let file = tempfile::tempfile().unwrap();
        let ask = || {
            crate::sandbox::shut_thread();
            Fiemap.unwritten(&file, HostOffset::ZERO, HostOffset::new(1 << 16))
        };
        // Whether the file system can or not, the call goes through.
        if let Err(error) = std::thread::scope(|scope| scope.spawn(ask).join().unwrap()) {
            let refused = [ENOSYS, EACCES, EPERM].map(Some);
            assert!(!refused.contains(&error.raw_os_error()), "{error}");
        }
    }
}
