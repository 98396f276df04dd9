//! The scratch file: what dm-linear can't serve from the image's own files, written out
//! once before the device is built.

mod job;

pub use job::{ScratchContent, ScratchJob};
