//! The oracle tier: imgdm beside qemu-img, on images that QEMU's own tools made.
//!
//! `map` has to print the same bytes as `qemu-img map`; the table that imgdm plans,
//! read over the image files as device-mapper would read it, has to be the disk that
//! `qemu-img convert` writes. The images are drawn from a seed: `IMGDM_SEED` sets it,
//! `IMGDM_CASES` how many of each kind, `IMGDM_CASE` picks a single one. A case that
//! fails prints how its image was made, and keeps it.

// Helpers outside of #[test] functions fail a test by panicking too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;

mod bitmap;
mod check;
mod consistency;
mod convert;
mod crypt;
mod damaged;
mod deep;
mod device;
mod diff;
mod explain;
mod far;
mod hash;
mod imgdm;
mod inflate;
mod info;
mod listed;
mod luks;
mod lvm;
mod map;
mod metadata;
mod mutated;
mod names;
mod odd;
mod one_field;
mod partitions;
mod random;
mod read;
mod selftest;
mod show;
mod signatures;
mod snapshots;
mod table;
mod throwaway;
mod units;
mod unopenable;
mod viscera;
mod writers;
