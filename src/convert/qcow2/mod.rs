//! Writing qcow2, versions 2 and 3.
//!
//! Header, first refcount block and L1 table come first, then L2 tables and clusters as they are
//! spoken of, and refcount blocks where the clusters that they count begin. The refcount table
//! comes last, and then the header, before which the file is no image.

mod clusters;
mod header;
mod tables;

use std::fs::File;

use super::create::NewImage;
use super::l1::L1Table;
use super::options::{CompatibilityLevel, Preallocation, Qcow2Options};
use super::output::OutputFile;
use super::{ImageWriter, Placed, push_place};
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::entry::COPIED;
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset, SECTOR_SIZE};
use clusters::Clusters;
use header::HeaderCluster;
use tables::{L2Entries, L2Table, Subclusters, compressed_offset_bits};

/// Offsets in L1 and L2 entries have 56 bits.
const MAX_HOST_OFFSET: u64 = 1 << 56;

/// Writes a qcow2 image.
#[derive(Debug)]
pub struct Qcow2Writer<'f> {
    image: OutputFile<'f>,
    /// Where the bytes go, where that is not `image`.
    external: Option<OutputFile<'f>>,
    header: Option<HeaderCluster>,
    options: Qcow2Options,
    size: u64,
    has_backing: bool,
    clusters: Clusters<'f>,
    l1: L1Table<'f>,
    l2: L2Table,
    /// The L2 table that is in memory: its index, and where it goes in the file.
    current: Option<(u64, u64)>,
    per_table: u64,
    /// The host cluster that the last compressed stream ends in, and the bytes of it that are
    /// used.
    open_cluster: Option<(u64, u64)>,
    /// Everything before this has been spoken of, or passed over.
    done: u64,
}

impl<'f> Qcow2Writer<'f> {
    /// Lays out the start of the image, and writes none of it but zeros over an old one.
    ///
    /// # Errors
    /// `Usage`: the disk is too large for the cluster size, a name too long, or the options go
    /// with no backing file; `CannotCreate`: the block device is too small; it can't be written.
    pub fn new(new: &NewImage<'f>, options: &Qcow2Options) -> Result<Self> {
        options.check(false, new.backing.is_some())?;
        require_possible_size(new.size, options)?;
        let image = OutputFile::new(new.file)?;
        let external = match (&options.data_file, new.data_file) {
            (Some(_), Some(data)) => Some(OutputFile::new(data.file)?.named(data.name)),
            (None, None) => None,
            _ => {
                let message = "a data file is wanted exactly where the options name one";
                return Err(Error::new(ErrorKind::Usage(message.to_owned())));
            }
        };
        let format = L2Entries::of(options);
        let mut clusters = Clusters::new(image, options.cluster_bits, options.refcount_order)?;
        let l1_entries = new.size.get().div_ceil(format.per_table() << options.cluster_bits);
        let l1_clusters = (l1_entries * 8).div_ceil(options.cluster_size());
        let l1_offset = match l1_clusters {
            0 => 0,
            wanted => clusters.allocate_contiguous(wanted)? << options.cluster_bits,
        };
        let l1_count = u32::try_from(l1_entries).unwrap_or(u32::MAX);
        let header = HeaderCluster::new(options, new.size, new.backing, (l1_offset, l1_count))?;
        image.blank(0, options.cluster_size())?;
        image.blank(l1_offset, l1_clusters << options.cluster_bits)?;
        if let Some(external) = external {
            external.require_room(new.size.get())?;
            external.set_length(new.size.get())?;
        }
        Ok(Self {
            image,
            external,
            header: Some(header),
            size: new.size.get(),
            has_backing: new.backing.is_some(),
            clusters,
            l1: L1Table::new(image, l1_offset),
            l2: L2Table::new(format),
            current: None,
            per_table: format.per_table(),
            open_cluster: None,
            done: 0,
            options: options.clone(),
        })
    }

    fn cluster_bits(&self) -> u32 {
        self.options.cluster_bits
    }

    fn is_preallocated(&self) -> bool {
        self.options.preallocation != Preallocation::Off
    }

    /// Has the L2 table of a guest cluster in memory, and gives the cluster's index in it.
    fn seek(&mut self, guest_cluster: u64) -> Result<u64> {
        let index = guest_cluster / self.per_table;
        if self.current.is_none_or(|(current, _)| current != index) {
            self.write_l2_table()?;
            let (table, _) = self.clusters.allocate(1)?;
            let offset = self.host_offset(table)?;
            self.current = Some((index, offset));
            self.l2.clear();
            self.l1.set(index, offset | COPIED)?;
            if self.is_preallocated() {
                self.preallocate_table(index)?;
            }
        }
        Ok(guest_cluster % self.per_table)
    }

    /// Gives all clusters of the table a place.
    fn preallocate_table(&mut self, index: u64) -> Result<()> {
        let first = index * self.per_table;
        let end = self.size.div_ceil(self.options.cluster_size()).min(first + self.per_table);
        let mut guest = first;
        while guest < end {
            let (host, count) = self.place(guest, end - guest)?;
            for i in 0..count {
                self.l2.set_host(guest - first + i, host + (i << self.cluster_bits()));
            }
            guest += count;
        }
        Ok(())
    }

