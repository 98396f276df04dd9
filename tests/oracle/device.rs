//! The device as the kernel would serve it, read on the host: the library's plan, its
//! scratch file filled, its tables followed down to the files, ciphers included.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use imgdm::chain::Chain;
use imgdm::crypt::{Passphrase, SectorCipher};
use imgdm::open::{OpenPolicy, open_chain};
use imgdm::plan::{Backing, BackingId, Plan, PlanOptions, Segment, SegmentTarget, TableSource};
use imgdm::plan::{TableId, TableRole};
use imgdm::scratch::{FillOptions, Filled, ScratchPlace, ScratchWork, fill};
use zeroize::Zeroizing;

use crate::common::images::SECTOR;
use crate::common::process::Outcome;
use crate::common::rng::Rng;
use crate::imgdm::all_of;
use crate::read;

/// How an image is to be read.
#[derive(Clone, Default)]
pub(crate) struct Reading {
    pub(crate) policy: OpenPolicy,
    pub(crate) options: PlanOptions,
    /// The passphrase of each encrypted layer.
    pub(crate) keys: BTreeMap<u32, Vec<u8>>,
}

struct Device<'c> {
    chain: &'c Chain,
    plan: Plan<'c>,
    tables: Vec<Vec<Segment>>,
    scratch: File,
    ciphers: Vec<SectorCipher>,
}

/// What reading fails with.
type Failed = String;

impl<'c> Device<'c> {
    fn new(chain: &'c Chain, reading: &Reading, directory: &Path) -> imgdm::Result<(Self, Filled)> {
        let plan = Plan::new(chain, reading.options)?;
        plan.check_attachable()?;
        let place = ScratchPlace::choose(Some(directory))?;
        let scratch = place.create()?;
        let options = FillOptions::new(directory, reading.options.on_error);
        let filled = fill(chain, &plan, &scratch.writer, &options, &|_| Ok(()))?;
        let written =
            scratch.reader.metadata().map_or(0, |m| std::os::unix::fs::MetadataExt::blocks(&m));
        assert!(written * SECTOR <= plan.scratch_bytes() + (1 << 20), "more than was announced");
        let plan = Plan::with_found(chain, reading.options, &filled.found())?;
        let mut tables = Vec::new();
        for id in (0..).map(TableId).take(plan.tables().len()) {
            let mut segments = Vec::new();
            plan.for_each_segment(id, &mut |segment| {
                segments.push(segment);
                Ok(())
            })?;
            tables.push(segments);
        }
        let mut ciphers = Vec::new();
        for crypt in plan.crypts() {
            let layer = &chain.layers()[crypt.layer as usize];
            let header = layer.image.crypt_header()?.expect("an encrypted layer has a header");
            let key = reading.keys.get(&crypt.layer).cloned().unwrap_or_default();
            let key = header.unlock(&layer.source, &Passphrase::new(Zeroizing::new(key)))?;
            assert_eq!(key.bytes().len(), crypt.key_bytes);
            ciphers.push(SectorCipher::new(&header, &key)?);
        }
        Ok((Self { chain, plan, tables, scratch: scratch.reader, ciphers }, filled))
    }

    /// Fills `out` from a sector of a table on.
    fn read_table(&self, table: usize, first: u64, out: &mut [u8]) -> Result<(), Failed> {
        let segments = &self.tables[table];
        let mut at = 0;
        while at < out.len() as u64 {
            let sector = first + at / SECTOR;
            let index = segments.partition_point(|s| s.start.get() + s.length.get() <= sector);
            let segment = segments.get(index).ok_or("past the table's end")?;
            let inside = sector - segment.start.get();
            let length = ((segment.length.get() - inside) * SECTOR).min(out.len() as u64 - at);
            let from = usize::try_from(at).unwrap();
            let part = &mut out[from..from + usize::try_from(length).unwrap()];
            match segment.target {
                SegmentTarget::Zero => part.fill(0),
                SegmentTarget::Error => return Err(format!("error target at sector {sector}")),
                SegmentTarget::Linear { backing, offset } => {
                    self.read_backing(table, backing, offset.get() + inside, part)?;
                }
                SegmentTarget::Crypt { backing, crypt } => {
                    self.read_backing(table, backing, inside, part)?;
                    self.ciphers[crypt.0 as usize].decrypt(inside, part);
                }
            }
            at += length;
        }
        Ok(())
    }

