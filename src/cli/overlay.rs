//! The arguments of a writable device, and its store.

use std::path::PathBuf;

use imgdm::chain::Chain;
use imgdm::device::attach::{Overlay, OverlayStore};
use imgdm::lock::Sharing;
use imgdm::overlay::{Store, StoreFile, StoreHeader, StoreSnapshot, persistent};
use imgdm::scratch::{OnError, ScratchPlace};
use imgdm::source::FileId;
use imgdm::units::{ByteLen, Sectors};
use imgdm::{Error, ErrorKind, Result};

use super::open::parse_size;
use super::scratch::PlaceArgs;

/// The least room for changes, so that a store is of some use.
const SMALLEST: u64 = 1 << 20;

/// Whether the device is to take writes.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct OverlayArgs {
    /// Make the device writable: what is written goes to a store, and the image never changes.
    /// Without FILE the store is a scratch file that goes with the device; with FILE it is kept,
    /// made where it is missing, and used again by the next attach of the same image.
    /// Once the store is full, writes fail and what was changed stays. One whose file system is
    /// full is given up by the kernel: then every read and write of the device fails, what was
    /// changed is lost, and the image is unhurt
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    overlay: Option<Option<PathBuf>>,

    /// Bytes that the changes may take, bookkeeping included; without it the store has room
    /// for a change of the whole disk. An existing store can be made larger, while it is not
    /// attached
    #[arg(long, value_name = "N", requires = "overlay", value_parser = parse_size)]
    overlay_size: Option<u64>,
}

impl OverlayArgs {
    /// What the options of the device say of it.
    pub(crate) fn overlay(&self) -> Overlay {
        match &self.overlay {
            None => Overlay::None,
            Some(None) => Overlay::Transient,
            Some(Some(_)) => Overlay::Kept,
        }
    }

    /// Refuses to keep what is written over an image that may change under it.
    pub(crate) fn check(&self, sharing: Sharing, direct_block: bool) -> Result<()> {
        if self.overlay() != Overlay::Kept {
            return Ok(());
        }
        let message = if sharing == Sharing::Writers {
            "--overlay=FILE: with --force-share the image may change, and its store would be refused from then on"
        } else if direct_block {
            "--overlay=FILE: with --direct-block nothing locks the image once this command has ended: others may change it, and what lies over it is lost"
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::Usage(message.to_owned())))
    }

    /// The store as far as it is known before it is opened or made: enough to know it where
    /// the image is attached already.
    pub(crate) fn wanted(&self, disk: Sectors) -> Result<Option<OverlayStore<'static>>> {
        let Some(file) = &self.overlay else { return Ok(None) };
        let id = file.as_deref().and_then(FileId::of_path);
        let room = self.room(disk)?.1.and_then(|room| Sectors::from_bytes(room.get()));
        Ok(Some(OverlayStore { file: None, id, chunk: persistent::DEFAULT_CHUNK, room }))
    }

    /// The room for a change of the whole disk, and the one that is asked for, which is no
    /// more than can be of use.
    fn room(&self, disk: Sectors) -> Result<(ByteLen, Option<ByteLen>)> {
        let chunk = persistent::DEFAULT_CHUNK;
        let full = persistent::length_for(disk, chunk).ok_or_else(|| {
            let message = "the disk is too large for a store that takes changes of all of it";
            Error::new(ErrorKind::NotRepresentable(message.to_owned()))
        })?;
        let size = self.overlay_size.map(|size| size_of(size, chunk)).transpose()?;
        Ok((full, size.map(|size| size.min(full))))
    }

    /// Opens or makes the store of a disk of this size, where one is asked for.
    pub(crate) fn open(
        &self,
        chain: &Chain,
        disk: Sectors,
        on_error: OnError,
        places: &PlaceArgs,
    ) -> Result<Option<Store>> {
        let Some(file) = &self.overlay else { return Ok(None) };
        let chunk = persistent::DEFAULT_CHUNK;
        let (full, size) = self.room(disk)?;
        let snapshot = chain.layers().first().and_then(|layer| layer.image.snapshot());
        let header = StoreHeader {
            disk,
            length: size.unwrap_or(full),
            chunk,
            on_error,
            snapshot: snapshot.map(|s| StoreSnapshot { id: s.id.clone(), name: s.name.clone() }),
            files: StoreFile::of_chain(chain)?,
        };
        let Some(path) = file else {
            let place = ScratchPlace::choose(places.scratch_dir.as_deref())?;
            return Store::transient(&place, &header).map(Some);
        };
        let id = FileId::of_path(path);
        let mut files = chain.layers().iter().flat_map(|layer| layer.files());
        if id.is_some() && files.any(|(_, source)| source.id() == id) {
            let message =
                "--overlay: this is a file of the image, and no store for what is written";
            return Err(Error::new(ErrorKind::Usage(message.to_owned())).at_path(path));
        }
        Store::kept(path, &header, size).map(Some)
    }
}

/// The room that `--overlay-size` asks for, in whole chunks.
fn size_of(size: u64, chunk: Sectors) -> Result<ByteLen> {
    let chunk = chunk.to_bytes().unwrap_or(1);
    if size < SMALLEST {
        let message = format!("--overlay-size: {size} bytes are too few: at least {SMALLEST} (1M)");
        return Err(Error::new(ErrorKind::Usage(message)));
    }
    Ok(ByteLen::new(size / chunk * chunk))
}