    /// Where up to `wanted` clusters from a guest cluster on go: the offset, and how many.
    fn place(&mut self, guest_cluster: u64, wanted: u64) -> Result<(u64, u64)> {
        if self.external.is_some() {
            return Ok((guest_cluster << self.cluster_bits(), wanted));
        }
        let (first, count) = self.clusters.allocate(wanted)?;
        Ok((self.host_offset(first)?, count))
    }

    fn host_offset(&self, cluster: u64) -> Result<u64> {
        let offset = cluster << self.cluster_bits();
        if offset >= MAX_HOST_OFFSET {
            return Err(too_large(MAX_HOST_OFFSET));
        }
        Ok(offset)
    }

    fn write_l2_table(&mut self) -> Result<()> {
        let Some((_, offset)) = self.current.take() else { return Ok(()) };
        self.image.write(offset, self.l2.bytes(), "an L2 table")
    }

    /// Calls come in guest order; what lies between them is passed over.
    fn advance(&mut self, range: GuestRange) -> Result<()> {
        let (start, end) = (range.start.get(), range.end.get());
        if start < self.done || end > self.size || !start.is_multiple_of(self.granularity()) {
            let message = format!("{start:#x} to {end:#x} of the disk can't be written now");
            return Err(Error::new(ErrorKind::Io(message)));
        }
        self.settle(start)?;
        self.done = end;
        Ok(())
    }

    /// Where each cluster has a place, also those from `done` up to `end` get theirs.
    fn settle(&mut self, end: u64) -> Result<()> {
        while self.is_preallocated() && self.done < end {
            let first = self.done >> self.cluster_bits();
            let index = self.seek(first)?;
            let table_end = (first - index + self.per_table) << self.cluster_bits();
            let part_end = end.min(table_end);
            self.fill(self.done, part_end)?;
            self.done = part_end;
        }
        Ok(())
    }

    /// Fills the places of a range without data, which the current table maps.
    fn fill(&self, start: u64, end: u64) -> Result<()> {
        let output = self.external.unwrap_or(self.image);
        let fill = |(offset, length): (u64, u64)| match self.options.preallocation {
            _ if length == 0 => Ok(()),
            Preallocation::Full => output.write_zeros(offset, length),
            // There are no holes in a block device, to read as zeros.
            _ if output.is_block_device() => output.zero(offset, length),
            Preallocation::Falloc => output.reserve(offset, length),
            Preallocation::Off | Preallocation::Metadata => Ok(()),
        };
        let mut run = (0, 0);
        let mut at = start;
        while at < end {
            let next = end.min((at | (self.options.cluster_size() - 1)) + 1);
            let index = (at >> self.cluster_bits()) % self.per_table;
            if let Some(host) = self.l2.host(index) {
                let host = host + at % self.options.cluster_size();
                if run.0 + run.1 != host {
                    fill(run)?;
                    run = (host, 0);
                }
                run.1 += next - at;
            }
            at = next;
        }
        fill(run)
    }

    /// Says what part of a cluster is, where it has subclusters.
    fn mark(&mut self, index: u64, start: u64, end: u64, what: Subclusters) {
        let in_cluster = self.options.cluster_size() - 1;
        let granularity = self.granularity();
        let first = (start & in_cluster) / granularity;
        let end = ((end - 1) & in_cluster) / granularity + 1;
        self.l2.mark(index, first, end, what);
    }

    /// The end of the part of a range that lies in one cluster.
    fn part_end(&self, at: u64, end: u64) -> u64 {
        end.min((at | (self.options.cluster_size() - 1)) + 1)
    }

    /// Where a stream goes: behind the last one, in the rest of its cluster and the next, where
    /// that follows it; else at the start of a cluster.
    fn place_stream(&mut self, length: u64) -> Result<u64> {
        let cluster_size = self.options.cluster_size();
        let open = self.open_cluster.take().filter(|&(cluster, _)| {
            // The refcounts of a full range are in the file by now.
            self.clusters.is_countable(cluster) && !self.clusters.is_full(cluster)
        });
        if let Some((cluster, used)) = open {
            let offset = self.host_offset(cluster)? + used;
            if used + length <= cluster_size {
                self.clusters.count_again(cluster);
                self.keep_open(cluster, used + length);
                return Ok(offset);
            }
            if self.clusters.next() == cluster + 1 && self.clusters.is_countable(cluster + 1) {
                self.clusters.count_again(cluster);
                let (next, _) = self.clusters.allocate(1)?;
                self.keep_open(next, used + length - cluster_size);
                return Ok(offset);
            }
        }
        let (cluster, _) = self.clusters.allocate(1)?;
        self.keep_open(cluster, length);
        self.host_offset(cluster)
    }

    fn keep_open(&mut self, cluster: u64, used: u64) {
        self.open_cluster = (used < self.options.cluster_size()).then_some((cluster, used));
    }
}

