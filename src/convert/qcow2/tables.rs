//! The one L2 table that is being filled.

use crate::convert::options::Qcow2Options;
use crate::format::qcow2::entry::{COMPRESSED, COPIED, ZERO};

/// What subclusters of a cluster are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Subclusters {
    Data,
    Zeros,
}

/// How an L2 table's entries are made.
#[derive(Clone, Copy, Debug)]
pub(super) struct L2Entries {
    cluster_bits: u32,
    extended: bool,
}

impl L2Entries {
    pub(super) fn of(options: &Qcow2Options) -> Self {
        Self { cluster_bits: options.cluster_bits, extended: options.extended_l2 }
    }

    /// Clusters that one table maps.
    pub(super) fn per_table(self) -> u64 {
        (1 << self.cluster_bits) / self.length() as u64
    }

    fn length(self) -> usize {
        if self.extended { 16 } else { 8 }
    }
}

/// An L2 table in memory. Entries are asked for by their index.
#[derive(Debug)]
pub(super) struct L2Table {
    format: L2Entries,
    bytes: Vec<u8>,
}

impl L2Table {
    pub(super) fn new(format: L2Entries) -> Self {
        Self { format, bytes: vec![0; 1 << format.cluster_bits] }
    }

    pub(super) fn clear(&mut self) {
        self.bytes.fill(0);
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The host cluster that a cluster has, in bytes.
    pub(super) fn host(&self, index: u64) -> Option<u64> {
        let entry = self.entry(index);
        (entry & COPIED != 0).then_some(entry & !COPIED)
    }

    /// A cluster of data, or with subclusters one that has a place.
    pub(super) fn set_host(&mut self, index: u64, host: u64) {
        self.put(index, 0, host | COPIED);
    }

    /// As [`set_host`](Self::set_host), for a cluster that may have that place by now.
    pub(super) fn set_host_if_none(&mut self, index: u64, host: u64) {
        if self.host(index).is_none() {
            self.put(index, 0, host | COPIED);
        }
    }

    /// A cluster of zeros without a place.
    pub(super) fn set_zero(&mut self, index: u64) {
        self.put(index, 0, ZERO);
    }

    /// A compressed cluster, of which the stream lies in `sectors` sectors of the file.
    pub(super) fn set_compressed(&mut self, index: u64, host: u64, sectors: u64) {
        let shift = compressed_offset_bits(self.format.cluster_bits);
        self.put(index, 0, COMPRESSED | (sectors - 1) << shift | host);
    }

    /// Says what the subclusters from `first` up to `end` of an extended entry are.
    pub(super) fn mark(&mut self, index: u64, first: u64, end: u64, what: Subclusters) {
        if !self.format.extended {
            return;
        }
        let bits = (1u64 << end) - (1 << first);
        let bitmap = self.get(index, 8);
        let (set, cleared) = match what {
            Subclusters::Data => (bits, bits << 32),
            Subclusters::Zeros => (bits << 32, bits),
        };
        self.put(index, 8, bitmap & !cleared | set);
    }

    fn entry(&self, index: u64) -> u64 {
        self.get(index, 0)
    }

    fn at(&self, index: u64, within: usize) -> usize {
        usize::try_from(index).unwrap_or(usize::MAX) * self.format.length() + within
    }

    fn get(&self, index: u64, within: usize) -> u64 {
        let at = self.at(index, within);
        crate::format::be64(&self.bytes[at..], 0)
    }

    fn put(&mut self, index: u64, within: usize, word: u64) {
        let at = self.at(index, within);
        self.bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
    }
}

/// Bits that a compressed cluster's entry has for the offset of its stream.
pub(super) fn compressed_offset_bits(cluster_bits: u32) -> u32 {
    62 - (cluster_bits - 8)
}
