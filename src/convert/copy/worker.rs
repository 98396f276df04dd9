//! One thread of the copying.

use std::sync::atomic::{AtomicU64, Ordering};

use super::super::compress::Compressor;
use super::super::reflink::{self, Offload, Offloaded};
use super::super::{InputPlace, InputReader, Placed};
use super::batch::{Batch, Unit, Work};
use super::detect::Detector;
use super::output::Room;
use super::{Shared, Turn, file_of, lock};
use crate::buffer::Buffer;
use crate::error::{Error, Result};
use crate::units::{ByteLen, GuestOffset, GuestRange};

/// Ends the work where a thread panics: those that wait for its turn would wait for good, and
/// the panic with them.
struct EndsByPanic<'w, 's>(&'w Shared<'s>);

impl Drop for EndsByPanic<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(0, Error::invalid("a thread panicked"));
        }
    }
}

/// Works until there is nothing left to do.
pub(super) fn run(shared: &Shared<'_>) {
    // The first, so that the locks are free when it is dropped.
    let _ends = EndsByPanic(shared);
    let mut batch = Batch::default();
    let mut worker = None;
    loop {
        let taken = lock(&shared.batches).take(&mut batch);
        let number = batch.number;
        if shared.has_failed_before(number) {
            return;
        }
        let outcome = taken.and_then(|taken| {
            if !taken {
                return Ok(false);
            }
            let worker = match &mut worker {
                Some(worker) => worker,
                none => none.insert(Worker::new(shared)?),
            };
            worker.work(&batch)
        });
        match outcome {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => return shared.fail(number, error),
        }
    }
}

/// A thread with its working memory.
struct Worker<'w, 's> {
    shared: &'w Shared<'s>,
    reader: Option<Box<dyn InputReader + Send + 's>>,
    compressor: Option<Compressor>,
    detector: Detector,
    /// The bytes of a batch.
    buffer: Buffer,
    /// The compressed streams of a batch.
    streams: Vec<u8>,
    steps: Vec<Step>,
    writes: Vec<Write>,
    /// What this thread allocates by itself.
    room: Room,
}

/// What the writer is told.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Zeros that need not be written.
    Zeros(GuestRange),
    /// Data, which lie in the buffer from there on; behind them come likely more.
    Data { range: GuestRange, at: usize, run_end: GuestOffset },
    /// A cluster, of which the stream lies there.
    Stream { cluster: GuestRange, at: usize, length: usize },
    /// What the file system does.
    Offload { range: GuestRange, place: InputPlace, offload: Offload },
}

/// What is to be written where.
#[derive(Clone, Copy, Debug)]
enum Write {
    Buffer { at: usize, length: usize, offset: u64 },
    Stream { at: usize, length: usize, offset: u64 },
    Offload { place: InputPlace, offload: Offload, length: u64, offset: u64 },
}

impl<'w, 's> Worker<'w, 's> {
    fn new(shared: &'w Shared<'s>) -> Result<Self> {
        let compressor = shared.options.compression.map(Compressor::new).transpose()?;
        let length = |bytes| usize::try_from(bytes).unwrap_or(usize::MAX);
        Ok(Self {
            shared,
            reader: None,
            compressor,
            detector: Detector {
                sparse: length(shared.options.sparse),
                granularity: length(shared.layout.granularity),
            },
            buffer: Buffer::default(),
            streams: Vec::new(),
            steps: Vec::new(),
            writes: Vec::new(),
            room: Room::new(shared.output.file(), shared.options)?,
        })
    }

    /// Does a batch; false where an earlier one has failed.
    fn work(&mut self, batch: &Batch) -> Result<bool> {
        let shared = self.shared;
        if shared.layout.keeps_offsets {
            for unit in &batch.units {
                if shared.has_failed_before(batch.number) {
                    return Ok(false);
                }
                self.copy_in_place(batch.number, unit)?;
            }
        } else if !self.copy_in_turn(batch)? {
            return Ok(false);
        }
        let done = shared.counts.done.fetch_max(batch.end.get(), Ordering::Relaxed);
        (shared.tick)(done.max(batch.end.get()))?;
        Ok(true)
    }

