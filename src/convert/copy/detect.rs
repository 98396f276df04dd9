//! Which of the bytes read are zeros, as `qemu-img convert -S` has it.

use crate::read::is_zero;

const SECTOR: usize = 512;

/// Looks for zeros in what is to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Detector {
    /// Zeros in a row that are worth leaving out.
    pub(super) sparse: usize,
    /// What can be zeros by itself: a power of two.
    pub(super) granularity: usize,
}

impl Detector {
    /// Calls `each` with the length of one run after the other, and whether it is to be
    /// written: whole granules, but for the end. `offset` is where on the disk `bytes` start.
    pub(super) fn for_each_run(self, offset: u64, bytes: &[u8], each: &mut dyn FnMut(usize, bool)) {
        let mut runs = Runs { each, length: 0, is_data: false };
        if self.sparse <= self.granularity {
            // Longer zeros than a granule are made of granules of zeros, and shorter ones are
            // nothing that can be told.
            for granule in bytes.chunks(self.granularity) {
                runs.push(granule.len(), !is_zero(granule));
            }
        } else {
            self.long_runs(offset, bytes, &mut runs);
        }
        runs.flush();
    }

    /// Where zeros have to be longer than a granule, as is_allocated_sectors_min() in QEMU's
    /// qemu-img.c finds them: runs start and end at multiples of the length that is asked for,
    /// cut down to a power of two, and what of them is shorter counts as data.
    fn long_runs(self, offset: u64, bytes: &[u8], runs: &mut Runs<'_>) {
        let alignment = 1 << self.sparse.max(SECTOR).ilog2();
        let mut at = 0;
        // Data that were found, and zeros behind them that are too few so far.
        let mut pending = 0;
        while at < bytes.len() {
            let (length, is_data) = aligned_run(offset + at as u64, &bytes[at..], alignment);
            let few = length < self.sparse.min(bytes.len());
            at += length;
            if is_data || (pending > 0 && few && at < bytes.len()) {
                pending += length;
            } else {
                runs.push(std::mem::take(&mut pending), true);
                runs.push(length, false);
            }
        }
        runs.push(pending, true);
    }
}

/// The first run of sectors that are all zeros or all not, its end moved to a multiple of
/// `alignment` where one follows: data are made longer, zeros shorter.
fn aligned_run(offset: u64, bytes: &[u8], alignment: usize) -> (usize, bool) {
    let mut sectors = bytes.chunks(SECTOR);
    let zero = sectors.next().is_none_or(is_zero);
    let mut length = SECTOR.min(bytes.len());
    for sector in sectors {
        if is_zero(sector) != zero {
            break;
        }
        length += sector.len();
    }
    if length == bytes.len() {
        return (length, !zero);
    }
    let end = offset + length as u64;
    let tail = usize::try_from(end % alignment as u64).unwrap_or(0);
    match (tail, zero) {
        (0, _) => (length, !zero),
        (_, true) if length > tail => (length - tail, false),
        _ => ((length + alignment - tail).min(bytes.len()), true),
    }
}

/// Joins runs of one kind.
struct Runs<'e> {
    each: &'e mut dyn FnMut(usize, bool),
    length: usize,
    is_data: bool,
}

impl Runs<'_> {
    fn push(&mut self, length: usize, is_data: bool) {
        if length > 0 && self.is_data != is_data {
            self.flush();
            self.is_data = is_data;
        }
        self.length += length;
    }

    fn flush(&mut self) {
        if self.length > 0 {
            (self.each)(std::mem::take(&mut self.length), self.is_data);
        }
    }
}
