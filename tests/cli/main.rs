//! The command line: golden output, and one contract for every command.
#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests: a panic is a failure.

mod check;
mod completions;
mod contract;
mod convert;
mod evidence;
mod explain;
mod export;
mod golden;
mod images;
#[allow(dead_code)]
#[path = "../common/lvm.rs"]
mod lvm;
mod partitions;
mod pipes;
mod reach;
#[cfg(feature = "sandbox")]
mod sandbox;
#[path = "../common/shell.rs"]
mod shell;
mod show;
mod tab;
