//! `imgdm check --metadata`: where every piece of an image's metadata lies, and what nothing
//! refers to.

mod human;
mod json;

use imgdm::metadata::{Metadata, Problem, Problems, UsedRange, Walk, first_non_zero};

pub(super) use human::print as print_human;
pub(super) use json::Viscera;

/// Whether a range that nothing refers to is all zeros: `None` where it can't be read.
struct Content {
    all_zeros: Option<bool>,
    first_non_zero: Option<u64>,
}

impl Content {
    /// Reads the range up to the first byte that is not 0.
    fn of(metadata: &Metadata, range: &UsedRange) -> Self {
        match first_non_zero(metadata.source(), range.offset, range.length) {
            Ok(first) => Self {
                all_zeros: Some(first.is_none()),
                first_non_zero: first.map(|offset| offset.get()),
            },
            Err(_) => Self { all_zeros: None, first_non_zero: None },
        }
    }
}

/// What was wrong on the way, with what of the refcounts can't be read.
fn problems(walk: &Walk<'_>) -> Problems {
    let mut problems = walk.problems().clone();
    for problem in walk.refcount_problems().iter() {
        problems.push(Problem::clone(problem));
    }
    problems
}
