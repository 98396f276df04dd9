//! Guest ranges to status runs, through the L1 and L2 tables.

use super::Qcow2Image;
use super::entry::{L2Entry, L2Format, Subcluster, SubclusterBitmap, l2_table_offset};
use super::header::{Qcow2Header, SUBCLUSTERS_PER_CLUSTER};
use crate::buffer::Buffer;
use crate::damage::{DamageList, spoil};
use crate::error::{Error, Result};
use crate::format::{PlainClusters, Scratch, be64, table_bytes};
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
    let l1_readable = image.l1_damage.as_ref().map_or(l1_entries, |damage| damage.first_entry);
    let end = range.end.get().div_ceil(coverage);
    let mut at = range.start;
    while at < range.end {
        let nothing_until = unallocated_until(image, at).min(range.end);
        if nothing_until > at {
            push_unallocated(runs, GuestRange::new(at, nothing_until));
            at = nothing_until;
            continue;
        }
        let first = at.get() / coverage;
        if let Some(damage) = image.l1_damage.as_ref().filter(|_| first >= l1_readable) {
            let spoiled = covered(image, l1_readable, l1_entries);
            let part = spoiled.intersection(GuestRange::new(at, range.end));
            runs.push(spoiled_run(image, spoiled, part, damage.error(), &mut scratch.damage)?);
            at = part.end;
            continue;
        }
        if let Some(entry) = image.kept_l1.get(first) {
            at = l1_status(image, first, entry, range, scratch, runs)?;
            continue;
        }
        let last = end.min(l1_readable).min(first + L1_CHUNK);
        let chunk = match l1_entries_of(image, first, last, &mut scratch.table) {
            Ok(chunk) => chunk,
            Err(error) => {
                let spoiled = covered(image, first, last);
                let part = spoiled.intersection(GuestRange::new(at, range.end));
                runs.push(spoiled_run(image, spoiled, part, error, &mut scratch.damage)?);
                at = part.end;
                continue;
            }
        };
        for (index, entry) in (first..last).zip(chunk) {
            at = l1_status(image, index, entry, range, scratch, runs)?;
        }
    }
    Ok(())
}

/// The runs of what L1 entry `index` says of `range`; gives back where that ends.
fn l1_status(
    image: &Qcow2Image,
    index: u64,
    entry: u64,
    range: GuestRange,
    scratch: &mut Scratch,
    runs: &mut Vec<StatusRun>,
) -> Result<GuestOffset> {
    let described = covered(image, index, index.saturating_add(1));
    let part = described.intersection(range);
    match l2_table_offset(entry).map(|table| check_l2_table(image, index, table)) {
        None => push_unallocated(runs, part),
        Some(Ok(table)) => l2_status(image, table, described.start, part, scratch, runs)?,
        Some(Err(error)) => {
            runs.push(spoiled_run(image, described, part, error, &mut scratch.damage)?);
        }
    }
    Ok(part.end)
}

/// Appends a run of what no L2 table tells of, joined to such a one before.
fn push_unallocated(runs: &mut Vec<StatusRun>, part: GuestRange) {
    let status = BlockStatus::Unallocated(None);
    match runs.last_mut() {
        Some(last) if last.status == status && last.end() == part.start => {
            last.length = part.end.since(last.start);
        }
        _ => runs.push(StatusRun { start: part.start, length: part.length(), status }),
    }
}

/// As [`ImageFormat::unallocated_until`](crate::format::ImageFormat::unallocated_until).
pub(super) fn unallocated_until(image: &Qcow2Image, from: GuestOffset) -> GuestOffset {
    const NO_END: GuestOffset = GuestOffset::new(u64::MAX);
    let index = from.get() / image.header.l2_coverage();
    // Past its end too: a snapshot's L1 table may be shorter than its disk.
    let l1_entries = image.l1_table.length.get() / 8;
    let damaged = image.l1_damage.as_ref().map(|damage| damage.first_entry.max(index));
    let damaged = damaged.filter(|&entry| entry < l1_entries);
    let named = image.kept_l1.next_named(index).filter(|&entry| entry < l1_entries);
    match [named, damaged].into_iter().flatten().min() {
        Some(entry) => covered(image, entry, entry).start.max(from),
        None => NO_END,
    }
}

