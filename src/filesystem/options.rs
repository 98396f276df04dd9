//! The options of mount(8) (`-o`): which of them say how a read-only mount is made, which
//! are for fstab's readers, and which are the file system's own.

use crate::error::{Error, ErrorKind, Result, printable};

/// One option: `key` or `key=value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What stands before the first `=`.
    pub key: String,
    /// What stands after it.
    pub value: Option<String>,
}

/// Takes a list of options apart at its commas. As in mount(8), a comma between double
/// quotes is none; the quotes themselves are taken away. Empty options are passed over.
///
/// # Errors
/// A quote that does not end.
pub fn split(text: &str) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    let mut quoted = false;
    let parts = text.split(|c| {
        if c == '"' {
            quoted = !quoted;
        }
        c == ',' && !quoted
    });
    for part in parts.filter(|part| !part.is_empty()) {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (part, None),
        };
        let value = value.map(|value| value.replace('"', ""));
        items.push(Item { key: key.replace('"', ""), value });
    }
    if quoted {
        return Err(usage(format!(
            "the mount options '{}' have a quote without end",
            printable(text)
        )));
    }
    Ok(items)
}

/// How a file system is to be mounted. Without a word of the user's, as safely as can be:
/// its programs don't run, its set-user-ID bits and device nodes have no effect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// Set-user-ID and set-group-ID bits have an effect.
    pub suid: bool,
    /// Device nodes can be opened.
    pub dev: bool,
    /// Programs can be run.
    pub exec: bool,
    /// Symbolic links are not followed.
    pub no_symfollow: bool,
    /// `rw` was asked for, which there is only on an overlay.
    pub read_write: bool,
    /// `ro` was asked for.
    pub read_only: bool,
    /// How times of access are kept, which matters only where anything can be written.
    pub access_times: AccessTimes,
    /// Directories' times of access are not kept.
    pub no_directory_access_times: bool,
    /// Flags that say how what is written gets to the device, in their order.
    pub writing: Vec<&'static str>,
    /// What the file system itself is told, after what keeps it from writing.
    pub data: Vec<Item>,
}

/// How times of access are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessTimes {
    /// Once a day, and where the file has changed since.
    #[default]
    Relative,
    /// Not at all.
    None,
    /// Each.
    Strict,
}

impl MountOptions {
    /// Sorts options; a later one overrides an earlier one.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for what is no new mount: `remount`, `bind`, `move`, and the
    /// kinds of propagation.
    pub fn sort(items: impl IntoIterator<Item = Item>) -> Result<Self> {
        let mut sorted = Self::default();
        for item in items {
            match (item.key.as_str(), &item.value) {
                ("ro" | "rw", None) => {
                    sorted.read_only = item.key == "ro";
                    sorted.read_write = !sorted.read_only;
                }
                ("suid", None) => sorted.suid = true,
                ("nosuid", None) => sorted.suid = false,
                ("dev", None) => sorted.dev = true,
                ("nodev", None) => sorted.dev = false,
                ("exec", None) => sorted.exec = true,
                ("noexec", None) => sorted.exec = false,
                ("symfollow", None) => sorted.no_symfollow = false,
                ("nosymfollow", None) => sorted.no_symfollow = true,
                ("remount", _) => {
                    return Err(usage(
                        "an image that is mounted can't be remounted: it is read-only at every layer; for other options unmount it first"
                            .to_owned(),
                    ));
                }
                (key, None) if is_other_operation(key) => {
                    return Err(usage(format!(
                        "the option '{key}' is for what is mounted already: use mount(8) for that"
                    )));
                }
                ("noatime", None) => sorted.access_times = AccessTimes::None,
                ("strictatime", None) => sorted.access_times = AccessTimes::Strict,
                ("atime" | "relatime" | "norelatime" | "nostrictatime", None) => {
                    sorted.access_times = AccessTimes::Relative;
                }
                ("nodiratime", None) => sorted.no_directory_access_times = true,
                ("diratime", None) => sorted.no_directory_access_times = false,
                (key, None) if WRITING.contains(&key) => {
                    sorted.writing.extend(WRITING.iter().find(|flag| **flag == key));
                }
                (key, value) if is_without_effect(key, value.is_some()) => {}
                _ => sorted.data.push(item),
            }
        }
        Ok(sorted)
    }
}

