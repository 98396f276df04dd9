//! What stands in the way of a walk, which goes on all the same.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use crate::error::{Error, printable};
use crate::units::HostOffset;

/// Problems that are kept; more are only counted.
const MAX_KEPT: usize = 1000;

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProblemKind {
    /// A field contradicts the specification; the walk goes on without it, or with what of it
    /// can be.
    InvalidField,
    /// An entry names a place on no cluster boundary.
    Unaligned,
    /// Something is named that does not lie in the file, or not whole.
    OutsideFile,
    /// The host could not read it.
    Unreadable,
    /// Two L1 tables share bytes; the entries of the second are not looked into.
    NamedTwice,
    /// More than imgdm keeps in memory; what is past that is not looked into.
    NotExamined,
}

impl ProblemKind {
    /// A stable name for scripts.
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidField => "invalid-field",
            Self::Unaligned => "unaligned",
            Self::OutsideFile => "outside-file",
            Self::Unreadable => "unreadable",
            Self::NamedTwice => "named-twice",
            Self::NotExamined => "not-examined",
        }
    }
}

/// One problem, and where it lies. Displayed as a sentence without the offset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong.
    pub kind: ProblemKind,
    /// Where the field or entry lies that says so.
    pub offset: HostOffset,
    /// What the field or entry is, or the whole message where `target` is not given.
    what: Cow<'static, str>,
    /// What it names.
    target: Option<u64>,
}

impl Problem {
    /// An entry that names a place where nothing can be. Costs no allocation: a damaged image
    /// has millions.
    pub(super) fn of_entry(
        kind: ProblemKind,
        offset: HostOffset,
        what: &'static str,
        target: u64,
    ) -> Self {
        Self { kind, offset, what: Cow::Borrowed(what), target: Some(target) }
    }

    /// Anything else, in words.
    pub(super) fn new(
        kind: ProblemKind,
        offset: HostOffset,
        message: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self { kind, offset, what: message.into(), target: None }
    }

    /// An error as a problem: of its own offset, or else of `offset`.
    pub(crate) fn of_error(error: &Error, offset: HostOffset) -> Self {
        let kind = match error.kind() {
            crate::ErrorKind::InvalidImage(_) | crate::ErrorKind::Unsupported(_) => {
                ProblemKind::InvalidField
            }
            _ => ProblemKind::Unreadable,
        };
        let offset = error.offset().map_or(offset, HostOffset::new);
        Self::new(kind, offset, error.kind().to_string())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(&self.what))?;
        match (self.target, self.kind) {
            (None, _) => Ok(()),
            (Some(target), ProblemKind::Unaligned) => {
                write!(f, " names {target:#x}, which is no multiple of the cluster size")
            }
            (Some(target), ProblemKind::OutsideFile) => {
                write!(f, " names {target:#x}, which does not lie in the file whole")
            }
            (Some(target), _) => write!(f, " says {target:#x}"),
        }
    }
}

/// The problems of a walk in the order of the file, each once; the first thousand of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems {
    kept: BTreeMap<(HostOffset, ProblemKind), Problem>,
    omitted: u64,
}

impl Problems {
    /// Adds one, unless the same kind is known of that place.
    pub fn push(&mut self, problem: Problem) {
        let key = (problem.offset, problem.kind);
        if self.kept.len() < MAX_KEPT {
            self.kept.entry(key).or_insert(problem);
        } else if !self.kept.contains_key(&key) {
            self.omitted = self.omitted.saturating_add(1);
        }
    }

    /// Those that are kept.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Problem> {
        self.kept.values()
    }

    /// How many more there were.
    pub fn omitted(&self) -> u64 {
        self.omitted
    }

    /// True where nothing was wrong.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }
}
