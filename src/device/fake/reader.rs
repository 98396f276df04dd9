//! Reading devices of the fake kernel.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::state::reference;
use crate::device::{DeviceNumber, DeviceReader};
use crate::table::{TableLine, Target};
use crate::units::SECTOR_SIZE;

/// Reads through tables as they were when it was made; dm-crypt it can't.
pub(super) struct FakeReader {
    pub(super) number: DeviceNumber,
    pub(super) tables: BTreeMap<DeviceNumber, Vec<TableLine>>,
    pub(super) files: BTreeMap<DeviceNumber, Arc<File>>,
}

impl FakeReader {
    fn read_sector(&self, mut sector: u64, buffer: &mut [u8]) -> io::Result<()> {
        let failed = || io::Error::from_raw_os_error(nix::libc::EIO);
        let mut number = self.number;
        loop {
            if let Some(file) = self.files.get(&number) {
                return file.read_exact_at(buffer, sector * SECTOR_SIZE).map_err(|_| failed());
            }
            let table = self.tables.get(&number).ok_or_else(failed)?;
            let line = table.iter().find(|line| {
                (line.start.get()..line.start.get() + line.length.get()).contains(&sector)
            });
            let line = line.ok_or_else(failed)?;
            match &line.target {
                Target::Zero => {
                    buffer.fill(0);
                    return Ok(());
                }
                Target::Linear { offset, .. } => {
                    sector = offset.get() + sector - line.start.get();
                    number = reference(line).ok_or_else(failed)?;
                }
                Target::Striped { chunk, offsets, .. } => {
                    let at = sector - line.start.get();
                    let (index, inside) = (at / chunk.get(), at % chunk.get());
                    let count = offsets.len() as u64;
                    let stripe = usize::try_from(index % count).ok();
                    let offset = stripe.and_then(|stripe| offsets.get(stripe));
                    sector =
                        offset.ok_or_else(failed)?.get() + index / count * chunk.get() + inside;
                    number = reference(line).ok_or_else(failed)?;
                }
                // As long as nothing was written.
                Target::Snapshot { .. } => {
                    number = reference(line).ok_or_else(failed)?;
                }
                Target::Error | Target::Crypt { .. } => return Err(failed()),
            }
        }
    }
}

impl DeviceReader for FakeReader {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let sectors = (offset / SECTOR_SIZE..).zip(buffer.chunks_mut(512));
        sectors.into_iter().try_for_each(|(sector, buffer)| self.read_sector(sector, buffer))
    }
}
