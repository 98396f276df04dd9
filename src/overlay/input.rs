//! What was changed on a writable device, as a disk to be copied over its image.

use super::exceptions::{Changes, Run};
use crate::chain::Chain;
use crate::convert::{Content, Input, InputPlace, InputReader, Piece};
use crate::error::{Error, Result};
use crate::read::{ChainReader, Ciphers};
use crate::source::Source;
use crate::units::{ByteLen, GuestOffset};

/// The number of the store's file, the only one.
const STORE: u32 = 0;

/// The disk that never changes, under what was written.
pub trait Origin: Sync {
    /// A reader for one thread.
    fn reader(&self) -> Box<dyn InputReader + Send + '_>;
}

/// The disk as its image has it.
#[derive(Clone, Copy, Debug)]
pub struct ImageOrigin<'c> {
    /// The image.
    pub chain: &'c Chain,
    /// The ciphers of its encrypted layers.
    pub ciphers: &'c Ciphers,
}

impl Origin for ImageOrigin<'_> {
    fn reader(&self) -> Box<dyn InputReader + Send + '_> {
        Box::new(ImageReader(ChainReader::new(self.chain, self.ciphers)))
    }
}

struct ImageReader<'c>(ChainReader<'c>);

impl InputReader for ImageReader<'_> {
    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, buffer)
    }
}

/// The changed chunks of a disk: bytes, and all else is the origin's, which becomes the
/// output's backing file.
pub struct ChangedDisk<'c> {
    origin: &'c dyn Origin,
    changes: Changes<'c>,
}

impl<'c> ChangedDisk<'c> {
    /// What was changed over this disk.
    pub fn new(origin: &'c dyn Origin, changes: Changes<'c>) -> Self {
        Self { origin, changes }
    }

    /// What was changed.
    pub fn changes(&self) -> &Changes<'c> {
        &self.changes
    }
}

impl Input for ChangedDisk<'_> {
    fn size(&self) -> ByteLen {
        self.changes.store().disk()
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        Box::new(self.changes.runs().map(|run| {
            let Run { range, place } = run?;
            let content = match place {
                None => Content::Backing,
                Some(offset) => Content::Bytes { place: Some(InputPlace { file: STORE, offset }) },
            };
            Ok(Piece { range, content })
        }))
    }

    fn file(&self, number: u32) -> Option<&Source> {
        (number == STORE).then(|| self.changes.store().source())
    }

    fn reader(&self) -> Box<dyn InputReader + Send + '_> {
        Box::new(ChangedReader { origin: self.origin.reader(), changes: &self.changes })
    }
}

/// Reads a disk with its changes.
struct ChangedReader<'i> {
    origin: Box<dyn InputReader + Send + 'i>,
    changes: &'i Changes<'i>,
}

impl InputReader for ChangedReader<'_> {
    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let Run { range, place } = self.changes.at(at)?;
            let length = usize::try_from(range.length().get()).unwrap_or(usize::MAX);
            let (piece, after) = rest.split_at_mut(length.min(rest.len()));
            if piece.is_empty() {
                return Err(Error::invalid(format!("guest offset {at} is not on the disk")));
            }
            match place {
                None => self.origin.read(at, piece)?,
                Some(place) => {
                    let source = self.changes.store().source();
                    source.read_exact(place, piece, "a changed chunk")?;
                }
            }
            at = at.saturating_add(ByteLen::new(piece.len() as u64));
            rest = after;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::open::{OpenPolicy, open_chain};
    use crate::overlay::exceptions::ExceptionStore;
    use crate::overlay::exceptions::tests::{START, store};
    use crate::units::HostOffset;

    #[test]
    fn changed_chunks_are_read_from_the_store_and_the_rest_from_the_image() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        let image: Vec<u8> = (0..64 * 1024u32).map(|n| (n / 512 % 100) as u8).collect();
        std::fs::write(&path, &image).unwrap();
        let policy = OpenPolicy { format: Some(crate::format::Format::Raw), ..Default::default() };
        let chain = open_chain(&path, &policy).unwrap().chain;
        let ciphers = Ciphers::new();
        let source = Source::from_bytes("x.store", store(8, &[(3, 200), (9, 201), (4, 202)]));
        let disk = ByteLen::new(image.len() as u64);
        let changes = ExceptionStore::open(&source, HostOffset::new(START), disk).unwrap();
        let origin = ImageOrigin { chain: &chain, ciphers: &ciphers };
        let input = ChangedDisk::new(&origin, changes.changes().unwrap());

        let mut wanted = image;
        for (chunk, fill) in [(3, 200), (9, 201), (4, 202)] {
            wanted[chunk * 4096..(chunk + 1) * 4096].fill(fill);
        }
        let mut all = vec![0; wanted.len()];
        let mut reader = input.reader();
        reader.read(GuestOffset::ZERO, &mut all).unwrap();
        assert!(all == wanted);
        let mut part = vec![0; 10_000];
        reader.read(GuestOffset::new(12_000), &mut part).unwrap();
        assert!(part == wanted[12_000..22_000]);
        assert!(reader.read(GuestOffset::new(64 * 1024 - 1), &mut [0; 2]).is_err());

        let pieces: Vec<_> = input.pieces().map(Result::unwrap).collect();
        let bytes = |piece: &&Piece| matches!(piece.content, Content::Bytes { .. });
        let changed: Vec<_> =
            pieces.iter().filter(bytes).map(|p| p.range.start.get() / 4096).collect();
        assert_eq!(changed, [3, 4, 9]);
        for Piece { range, content } in pieces {
            let Content::Bytes { place: Some(InputPlace { file, offset }) } = content else {
                continue;
            };
            let mut bytes = vec![0; usize::try_from(range.length().get()).unwrap()];
            input.file(file).unwrap().read_exact(offset, &mut bytes, "a piece").unwrap();
            let start = usize::try_from(range.start.get()).unwrap();
            assert!(bytes == wanted[start..start + bytes.len()]);
        }
    }
}
