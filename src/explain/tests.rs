//! Explaining beside resolving: the same answer for every sector.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::chain::tests::{chain_of, layers};
use crate::chain::{Chain, HoleQuery, Layer};
use crate::format::cow::CowImage;
use crate::format::raw::RawImage;
use crate::source::Source;
use crate::status::{FileRole, HostPlace};
use crate::units::{GuestRange, HostOffset, SECTOR_SIZE};

proptest! {
    #[test]
    fn the_answer_is_what_the_resolver_gives(layers in layers(), at in any::<prop::sample::Index>()) {
        let chain = chain_of(layers);
        let bytes = usize::try_from(chain.virtual_size().get()).unwrap();
        let offset = GuestOffset::new(at.index(bytes) as u64);
        let explanation = explain(&chain, offset).unwrap();
        let byte = GuestRange::new(offset, offset.saturating_add(ByteLen::new(1)));
        let mut resolver = chain.resolver(HoleQuery::AsQemu);
        let extent = resolver.resolve(byte).unwrap().next().unwrap();
        prop_assert_eq!(explanation.depth(), extent.depth);
        prop_assert_eq!(explanation.mapping, extent.mapping);
        prop_assert!(explanation.layers.len() as u64 == u64::from(extent.depth) + 1);
    }
}

/// A cow image (User-Mode Linux, version 3) of 8 KiB: sector 9 is in this file.
fn cow() -> Vec<u8> {
    let mut bytes = vec![0; 24 << 10];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"OOOM");
    put(4, &3u32.to_be_bytes());
    put(12, &8192u64.to_be_bytes());
    put(20, &512u32.to_be_bytes());
    put(24, &4096u32.to_be_bytes());
    put(32, b"base.img\0");
    // Header 4128 bytes: the bitmap is at 8192, the data at 12288.
    put(8193, &[0b10]);
    bytes
}

fn layer(image: Box<dyn crate::format::ImageFormat>, source: &Arc<Source>) -> Layer {
    Layer { image, source: Arc::clone(source), data_file: None, declared_format: None }
}

#[test]
fn a_cow_image_is_explained_by_its_bits_both_ways() {
    let source = Arc::new(Source::from_bytes("a.cow", cow()));
    let image = CowImage::open(Arc::clone(&source)).unwrap();
    let base = Arc::new(Source::from_bytes("base.img", vec![1; 8192]));
    let raw = RawImage::open(Arc::clone(&base)).unwrap();
    let chain =
        Chain::new(vec![layer(Box::new(image), &source), layer(Box::new(raw), &base)]).unwrap();

    let own = explain(&chain, GuestOffset::new(9 * 512 + 5)).unwrap();
    let [TraceStep::SectorBit { sector: 9, at, byte: 0b10, bit: 1 }] = own.layers[0].trace[..]
    else {
        panic!("{own:?}")
    };
    assert_eq!(at, HostOffset::new(8193));
    let host = HostOffset::new(12288 + 9 * 512 + 5);
    assert_eq!(own.mapping, Mapping::Data(HostPlace::in_image(host)));
    let left = explain(&chain, GuestOffset::new(8 * 512)).unwrap();
    assert!(matches!(left.layers[0].outcome, Outcome::GoesOn), "{left:?}");
    assert_eq!((left.depth(), left.layers.len()), (1, 2));

    let used = explain_reverse(&chain, 0, FileRole::Image, host).unwrap();
    let expected = GuestUse {
        snapshot: None,
        guest: GuestOffset::new(9 * 512 + 5),
        kind: GuestUseKind::Data,
        visibility: Visibility::Shown,
    };
    assert_eq!(used.guests, std::slice::from_ref(&expected), "{used:?}");
    let bitmap = explain_reverse(&chain, 0, FileRole::Image, at).unwrap();
    assert_eq!(bitmap.metadata[0].1, "the bitmap of sectors");
    // Below, the same byte is hidden; a neighbour is not.
    let below = |at| explain_reverse(&chain, 1, FileRole::Image, HostOffset::new(at)).unwrap();
    let visibility = |at| below(at).guests[0].visibility;
    assert_eq!(visibility(9 * 512 + 5), Visibility::HiddenBy(0));
    assert_eq!(visibility(8 * 512), Visibility::Shown);
    assert_eq!(below(8192).guests, []);
}

#[test]
fn damage_ends_the_way_and_is_told() {
    let mut bytes = cow();
    bytes.truncate(8193);
    let source = Arc::new(Source::from_bytes("a.cow", bytes));
    let image = CowImage::open_past_damage(Arc::clone(&source)).unwrap();
    let chain = Chain::new(vec![layer(Box::new(image), &source)]).unwrap();
    assert!(explain(&chain, GuestOffset::new(7 * 512)).unwrap().damage().is_none());
    let torn = explain(&chain, GuestOffset::new(8 * 512)).unwrap();
    assert!(torn.damage().unwrap().to_string().contains("a.cow: at offset 0x2000: the bitmap"));
    assert!(matches!(torn.mapping, Mapping::Damaged { .. }));
}

#[test]
fn a_byte_past_the_disk_is_refused() {
    let chain = chain_of(vec![vec![crate::chain::tests::Sector::Zero; 3]]);
    let error = explain(&chain, GuestOffset::new(3 * SECTOR_SIZE)).unwrap_err();
    assert_eq!(error.to_string(), "the disk has 1536 bytes and no byte 1536 (0x600)");
    assert!(explain(&chain, GuestOffset::new(3 * SECTOR_SIZE - 1)).is_ok());
}
