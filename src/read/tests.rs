//! Reading chains of a few sectors, beside a model that asks the layers sector by sector.

#![allow(clippy::cast_possible_truncation)]

use std::io::Write;
use std::sync::OnceLock;

use proptest::prelude::*;
use zeroize::Zeroizing;

use super::*;
use crate::chain::tests::{FILE_SECTORS, Sector, chain_over, layers, model};
use crate::crypt::{CryptHeader, Passphrase, VolumeKey};
use crate::error::{Error, ErrorKind};
use crate::source::Source;
use crate::units::{GuestRange, SECTOR_SIZE};

const SECTOR: usize = SECTOR_SIZE as usize;

/// What the compressed clusters of a layer inflate to.
fn inflated(depth: usize) -> Vec<u8> {
    (0..SECTOR).map(|at| (at / 7 + depth) as u8).collect()
}

/// A layer's file: no two sectors are the same, the first is a stream, and the last is cut
/// off.
pub(crate) fn file(depth: usize) -> Vec<u8> {
    let sectors = FILE_SECTORS as usize;
    let mut bytes: Vec<u8> = (0..sectors * SECTOR)
        .map(|at| ((at / SECTOR * 37 + depth * 101 + 1) ^ (at % SECTOR * 3)) as u8)
        .collect();
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&inflated(depth)).unwrap();
    let stream = encoder.finish().unwrap();
    bytes[..stream.len()].copy_from_slice(&stream);
    bytes.truncate((sectors - 1) * SECTOR + 200);
    bytes
}

/// A key of its own for each layer.
fn key(depth: usize) -> VolumeKey {
    let passphrase = Passphrase::new(Zeroizing::new(format!("key {depth}").into_bytes()));
    CryptHeader::Aes.unlock(&Source::from_bytes("", Vec::new()), &passphrase).unwrap()
}

/// The ciphers of as many layers as a chain has, made once.
pub(crate) fn ciphers() -> &'static Ciphers {
    static MADE: OnceLock<Ciphers> = OnceLock::new();
    MADE.get_or_init(|| {
        let mut ciphers = Ciphers::new();
        for depth in 0..8 {
            ciphers.insert(depth, &CryptHeader::Aes, &key(depth as usize)).unwrap();
        }
        ciphers
    })
}

/// The whole disk, by the model.
pub(crate) fn disk(layers: &[Vec<Sector>]) -> Vec<u8> {
    let mut disk = Vec::new();
    for sector in 0..layers[0].len() {
        let (depth, found) = model(layers, sector);
        let depth = depth as usize;
        let mut file = file(depth);
        file.resize(FILE_SECTORS as usize * SECTOR, 0);
        let at = |place: u64| file[place as usize * SECTOR..][..SECTOR].to_vec();
        disk.extend(match found {
            Sector::Unallocated | Sector::Zero => vec![0; SECTOR],
            Sector::Data(place) => at(place),
            Sector::Encrypted(place) => {
                let mut bytes = at(place);
                ciphers().0[&(depth as u32)].decrypt(sector as u64, &mut bytes);
                bytes
            }
            Sector::Compressed => inflated(depth),
        });
    }
    disk
}

fn range(start: usize, end: usize) -> GuestRange {
    GuestRange::new(GuestOffset::new(start as u64), GuestOffset::new(end as u64))
}

/// What a sweep over `range` gives; stretches have to follow on each other.
fn swept(chain: &Chain, ciphers: &Ciphers, range: GuestRange) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    chain.for_each_chunk(ciphers, range, |part, content| {
        assert_eq!(part.start.get(), range.start.get() + bytes.len() as u64);
        assert!(!part.is_empty());
        let length = part.length().get() as usize;
        match content {
            Content::Bytes(chunk) => {
                assert_eq!(chunk.len(), length);
                bytes.extend(chunk);
            }
            Content::Zeros => bytes.resize(bytes.len() + length, 0),
        }
        Ok(())
    })?;
    Ok(bytes)
}

