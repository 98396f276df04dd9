//! Tests on a real kernel with device-mapper, as root: run by `tests/kernel/run`, which
//! boots a guest for them.

mod content;
mod faults;
mod guest;
mod locks;
mod names;
mod readonly;
