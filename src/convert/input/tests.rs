//! Chains as inputs, beside a model that asks the layers sector by sector.

use proptest::prelude::*;

use super::*;
use crate::chain::tests::{Sector, chain_over, layers, model};
use crate::read::tests::{ciphers, disk, file};

const SECTOR: u64 = 512;

/// What an input says of each sector; gapless, in order.
fn sectors(input: &ChainInput<'_>) -> Vec<Content> {
    let mut found = Vec::new();
    for piece in input.pieces() {
        let piece = piece.unwrap();
        assert_eq!(piece.range.start.get(), found.len() as u64 * SECTOR);
        assert!(!piece.range.is_empty());
        for index in 0..piece.range.length().get() / SECTOR {
            found.push(match piece.content {
                Content::Bytes { place } => Content::Bytes {
                    place: place.map(|place| place.advanced(ByteLen::new(index * SECTOR))),
                },
                other => other,
            });
        }
    }
    found
}

/// What a sector that the layer at `depth` answers for is, where it is copied.
fn copied(depth: u32, sector: Sector) -> Content {
    match sector {
        Sector::Unallocated | Sector::Zero => Content::Zeros,
        Sector::Encrypted(_) | Sector::Compressed => Content::Bytes { place: None },
        Sector::Data(at) => {
            let place = HostPlace::in_image(crate::units::HostOffset::new(at * SECTOR));
            Content::Bytes { place: Some(numbered(depth, place)) }
        }
    }
}

fn read_all(input: &ChainInput<'_>) -> Vec<u8> {
    let mut bytes = vec![0xaa; usize::try_from(input.size().get()).unwrap()];
    input.reader().read(GuestOffset::ZERO, &mut bytes).unwrap();
    bytes
}

/// The disk of the chain that starts at `depth`.
pub(in crate::convert) fn base_disk(chain: &Chain, depth: u32) -> Vec<u8> {
    let base = chain.base(depth).unwrap();
    let mut bytes = vec![0; usize::try_from(base.virtual_size().get()).unwrap()];
    base.read_at(&ciphers().of_base(depth), GuestOffset::ZERO, &mut bytes).unwrap();
    bytes
}

/// The disk of an image over a backing file with the bytes `base`.
fn over(base: &[u8], contents: &[Content], own: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let length = usize::try_from(SECTOR).unwrap();
    for (content, own) in contents.iter().zip(own.chunks(length)) {
        let at = bytes.len();
        match content {
            Content::Bytes { .. } => bytes.extend(own),
            Content::Zeros => bytes.resize(at + length, 0),
            Content::Backing => {
                bytes
                    .extend(base.iter().copied().skip(at).chain(std::iter::repeat(0)).take(length));
            }
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn without_a_base_all_layers_are_copied(layers in layers()) {
        let chain = chain_over(layers.clone(), file);
        let input = ChainInput::new(&chain, ciphers(), None).unwrap();
        let expected: Vec<Content> = (0..layers[0].len())
            .map(|sector| model(&layers, sector))
            .map(|(depth, sector)| copied(depth, sector))
            .collect();
        let found = sectors(&input);
        prop_assert_eq!(&found, &expected);
        let disk = disk(&layers);
        prop_assert!(read_all(&input) == disk);
        for (content, bytes) in found.iter().zip(disk.chunks(512)) {
            if let Content::Bytes { place: Some(place) } = content {
                let mut there = vec![0; 512];
                let file = input.file(place.file).unwrap();
                file.read_with_zeros(place.offset, &mut there).unwrap();
                prop_assert_eq!(&there, bytes);
            }
        }
    }

    #[test]
    fn above_a_layer_the_output_gives_what_the_chain_gives(layers in layers()) {
        let chain = chain_over(layers.clone(), file);
        let own = disk(&layers);
        for depth in 0..layers.len() {
            let base = Base::Layer(u32::try_from(depth).unwrap());
            let input = ChainInput::new(&chain, ciphers(), Some(base)).unwrap();
            let found = sectors(&input);
            for (sector, content) in found.iter().enumerate() {
                let (found_at, _) = model(&layers, sector);
                if found_at as usize >= depth {
                    prop_assert_eq!(*content, Content::Backing, "nothing below is copied");
                }
                if let Content::Bytes { place: Some(place) } = content {
                    prop_assert!(input.file_numbers().contains(&place.file));
                }
            }
            prop_assert_eq!(input.file_numbers().len(), 2 * depth, "no file of the base");
            let base = base_disk(&chain, u32::try_from(depth).unwrap());
            prop_assert!(over(&base, &found, &own) == own);
            prop_assert!(read_all(&input) == own);
        }
    }

    #[test]
    fn another_base_shows_where_the_active_layer_has_nothing(
        layers in layers(),
        other in layers(),
    ) {
        let chain = chain_over(layers.clone(), file);
        let base = chain_over(other.clone(), |depth| file(depth + 3));
        // The ciphers go by depth, and the files do not: no encrypted ones in the base.
        let encrypted = |layer: &Vec<Sector>| {
            layer.iter().any(|sector| matches!(sector, Sector::Encrypted(_)))
        };
        prop_assume!(!other.iter().any(encrypted));
        let no_keys = Ciphers::new();
        let with = Base::Other { chain: &base, ciphers: &no_keys };
        let input = ChainInput::new(&chain, ciphers(), Some(with)).unwrap();
        let base_sectors = other[0].len();
        let backing_sectors = layers.get(1).map_or(0, Vec::len);
        let found = sectors(&input);
        for (sector, content) in found.iter().enumerate() {
            // As convert_iteration_sectors() in QEMU's qemu-img.c.
            let expected = match layers[0][sector] {
                Sector::Unallocated if sector < backing_sectors => Content::Backing,
                Sector::Unallocated | Sector::Zero if sector >= base_sectors => Content::Backing,
                here => copied(0, here),
            };
            prop_assert_eq!(*content, expected, "{}", sector);
        }
        let mut whole = vec![0; base_sectors * 512];
        base.read_at(&no_keys, GuestOffset::ZERO, &mut whole).unwrap();
        prop_assert!(read_all(&input) == over(&whole, &found, &disk(&layers)));
    }
}

#[test]
fn a_base_that_the_chain_does_not_have_is_refused() {
    let chain = chain_over(vec![vec![Sector::Zero]], file);
    assert!(ChainInput::new(&chain, ciphers(), Some(Base::Layer(1))).is_err());
}
