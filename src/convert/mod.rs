//! Copying a disk into a new image.
//!
//! ```text
//! Input -> pieces -> cut to the output's clusters -> read | clone -> ImageWriter -> file
//! ```
//!
//! An [`Input`] says what of the disk is to be in the output: bytes, zeros, and what is left
//! to the output's backing file. An [`ImageWriter`] says, in guest order, where in the output
//! these bytes go, and writes the output's metadata; the bytes themselves are read, cloned,
//! compressed and written by all cores.

pub mod compress;
pub mod copy;
pub mod create;
mod cut;
pub mod input;
mod l1;
pub mod options;
mod output;
pub mod qcow;
pub mod qcow2;
pub mod raw;
pub mod reflink;
pub mod target;

use std::fs::File;
use std::ops::Range;

use crate::error::Result;
use crate::source::Source;
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};

/// A range of the disk, and what the output is to have there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The range, never empty.
    pub range: GuestRange,
    /// What is there.
    pub content: Content,
}

/// What the output is to have in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing: its backing file answers. (Without one it reads as zeros.)
    Backing,
    /// Zeros, which hide what the backing file has there.
    Zeros,
    /// Bytes.
    Bytes {
        /// Where they lie as they are in a file of the input, from the range's start on;
        /// `None` where they have to be inflated or decrypted.
        place: Option<InputPlace>,
    },
}

/// Where bytes lie as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InputPlace {
    /// Which file of [`Input::file`].
    pub file: u32,
    /// Offset in it.
    pub offset: HostOffset,
}

impl InputPlace {
    /// `distance` bytes further on in the same file.
    #[must_use]
    pub fn advanced(self, distance: ByteLen) -> Self {
        Self { offset: self.offset.saturating_add(distance), ..self }
    }
}

/// A disk that is copied.
pub trait Input: Sync {
    /// Bytes of the disk, whole sectors.
    fn size(&self) -> ByteLen;

    /// What is where, in guest order, without gap; neighbours can be of the same kind.
    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_>;

    /// The file of that number of an [`InputPlace`].
    fn file(&self, number: u32) -> Option<&Source>;

    /// The numbers that the places of [`pieces`](Self::pieces) can have.
    fn file_numbers(&self) -> Range<u32> {
        0..u32::from(self.file(0).is_some())
    }

    /// A reader for one thread.
    fn reader(&self) -> Box<dyn InputReader + Send + '_>;
}

/// Reads what is copied.
pub trait InputReader {
    /// Fills `buffer` with what the output's disk is to give from `offset` on: also zeros, and
    /// where it is [`Content::Backing`] what its backing file gives (a cluster can be of both).
    ///
    /// # Errors
    /// As [`ChainReader::read_at`](crate::read::ChainReader::read_at).
    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()>;
}

/// Where some bytes of the disk go in the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// These bytes.
    pub range: GuestRange,
    /// Where the first of them goes in [`ImageWriter::data_file`].
    pub offset: HostOffset,
}

/// Lays out a new image. It is called in guest order, ranges never overlap, and what is never
/// spoken of is left to the backing file, or reads as zeros without one. All ranges start and
/// end at multiples of [`granularity`](Self::granularity), but for the disk's end. It writes
/// its metadata as it goes on, with memory that does not grow with the disk.
pub trait ImageWriter: Send {
    /// Bytes of what can be data, zeros or left to the backing file by itself: a cluster, a
    /// subcluster, a sector.
    fn granularity(&self) -> u64;

    /// Bytes of a cluster: what is compressed at a time, and best read at a time.
    fn cluster_size(&self) -> u64;

    /// True where zeros can be told without bytes; else they are given to it as data where they
    /// hide something.
    fn has_zeros(&self) -> bool;

    /// Places bytes: appends to `placed`, in order, where they are to be written. Nobody waits
    /// for them to be written before the next call.
    ///
    /// # Errors
    /// Metadata can't be written; the format holds no more.
    fn data(&mut self, range: GuestRange, placed: &mut Vec<Placed>) -> Result<()>;

    /// Zeros, that hide what the backing file has there.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    fn zeros(&mut self, range: GuestRange) -> Result<()>;

    /// A cluster of which the compressed stream is to be written where this says.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    fn compressed(&mut self, cluster: GuestOffset, stream_length: usize) -> Result<HostOffset>;

    /// True where all bytes go to their own offsets, and zeros need no word (a sparse raw
    /// image): then nobody has to ask, and nobody does.
    fn keeps_offsets(&self) -> bool {
        false
    }

    /// The file that the bytes are to be written to.
    fn data_file(&self) -> &File;

    /// Readies what comes before `end` and has not been spoken of: with preallocation that can
    /// take long. It is done anyway; called in steps, the work can be stopped between them.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    fn pass_over(&mut self, end: GuestOffset) -> Result<()> {
        let _ = end;
        Ok(())
    }

    /// Writes what is left of the metadata, the header last. The bytes are all written by now.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    fn finish(&mut self) -> Result<()>;
}

/// Adds a place of bytes, or lengthens the last one.
fn push_place(placed: &mut Vec<Placed>, start: u64, end: u64, host: u64) {
    let range = GuestRange::new(GuestOffset::new(start), GuestOffset::new(end));
    let offset = HostOffset::new(host);
    match placed.last_mut() {
        Some(last)
            if last.range.end == range.start
                && last.offset.saturating_add(last.range.length()) == offset =>
        {
            last.range.end = range.end;
        }
        _ => placed.push(Placed { range, offset }),
    }
}