    fn read_backing(
        &self,
        above: usize,
        backing: BackingId,
        sector: u64,
        out: &mut [u8],
    ) -> Result<(), Failed> {
        let offset = sector * SECTOR;
        let end = sector + out.len() as u64 / SECTOR;
        match &self.plan.backings()[backing.0 as usize] {
            Backing::Zero { length } => {
                assert!(end <= length.get(), "the zeros are long enough");
                out.fill(0);
            }
            Backing::Scratch { length } => {
                assert!(end <= length.get(), "the scratch file is long enough");
                self.scratch.read_exact_at(out, offset).map_err(|error| error.to_string())?;
            }
            Backing::File { layer, role } => {
                let file = self.chain.layers()[*layer as usize].file(*role);
                let shown = file.length().get() / SECTOR * SECTOR;
                if offset + out.len() as u64 > shown {
                    return Err(format!("{} is read past its end", file.path().display()));
                }
                let read = file.read_up_to(imgdm::units::HostOffset::new(offset), out);
                assert_eq!(read.map_err(|error| error.to_string())?, out.len());
            }
            Backing::Table(below) => {
                assert!((below.0 as usize) < above, "tables are built bottom up");
                self.read_table(below.0 as usize, sector, out)?;
            }
        }
        Ok(())
    }
}

/// Compares the device, and what the library itself reads, with a raw copy, and says what filling the scratch file found.
///
/// # Errors
/// They differ, or there is no device.
pub(crate) fn compare(dir: &Path, image: &str, reading: &Reading, copy: &str) -> Outcome<Filled> {
    let opened = open_chain(&dir.join(image), &all_of(dir, &reading.policy))
        .map_err(|error| error.to_string())?;
    let ciphers = read::unlock(&opened.chain, &reading.keys).map_err(|error| error.to_string())?;
    read::compare(&opened.chain, &ciphers, &dir.join(copy), &mut Rng::new(1))?;
    let (device, filled) =
        Device::new(&opened.chain, reading, dir).map_err(|error| format!("{error:#}"))?;
    let top = device.plan.tables().len() - 1;
    assert_eq!(device.plan.tables()[top].role, TableRole::Top);
    let copy = File::open(dir.join(copy)).map_err(|error| error.to_string())?;
    let size = device.plan.size().get() * SECTOR;
    let copied = copy.metadata().map_err(|error| error.to_string())?.len();
    if size != copied.next_multiple_of(SECTOR) {
        return Err(format!("the device has {size} bytes, the copy {copied}"));
    }
    const STEP: u64 = 1 << 20;
    let mut ours = vec![0; usize::try_from(STEP).unwrap()];
    let mut theirs = ours.clone();
    let mut at = 0;
    while at < size {
        let length = usize::try_from(STEP.min(size - at)).unwrap();
        device.read_table(top, at / SECTOR, &mut ours[..length])?;
        theirs.fill(0);
        let have = usize::try_from(copied.saturating_sub(at)).unwrap().min(length);
        copy.read_exact_at(&mut theirs[..have], at).map_err(|error| error.to_string())?;
        if ours[..length] != theirs[..length] {
            let differs = (0..length).find(|&i| ours[i] != theirs[i]).unwrap() as u64;
            return Err(format!("{image}: the bytes differ at guest offset {:#x}", at + differs));
        }
        at += length as u64;
    }
    Ok(filled)
}