/// As [`ImageFormat::tables`](crate::format::ImageFormat::tables).
pub(super) fn tables(
    image: &Qcow2Image,
    range: GuestRange,
    each: &mut dyn FnMut(HostOffset, HostOffset),
) {
    let coverage = image.header.l2_coverage();
    let entry_size = image.header.l2_entry_size();
    let l1_entries = image.l1_table.length.get() / 8;
    let end = range.end.get().div_ceil(coverage).min(l1_entries);
    let mut index = range.start.get() / coverage;
    let mut read = (index, Vec::new());
    while let Some(named) = image.kept_l1.next_named(index).filter(|&named| named < end) {
        index = named + 1;
        let entry = image.kept_l1.get(named).or_else(|| {
            let (first, entries) = &mut read;
            if named - *first >= entries.len() as u64 {
                let last = end.min(named + L1_CHUNK);
                *entries = l1_entries_of(image, named, last, &mut Buffer::default()).ok()?;
                *first = named;
            }
            entries.get(usize::try_from(named - *first).ok()?).copied()
        });
        let Some(table) = entry.and_then(l2_table_offset) else { continue };
        let described = covered(image, named, index);
        let part = described.intersection(range);
        let entry_of = |at: GuestOffset| at.since(described.start).get();
        let first = entry_of(part.start) / image.header.cluster_size();
        let last = entry_of(part.end).div_ceil(image.header.cluster_size());
        let from = table.saturating_add(ByteLen::new(first * entry_size));
        each(from, table.saturating_add(ByteLen::new(last * entry_size)));
    }
}

/// The part of the disk that the L1 entries from `first` up to `last` describe.
fn covered(image: &Qcow2Image, first: u64, last: u64) -> GuestRange {
    let coverage = image.header.l2_coverage();
    let start = |index: u64| GuestOffset::new(index.saturating_mul(coverage));
    GuestRange::new(start(first), start(last))
}

/// The run of `part` of what damage spoils.
#[cold]
fn spoiled_run(
    image: &Qcow2Image,
    spoiled: GuestRange,
    part: GuestRange,
    error: Error,
    damage: &mut Option<DamageList>,
) -> Result<StatusRun> {
    let spoiled = spoiled.intersection(image.disk());
    let status = spoil(damage, spoiled, error.at_path(image.source.path()))?;
    Ok(StatusRun { start: part.start, length: part.length(), status })
}

/// The L1 entries from `first` up to `last`, read for the moment.
fn l1_entries_of(
    image: &Qcow2Image,
    first: u64,
    last: u64,
    table: &mut Buffer,
) -> Result<Vec<u64>> {
    let offset = image.l1_table.offset.saturating_add(ByteLen::new(first * 8));
    let count = usize::try_from(last - first).unwrap_or(0);
    let bytes = table_bytes(&image.source, offset, count * 8, "the L1 table", table)?;
    Ok((0..count).map(|i| be64(bytes, i)).collect())
}

/// Gives back where the L2 table of an L1 entry is, checked.
pub(super) fn check_l2_table(
    image: &Qcow2Image,
    l1_index: u64,
    table: HostOffset,
) -> Result<HostOffset> {
    if let Some(error) = image.repeated_l2.error_of(l1_index, table, image.l1_table) {
        return Err(error);
    }
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
    Ok(table)
}

/// The runs of the clusters of `part`, which one L2 table describes; `start` is where the table's
/// coverage starts.
fn l2_status(
    image: &Qcow2Image,
    table: HostOffset,
    start: GuestOffset,
    part: GuestRange,
    scratch: &mut Scratch,
    runs: &mut Vec<StatusRun>,
) -> Result<()> {
    let header = &image.header;
    let cluster_size = header.cluster_size();
    let entry_size = header.l2_entry_size();
    let first = part.start.since(start).get() / cluster_size;
    let last = part.end.since(start).get().div_ceil(cluster_size);
    let count = usize::try_from(last - first).unwrap_or(0);
    let table_at = table.saturating_add(ByteLen::new(first * entry_size));
    let length = count * usize::try_from(entry_size).unwrap_or(0);
    let Scratch { table: buffer, damage, plain } = scratch;
    let bytes = match table_bytes(&image.source, table_at, length, "the L2 table", buffer) {
        Ok(bytes) => bytes,
        Err(error) => {
            runs.push(spoiled_run(image, part, part, error, damage)?);
            return Ok(());
        }
    };
    let slice = L2Slice {
        image,
        header,
        format: L2Format::of(header),
        bytes,
        count,
        range: part,
        table_at,
        guest: start.saturating_add(ByteLen::new(first * cluster_size)),
        data_role: if header.has_data_file() { FileRole::DataFile } else { FileRole::Image },
    };
    if header.has_extended_l2() {
        slice.extended(runs, damage)
    } else {
        slice.standard(plain, runs, damage)
    }
}

