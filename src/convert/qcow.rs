//! Writing qcow, version 1, as QEMU's block/qcow.c lays it out: header, backing file name, L1
//! table, then L2 tables and clusters as they come.

use std::fs::File;

use super::create::NewImage;
use super::l1::L1Table;
use super::output::OutputFile;
use super::{ImageWriter, Placed, push_place};
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow::{BACKING_NAME_MAX, L1_ENTRIES_MAX, MAGIC, OFLAG_COMPRESSED, QcowHeader};
use crate::units::{GuestOffset, GuestRange, HostOffset, SECTOR_SIZE};

/// log2 of the cluster size, and of an L2 table's entries.
const SHAPE: (u8, u8) = (12, 9);
/// The same where there is a backing file: QEMU's choice, so that it never has to copy from it.
const SHAPE_OVER_BACKING: (u8, u8) = (9, 12);
/// Bytes of an entry.
const ENTRY_SIZE: u64 = 8;

/// Writes a qcow image.
#[derive(Debug)]
pub struct QcowWriter<'f> {
    output: OutputFile<'f>,
    /// Header and backing file name.
    header: Vec<u8>,
    size: u64,
    has_backing: bool,
    cluster_bits: u8,
    l2_entries: u64,
    l1: L1Table<'f>,
    /// The L2 table in memory: its index, where it goes in the file, its entries.
    current: Option<(u64, u64)>,
    l2: Vec<u8>,
    /// First byte of the file that nobody has.
    end: u64,
    /// Everything before this has been spoken of.
    done: u64,
}

impl<'f> QcowWriter<'f> {
    /// Lays out the start of the image, and writes none of it but zeros over an old one.
    ///
    /// # Errors
    /// `Usage`: the format can't have a disk of that size, or a backing file name that long;
    /// `CannotCreate`: the block device is too small; it can't be written.
    pub fn new(new: &NewImage<'f>) -> Result<Self> {
        let size = new.size.get();
        let (cluster_bits, l2_bits) =
            if new.backing.is_some() { SHAPE_OVER_BACKING } else { SHAPE };
        let l1_entries = size.div_ceil(1 << (cluster_bits + l2_bits));
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) || l1_entries > L1_ENTRIES_MAX {
            let limit = L1_ENTRIES_MAX << (cluster_bits + l2_bits);
            return Err(usage(format!(
                "a qcow image can't have a disk of {size} bytes: it takes whole sectors, at least \
                 one and at most {limit} bytes of them"
            )));
        }
        let name = new.backing.map(|backing| backing.name.as_slice());
        let mut header = header(size, cluster_bits, l2_bits, name)?;
        let l1_offset = header.len() as u64;
        let l1_end = l1_offset + l1_entries * ENTRY_SIZE;
        header[40..48].copy_from_slice(&l1_offset.to_be_bytes());
        let output = OutputFile::new(new.file)?;
        output.require_room(l1_end)?;
        output.blank(0, l1_end)?;
        Ok(Self {
            output,
            header,
            size,
            has_backing: new.backing.is_some(),
            cluster_bits,
            l2_entries: 1 << l2_bits,
            l1: L1Table::new(output, l1_offset),
            current: None,
            l2: vec![0; usize::from(8u8) << l2_bits],
            end: l1_end,
            done: 0,
        })
    }

    /// Has the L2 table of a guest cluster in memory, and gives where its entry is in it.
    fn seek(&mut self, guest_cluster: u64) -> Result<usize> {
        let index = guest_cluster / self.l2_entries;
        if self.current.is_none_or(|(current, _)| current != index) {
            self.write_l2_table()?;
            let offset = self.allocate(self.l2.len() as u64)?;
            self.current = Some((index, offset));
            self.l2.fill(0);
            self.l1.set(index, offset)?;
        }
        let at = guest_cluster % self.l2_entries * ENTRY_SIZE;
        Ok(usize::try_from(at).unwrap_or(usize::MAX))
    }

    fn set(&mut self, at: usize, entry: u64) {
        self.l2[at..at + 8].copy_from_slice(&entry.to_be_bytes());
    }

    fn write_l2_table(&mut self) -> Result<()> {
        let Some((_, offset)) = self.current.take() else { return Ok(()) };
        self.output.write(offset, &self.l2, "an L2 table")
    }

    /// Gives out bytes from a cluster's start on.
    fn allocate(&mut self, length: u64) -> Result<u64> {
        let offset = self.end.next_multiple_of(self.cluster_size());
        self.take(offset, length)
    }

    fn take(&mut self, offset: u64, length: u64) -> Result<u64> {
        let end = offset + length;
        self.output.require_room(end)?;
        if end > self.offset_limit() {
            return Err(Error::new(ErrorKind::CannotCreate(format!(
                "the image takes more than {} bytes, which is where its entries can't point to",
                self.offset_limit()
            ))));
        }
        self.end = end;
        Ok(offset)
    }

    /// What a compressed cluster's entry has bits for; another's has as many as files have.
    fn offset_limit(&self) -> u64 {
        1 << (63 - self.cluster_bits)
    }

    /// Calls come in guest order.
    fn advance(&mut self, start: u64, end: u64) -> Result<()> {
        if start < self.done || end > self.size || !start.is_multiple_of(self.cluster_size()) {
            let message = format!("{start:#x} to {end:#x} of the disk can't be written now");
            return Err(Error::new(ErrorKind::Io(message)));
        }
        self.done = end;
        Ok(())
    }
}

