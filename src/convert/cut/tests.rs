//! Cutting beside a model that looks at each sector.

use proptest::prelude::*;

use super::*;
use crate::units::HostOffset;

const SECTOR: u64 = 512;

/// Pieces with a few sectors each; bytes come from a file of which every sector is asked for
/// once, with and without gap.
fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    let content = prop_oneof![
        Just(Content::Backing),
        Just(Content::Zeros),
        Just(Content::Bytes { place: None }),
        (0..2u32, any::<bool>()).prop_map(|(file, _)| Content::Bytes {
            place: Some(InputPlace { file, offset: HostOffset::new(0) })
        }),
    ];
    prop::collection::vec((content, 1..20u64, 0..2u64), 0..40).prop_map(|runs| {
        let (mut at, mut host) = (0, 0);
        let mut pieces = Vec::new();
        for (content, sectors, gap) in runs {
            let content = match content {
                Content::Bytes { place: Some(place) } => {
                    host += gap * SECTOR;
                    let offset = HostOffset::new(host);
                    host += sectors * SECTOR;
                    Content::Bytes { place: Some(InputPlace { offset, ..place }) }
                }
                other => other,
            };
            let end = at + sectors * SECTOR;
            pieces.push(Piece { range: range(at, end), content });
            at = end;
        }
        pieces
    })
}

fn range(start: u64, end: u64) -> GuestRange {
    GuestRange::new(GuestOffset::new(start), GuestOffset::new(end))
}

/// What each sector is.
fn sectors(pieces: &[Piece]) -> Vec<Content> {
    let sector = |piece: Piece| {
        let count = piece.range.length().get() / SECTOR;
        (0..count).map(move |index| {
            let distance = ByteLen::new(index * SECTOR);
            without_start(piece, piece.range.start.saturating_add(distance)).content
        })
    };
    pieces.iter().copied().flat_map(sector).collect()
}

proptest! {
    #[test]
    fn each_granule_is_what_its_sectors_are(pieces in pieces(), granularity in 0..5u32) {
        let granularity = SECTOR << granularity;
        let sectors = sectors(&pieces);
        let size = sectors.len() as u64 * SECTOR;
        let input = pieces.iter().copied().map(Ok);
        let cuts: Vec<Cut> =
            Cutter::new(input, granularity, ByteLen::new(size)).map(|cut| cut.unwrap()).collect();
        let mut at = 0;
        let mut of_granules = Vec::new();
        for cut in cuts {
            let (start, end) = (cut.range.start.get(), cut.range.end.get());
            prop_assert!(start == at && start < end && end <= size, "in order");
            prop_assert!(start % granularity == 0 && (end % granularity == 0 || end == size));
            let mut granule = start;
            while granule < end {
                let distance = ByteLen::new(granule - start);
                of_granules.push(match cut.kind {
                    CutKind::Bytes(place) => {
                        CutKind::Bytes(place.map(|place| place.advanced(distance)))
                    }
                    other => other,
                });
                granule += granularity;
            }
            at = end;
        }
        prop_assert_eq!(at, size, "without gap");
        let per_granule = usize::try_from(granularity / SECTOR).unwrap();
        let granules = sectors.chunks(per_granule);
        for (got, sectors) in of_granules.iter().zip(granules) {
            let kind = |content: &Content| std::mem::discriminant(content);
            let alike = sectors.iter().all(|sector| kind(sector) == kind(&sectors[0]));
            match (*got, sectors[0]) {
                (got, _) if !alike => prop_assert_eq!(got, CutKind::Mixed),
                (got, Content::Backing) => prop_assert_eq!(got, CutKind::Backing),
                (got, Content::Zeros) => prop_assert_eq!(got, CutKind::Zeros),
                (CutKind::Bytes(Some(place)), _) => {
                    for (index, sector) in (0..).zip(sectors) {
                        let place = place.advanced(ByteLen::new(index * SECTOR));
                        prop_assert_eq!(*sector, Content::Bytes { place: Some(place) });
                    }
                }
                (got, _) => prop_assert_eq!(got, CutKind::Bytes(None)),
            }
        }
    }
}

#[test]
fn neighbours_that_carry_each_other_on_are_one_cut() {
    let place = |sector: u64| Content::Bytes {
        place: Some(InputPlace { file: 0, offset: HostOffset::new(sector * SECTOR) }),
    };
    let piece = |start: u64, content| Piece { range: range(start, start + 8 * SECTOR), content };
    let pieces = [
        piece(0, place(100)),
        piece(8 * SECTOR, place(108)),
        piece(16 * SECTOR, place(300)),
        piece(24 * SECTOR, Content::Zeros),
        piece(32 * SECTOR, Content::Zeros),
    ];
    let cuts: Vec<u64> = Cutter::new(pieces.into_iter().map(Ok), 4096, ByteLen::new(40 * SECTOR))
        .map(|cut| cut.unwrap().range.length().get() / SECTOR)
        .collect();
    assert_eq!(cuts, [16, 8, 16]);
}

#[test]
fn an_error_comes_in_its_place() {
    let piece = |start: u64| Piece { range: range(start, start + 512), content: Content::Zeros };
    let pieces = [Ok(piece(0)), Ok(piece(512)), Err(crate::error::Error::invalid("here"))];
    let mut cutter = Cutter::new(pieces.into_iter(), 512, ByteLen::new(2048));
    assert_eq!(cutter.next().unwrap().unwrap().range, range(0, 1024));
    assert!(cutter.next().unwrap().is_err());
}
