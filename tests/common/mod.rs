//! What the test tiers share that make real images with QEMU's own tools.

// Each tier is a program of its own and uses its part of this.
#![allow(dead_code)]

pub(crate) mod chain_work;
pub(crate) mod images;
pub(crate) mod lvm;
pub(crate) mod patch;
pub(crate) mod process;
pub(crate) mod qemu;
pub(crate) mod rng;
