//! What is fuzzed: functions that take any bytes and must come to an end, without a panic,
//! in bounded memory and time, and give what their callers rely on.
//!
//! The fuzz targets beside this folder hand them libFuzzer's inputs; `tests/fuzzed.rs` of
//! imgdm runs them over `fuzz/corpus` with any toolchain. Only imgdm's public interface is
//! used, so that what is tested is what the program does.

// An expectation that does not hold is what is looked for.
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod disks;
pub mod images;
pub mod stores;
pub mod texts;

/// A fuzz target.
pub struct Entry {
    /// Its name, which is that of its file in `fuzz_targets`.
    pub name: &'static str,
    /// What is called with the input.
    pub function: fn(&[u8]),
    /// The folders of `fuzz/corpus` with inputs of its kind.
    pub corpora: &'static [&'static str],
}

/// All of them.
pub const ENTRIES: [Entry; 16] = [
    entry("chain", images::chain, &["chain"]),
    entry("check", images::check, &["check", "qcow2", "qcow", "cow"]),
    entry("cow", images::cow, &["cow"]),
    entry("inflate", stores::inflate, &["inflate"]),
    entry("luks", stores::luks, &["luks"]),
    entry("lvm", disks::lvm, &["lvm"]),
    entry("metadata", images::metadata, &["metadata", "qcow2", "qcow", "cow"]),
    entry("names", texts::names, &["names"]),
    entry("overlay", stores::overlay, &["overlay"]),
    entry("partitions", disks::partitions, &["partitions"]),
    entry("qcow", images::qcow, &["qcow"]),
    entry("qcow2", images::qcow2, &["qcow2"]),
    entry("qcow2_tables", images::qcow2_tables, &["qcow2_tables", "qcow2"]),
    entry("signatures", disks::signatures, &["signatures"]),
    entry("table", texts::table, &["table"]),
    entry("text", texts::text, &["text"]),
];

const fn entry(name: &'static str, function: fn(&[u8]), corpora: &'static [&'static str]) -> Entry {
    Entry { name, function, corpora }
}
