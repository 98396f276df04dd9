//! A backing chain as what is copied: all of it, or what lies above a base.

use crate::chain::{Chain, Resolver};
use crate::convert::{Content, Input, InputPlace, InputReader, Piece};
use crate::error::{Error, Result};
use crate::extent::{Extent, Mapping, ZeroCause};
use crate::read::{ChainReader, Ciphers, HOLES};
use crate::source::Source;
use crate::status::{FileRole, HostPlace};
use crate::units::{ByteLen, GuestOffset, GuestRange};

/// Files that a layer can have, in the numbers of an [`InputPlace`].
const FILES_PER_LAYER: usize = 2;

/// What the output's backing file is, seen from the chain that is copied.
#[derive(Clone, Copy, Debug)]
pub enum Base<'c> {
    /// The layer of this depth: what lies above it is copied.
    Layer(u32),
    /// Another image: it takes the place of the active layer's own backing file, so what that
    /// layer leaves to its backing file is left to it.
    Other {
        /// The image with its own backing chain.
        chain: &'c Chain,
        /// Its encrypted layers' ciphers.
        ciphers: &'c Ciphers,
    },
}

/// A chain, and what of it the output is to hold.
#[derive(Clone, Copy, Debug)]
pub struct ChainInput<'c> {
    chain: &'c Chain,
    ciphers: &'c Ciphers,
    base: Option<Base<'c>>,
    /// Layers from this depth on are left to the output's backing file.
    depth: u32,
    /// Bytes of the disk of the output's backing file: zeros that lie past it hide nothing.
    base_size: u64,
}

impl<'c> ChainInput<'c> {
    /// All of the chain without `base`, else what lies above it.
    ///
    /// # Errors
    /// `Usage`: there is no layer of that depth.
    pub fn new(chain: &'c Chain, ciphers: &'c Ciphers, base: Option<Base<'c>>) -> Result<Self> {
        let (depth, base_size) = match base {
            None => (u32::MAX, 0),
            Some(Base::Other { chain, .. }) => (1, chain.virtual_size().get()),
            Some(Base::Layer(depth)) => {
                let layer = chain.layers().get(depth as usize);
                let layer = layer.ok_or_else(|| {
                    let message = format!("the chain has no layer {depth}");
                    Error::new(crate::error::ErrorKind::Usage(message))
                })?;
                (depth, layer.image.virtual_size().get())
            }
        };
        Ok(Self { chain, ciphers, base, depth, base_size })
    }

    /// Layers of the chain that are copied; all of them without a base.
    pub fn copied_layers(&self) -> u32 {
        self.depth
    }

    /// What the output is to have of an extent: one piece, or two where the backing file ends
    /// inside of zeros.
    fn push(&self, extent: &Extent, to: &mut Vec<Piece>) -> Result<()> {
        let range = GuestRange::new(extent.start, extent.end());
        let content = match extent.mapping {
            _ if extent.depth >= self.depth => Content::Backing,
            Mapping::Data(place) => Content::Bytes { place: Some(numbered(extent.depth, place)) },
            Mapping::Encrypted { .. } | Mapping::Compressed { .. } => {
                Content::Bytes { place: None }
            }
            Mapping::Damaged { .. } => {
                let layer = self.chain.layers().get(extent.depth as usize);
                let error = layer.and_then(|layer| layer.damage_at(extent.start));
                return Err(error.unwrap_or_else(|| Error::invalid("damaged metadata")));
            }
            Mapping::Zero(cause) => return self.push_zeros(range, extent.depth, cause, to),
        };
        to.push(Piece { range, content });
        Ok(())
    }

    fn push_zeros(
        &self,
        range: GuestRange,
        depth: u32,
        cause: ZeroCause,
        to: &mut Vec<Piece>,
    ) -> Result<()> {
        let left_to_base = match (self.base, cause) {
            (None, _) => {
                to.push(Piece { range, content: Content::Zeros });
                return Ok(());
            }
            // What the layer above the base leaves to it, and the base does not have.
            (Some(Base::Layer(_)), ZeroCause::PastBackingEnd(_)) => {
                depth.saturating_add(1) == self.depth
            }
            _ => false,
        };
        // As by QEMU (post_backing_zero in its qemu-img.c): zeros past the end of the output's
        // backing file need not be said.
        let base_end = GuestOffset::new(if left_to_base { 0 } else { self.base_size });
        let hides = GuestRange::new(range.start, range.end.min(base_end));
        let past = GuestRange::new(range.start.max(base_end), range.end);
        for (range, content) in [(hides, Content::Zeros), (past, Content::Backing)] {
            if !range.is_empty() {
                to.push(Piece { range, content });
            }
        }
        Ok(())
    }
}

