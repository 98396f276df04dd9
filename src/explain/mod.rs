//! Where one byte of the guest's disk comes from, step by step; and who uses one byte of a
//! file.
//!
//! The answer itself is what [`Chain::resolver`] gives for the byte, by the same status
//! calls; the steps are the table entries that those calls went by.

mod forward;
mod reverse;
#[cfg(test)]
mod tests;

use crate::crypt::CryptHeader;
use crate::error::{Error, Result};
use crate::extent::Mapping;
use crate::format::trace::TraceStep;
use crate::holes::Piece;
use crate::status::Encryption;
use crate::units::{ByteLen, GuestOffset};

#[cfg(doc)]
use crate::chain::Chain;

pub use forward::explain;
pub use reverse::{
    ByteUse, GuestUse, GuestUseKind, LayerProblem, SnapshotName, Visibility, explain_reverse,
};

/// How one byte of the disk is found.
#[derive(Debug)]
pub struct Explanation {
    /// The byte.
    pub offset: GuestOffset,
    /// The layers that were asked, the active one first: all but the last leave the byte
    /// to their backing file.
    pub layers: Vec<AskedLayer>,
    /// Where the byte comes from: what a map says of it, with the layer that answers.
    pub mapping: Mapping,
    /// What the host's file system says of the place, where the byte lies in a file as it
    /// is or under a cipher; of a compressed one, of the start of its stream.
    pub below: Option<Piece>,
    /// How the byte is encrypted, where it is.
    pub encrypted: Option<Encrypted>,
}

impl Explanation {
    /// Depth of the layer that answers.
    pub fn depth(&self) -> u32 {
        self.layers.last().map_or(0, |layer| layer.depth)
    }

    /// The damage that stands in the way of an answer, if any does.
    pub fn damage(&self) -> Option<&Error> {
        match self.layers.last().map(|layer| &layer.outcome) {
            Some(Outcome::Damaged(error)) => Some(error),
            _ => None,
        }
    }
}

/// One layer that was asked for the byte.
#[derive(Debug)]
pub struct AskedLayer {
    /// 0 the active layer, 1 its backing file, and so on.
    pub depth: u32,
    /// The table entries that lead to the byte, as far as they could be read; none of a raw
    /// image.
    pub trace: Vec<TraceStep>,
    /// What comes of it.
    pub outcome: Outcome,
}

/// What comes of asking a layer.
#[derive(Debug)]
pub enum Outcome {
    /// It has the byte, or says that it is zero.
    Answers,
    /// It leaves the byte to its backing file.
    GoesOn,
    /// It leaves the byte to its backing file, which ends before it: zero.
    PastBackingEnd {
        /// Size of the backing file's virtual disk.
        size: ByteLen,
    },
    /// It has not got the byte, and has no backing file: zero.
    NoBacking,
    /// Its metadata is damaged.
    Damaged(Error),
}

/// How a byte is encrypted.
#[derive(Debug)]
pub struct Encrypted {
    /// Which way.
    pub method: Encryption,
    /// The number of the 512-byte sector that the IV is made of: the guest's with legacy
    /// AES, with LUKS the file's.
    pub iv_sector: u64,
    /// What the image says of its cipher, or why it can't be read.
    pub header: Result<CryptHeader>,
}
