//! What has to be written to the scratch file, piece by piece.

use crate::status::FileRole;
use crate::units::{ByteLen, GuestOffset, HostOffset};

/// One piece of the scratch file. Jobs come in the order of their guest offsets, and
/// their pieces of the scratch file follow on each other without gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScratchJob {
    /// Where in the scratch file the piece starts: a multiple of 512.
    pub at: u64,
    /// Length in bytes: a multiple of 512, never 0.
    pub length: u64,
    /// The guest offset of its first byte.
    pub guest: GuestOffset,
    /// The layer whose file has it: 0 the active layer.
    pub layer: u32,
    /// What is to be written.
    pub what: ScratchContent,
}

/// Where the bytes of a [`ScratchJob`] come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScratchContent {
    /// Out of one compressed cluster of the layer's image file, which starts at guest
    /// offset `cluster`: its bytes from `guest` on. Several jobs of one window can be of
    /// the same cluster.
    Inflate {
        /// Where the cluster's stream starts.
        host: HostOffset,
        /// An upper bound of the stream's length.
        stream_length: ByteLen,
        /// Guest offset of the cluster's first byte.
        cluster: GuestOffset,
    },
    /// Bytes of a file as they are, with zeros past its end.
    Copy {
        /// Which of the layer's files.
        role: FileRole,
        /// Where they start.
        host: HostOffset,
        /// How many of them; the rest of the piece is zeros.
        bytes: u64,
    },
}