    /// Has the writer place the bytes of a batch, and writes them; false where an earlier one
    /// has failed.
    fn copy_in_turn(&mut self, batch: &Batch) -> Result<bool> {
        let shared = self.shared;
        self.read(batch)?;
        let Some(mut turn) = shared.wait_for_turn(batch.number) else { return Ok(false) };
        let placed = self.place(&mut turn);
        if placed.is_err() {
            // The turn stays here: nobody may place anything behind it.
            drop(turn);
            placed?;
            return Ok(false);
        }
        shared.pass_turn(turn);
        self.write(batch.number)?;
        Ok(true)
    }

    /// Copies a unit to its own offset.
    fn copy_in_place(&mut self, number: u64, unit: &Unit) -> Result<()> {
        let shared = self.shared;
        match unit.work {
            Work::Zeros => {
                add(&shared.counts.zeros, unit.range);
                return Ok(());
            }
            Work::Offload(place, offload) => {
                add(&shared.counts.cloned, unit.range);
                let length = unit.range.length().get();
                return self.offload(number, place, offload, length, unit.range.start.get());
            }
            Work::WriteZeros | Work::Copy(_) | Work::Granule => {}
        }
        let mut rest = *unit;
        while !rest.range.is_empty() {
            let next = (rest.range.start.get() / shared.layout.chunk).saturating_add(1);
            let end = GuestOffset::new(next.saturating_mul(shared.layout.chunk));
            let end = end.min(rest.range.end);
            let chunk = Unit { range: GuestRange::new(rest.range.start, end), ..rest };
            let length = bytes_of(chunk.range);
            self.steps.clear();
            self.buffer.reserve(length);
            self.read_unit(&chunk, 0, length)?;
            self.judge(&chunk, 0, length)?;
            for step in &self.steps {
                match *step {
                    Step::Data { range, at, .. } => {
                        add(&shared.counts.copied, range);
                        let bytes = &self.buffer[at..at + bytes_of(range)];
                        let writing = shared.output.lock();
                        self.room.make_for(range);
                        drop(writing);
                        shared.output.write(range.start.get(), bytes)?;
                    }
                    Step::Zeros(range) => {
                        add(&shared.counts.zeros, range);
                    }
                    Step::Stream { .. } | Step::Offload { .. } => {}
                }
            }
            rest = rest.from(end);
        }
        Ok(())
    }

    /// Reads the units and says what they become.
    fn read(&mut self, batch: &Batch) -> Result<()> {
        self.steps.clear();
        self.streams.clear();
        let padded = batch.bytes.saturating_add(self.shared.layout.cluster as u64);
        let length = usize::try_from(padded).unwrap_or(usize::MAX);
        self.buffer.reserve(length);
        let mut at = 0;
        for unit in &batch.units {
            match unit.work {
                Work::Zeros => self.steps.push(Step::Zeros(unit.range)),
                Work::Offload(place, offload) => {
                    self.steps.push(Step::Offload { range: unit.range, place, offload });
                }
                Work::WriteZeros | Work::Copy(_) | Work::Granule => {
                    let length = bytes_of(unit.range);
                    self.read_unit(unit, at, length)?;
                    self.judge(unit, at, length)?;
                    at += length;
                }
            }
        }
        Ok(())
    }

    fn read_unit(&mut self, unit: &Unit, at: usize, length: usize) -> Result<()> {
        let shared = self.shared;
        let bytes = &mut self.buffer[at..at + length];
        if unit.work == Work::WriteZeros {
            bytes.fill(0);
            return Ok(());
        }
        if let Work::Copy(Some(place)) = unit.work
            && let Some(source) = shared.input.file(place.file)
        {
            return source.read_with_zeros(place.offset, bytes);
        }
        let reader = self.reader.get_or_insert_with(|| shared.input.reader());
        reader.read(unit.range.start, bytes)
    }

