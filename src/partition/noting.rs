//! A disk that may have places which can't be read.

use super::Disk;
use crate::error::{Error, Result};
use crate::units::{ByteLen, GuestOffset};

/// Most places that are kept.
const MAX_PLACES: usize = 16;

/// A disk of which it is noted what can't be read, for whoever can do without and has to tell.
pub struct Noting<'d> {
    disk: &'d mut dyn Disk,
    unreadable: Vec<GuestOffset>,
    first: Option<Error>,
}

impl<'d> Noting<'d> {
    /// Nothing is noted yet.
    pub fn new(disk: &'d mut dyn Disk) -> Self {
        Self { disk, unreadable: Vec::new(), first: None }
    }

    /// Where reads failed since the last time: the first 16 places, each once.
    pub fn take(&mut self) -> Vec<GuestOffset> {
        std::mem::take(&mut self.unreadable)
    }

    /// The error of the first read that failed.
    pub(super) fn into_error(self) -> Option<Error> {
        self.first
    }
}

impl Disk for Noting<'_> {
    fn size(&self) -> ByteLen {
        self.disk.size()
    }

    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let read = self.disk.read(offset, buffer);
        if let Err(error) = &read
            && !error.is_interruption()
        {
            if self.unreadable.len() < MAX_PLACES && !self.unreadable.contains(&offset) {
                self.unreadable.push(offset);
            }
            self.first.get_or_insert_with(|| error.told_again());
        }
        read
    }
}
