//! Tests on a real kernel with device-mapper, as root: run by `tests/kernel/run`, which
//! boots a guest for them.
#![allow(clippy::unwrap_used, clippy::expect_used)] // All of it is tests and their helpers.

mod again;
mod bad_disk;
mod cache;
mod changed;
mod completions;
mod compressed;
mod content;
mod convert;
mod cow;
mod encrypted;
mod evidence;
mod explain;
mod export;
mod faults;
mod guest;
mod holes;
#[path = "../../benches/common/image.rs"]
#[allow(dead_code)] // The benches use the rest.
mod image;
mod info;
mod lacking;
mod locks;
mod long_chain;
mod lvm;
mod many;
mod mount;
mod mount_overlay;
mod names;
mod odd;
mod overlay;
mod partitions;
mod progress;
mod readonly;
mod refused;
mod sandbox;
#[path = "../common/shell.rs"]
mod shell;
mod soak;
mod verify;
