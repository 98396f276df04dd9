//! Guest ranges to status runs, through the L1 and L2 tables.

use super::Qcow2Image;
use super::entry::{L2Entry, L2Format, Subcluster, SubclusterBitmap, l2_table_offset};
use super::header::{Qcow2Header, SUBCLUSTERS_PER_CLUSTER};
use crate::error::{Error, Result};
use crate::format::{Scratch, be64, table_bytes};
use crate::status::{BlockStatus, FileRole, HostPlace, StatusRun, ZeroStatus};
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};

/// L1 entries that are read at a time.
const L1_CHUNK: u64 = 4096;

/// The runs of `range`, as [`ImageFormat::status`](crate::format::ImageFormat::status).
pub(super) fn status(
    image: &Qcow2Image,
    range: GuestRange,
    scratch: &mut Scratch,
    runs: &mut Vec<StatusRun>,
) -> Result<()> {
    let coverage = image.header.l2_coverage();
    let l1_entries = image.l1_table.length.get() / 8;
    let mut out = Runs { runs, range };
    let mut at = range.start;
    while at < range.end {
        let first = at.get() / coverage;
        // A snapshot's L1 table may be shorter than its disk: nothing is allocated there.
        if first >= l1_entries {
            out.push(at, range.end, BlockStatus::Unallocated(None));
            return Ok(());
        }
        let last = (range.end.get().div_ceil(coverage)).min(l1_entries).min(first + L1_CHUNK);
        let chunk = read_l1(image, first, last, scratch)?;
        for (index, entry) in (first..last).zip(chunk) {
            let start = GuestOffset::new(index * coverage);
            let end = start.saturating_add(ByteLen::new(coverage));
            let part = GuestRange::new(start, end).intersection(range);
            match l2_table_offset(entry) {
                None => out.push(part.start, part.end, BlockStatus::Unallocated(None)),
                Some(table) => {
                    check_l2_offset(image, index, table)?;
                    l2_status(image, table, start, part, scratch, &mut out)?;
                }
            }
            at = part.end;
        }
    }
    Ok(())
}

fn read_l1(
    image: &Qcow2Image,
    first: u64,
    last: u64,
    scratch: &mut Scratch,
) -> Result<impl Iterator<Item = u64> + use<>> {
    let offset = image.l1_table.offset.saturating_add(ByteLen::new(first * 8));
    let count = usize::try_from(last - first).unwrap_or(0);
    let bytes = table_bytes(&image.source, offset, count * 8, "the L1 table", scratch)?;
    let entries: Vec<u64> = (0..count).map(|i| be64(bytes, i)).collect();
    Ok(entries.into_iter())
}

fn check_l2_offset(image: &Qcow2Image, l1_index: u64, table: HostOffset) -> Result<()> {
    let cluster_size = image.header.cluster_size();
    let at = image.l1_table.offset.get() + l1_index * 8;
    let invalid = |what: String| {
        Err(Error::invalid(format!("the L2 table at {table} (L1 entry {l1_index}) {what}"))
            .at_offset(at))
    };
    if !table.is_multiple_of(cluster_size) {
        return invalid("does not start on a cluster boundary".to_owned());
    }
    for (other, name) in
        [(image.l1_table, "L1 table"), (image.header.refcount_table, "refcount table")]
    {
        if other.overlaps(table, cluster_size) {
            return invalid(format!("overlaps the {name}"));
        }
    }
    let end = table.saturating_add(ByteLen::new(cluster_size));
    if end.get() > image.source.length().get() {
        return invalid(format!(
            "lies outside the file, which is {} bytes long: the image is truncated or corrupt",
            image.source.length().get()
        ));
    }
    Ok(())
}

