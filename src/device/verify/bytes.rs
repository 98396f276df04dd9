//! Comparing bytes: what the device has, or what lies below it, with what the image gives.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::sync::Arc;

use super::Tick;
use super::fresh::Fresh;
use crate::device::{DeviceNumber, DeviceReader, Kernel};
use crate::error::{Error, ErrorKind, Result};
use crate::read::{ChainReader, Ciphers, in_order};
use crate::scratch::OnError;
use crate::status::FileRole;
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};

/// Bytes that one thread compares in one go.
const UNIT: u64 = 1 << 20;
/// Where something can't be read, it is looked for in steps of so many bytes.
const STEP: usize = 4096;
/// Units in which it is looked for; of more that can't be read, each counts as a whole.
const NARROWED: usize = 64;
/// Bytes, and pieces, that are compared together.
const BATCH_BYTES: u64 = 64 << 20;
const BATCH_CHECKS: usize = 4096;

/// Where the bytes of the device are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LiveSide {
    /// They are zeros.
    Zeros,
    /// Reading fails: then reading the image has to fail too.
    Fails,
    /// On this device from this byte on.
    Device(DeviceNumber, u64),
}

/// What they are compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FreshSide {
    /// Zeros.
    Zeros,
    /// What our own reader gives of the disk.
    Guest,
    /// The bytes of a file from this offset on, as they are, and zeros past its end.
    File(u32, FileRole, u64),
}

/// A guest range of which the bytes are to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Check {
    pub(super) range: GuestRange,
    pub(super) live: LiveSide,
    pub(super) fresh: FreshSide,
}

impl Check {
    /// The part of it from `start` to `end`, which lie inside.
    fn part(&self, start: GuestOffset, end: GuestOffset) -> Self {
        let by = start.since(self.range.start).get();
        let live = match self.live {
            LiveSide::Device(number, at) => LiveSide::Device(number, at.saturating_add(by)),
            other => other,
        };
        let fresh = match self.fresh {
            FreshSide::File(depth, role, at) => FreshSide::File(depth, role, at.saturating_add(by)),
            other => other,
        };
        Self { range: GuestRange::new(start, end), live, fresh }
    }

    /// Takes `next` into it where it carries it on.
    fn absorb(&mut self, next: &Self) -> bool {
        let whole = Self { range: GuestRange::new(self.range.start, next.range.end), ..*self };
        let carries_on = self.range.end == next.range.start
            && whole.part(next.range.start, next.range.end) == *next;
        if carries_on {
            self.range.end = next.range.end;
        }
        carries_on
    }
}

/// What is not the same.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Other bytes, in steps; the first of them, and where.
    Differs { range: GuestRange, at: GuestOffset, live: u8, fresh: u8 },
    /// The device can't be read.
    LiveFails { range: GuestRange, error: io::Error },
    /// Reading the device fails on purpose, and needn't.
    LiveShouldRead { range: GuestRange },
    /// The image can't be read.
    FreshFails { range: GuestRange, error: Error },
}

/// What a batch came to.
#[derive(Debug, Default)]
pub(super) struct Checked {
    pub(super) outcomes: Vec<(Check, Outcome)>,
    /// Bytes compared.
    pub(super) bytes: u64,
}

/// Collects what is to be compared, and compares it on all cores.
pub(super) struct Checker<'a> {
    fresh: &'a Fresh,
    ciphers: Option<&'a Ciphers>,
    on_error: OnError,
    readers: BTreeMap<DeviceNumber, Arc<dyn DeviceReader>>,
    waiting: Vec<Check>,
    bytes: u64,
    narrowed: usize,
}

impl<'a> Checker<'a> {
    pub(super) fn new(fresh: &'a Fresh, ciphers: Option<&'a Ciphers>, on_error: OnError) -> Self {
        let (readers, waiting) = (BTreeMap::new(), Vec::new());
        Self { fresh, ciphers, on_error, readers, waiting, bytes: 0, narrowed: 0 }
    }

    /// Opens a device that is to be read.
    pub(super) fn open<K: Kernel>(&mut self, kernel: &K, number: DeviceNumber) -> Result<()> {
        if let Entry::Vacant(vacant) = self.readers.entry(number) {
            vacant.insert(kernel.reader(number)?);
        }
        Ok(())
    }

