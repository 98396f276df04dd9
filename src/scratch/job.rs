//! What has to be written to the scratch file, piece by piece.

use crate::error::Result;
use crate::status::FileRole;
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};

/// One piece of the scratch file. The scratch file is sparse: a piece lies in it at the
/// guest's own offset, so that its place does not depend on what else there is (only
/// pieces of ciphertext by host offsets come after the virtual disk's end). Pieces that
/// follow on each other in the guest do so in the file; between others are holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScratchJob {
    /// Where in the scratch file the piece starts: a multiple of 512. There are gaps
    /// between pieces that are not neighbours.
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

/// What is to be written to a scratch file. The plan is one.
pub trait ScratchWork {
    /// Bytes that all pieces together take, at most: clusters that inflate to zeros take
    /// none.
    fn scratch_bytes(&self) -> u64;

    /// Length of the (sparse) scratch file in bytes: a multiple of 512.
    fn scratch_length(&self) -> u64;

    /// Calls `each` with the jobs of one window after the other. Jobs come in guest order,
    /// but for pieces of ciphertext ([`ScratchContent::Copy`]), which come last.
    ///
    /// # Errors
    /// What resolving the images or `each` says.
    fn for_each_window(&self, each: &mut dyn FnMut(&[ScratchJob]) -> Result<()>) -> Result<()>;

    /// Calls `each` with one job after the other, in the same order. For those who only
    /// look at them: on one thread, and nothing is stored on the way.
    ///
    /// # Errors
    /// What resolving the images says.
    fn for_each_job(&self, each: &mut (dyn FnMut(&ScratchJob) + Send)) -> Result<()> {
        self.for_each_window(&mut |jobs| {
            jobs.iter().for_each(&mut *each);
            Ok(())
        })
    }
}

/// What to do with a cluster that does not inflate (`--on-error`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// Attach nothing.
    #[default]
    Refuse,
    /// Let it read as zeros, and say which it is.
    Zero,
    /// Let reading it fail (dm-error), and say which it is.
    ErrorTarget,
}

/// A guest range of the scratch file that is not simply data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Whole sectors, inside of the pieces that were to be written.
    pub range: GuestRange,
    /// What was found there.
    pub kind: FoundKind,
}

/// The kinds of [`Found`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundKind {
    /// A long run of clusters that inflated to zeros; a hole of the scratch file.
    Zeros,
    /// A cluster that does not inflate; a hole of the scratch file.
    Failed,
}
