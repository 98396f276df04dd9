//! The L1 table of qcow2 and qcow, a window of it at a time.

use super::output::OutputFile;
use crate::error::Result;

/// Bytes of an L1 entry.
const L1_ENTRY: u64 = 8;
/// L1 entries in memory: a window of 64 KiB.
const L1_WINDOW: u64 = 8192;

/// The L1 table, filled from its start on.
#[derive(Debug)]
pub(super) struct L1Table<'f> {
    output: OutputFile<'f>,
    offset: u64,
    window: u64,
    entries: Vec<u8>,
}

impl<'f> L1Table<'f> {
    /// A table at `offset`, where all is zeros.
    pub(super) fn new(output: OutputFile<'f>, offset: u64) -> Self {
        Self { output, offset, window: 0, entries: Vec::new() }
    }

    pub(super) fn set(&mut self, index: u64, entry: u64) -> Result<()> {
        if index / L1_WINDOW != self.window {
            self.flush()?;
            self.window = index / L1_WINDOW;
        }
        let at = usize::try_from(index % L1_WINDOW * L1_ENTRY).unwrap_or(usize::MAX);
        self.entries.resize(at, 0);
        self.entries.extend(entry.to_be_bytes());
        Ok(())
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        if !self.entries.is_empty() {
            let offset = self.offset + self.window * L1_WINDOW * L1_ENTRY;
            self.output.write(offset, &self.entries, "the L1 table")?;
            self.entries.clear();
        }
        Ok(())
    }
}
