//! From a byte of the disk down to a byte of a file.

use super::{AskedLayer, Encrypted, Explanation, Outcome};
use crate::chain::{Chain, Layer, last_answer};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Mapping, ZeroCause};
use crate::format::Scratch;
use crate::holes::{Piece, for_each_piece};
use crate::source::Source;
use crate::status::{BlockStatus, Encryption, HostPlace, StatusRun};
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset, SECTOR_SIZE};
use crate::worker::apart;

const ONE_BYTE: ByteLen = ByteLen::new(1);

/// Explains the byte at `offset`. Damage ends it: it is the outcome of the last layer.
///
/// # Errors
/// `Usage`: the disk ends before the byte.
pub fn explain(chain: &Chain, offset: GuestOffset) -> Result<Explanation> {
    apart(|| look(chain, offset))
}

fn look(chain: &Chain, offset: GuestOffset) -> Result<Explanation> {
    if offset >= chain.whole().end {
        return Err(Error::new(ErrorKind::Usage(format!(
            "the disk has {} bytes and no byte {} ({offset})",
            chain.virtual_size().get(),
            offset.get()
        ))));
    }
    let mut layers = Vec::new();
    let mut mapping = Mapping::Zero(ZeroCause::Unallocated(None));
    for (layer, depth) in chain.layers().iter().zip(0u32..) {
        let backing_size =
            chain.layers().get(layers.len() + 1).map(|backing| backing.image.virtual_size());
        let mut trace = Vec::new();
        layer.image.trace(offset, &mut trace);
        let outcome = match status_of(layer, offset) {
            Err(error) => {
                mapping = Mapping::Damaged { from: offset };
                Outcome::Damaged(error)
            }
            Ok(run) => {
                mapping = last_answer(&run, depth).mapping;
                match (run.status, backing_size) {
                    (BlockStatus::Unallocated(_), None) => Outcome::NoBacking,
                    (BlockStatus::Unallocated(place), Some(size)) if offset.get() >= size.get() => {
                        mapping = Mapping::Zero(ZeroCause::PastBackingEnd(place));
                        Outcome::PastBackingEnd { size }
                    }
                    (BlockStatus::Unallocated(_), Some(_)) => Outcome::GoesOn,
                    _ => Outcome::Answers,
                }
            }
        };
        let goes_on = matches!(outcome, Outcome::GoesOn);
        layers.push(AskedLayer { depth, trace, outcome });
        if !goes_on {
            let below = below(layer, mapping);
            let encrypted = encrypted(layer, offset, mapping);
            return Ok(Explanation { offset, layers, mapping, below, encrypted });
        }
    }
    // Not reached: the last layer has no backing file to go on to.
    Ok(Explanation { offset, layers, mapping, below: None, encrypted: None })
}

/// What the layer says of the byte.
fn status_of(layer: &Layer, offset: GuestOffset) -> Result<StatusRun> {
    let byte = GuestRange::new(offset, offset.saturating_add(ONE_BYTE));
    let mut runs = Vec::new();
    layer
        .image
        .status(byte, &mut Scratch::default(), &mut runs)
        .map_err(|error| error.at_path(layer.source.path()))?;
    let run = runs.iter().find_map(|run| run.clipped(byte));
    run.ok_or_else(|| Error::invalid("the layer says nothing").at_path(layer.source.path()))
}

/// What the host's file system says of the place, where `mapping` has one.
fn below(layer: &Layer, mapping: Mapping) -> Option<Piece> {
    let place = match mapping {
        Mapping::Data(place) | Mapping::Encrypted { place, .. } => place,
        Mapping::Compressed { host, .. } => HostPlace::in_image(host),
        // A raw image's holes are its status already.
        Mapping::Zero(_) | Mapping::Damaged { .. } => return None,
    };
    piece_at(layer.file(place.file), place.offset)
}

/// What the host's file system says of one byte of a file.
fn piece_at(file: &Source, offset: HostOffset) -> Option<Piece> {
    let mut found = None;
    for_each_piece(file, offset, ONE_BYTE, &mut |_, _, piece| found = Some(piece));
    found
}

fn encrypted(layer: &Layer, guest: GuestOffset, mapping: Mapping) -> Option<Encrypted> {
    let Mapping::Encrypted { place: HostPlace { offset, .. }, cipher } = mapping else {
        return None;
    };
    let iv_sector = match cipher {
        Encryption::Aes => guest.get() / SECTOR_SIZE,
        Encryption::Luks => offset.get() / SECTOR_SIZE,
    };
    let header = layer.image.crypt_header().and_then(|header| {
        header.ok_or_else(|| {
            Error::invalid("the header names no cipher").at_path(layer.source.path())
        })
    });
    Some(Encrypted { method: cipher, iv_sector, header })
}
