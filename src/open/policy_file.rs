//! `/etc/imgdm.conf`: what images may name on this machine, whoever opens them.
//!
//! A line is a word and its value, between blanks, with the comments and octal escapes of
//! imgdmtab:
//!
//! ```text
//! # golden images
//! allow-path /srv/golden
//! allow-path /srv/my\040images
//! ```

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result, printable};
use crate::imgdmtab::{fields, unescape};

/// Most bytes that are read of it.
const MAX_LEN: u64 = 1 << 20;

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyFile {
    /// The values of its `allow-path` lines, all absolute.
    pub allowed: Vec<PathBuf>,
}

impl PolicyFile {
    /// Where it is.
    pub const DEFAULT_PATH: &str = "/etc/imgdm.conf";

    /// Reads a policy file; one that is not there says nothing, as does one that this user may
    /// not read.
    ///
    /// # Errors
    /// `InvalidTab`, naming the line that is wrong; it can't be read.
    pub fn read(path: &Path) -> Result<Self> {
        use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
        let mut text = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MAX_LEN + 1).read_to_end(&mut text));
        match read {
            Ok(_) => Self::parse(&text).map_err(|error| error.at_path(path)),
            Err(error) if matches!(error.kind(), NotFound | NotADirectory | PermissionDenied) => {
                Ok(Self::default())
            }
            Err(error) => Err(Error::io("cannot read the policy", error).at_path(path)),
        }
    }

    /// Reads the text of one.
    ///
    /// # Errors
    /// `InvalidTab`, naming the line that is wrong.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let wrong = |line: usize, why: &str| {
            Error::new(ErrorKind::InvalidTab(format!("line {line}: {why}")))
        };
        if text.len() as u64 > MAX_LEN {
            return Err(wrong(1, &format!("the file is longer than {MAX_LEN} bytes")));
        }
        let mut policy = Self::default();
        for (line, text) in (1..).zip(text.split(|&byte| byte == b'\n')) {
            match fields(text).as_deref() {
                None => {}
                Some([b"allow-path", path]) => {
                    let path = PathBuf::from(unescape(path));
                    if !path.is_absolute() {
                        let path = printable(&path.to_string_lossy());
                        return Err(wrong(line, &format!("'{path}' is no absolute path")));
                    }
                    policy.allowed.push(path);
                }
                Some([b"allow-path", ..]) => {
                    let why = "allow-path takes one path (\\040 stands for a blank, and a comment takes a line of its own)";
                    return Err(wrong(line, why));
                }
                Some([word, ..]) => {
                    let word = printable(&String::from_utf8_lossy(word));
                    return Err(wrong(line, &format!("unknown word '{word}'")));
                }
                Some([]) => {}
            }
        }
        Ok(policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_allows_a_path() {
        let text = b"# golden\n\nallow-path /srv/golden\r\n allow-path\t/srv/a\\040b\n";
        let allowed = vec!["/srv/golden".into(), "/srv/a b".into()];
        assert_eq!(PolicyFile::parse(text).unwrap(), PolicyFile { allowed });
        assert_eq!(PolicyFile::parse(b"").unwrap(), PolicyFile::default());
    }

    #[test]
    fn a_line_that_is_wrong_is_named() {
        for (line, why) in [
            ("allow-path", "takes one path"),
            ("allow-path /a # b", "takes one path"),
            ("allow-path golden", "'golden' is no absolute path"),
            ("allow-paths /a", "unknown word 'allow-paths'"),
            ("\x1b[2J", "unknown word '\\u{1b}[2J'"),
        ] {
            let error = PolicyFile::parse(format!("\n{line}\n").as_bytes()).unwrap_err();
            let said = error.to_string();
            assert!(said.starts_with("line 2: ") && said.contains(why), "{line}: {said}");
            assert!(matches!(error.kind(), ErrorKind::InvalidTab(_)), "{line}");
        }
    }

    #[test]
    fn one_that_is_not_there_says_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let policy = PolicyFile::read(&directory.path().join("imgdm.conf")).unwrap();
        assert_eq!(policy, PolicyFile::default());
        let error = PolicyFile::read(directory.path()).unwrap_err();
        assert_eq!(error.path(), Some(directory.path()));
    }
}