    /// Says what becomes of the bytes of a unit.
    fn judge(&mut self, unit: &Unit, at: usize, length: usize) -> Result<()> {
        let looks = self.shared.layout.detects_zeros && unit.work != Work::WriteZeros;
        if self.compressor.is_some() {
            return self.compress(unit, at, length, looks);
        }
        if !looks {
            self.steps.push(Step::Data { range: unit.range, at, run_end: unit.run_end });
            return Ok(());
        }
        let (steps, start, run_end) = (&mut self.steps, unit.range.start, unit.run_end);
        let mut done = 0;
        let bytes = &self.buffer[at..at + length];
        self.detector.for_each_run(start.get(), bytes, &mut |length, is_data| {
            let range = part_of(start, done, length);
            steps.push(match is_data {
                true => Step::Data { range, at: at + done, run_end },
                false => Step::Zeros(range),
            });
            done += length;
        });
        Ok(())
    }

    /// Compresses the clusters of a unit, which are whole but for the disk's last one.
    fn compress(&mut self, unit: &Unit, at: usize, length: usize, looks: bool) -> Result<()> {
        let Some(compressor) = &mut self.compressor else { return Ok(()) };
        let size = self.shared.layout.cluster;
        let mut done = 0;
        while done < length {
            let part = size.min(length - done);
            let from = at + done;
            if part < size {
                // The disk's last cluster: nothing comes behind it.
                self.buffer[from + part..from + size].fill(0);
            }
            let range = part_of(unit.range.start, done, part);
            let cluster = &self.buffer[from..from + size];
            if looks && crate::read::is_zero(cluster) {
                self.steps.push(Step::Zeros(range));
            } else if let Some(stream) = compressor.compress(cluster)? {
                let (at, length) = (self.streams.len(), stream.len());
                self.streams.extend_from_slice(stream);
                self.steps.push(Step::Stream { cluster: range, at, length });
            } else {
                self.steps.push(Step::Data { range, at: from, run_end: range.end });
            }
            done += part;
        }
        Ok(())
    }