/// A place in a layer's file, with the number that the file has here.
fn numbered(depth: u32, place: HostPlace) -> InputPlace {
    let role = match place.file {
        FileRole::Image => 0,
        FileRole::DataFile => 1,
    };
    InputPlace { file: depth.saturating_mul(2).saturating_add(role), offset: place.offset }
}

impl Input for ChainInput<'_> {
    fn size(&self) -> ByteLen {
        self.chain.virtual_size()
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        Box::new(Pieces {
            input: self,
            resolver: self.chain.resolver(HOLES),
            windows: self.chain.windows(self.chain.whole(), HOLES),
            ready: Vec::new(),
            next: 0,
        })
    }

    fn file(&self, number: u32) -> Option<&Source> {
        let number = usize::try_from(number).ok()?;
        let layer = self.chain.layers().get(number / FILES_PER_LAYER)?;
        match number % FILES_PER_LAYER {
            0 => Some(&layer.source),
            _ => layer.data_file.as_deref(),
        }
    }

    fn file_numbers(&self) -> std::ops::Range<u32> {
        // Those of which bytes are copied.
        let copied = self.chain.layers().len().min(self.depth as usize);
        0..u32::try_from(copied.saturating_mul(FILES_PER_LAYER)).unwrap_or(u32::MAX)
    }

    fn reader(&self) -> Box<dyn InputReader + Send + '_> {
        let own = ChainReader::new(self.chain, self.ciphers);
        match self.base {
            Some(Base::Other { chain, ciphers }) => Box::new(RebasedReader {
                input: self,
                resolver: self.chain.resolver(HOLES),
                pieces: Vec::new(),
                own,
                base: ChainReader::new(chain, ciphers),
                base_size: self.base_size,
            }),
            // Above its own base, the output's disk is the chain's.
            Some(Base::Layer(_)) | None => Box::new(OwnReader(own)),
        }
    }
}

/// The pieces of a chain's windows, one after the other.
struct Pieces<'i, 'c, W> {
    input: &'i ChainInput<'c>,
    resolver: Resolver<'c>,
    windows: W,
    /// Those of one window.
    ready: Vec<Piece>,
    next: usize,
}

impl<W: Iterator<Item = GuestRange>> Iterator for Pieces<'_, '_, W> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(piece) = self.ready.get(self.next) {
                self.next += 1;
                return Some(Ok(*piece));
            }
            let window = self.windows.next()?;
            self.ready.clear();
            self.next = 0;
            if let Err(error) = pieces_of(self.input, &mut self.resolver, window, &mut self.ready) {
                return Some(Err(error));
            }
        }
    }
}

/// Appends the pieces of one window.
fn pieces_of(
    input: &ChainInput<'_>,
    resolver: &mut Resolver<'_>,
    window: GuestRange,
    to: &mut Vec<Piece>,
) -> Result<()> {
    resolver.resolve(window)?.try_for_each(|extent| input.push(&extent, to))
}

struct OwnReader<'c>(ChainReader<'c>);

impl InputReader for OwnReader<'_> {
    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, buffer)
    }
}

/// Reads the active layer over another image than its backing file.
struct RebasedReader<'i, 'c> {
    input: &'i ChainInput<'c>,
    resolver: Resolver<'c>,
    pieces: Vec<Piece>,
    own: ChainReader<'c>,
    base: ChainReader<'c>,
    base_size: u64,
}

impl InputReader for RebasedReader<'_, '_> {
    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let end = offset.saturating_add(ByteLen::new(buffer.len() as u64));
        self.pieces.clear();
        let range = GuestRange::new(offset, end);
        pieces_of(self.input, &mut self.resolver, range, &mut self.pieces)?;
        let mut rest = buffer;
        for piece in &self.pieces {
            let length = usize::try_from(piece.range.length().get()).unwrap_or(usize::MAX);
            let part;
            (part, rest) = rest.split_at_mut(length.min(rest.len()));
            match piece.content {
                Content::Bytes { .. } => self.own.read_at(piece.range.start, part)?,
                Content::Zeros => part.fill(0),
                Content::Backing => {
                    let there = self.base_size.saturating_sub(piece.range.start.get());
                    let there = usize::try_from(there).map_or(part.len(), |n| n.min(part.len()));
                    let (bytes, past) = part.split_at_mut(there);
                    if !bytes.is_empty() {
                        self.base.read_at(piece.range.start, bytes)?;
                    }
                    past.fill(0);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests;