impl ImageWriter for Qcow2Writer<'_> {
    fn granularity(&self) -> u64 {
        self.options.granularity()
    }

    fn cluster_size(&self) -> u64 {
        self.options.cluster_size()
    }

    fn has_zeros(&self) -> bool {
        !self.has_backing || self.options.compat == CompatibilityLevel::V3
    }

    fn data(&mut self, range: GuestRange, placed: &mut Vec<Placed>) -> Result<()> {
        self.advance(range)?;
        let (mut at, end) = (range.start.get(), range.end.get());
        let bits = self.cluster_bits();
        while at < end {
            let guest = at >> bits;
            let index = self.seek(guest)?;
            let (host, count) = match self.l2.host(index) {
                Some(host) => (host, 1),
                None => {
                    let clusters = end.div_ceil(self.cluster_size()) - guest;
                    self.place(guest, clusters.min(self.per_table - index))?
                }
            };
            let start = at;
            for i in 0..count {
                let part_end = self.part_end(at, end);
                self.l2.set_host_if_none(index + i, host + (i << bits));
                self.mark(index + i, at, part_end, Subclusters::Data);
                at = part_end;
            }
            push_place(placed, start, at, host + start % self.cluster_size());
        }
        Ok(())
    }

    fn zeros(&mut self, range: GuestRange) -> Result<()> {
        if !self.has_backing {
            // What nobody speaks of reads as zeros.
            return Ok(());
        }
        if !self.has_zeros() {
            let message = "qcow2 v2 has no zero clusters: take compat=v3";
            return Err(Error::new(ErrorKind::Usage(message.to_owned())));
        }
        self.advance(range)?;
        let (mut at, end) = (range.start.get(), range.end.get());
        while at < end {
            let index = self.seek(at >> self.cluster_bits())?;
            let part_end = self.part_end(at, end);
            if self.options.extended_l2 {
                self.mark(index, at, part_end, Subclusters::Zeros);
                if self.is_preallocated() {
                    self.fill(at, part_end)?;
                }
            } else {
                self.l2.set_zero(index);
            }
            at = part_end;
        }
        Ok(())
    }

    fn compressed(&mut self, cluster: GuestOffset, stream_length: usize) -> Result<HostOffset> {
        self.options.check(true, self.has_backing)?;
        let length = stream_length as u64;
        let start = cluster.get();
        if length == 0
            || length >= self.cluster_size()
            || !start.is_multiple_of(self.cluster_size())
        {
            let message = format!("{length} bytes are no stream for the cluster at {start:#x}");
            return Err(Error::new(ErrorKind::Io(message)));
        }
        let end = start.saturating_add(self.cluster_size()).min(self.size);
        self.advance(GuestRange::new(cluster, GuestOffset::new(end)))?;
        let index = self.seek(start >> self.cluster_bits())?;
        let host = self.place_stream(length)?;
        let limit = 1 << compressed_offset_bits(self.cluster_bits());
        if host >= limit {
            return Err(too_large(limit));
        }
        let sectors = (host + length - 1) / SECTOR_SIZE - host / SECTOR_SIZE + 1;
        self.l2.set_compressed(index, host, sectors);
        Ok(HostOffset::new(host))
    }

    fn data_file(&self) -> &File {
        self.external.unwrap_or(self.image).file()
    }

    fn pass_over(&mut self, end: GuestOffset) -> Result<()> {
        self.settle(end.get().min(self.size))
    }

    fn finish(&mut self) -> Result<()> {
        self.settle(self.size)?;
        self.write_l2_table()?;
        self.l1.flush()?;
        let refcounts = self.clusters.finish()?;
        self.image.set_length(self.clusters.end())?;
        self.image.settle()?;
        let Some(header) = self.header.take() else { return Ok(()) };
        let bytes = header.with_refcount_table(refcounts.offset, refcounts.clusters);
        self.image.write(0, &bytes, "the header")
    }
}

fn too_large(limit: u64) -> Error {
    Error::new(ErrorKind::CannotCreate(format!(
        "the image takes more than {limit} bytes, which is where its entries can't point to"
    )))
}

fn require_possible_size(size: ByteLen, options: &Qcow2Options) -> Result<()> {
    let limit = options.max_virtual_size();
    if size > limit {
        let possible = (options.cluster_bits..=21).find(|&cluster_bits| {
            size <= Qcow2Options { cluster_bits, ..options.clone() }.max_virtual_size()
        });
        let hint = possible.map_or_else(
            || "no cluster size is enough".to_owned(),
            |bits| format!("take cluster_size={} or more", 1u64 << bits),
        );
        return Err(Error::new(ErrorKind::Usage(format!(
            "a disk of {} bytes is too large for clusters of {} bytes, with which it can have {}: \
             {hint}",
            size.get(),
            options.cluster_size(),
            limit.get()
        ))));
    }
    if !size.is_multiple_of(SECTOR_SIZE) {
        let message = format!("a disk of {} bytes is not made of whole sectors", size.get());
        return Err(Error::new(ErrorKind::Usage(message)));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