/// The runs of `part`, which one L2 table describes; `start` is where the table's
/// coverage starts.
fn l2_status(
    image: &Qcow2Image,
    table: HostOffset,
    start: GuestOffset,
    part: GuestRange,
    scratch: &mut Scratch,
    out: &mut Runs,
) -> Result<()> {
    let header = &image.header;
    let cluster_size = header.cluster_size();
    let entry_size = header.l2_entry_size();
    let first = part.start.since(start).get() / cluster_size;
    let last = part.end.since(start).get().div_ceil(cluster_size);
    let count = usize::try_from(last - first).unwrap_or(0);
    let table_at = table.saturating_add(ByteLen::new(first * entry_size));
    let length = count * usize::try_from(entry_size).unwrap_or(0);
    let bytes = table_bytes(&image.source, table_at, length, "the L2 table", scratch)?;
    let slice = L2Slice {
        header,
        format: L2Format::of(header),
        bytes,
        count,
        table_at,
        guest: start.saturating_add(ByteLen::new(first * cluster_size)),
        data_role: if header.has_data_file() { FileRole::DataFile } else { FileRole::Image },
    };
    if header.has_extended_l2() { slice.extended(out) } else { slice.standard(out) }
}

/// Consecutive entries of one L2 table.
struct L2Slice<'a> {
    header: &'a Qcow2Header,
    format: L2Format,
    bytes: &'a [u8],
    count: usize,
    /// File offset of the first entry.
    table_at: HostOffset,
    /// Guest offset of the first entry's cluster.
    guest: GuestOffset,
    data_role: FileRole,
}