    /// Takes one more; true once a batch is full.
    pub(super) fn push(&mut self, check: Check) -> bool {
        self.bytes = self.bytes.saturating_add(check.range.length().get());
        if !self.waiting.last_mut().is_some_and(|last| last.absorb(&check)) {
            self.waiting.push(check);
        }
        self.bytes >= BATCH_BYTES || self.waiting.len() >= BATCH_CHECKS
    }

    /// Compares all that was taken.
    ///
    /// # Errors
    /// A key is missing, or what `tick` says.
    pub(super) fn run(&mut self, tick: &Tick<'_>) -> Result<Checked> {
        let checks = std::mem::take(&mut self.waiting);
        self.bytes = 0;
        let none = Ciphers::new();
        let units = checks.iter().flat_map(units);
        let mut checked = Checked::default();
        let mut narrowed = self.narrowed;
        let this = &*self;
        let ciphers = self.ciphers.unwrap_or(&none);
        in_order(
            units,
            || Worker::new(this, ciphers),
            |worker, unit: Check| {
                let broken = worker.compare(&unit)?;
                Ok((unit, broken))
            },
            |(unit, outcomes)| {
                checked.bytes = checked.bytes.saturating_add(unit.range.length().get());
                narrowed += usize::from(!outcomes.is_empty());
                checked.outcomes.extend(outcomes.into_iter().map(|outcome| (unit, outcome)));
                tick(unit.range.end.get())
            },
        )?;
        self.narrowed = narrowed;
        Ok(checked)
    }
}

/// Cuts a check where all are cut, so that no cluster is inflated by two threads if that can
/// be helped.
fn units(check: &Check) -> impl Iterator<Item = Check> + Send + use<> {
    let check = *check;
    let mut at = check.range.start;
    std::iter::from_fn(move || {
        if at >= check.range.end {
            return None;
        }
        let next = (at.get() / UNIT).saturating_add(1).saturating_mul(UNIT);
        let end = GuestOffset::new(next).min(check.range.end);
        let unit = check.part(at, end);
        at = end;
        Some(unit)
    })
}

/// What one thread needs.
struct Worker<'a> {
    checker: &'a Checker<'a>,
    reader: ChainReader<'a>,
    live: Vec<u8>,
    fresh: Vec<u8>,
}

/// Why two pieces could not be compared.
enum Failure {
    Live(io::Error),
    Fresh(Error),
}

impl<'a> Worker<'a> {
    fn new(checker: &'a Checker<'a>, ciphers: &'a Ciphers) -> Self {
        let reader = ChainReader::new(&checker.fresh.chain, ciphers);
        let buffer = || vec![0; usize::try_from(UNIT).unwrap_or(0)];
        Self { checker, reader, live: buffer(), fresh: buffer() }
    }