    /// Has the writer place all steps.
    fn place(&mut self, turn: &mut Turn<'_>) -> Result<()> {
        self.writes.clear();
        let Turn { writer, placed, room, .. } = turn;
        let counts = &self.shared.counts;
        for step in &self.steps {
            match *step {
                Step::Zeros(range) => {
                    add(&counts.zeros, range);
                    if self.shared.layout.tells_zeros {
                        writer.zeros(range)?;
                    }
                }
                Step::Stream { cluster, at, length } => {
                    add(&counts.compressed, cluster);
                    let offset = writer.compressed(cluster.start, length)?.get();
                    self.writes.push(Write::Stream { at, length, offset });
                }
                Step::Data { range, at, run_end } => {
                    add(&counts.copied, range);
                    placed.clear();
                    writer.data(range, placed)?;
                    for part in placed.iter() {
                        let (skip, length, offset) = in_order(range, part)?;
                        room.make(part, run_end);
                        self.writes.push(Write::Buffer { at: at + skip, length, offset });
                    }
                }
                Step::Offload { range, place, offload } => {
                    add(&counts.cloned, range);
                    placed.clear();
                    writer.data(range, placed)?;
                    for part in placed.iter() {
                        let place = place.advanced(part.range.start.since(range.start));
                        let length = part.range.length().get();
                        let offset = part.offset.get();
                        self.writes.push(Write::Offload { place, offload, length, offset });
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes what was placed.
    fn write(&mut self, number: u64) -> Result<()> {
        let writes = std::mem::take(&mut self.writes);
        let outcome = writes.iter().try_for_each(|write| match *write {
            Write::Buffer { at, length, offset } => {
                self.shared.output.write(offset, &self.buffer[at..at + length])
            }
            Write::Stream { at, length, offset } => {
                self.shared.output.write(offset, &self.streams[at..at + length])
            }
            Write::Offload { place, offload, length, offset } => {
                self.offload(number, place, offload, length, offset)
            }
        });
        self.writes = writes;
        outcome
    }

    /// Has the file system share or copy blocks, and copies what it does not.
    fn offload(
        &mut self,
        number: u64,
        place: InputPlace,
        offload: Offload,
        length: u64,
        offset: u64,
    ) -> Result<()> {
        let shared = self.shared;
        let (Some(source), Some(from)) =
            (shared.input.file(place.file), file_of(shared.input, place.file))
        else {
            return self.copy_from(place, length, offset);
        };
        let alignment = offload.alignment();
        // The last bytes of the file are less than a block.
        let in_file = source.length().get().saturating_sub(place.offset.get());
        let mut whole = length.min(in_file) / alignment * alignment;
        let is_aligned = offset.is_multiple_of(alignment) && place.offset.is_multiple_of(alignment);
        if !is_aligned {
            whole = 0;
        }
        let tick = |_| {
            if shared.has_failed_before(number) {
                return Err(Error::invalid("an earlier part failed"));
            }
            (shared.tick)(shared.counts.done.load(Ordering::Relaxed))
        };
        let (from, to) = ((from, place.offset.get()), (shared.output.file(), offset));
        let writing = shared.output.lock();
        let done = match offload {
            Offload::Clone { .. } => {
                reflink::clone_range(shared.options.calls, from, whole, to, &tick)?
            }
            Offload::CopyRange => reflink::copy_range(from, whole, to, &tick)?,
        };
        drop(writing);
        let done = match done.map_err(|error| shared.output.write_failed(error, offset))? {
            Offloaded::All => whole,
            Offloaded::Some(_, error)
                if shared.options.offloads.must_clone()
                    && matches!(offload, Offload::Clone { .. }) =>
            {
                return Err(reflink::no_reflink(source, error));
            }
            Offloaded::Some(done, error) => {
                log::debug!("copied, not cloned: {error}");
                done
            }
        };
        self.copy_from(place.advanced(ByteLen::new(done)), length - done, offset + done)
    }

    /// Copies bytes of a file through the buffer.
    fn copy_from(&mut self, place: InputPlace, length: u64, offset: u64) -> Result<()> {
        const AT_ONCE: usize = 256 << 10;
        if length == 0 {
            return Ok(());
        }
        let shared = self.shared;
        let source = shared.input.file(place.file);
        let source = source.ok_or_else(|| Error::invalid("a place is in no file"))?;
        // What the batch has in the buffer may not be written yet.
        let mut buffer = Buffer::default();
        buffer.reserve(usize::try_from(length).unwrap_or(AT_ONCE).min(AT_ONCE));
        let mut done = 0;
        while done < length {
            let part = (length - done).min(buffer.len() as u64);
            let bytes = &mut buffer[..usize::try_from(part).unwrap_or(0)];
            source.read_with_zeros(place.advanced(ByteLen::new(done)).offset, bytes)?;
            shared.output.write(offset + done, bytes)?;
            done += part;
        }
        Ok(())
    }
}

fn add(count: &AtomicU64, range: GuestRange) {
    count.fetch_add(range.length().get(), Ordering::Relaxed);
}

/// What part of the data a place is of: bytes before it, its length, and where it goes.
fn in_order(range: GuestRange, part: &Placed) -> Result<(usize, usize, u64)> {
    if part.range.start < range.start || part.range.end > range.end {
        return Err(Error::invalid("a writer places what it was not given"));
    }
    let skip = usize::try_from(part.range.start.since(range.start).get()).unwrap_or(usize::MAX);
    Ok((skip, bytes_of(part.range), part.offset.get()))
}

fn part_of(start: GuestOffset, skip: usize, length: usize) -> GuestRange {
    let from = start.saturating_add(ByteLen::new(skip as u64));
    GuestRange::new(from, from.saturating_add(ByteLen::new(length as u64)))
}

/// Length of a range that lies in memory.
fn bytes_of(range: GuestRange) -> usize {
    usize::try_from(range.length().get()).unwrap_or(usize::MAX)
}
