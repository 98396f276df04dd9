//! The library's one error: what kind, in which file, at which offset, and why.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, to match on. The exit code of the command follows from it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A read, open or ioctl failed; the source says how.
    #[error("{0}")]
    Io(String),
    /// The file does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The kernel does not let this user open the file or do this.
    #[error("{0}")]
    PermissionDenied(String),
    /// The metadata contradicts the format's specification, or lies outside the file.
    #[error("{0}")]
    InvalidImage(String),
    /// Correct metadata that imgdm does not know how to read.
    #[error("{0}")]
    Unsupported(String),
    /// The image holds no such snapshot.
    #[error("{0}")]
    SnapshotNotFound(String),
    /// The disk has no such partition, or no partition table.
    #[error("{0}")]
    PartitionNotFound(String),
    /// Somebody else writes to the file, or holds the device open.
    #[error("{0}")]
    InUse(String),
    /// Device-mapper has no target for what the image holds.
    #[error("{0}")]
    NotRepresentable(String),
    /// The arguments contradict each other or cannot be understood.
    #[error("{0}")]
    Usage(String),
    /// Something of that name is already there, or cannot be made.
    #[error("{0}")]
    CannotCreate(String),
    /// Nothing of that name is attached.
    #[error("{0}")]
    NotAttached(String),
    /// The running kernel has no device-mapper, loop driver or target.
    #[error("{0}")]
    KernelLacks(String),
    /// An encrypted layer's key is missing, or is not the right one.
    #[error("{0}")]
    WrongKey(String),
    /// A line of imgdmtab is wrong.
    #[error("{0}")]
    InvalidTab(String),
    /// SIGINT or SIGTERM asked the work to stop; all of it was undone.
    #[error("interrupted by signal {0}")]
    Interrupted(i32),
}

/// An error with the file and the offset it is about.
///
/// Displayed as `PATH: at offset 0x...: what is wrong`; the underlying cause is
/// its [`source`](std::error::Error::source).
#[derive(Debug)]
pub struct Error(Box<Details>);

/// Boxed, so that a `Result` in a loop over a million entries stays small.
#[derive(Debug)]
struct Details {
    kind: ErrorKind,
    path: Option<PathBuf>,
    offset: Option<u64>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of this kind, about no file yet.
    pub fn new(kind: ErrorKind) -> Self {
        Self(Box::new(Details { kind, path: None, offset: None, source: None }))
    }

    /// Metadata that contradicts the specification.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidImage(message.into()))
    }

    /// A failed system call; `NotFound` and `PermissionDenied` keep their kinds.
    pub fn io(message: impl Into<String>, source: io::Error) -> Self {
        let mut message = message.into();
        if source.raw_os_error() == Some(nix::libc::EMFILE) {
            // A long chain, under a hard limit: the soft one has been raised.
            message.push_str(
                " (this process may have no more files open: raise the limit with 'ulimit -Hn', or with LimitNOFILE= of its unit)",
            );
        }
        let kind = match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ErrorKind::NotFound(message),
            io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied(message),
            _ => ErrorKind::Io(message),
        };
        Self::new(kind).with_source(source)
    }

    /// Adds the file, unless one is already named (the innermost is the right one).
    #[must_use]
    pub fn at_path(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path.get_or_insert_with(|| path.as_ref().to_owned());
        self
    }

    /// Adds the offset in bytes into the file, unless one is already named.
    #[must_use]
    pub fn at_offset(mut self, offset: u64) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The same error with another kind or message.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self
    }

    /// The error as it is displayed, but for the file; with its causes.
    pub fn without_path(&self) -> String {
        let offset = self.0.offset.map(|offset| format!("at offset {offset:#x}: "));
        let mut text =
            format!("{}{}", offset.unwrap_or_default(), printable(&self.0.kind.to_string()));
        let mut cause = std::error::Error::source(self);
        while let Some(next) = cause {
            text.push_str(&format!(": {}", printable(&next.to_string())));
            cause = next.source();
        }
        text
    }

    /// True where a signal asked the work to stop, so that nothing is to go on without what
    /// failed.
    pub fn is_interruption(&self) -> bool {
        matches!(self.0.kind, ErrorKind::Interrupted(_))
    }

    /// An error that says the same; its causes are but text.
    pub(crate) fn told_again(&self) -> Self {
        let mut causes = Vec::new();
        let mut cause = std::error::Error::source(self);
        while let Some(next) = cause {
            causes.push(next.to_string());
            cause = next.source();
        }
        let source: Option<Box<dyn std::error::Error + Send + Sync>> =
            (!causes.is_empty()).then(|| causes.join(": ").into());
        let (path, offset) = (self.0.path.clone(), self.0.offset);
        Self(Box::new(Details { kind: self.0.kind.clone(), path, offset, source }))
    }

    /// What went wrong.
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// The file it is about.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The offset in bytes into that file.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.0.path {
            write!(f, "{}: ", printable(&path.to_string_lossy()))?;
        }
        if let Some(offset) = self.0.offset {
            write!(f, "at offset {offset:#x}: ")?;
        }
        // Whatever a message quotes may be a stranger's; only its own line ends stay.
        for (index, line) in self.0.kind.to_string().split('\n').enumerate() {
            let line_end = if index == 0 { "" } else { "\n" };
            write!(f, "{line_end}{}", printable(line))?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

/// `text` with control characters escaped: names in an image are a stranger's, and
/// must not move the cursor of the terminal they are printed on.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_names_file_then_offset_then_what() {
        let error = Error::invalid("bad magic").at_offset(16).at_path("/a/b\n.qcow2");
        assert_eq!(error.to_string(), "/a/b\\n.qcow2: at offset 0x10: bad magic");
    }

    #[test]
    fn what_a_message_quotes_cannot_move_the_cursor() {
        let error = Error::invalid("the name 'x\x1b[2J'\n  and more");
        assert_eq!(error.to_string(), "the name 'x\\u{1b}[2J'\n  and more");
    }

    #[test]
    fn the_innermost_place_is_kept() {
        let error = Error::invalid("x").at_path("base").at_path("overlay");
        assert_eq!(error.path(), Some(Path::new("base")));
    }

    #[test]
    fn io_errors_keep_the_kinds_that_have_their_own_exit_code() {
        let error = Error::io("open", io::Error::from(io::ErrorKind::NotFound));
        assert!(matches!(error.kind(), ErrorKind::NotFound(_)));
    }
}