    fn compare(&mut self, unit: &Check) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        // A piece that is to fail may do so for its first cluster only.
        if unit.live != LiveSide::Fails {
            match self.read(unit) {
                Ok(length) => {
                    self.differences(unit.range.start, length, &mut outcomes);
                    return Ok(outcomes);
                }
                Err(Failure::Live(error)) if self.checker.narrowed >= NARROWED => {
                    return Ok(vec![Outcome::LiveFails { range: unit.range, error }]);
                }
                Err(_) => {}
            }
        }
        let mut at = unit.range.start;
        while at < unit.range.end {
            let end = at.saturating_add(ByteLen::new(STEP as u64)).min(unit.range.end);
            self.step(&unit.part(at, end), &mut outcomes)?;
            at = end;
        }
        Ok(outcomes)
    }

    fn step(&mut self, step: &Check, outcomes: &mut Vec<Outcome>) -> Result<()> {
        let range = step.range;
        let on_error = self.checker.on_error;
        match self.read(step) {
            Ok(_) if step.live == LiveSide::Fails => {
                push(outcomes, Outcome::LiveShouldRead { range })
            }
            Ok(length) => self.differences(range.start, length, outcomes),
            Err(Failure::Live(error)) => push(outcomes, Outcome::LiveFails { range, error }),
            Err(Failure::Fresh(error)) if !is_of_image(&error) => return Err(error),
            Err(Failure::Fresh(_)) if step.live == LiveSide::Fails => {}
            // It is to read as zeros then.
            Err(Failure::Fresh(_)) if on_error == OnError::Zero => {
                let zeros = Check { fresh: FreshSide::Zeros, ..*step };
                match self.read(&zeros) {
                    Ok(length) => self.differences(range.start, length, outcomes),
                    Err(Failure::Live(error)) => {
                        push(outcomes, Outcome::LiveFails { range, error })
                    }
                    Err(Failure::Fresh(error)) => return Err(error),
                }
            }
            Err(Failure::Fresh(error)) => push(outcomes, Outcome::FreshFails { range, error }),
        }
        Ok(())
    }

    /// Reads both sides of a check into the buffers.
    fn read(&mut self, check: &Check) -> Result<usize, Failure> {
        let length = usize::try_from(check.range.length().get()).unwrap_or(usize::MAX);
        let length = length.min(self.live.len());
        let (live, fresh) = (&mut self.live[..length], &mut self.fresh[..length]);
        match check.live {
            LiveSide::Zeros | LiveSide::Fails => live.fill(0),
            LiveSide::Device(number, at) => {
                let reader = self.checker.readers.get(&number);
                let reader = reader.ok_or_else(|| Failure::Live(io::ErrorKind::NotFound.into()))?;
                reader.read_at(at, live).map_err(Failure::Live)?;
            }
        }
        match check.fresh {
            FreshSide::Zeros => fresh.fill(0),
            FreshSide::Guest => {
                self.reader.read_at(check.range.start, fresh).map_err(Failure::Fresh)?;
            }
            FreshSide::File(depth, role, at) => {
                let source = self.checker.fresh.source(depth, role);
                let source = source.ok_or_else(|| {
                    Failure::Fresh(Error::invalid("a layer that the chain has not"))
                })?;
                source.read_with_zeros(HostOffset::new(at), fresh).map_err(Failure::Fresh)?;
            }
        }
        Ok(length)
    }

    /// Compares the buffers, which are of the guest range from `start` on.
    fn differences(&self, start: GuestOffset, length: usize, outcomes: &mut Vec<Outcome>) {
        let (live, fresh) = (&self.live[..length], &self.fresh[..length]);
        if live == fresh {
            return;
        }
        let mut from = 0usize;
        for (live, fresh) in live.chunks(512).zip(fresh.chunks(512)) {
            let at = |index: usize| start.saturating_add(ByteLen::new((from + index) as u64));
            let first = live.iter().zip(fresh).position(|(a, b)| a != b);
            if let Some(first) = first {
                let range = GuestRange::new(at(0), at(live.len()));
                let differs = Outcome::Differs {
                    range,
                    at: at(first),
                    live: live[first],
                    fresh: fresh[first],
                };
                push(outcomes, differs);
            }
            from += live.len();
        }
    }
}

/// Appends an outcome, joined to the one before where both are of a kind.
fn push(outcomes: &mut Vec<Outcome>, next: Outcome) {
    use Outcome::{Differs, FreshFails, LiveFails, LiveShouldRead};
    if let Some(
        last @ (Differs { .. } | FreshFails { .. } | LiveFails { .. } | LiveShouldRead { .. }),
    ) = outcomes.last_mut()
        && std::mem::discriminant(last) == std::mem::discriminant(&next)
        && last.range().end == next.range().start
    {
        last.range_mut().end = next.range().end;
        return;
    }
    outcomes.push(next);
}

impl Outcome {
    fn range(&self) -> GuestRange {
        match self {
            Self::Differs { range, .. }
            | Self::LiveFails { range, .. }
            | Self::LiveShouldRead { range }
            | Self::FreshFails { range, .. } => *range,
        }
    }

    fn range_mut(&mut self) -> &mut GuestRange {
        match self {
            Self::Differs { range, .. }
            | Self::LiveFails { range, .. }
            | Self::LiveShouldRead { range }
            | Self::FreshFails { range, .. } => range,
        }
    }
}

/// True for what is wrong with the image; else it is this build, a key or the caller.
fn is_of_image(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::InvalidImage(_) | ErrorKind::Io(_) | ErrorKind::NotFound(_))
}
