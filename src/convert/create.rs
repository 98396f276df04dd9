//! What an [`ImageWriter`](super::ImageWriter) is made from.

use std::fs::File;
use std::path::Path;

use crate::format::Format;
use crate::units::ByteLen;

/// A backing file, as the output is to name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBacking {
    /// The name as it is stored: relative to the output's directory, or absolute.
    pub name: Vec<u8>,
    /// Its format, which qcow2 stores; qcow has no place for it.
    pub format: Option<Format>,
}

/// An external data file.
#[derive(Clone, Copy, Debug)]
pub struct DataFile<'f> {
    /// An empty regular file, or a block device. Open for reading and writing.
    pub file: &'f File,
    /// Its name, which errors name.
    pub name: &'f Path,
}

/// An image that is to be written.
#[derive(Clone, Copy, Debug)]
pub struct NewImage<'f> {
    /// The image: an empty regular file, or a block device. Open for reading and writing.
    pub file: &'f File,
    /// The external data file, where [`FormatOptions::data_file`](super::options::FormatOptions::data_file)
    /// names one.
    pub data_file: Option<DataFile<'f>>,
    /// Bytes of the disk, whole sectors.
    pub size: ByteLen,
    /// The backing file.
    pub backing: Option<&'f StoredBacking>,
}