/// What an extended entry says of its cluster.
enum Extended {
    /// The same of all of it.
    Whole(BlockStatus),
    /// Where it lies, and what of each subcluster.
    Subclusters(Option<HostPlace>, SubclusterBitmap),
}

/// Consecutive entries of one L2 table.
struct L2Slice<'a> {
    image: &'a Qcow2Image,
    header: &'a Qcow2Header,
    format: L2Format,
    bytes: &'a [u8],
    count: usize,
    /// What of their clusters is asked for.
    range: GuestRange,
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

    /// Appends the runs of the entries at the start of `entries` (the first of them is
    /// entry `index`) that are plain data clusters of the image file, and says how many
    /// that are. Nearly all entries of nearly all images are: a loop of its own keeps
    /// what it works with in registers.
    #[inline(never)]
    fn plain_data(&self, index: usize, entries: &[[u8; 8]], runs: &mut Vec<StatusRun>) -> usize {
        let format = self.format;
        let host_of = |entry: &[u8; 8]| format.plain_host(u64::from_be_bytes(*entry));
        let Some(mut run_host) = entries.first().and_then(host_of) else { return 0 };
        // All of it lies below 2^64: the disk, and entries of 56 bits.
        let cluster_bits = self.header.cluster_bits & 63;
        let cluster_size = 1u64 << cluster_bits;
        let guest = self.guest_at(index).get();
        let run = |first: usize, end: usize, host| StatusRun {
            start: GuestOffset::new(guest.wrapping_add((first as u64) << cluster_bits)),
            length: ByteLen::new((end.wrapping_sub(first) as u64) << cluster_bits),
            status: BlockStatus::Data(HostPlace::in_image(host)),
        };
        let mut first = 0;
        let mut expected = run_host.get().wrapping_add(cluster_size);
        let mut count = entries.len();
        for (entry, at) in entries[1..].iter().zip(1..) {
            let Some(host) = host_of(entry) else {
                count = at;
                break;
            };
            if host.get() != expected {
                runs.push(run(first, at, run_host));
                (first, run_host) = (at, host);
            }
            expected = host.get().wrapping_add(cluster_size);
        }
        runs.push(run(first, count, run_host));
        count
    }

    /// Whether all entries are plain data clusters of the image file, and so were put where
    /// those go.
    #[inline(never)]
    fn all_plain(&self, entries: &[[u8; 8]], plain: &mut PlainClusters) -> bool {
        let format = self.format;
        plain.push_all(
            self.header.cluster_bits,
            self.range,
            entries,
            #[inline(always)]
            move |entry| (format.host_of_plain(entry), format.against_plain(entry)),
        )
    }

    fn standard(
        &self,
        plain: &mut PlainClusters,
        runs: &mut Vec<StatusRun>,
        damage: &mut Option<DamageList>,
    ) -> Result<()> {
        let entries = &self.bytes.as_chunks::<8>().0[..self.count];
        let before = runs.len();
        let in_the_clear = self.header.encryption.is_none() && self.data_role == FileRole::Image;
        if in_the_clear && plain.is_wanted() && runs.is_empty() && self.all_plain(entries, plain) {
            return Ok(());
        }
        let mut index = 0;
        loop {
            if in_the_clear {
                index += self.plain_data(index, &entries[index..], runs);
            }
            let Some((&entry, rest)) = entries[index..].split_first() else { break };
            let entry = u64::from_be_bytes(entry);
            let first = index;
            index += 1 + self.format.followers(entry, rest);
            match self.standard_status(entry, first) {
                Ok(status) => {
                    let start = self.guest_at(first);
                    let length = self.guest_at(index).since(start);
                    runs.push(StatusRun { start, length, status });
                }
                // Those that follow in its run are bad as it is, each by itself.
                Err(_) => {
                    for bad in first..index {
                        let entry = be64(self.bytes, bad);
                        if let Err(error) = self.standard_status(entry, bad) {
                            runs.push(self.spoiled_cluster(bad, error, damage)?);
                        }
                    }
                }
            }
        }
        // Whole clusters so far: only the first and the last can reach out of the range.
        for end in [before, runs.len().saturating_sub(1)] {
            if let Some(part) = runs.get(end).and_then(|run| run.clipped(self.range)) {
                runs[end] = part;
            }
        }
        Ok(())
    }

    /// What an entry says of its cluster, or of the first of a run of clusters.
    #[inline]
    fn standard_status(&self, entry: u64, index: usize) -> Result<BlockStatus> {
        Ok(match self.format.decode(entry) {
            L2Entry::Standard(host) => {
                self.check_place(host, index)?;
                self.data(HostPlace { file: self.data_role, offset: host })
            }
            L2Entry::Unallocated => BlockStatus::Unallocated(None),
            L2Entry::ZeroPlain => {
                self.check_zero_allowed(index)?;
                BlockStatus::Zero(ZeroStatus::Plain)
            }
            L2Entry::ZeroAllocated(host) => {
                self.check_zero_allowed(index)?;
                BlockStatus::Zero(self.zero(Some(self.place(host, index)?)))
            }
            L2Entry::Compressed { host, stream_length } => {
                self.compressed(host, stream_length, index)?
            }
        })
    }

    /// The run of a whole cluster whose entry is bad.
    #[cold]
    fn spoiled_cluster(
        &self,
        index: usize,
        error: Error,
        damage: &mut Option<DamageList>,
    ) -> Result<StatusRun> {
        let cluster = GuestRange::new(self.guest_at(index), self.guest_at(index + 1));
        spoiled_run(self.image, cluster, cluster, error, damage)
    }

    fn extended(&self, runs: &mut Vec<StatusRun>, damage: &mut Option<DamageList>) -> Result<()> {
        let cluster_size = ByteLen::new(self.header.cluster_size());
        for index in 0..self.count {
            let whole = match self.extended_status(index) {
                Ok(Extended::Subclusters(host, bitmap)) => {
                    self.subclusters(index, host, bitmap, runs);
                    continue;
                }
                Ok(Extended::Whole(status)) => {
                    StatusRun { start: self.guest_at(index), length: cluster_size, status }
                }
                Err(error) => self.spoiled_cluster(index, error, damage)?,
            };
            runs.extend(whole.clipped(self.range));
        }
        Ok(())
    }

    /// What an extended entry says of its cluster.
    #[inline]
    fn extended_status(&self, index: usize) -> Result<Extended> {
        let host = match self.format.decode(be64(self.bytes, index * 2)) {
            L2Entry::Compressed { host, stream_length } => {
                return self.compressed(host, stream_length, index).map(Extended::Whole);
            }
            L2Entry::Standard(host) => Some(self.place(host, index)?),
            // decode() gives zero clusters only without extended entries.
            L2Entry::Unallocated | L2Entry::ZeroPlain | L2Entry::ZeroAllocated(_) => None,
        };
        let bits = be64(self.bytes, index * 2 + 1);
        let bitmap = SubclusterBitmap::new(bits, host.is_some()).ok_or_else(|| {
            self.invalid(index, format!("has the contradicting subcluster bitmap {bits:#x}"))
        })?;
        Ok(Extended::Subclusters(host, bitmap))
    }

    /// Appends the runs of a cluster's subclusters.
    fn subclusters(
        &self,
        index: usize,
        host: Option<HostPlace>,
        bitmap: SubclusterBitmap,
        runs: &mut Vec<StatusRun>,
    ) {
        let subcluster_size = self.header.subcluster_size();
        let mut subcluster = 0;
        while subcluster < SUBCLUSTERS_PER_CLUSTER {
            let count = bitmap.run_length(subcluster);
            let skipped = ByteLen::new(subcluster * subcluster_size);
            let start = self.guest_at(index).saturating_add(skipped);
            let length = ByteLen::new(count * subcluster_size);
            let place = host.map(|place| place.advanced(skipped));
            let status = match (bitmap.get(subcluster), place) {
                (Subcluster::Zero, place) => BlockStatus::Zero(self.zero(place)),
                (Subcluster::Allocated, Some(place)) => self.data(place),
                // No bitmap has an allocated subcluster without a host cluster.
                (Subcluster::Unallocated | Subcluster::Allocated, place) => {
                    BlockStatus::Unallocated(place.filter(|_| self.header.encryption.is_none()))
                }
            };
            if let Some(run) = (StatusRun { start, length, status }).clipped(self.range) {
                push_joined(runs, run);
            }
            subcluster += count;
        }
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

    #[inline]
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

/// Appends a run, joined to the one before where it carries that on: subclusters would
/// otherwise end every run at the end of its cluster.
fn push_joined(runs: &mut Vec<StatusRun>, next: StatusRun) {
    if let Some(last) = runs.last_mut()
        && last.end() == next.start
        && last.status.advanced(last.length) == next.status
    {
        last.length = next.end().since(last.start);
    } else {
        runs.push(next);
    }
}