impl ImageWriter for QcowWriter<'_> {
    fn granularity(&self) -> u64 {
        self.cluster_size()
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn has_zeros(&self) -> bool {
        !self.has_backing
    }

    fn data(&mut self, range: GuestRange, placed: &mut Vec<Placed>) -> Result<()> {
        let (mut at, end) = (range.start.get(), range.end.get());
        self.advance(at, end)?;
        while at < end {
            let entry = self.seek(at >> self.cluster_bits)?;
            let host = self.allocate(self.cluster_size())?;
            self.set(entry, host);
            let part_end = end.min(at + self.cluster_size());
            push_place(placed, at, part_end, host);
            at = part_end;
        }
        Ok(())
    }

    fn zeros(&mut self, _: GuestRange) -> Result<()> {
        if self.has_backing {
            return Err(usage("qcow has no zero clusters: zeros over a backing file are data"));
        }
        Ok(())
    }

    fn compressed(&mut self, cluster: GuestOffset, stream_length: usize) -> Result<HostOffset> {
        let (start, length) = (cluster.get(), stream_length as u64);
        if length == 0 || length >= self.cluster_size() {
            let message = format!("{length} bytes are no stream for the cluster at {start:#x}");
            return Err(Error::new(ErrorKind::Io(message)));
        }
        self.advance(start, start.saturating_add(self.cluster_size()).min(self.size))?;
        let entry = self.seek(start >> self.cluster_bits)?;
        let host = self.take(self.end, length)?;
        self.set(entry, OFLAG_COMPRESSED | length << (63 - self.cluster_bits) | host);
        Ok(HostOffset::new(host))
    }

    fn data_file(&self) -> &File {
        self.output.file()
    }

    fn finish(&mut self) -> Result<()> {
        self.write_l2_table()?;
        self.l1.flush()?;
        // To a sector's end: QEMU reads files by sectors where it can't do otherwise.
        self.output.set_length(self.end.next_multiple_of(SECTOR_SIZE))?;
        self.output.settle()?;
        self.output.write(0, &self.header, "the header")
    }
}

fn usage(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage(message.into()))
}

/// The header, up to where the L1 table is, whose offset it lacks.
fn header(size: u64, cluster_bits: u8, l2_bits: u8, backing: Option<&[u8]>) -> Result<Vec<u8>> {
    let mut bytes = Vec::from(MAGIC);
    bytes.extend(1u32.to_be_bytes());
    let name = backing.unwrap_or_default();
    let length = u32::try_from(name.len()).ok().filter(|&length| length <= BACKING_NAME_MAX);
    let Some(length) = length else {
        return Err(usage(format!(
            "the name of the backing file has {} bytes, and at most {BACKING_NAME_MAX} fit: give a \
             shorter or a relative one",
            name.len()
        )));
    };
    let name_offset = if backing.is_some() { QcowHeader::LENGTH as u64 } else { 0 };
    bytes.extend(name_offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend([0; 4]); // The backing file's time, which QEMU leaves 0 as well.
    bytes.extend(size.to_be_bytes());
    bytes.extend([cluster_bits, l2_bits, 0, 0]);
    bytes.extend([0; 4]); // Not encrypted.
    bytes.resize(QcowHeader::LENGTH, 0);
    bytes.extend(name);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    Ok(bytes)
}