fn usage(message: String) -> Error {
    Error::new(ErrorKind::Usage(message))
}

/// Options that make mount(8) do something else than mount a file system.
fn is_other_operation(key: &str) -> bool {
    const PROPAGATION: [&str; 4] = ["shared", "private", "slave", "unbindable"];
    matches!(key, "bind" | "rbind" | "move")
        || PROPAGATION.contains(&key)
        || key.strip_prefix('r').is_some_and(|kind| PROPAGATION.contains(&kind))
}

/// Flags that every file system knows, and that say how it is written.
const WRITING: [&str; 5] = ["sync", "async", "dirsync", "lazytime", "nolazytime"];

/// Options for those who read fstab, and some that have no effect any more. `defaults`
/// stands for suid, dev and exec too, but in fstab mostly for nothing: it is not taken for a
/// wish.
fn is_without_effect(key: &str, has_value: bool) -> bool {
    const FSTAB: [&str; 14] = [
        "defaults", "auto", "noauto", "nofail", "fail", "_netdev", "user", "nouser", "users",
        "nousers", "owner", "noowner", "group", "nogroup",
    ];
    const OTHERS: [&str; 6] = ["iversion", "noiversion", "mand", "nomand", "silent", "loud"];
    if key.starts_with("x-") || key.starts_with("X-") {
        return true;
    }
    if has_value {
        return matches!(key, "comment" | "user" | "helper" | "uhelper");
    }
    FSTAB.contains(&key) || OTHERS.contains(&key) || key == "comment"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(key: &str, value: Option<&str>) -> Item {
        Item { key: key.to_owned(), value: value.map(str::to_owned) }
    }

    fn sort(text: &str) -> Result<MountOptions> {
        MountOptions::sort(split(text)?)
    }

    #[test]
    fn commas_between_quotes_do_not_part() {
        let items = split(r#"a,,b=1,context="x,y=z",c="#).unwrap();
        let wanted = [
            item("a", None),
            item("b", Some("1")),
            item("context", Some("x,y=z")),
            item("c", Some("")),
        ];
        assert_eq!(items, wanted);
        assert!(split(r#"a="b,c"#).is_err());
        assert_eq!(split("").unwrap(), []);
    }

    #[test]
    fn without_a_word_nothing_of_the_guest_is_trusted() {
        assert_eq!(sort("defaults,atime,silent").unwrap(), MountOptions::default());
        let asked = sort("suid,dev,exec,noexec").unwrap();
        assert!(asked.suid && asked.dev && !asked.exec);
    }

    #[test]
    fn options_for_the_readers_of_fstab_never_reach_the_file_system() {
        let fstab = "noauto,nofail,user,user=me,_netdev,x-systemd.device-timeout=5s,X-mount.mkdir,comment=systemd.automount,defaults";
        assert_eq!(sort(fstab).unwrap().data, []);
    }

    #[test]
    fn what_is_not_known_is_the_file_systems_own_in_order() {
        let data = sort("subvol=home,ro,uid=5,quiet").unwrap().data;
        let wanted = [item("subvol", Some("home")), item("uid", Some("5")), item("quiet", None)];
        assert_eq!(data, wanted);
    }

    #[test]
    fn what_is_no_new_mount_is_refused() {
        for text in ["remount", "remount,ro", "bind", "rbind", "move", "rshared", "private"] {
            let error = sort(text).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Usage(_)), "{text}");
        }
        assert!(sort("shared=1").is_ok());
    }

    #[test]
    fn how_it_is_written_is_for_those_that_are() {
        let sorted = sort("sync,noatime,nodiratime,lazytime,strictatime").unwrap();
        assert_eq!(sorted.writing, ["sync", "lazytime"]);
        assert_eq!(sorted.access_times, AccessTimes::Strict);
        assert!(sorted.no_directory_access_times && sorted.data.is_empty());
    }

    #[test]
    fn the_last_of_two_counts() {
        assert!(sort("ro,rw").unwrap().read_write);
        let last = sort("rw,ro").unwrap();
        assert!(!last.read_write && last.read_only);
    }
}