impl L2Slice<'_> {
    #[inline]
    fn guest_at(&self, index: usize) -> GuestOffset {
        self.guest.saturating_add(ByteLen::new((index as u64) << self.header.cluster_bits))
    }

    fn standard(&self, out: &mut Runs) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        let entries = &self.bytes.as_chunks::<8>().0[..self.count];
        let mut index = 0;
        while let Some(&entry) = entries.get(index) {
            let entry = u64::from_be_bytes(entry);
            let first = index;
            index += 1;
            let mut distance = cluster_size;
            while let Some(&next) = entries.get(index)
                && self.format.continues(entry, distance, u64::from_be_bytes(next))
            {
                distance += cluster_size;
                index += 1;
            }
            let status = match self.format.decode(entry) {
                L2Entry::Standard(host) => {
                    self.check_place(host, first)?;
                    self.data(HostPlace { file: self.data_role, offset: host })
                }
                L2Entry::Unallocated => BlockStatus::Unallocated(None),
                L2Entry::ZeroPlain => {
                    self.check_zero_allowed(first)?;
                    BlockStatus::Zero(ZeroStatus::Plain)
                }
                L2Entry::ZeroAllocated(host) => {
                    self.check_zero_allowed(first)?;
                    BlockStatus::Zero(self.zero(Some(self.place(host, first)?)))
                }
                L2Entry::Compressed { host, stream_length } => {
                    self.compressed(host, stream_length, first)?
                }
            };
            out.push(self.guest_at(first), self.guest_at(index), status);
        }
        Ok(())
    }

    fn extended(&self, out: &mut Runs) -> Result<()> {
        let subcluster_size = self.header.subcluster_size();
        for index in 0..self.count {
            let host = match self.format.decode(be64(self.bytes, index * 2)) {
                L2Entry::Compressed { host, stream_length } => {
                    let status = self.compressed(host, stream_length, index)?;
                    out.push(self.guest_at(index), self.guest_at(index + 1), status);
                    continue;
                }
                L2Entry::Standard(host) => Some(self.place(host, index)?),
                // decode() gives zero clusters only without extended entries.
                L2Entry::Unallocated | L2Entry::ZeroPlain | L2Entry::ZeroAllocated(_) => None,
            };
            let bits = be64(self.bytes, index * 2 + 1);
            let bitmap = SubclusterBitmap::new(bits, host.is_some()).ok_or_else(|| {
                self.invalid(index, format!("has the contradicting subcluster bitmap {bits:#x}"))
            })?;
            let mut subcluster = 0;
            while subcluster < SUBCLUSTERS_PER_CLUSTER {
                let count = bitmap.run_length(subcluster);
                let skipped = ByteLen::new(subcluster * subcluster_size);
                let start = self.guest_at(index).saturating_add(skipped);
                let end = start.saturating_add(ByteLen::new(count * subcluster_size));
                let place = host.map(|place| place.advanced(skipped));
                let status = match (bitmap.get(subcluster), place) {
                    (Subcluster::Unallocated, place) => {
                        BlockStatus::Unallocated(place.filter(|_| self.header.encryption.is_none()))
                    }
                    (Subcluster::Zero, place) => BlockStatus::Zero(self.zero(place)),
                    (Subcluster::Allocated, Some(place)) => self.data(place),
                    (Subcluster::Allocated, None) => {
                        return Err(self.invalid(index, "has no host cluster".to_owned()));
                    }
                };
                out.push_joined(start, end, status);
                subcluster += count;
            }
        }
        Ok(())
    }

    /// The place of the host cluster of entry `index`, checked.
    fn place(&self, host: HostOffset, index: usize) -> Result<HostPlace> {
        self.check_place(host, index)?;
        Ok(HostPlace { file: self.data_role, offset: host })
    }

    /// Checks the host cluster of entry `index`. Those that follow in its run have been
    /// found by equal steps on both sides.
    #[inline]
    fn check_place(&self, host: HostOffset, index: usize) -> Result<()> {
        let in_cluster = host.get() & (self.header.cluster_size() - 1);
        let moved =
            self.data_role == FileRole::DataFile && host.get() != self.guest_at(index).get();
        if in_cluster != 0 || moved { Err(self.bad_place(host, index)) } else { Ok(()) }
    }

    #[cold]
    fn bad_place(&self, host: HostOffset, index: usize) -> Error {
        if !host.is_multiple_of(self.header.cluster_size()) {
            return self.invalid(
                index,
                format!("has the host offset {host}, which is no multiple of the cluster size"),
            );
        }
        self.invalid(
            index,
            format!(
                "has the host offset {host} in the external data file, where only {} can be",
                self.guest_at(index)
            ),
        )
    }

    #[inline]
    fn data(&self, place: HostPlace) -> BlockStatus {
        match self.header.encryption {
            None => BlockStatus::Data(place),
            Some(cipher) => BlockStatus::Encrypted { place, cipher },
        }
    }

    /// A zero cluster; QEMU tells no offset of anything in an encrypted image.
    fn zero(&self, place: Option<HostPlace>) -> ZeroStatus {
        match place {
            Some(place) if self.header.encryption.is_none() => ZeroStatus::Allocated(place),
            _ => ZeroStatus::Plain,
        }
    }

    fn compressed(
        &self,
        host: HostOffset,
        stream_length: ByteLen,
        index: usize,
    ) -> Result<BlockStatus> {
        if self.data_role == FileRole::DataFile {
            return Err(self.invalid(
                index,
                "is a compressed cluster, which an image with an external data file can't have"
                    .to_owned(),
            ));
        }
        Ok(BlockStatus::Compressed { host, stream_length, cluster: self.guest_at(index) })
    }

    fn check_zero_allowed(&self, index: usize) -> Result<()> {
        if self.header.version >= 3 {
            return Ok(());
        }
        Err(self.invalid(index, "is a zero cluster, which version 2 does not have".to_owned()))
    }

    fn invalid(&self, index: usize, what: String) -> Error {
        let at = self.table_at.get() + index as u64 * self.header.l2_entry_size();
        Error::invalid(format!("the L2 entry of guest offset {} {what}", self.guest_at(index)))
            .at_offset(at)
    }
}

/// Collects runs, cut to the asked range.
struct Runs<'a> {
    runs: &'a mut Vec<StatusRun>,
    range: GuestRange,
}

impl Runs<'_> {
    #[inline]
    fn push(&mut self, start: GuestOffset, end: GuestOffset, status: BlockStatus) {
        if start >= self.range.start && end <= self.range.end {
            self.runs.push(StatusRun { start, length: end.since(start), status });
            return;
        }
        let run = StatusRun { start, length: end.since(start), status };
        self.runs.extend(run.clipped(self.range));
    }

    /// As `push`, joined to the run before where it carries that on: subclusters would
    /// otherwise end every run at the end of its cluster.
    fn push_joined(&mut self, start: GuestOffset, end: GuestOffset, status: BlockStatus) {
        if let Some(last) = self.runs.last_mut()
            && last.end() == start
            && !matches!(status, BlockStatus::Compressed { .. })
            && last.status.advanced(last.length) == status
            && end <= self.range.end
        {
            last.length = end.since(last.start);
            return;
        }
        self.push(start, end, status);
    }
}