proptest! {
    // Each case starts and ends work on all cores several times.
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_read_gives_what_asking_sector_by_sector_gives(
        layers in layers(),
        reads in prop::collection::vec((any::<prop::sample::Index>(), 0..2000usize, any::<bool>()), 1..8),
    ) {
        let chain = chain_over(layers.clone(), file);
        let disk = disk(&layers);
        let mut reader = ChainReader::new(&chain, ciphers());
        let mut last = 0;
        for (offset, length, in_order) in reads {
            let start = if in_order { last } else { offset.index(disk.len() + 1) };
            let end = disk.len().min(start + length);
            let mut bytes = vec![0xaa; end - start];
            reader.read_at(GuestOffset::new(start as u64), &mut bytes).unwrap();
            prop_assert_eq!(&bytes, &disk[start..end]);
            bytes.fill(0xaa);
            chain.read_at(ciphers(), GuestOffset::new(start as u64), &mut bytes).unwrap();
            prop_assert_eq!(&bytes, &disk[start..end]);
            prop_assert_eq!(&swept(&chain, ciphers(), range(start, end)).unwrap(), &disk[start..end]);
            last = end;
        }
        prop_assert_eq!(swept(&chain, ciphers(), chain.whole()).unwrap(), disk);
    }

    #[test]
    fn keys_are_asked_for_where_ciphertext_is_to_be_seen(layers in layers()) {
        let chain = chain_over(layers.clone(), file);
        let seen: std::collections::BTreeSet<u32> = (0..layers[0].len())
            .map(|sector| model(&layers, sector))
            .filter(|(_, found)| matches!(found, Sector::Encrypted(_)))
            .map(|(depth, _)| depth)
            .collect();
        prop_assert_eq!(chain.keys_needed(chain.whole()).unwrap(), seen.clone());
        let outcome = swept(&chain, &Ciphers::new(), chain.whole());
        prop_assert_eq!(outcome.is_err(), !seen.is_empty());
    }
}

fn failure(chain: &Chain, ciphers: &Ciphers) -> Error {
    let error = swept(chain, ciphers, chain.whole()).unwrap_err();
    let mut buffer = vec![0; chain.virtual_size().get() as usize];
    let other = chain.read_at(ciphers, GuestOffset::ZERO, &mut buffer).unwrap_err();
    assert_eq!(error.to_string(), other.to_string());
    error
}

#[test]
fn a_missing_key_names_the_layer() {
    let sectors = vec![vec![Sector::Unallocated; 3], vec![Sector::Encrypted(1); 3]];
    let error = failure(&chain_over(sectors, file), &Ciphers::new());
    assert!(matches!(error.kind(), ErrorKind::WrongKey(_)));
    assert_eq!(error.to_string(), "layer1: layer 1 is encrypted, and its key is missing");
}

#[test]
fn a_cluster_that_does_not_inflate_is_named_with_its_place() {
    let sectors = vec![vec![Sector::Zero, Sector::Zero, Sector::Compressed]];
    let error = failure(&chain_over(sectors, |_| vec![0xff; 4096]), &Ciphers::new());
    assert!(matches!(error.kind(), ErrorKind::InvalidImage(_)));
    assert_eq!(
        error.to_string(),
        "layer0: at offset 0x0: the compressed cluster of guest offset 0x400 (bytes 0x0 to 0x200 of the file) does not inflate: the compressed data is damaged"
    );
}

#[test]
fn an_empty_range_has_no_chunks() {
    let chain = chain_over(vec![vec![Sector::Zero, Sector::Data(1)]], file);
    for at in [0, 1, 512, 700, 1024, 5000] {
        assert!(swept(&chain, &Ciphers::new(), range(at, at)).unwrap().is_empty());
        assert!(swept(&chain, &Ciphers::new(), range(at.max(1024), 9999)).unwrap().is_empty());
    }
}

#[test]
fn reads_past_the_end_of_the_disk_are_refused() {
    let chain = chain_over(vec![vec![Sector::Data(1); 4]], file);
    for (offset, length) in [(0, 2049), (2048, 1), (4096, 0), (u64::MAX, 2)] {
        let error = chain
            .read_at(&Ciphers::new(), GuestOffset::new(offset), &mut vec![0; length])
            .unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Usage(_)), "{error}");
    }
    chain.read_at(&Ciphers::new(), GuestOffset::new(2048), &mut []).unwrap();
}

#[test]
fn a_sweep_ends_at_its_range_where_a_file_ends_in_the_same_sector() {
    let bytes: Vec<u8> = (0..1000u32).map(|at| (at % 251) as u8 + 1).collect();
    let source = std::sync::Arc::new(Source::from_bytes("odd.raw", bytes.clone()));
    let image =
        Box::new(crate::format::raw::RawImage::open(std::sync::Arc::clone(&source)).unwrap());
    let layer = crate::chain::Layer { image, source, data_file: None, declared_format: None };
    let chain = Chain::new(vec![layer]).unwrap();
    let mut disk = bytes;
    disk.resize(1024, 0);
    for (start, end) in [(0, 700), (600, 700), (0, 1000), (900, 1010), (1000, 1010), (1005, 1024)] {
        let swept = swept(&chain, &Ciphers::new(), range(start, end)).unwrap();
        assert_eq!(swept, disk[start..end], "{start}..{end}");
    }
}
