//! Comparing disks of a few sectors, beside a model that asks sector by sector.

#![allow(clippy::cast_possible_truncation)]

use proptest::prelude::*;

use super::*;
use crate::chain::tests::{Sector, chain_on, layers, model};
use crate::error::Error;
use crate::read::tests::{ciphers, disk, file};
use crate::source::Source;
use crate::units::SECTOR_SIZE;

const SECTOR: usize = SECTOR_SIZE as usize;

fn chain(layers: &[Vec<Sector>], files: &[Arc<Source>]) -> Chain {
    chain_on(layers.to_vec(), files)
}

fn files() -> Vec<Arc<Source>> {
    (0..8).map(|depth| Arc::new(Source::from_bytes(format!("layer{depth}"), file(depth)))).collect()
}

fn state(sector: Sector) -> State {
    match sector {
        Sector::Unallocated | Sector::Zero => State::Zero,
        Sector::Data(_) => State::Data,
        Sector::Encrypted(_) => State::Encrypted,
        Sector::Compressed => State::Compressed,
    }
}

/// The kind of each sector; checks that the rows come in order and are joined.
fn listed(comparison: &Comparison<'_>, content: bool) -> Vec<Option<DifferenceKind>> {
    let sectors = comparison.whole().end.get() / SECTOR_SIZE;
    let mut kinds = vec![None; sectors as usize];
    let mut rows: Vec<Difference> = Vec::new();
    let mut done = GuestOffset::ZERO;
    let each = |difference: &Difference| {
        rows.push(*difference);
        Ok(())
    };
    let tick = |at| {
        assert!(at >= done);
        done = at;
        Ok(())
    };
    if content {
        comparison.for_each_content(ciphers(), each, tick).unwrap();
    } else {
        comparison.for_each_mapping(each, tick).unwrap();
    }
    assert_eq!(done, comparison.whole().end);
    for pair in rows.windows(2) {
        let (a, b) = (&pair[0], &pair[1]);
        assert!(a.range.end < b.range.start || (a.range.end == b.range.start && a.kind != b.kind));
    }
    for Difference { range, kind } in rows {
        assert!(!range.is_empty());
        let sectors = range.start.get() / SECTOR_SIZE..range.end.get() / SECTOR_SIZE;
        sectors.for_each(|sector| kinds[sector as usize] = Some(kind));
    }
    kinds
}

/// What the mapping of each sector is expected to come to.
fn expected(
    a: &[Vec<Sector>],
    b: &[Vec<Sector>],
    base_at: Option<u32>,
) -> Vec<Option<DifferenceKind>> {
    let of =
        |layers: &[Vec<Sector>], sector| (sector < layers[0].len()).then(|| model(layers, sector));
    (0..a[0].len().max(b[0].len()))
        .map(|sector| match (of(a, sector), of(b, sector)) {
            (Some((da, a)), Some((db, b))) => {
                let differs = match base_at {
                    Some(depth) => db < depth,
                    None => {
                        (da, a) != (db, b) && (state(a), state(b)) != (State::Zero, State::Zero)
                    }
                };
                differs.then(|| DifferenceKind::Mapping { a: state(a), b: state(b) })
            }
            (Some((_, a)), None) => Some(DifferenceKind::OnlyInA(state(a))),
            (None, Some((_, b))) => Some(DifferenceKind::OnlyInB(state(b))),
            (None, None) => None,
        })
        .collect()
}

/// What is expected of the bytes of each sector: all that differ, whatever the mappings say.
fn expected_bytes(
    (a, bytes_a): (&[Vec<Sector>], &[u8]),
    (b, bytes_b): (&[Vec<Sector>], &[u8]),
) -> Vec<Option<DifferenceKind>> {
    let mut kinds = expected(a, b, None);
    let sectors = bytes_a.chunks(SECTOR).zip(bytes_b.chunks(SECTOR)).enumerate();
    for (sector, (bytes_a, bytes_b)) in sectors {
        let (a, b) = (state(model(a, sector).1), state(model(b, sector).1));
        kinds[sector] = (bytes_a != bytes_b).then_some(DifferenceKind::Content { a, b });
    }
    kinds
}

proptest! {
    // Each case starts and ends work on all cores several times.
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_listed_is_what_asking_sector_by_sector_finds(a in layers(), b in layers()) {
        let files = files();
        let (chain_a, chain_b) = (chain(&a, &files), chain(&b, &files));
        let comparison = Comparison::new(&chain_a, &chain_b);
        prop_assert_eq!(listed(&comparison, false), expected(&a, &b, None));
        let bytes = expected_bytes((&a, &disk(&a)), (&b, &disk(&b)));
        prop_assert_eq!(listed(&comparison, true), bytes);
        prop_assert!(listed(&Comparison::new(&chain_a, &chain_a), false).iter().all(Option::is_none));
    }

    #[test]
    fn an_overlay_differs_from_its_base_where_it_holds_something(
        layers in layers(),
        depth in any::<prop::sample::Index>(),
    ) {
        prop_assume!(layers.len() > 1);
        let depth = 1 + depth.index(layers.len() - 1);
        let overlay = chain(&layers, &files());
        let base = overlay.base(depth as u32).unwrap();
        let comparison = Comparison::with_base(&overlay, &base, depth as u32);
        let kinds = expected(&layers[depth..], &layers, Some(depth as u32));
        prop_assert_eq!(listed(&comparison, false), kinds);
        // By itself: in the model the files' bytes go by the depth in the whole chain.
        let mut below = vec![0; layers[depth].len() * SECTOR];
        base.read_at(&ciphers().of_base(depth as u32), GuestOffset::ZERO, &mut below).unwrap();
        let bytes = expected_bytes((&layers[depth..], &below), (&layers, &disk(&layers)));
        prop_assert_eq!(listed(&comparison, true), bytes);
    }

    #[test]
    fn keys_are_needed_of_layers_whose_ciphertext_is_compared(a in layers(), b in layers()) {
        let files = files();
        let (chain_a, chain_b) = (chain(&a, &files), chain(&b, &files));
        let kinds = expected(&a, &b, None);
        let needed = |layers: &[Vec<Sector>]| -> BTreeSet<u32> {
            (0..layers[0].len())
                .filter(|&at| matches!(kinds[at], Some(DifferenceKind::Mapping { .. })))
                .map(|at| model(layers, at))
                .filter(|(_, sector)| matches!(sector, Sector::Encrypted(_)))
                .map(|(depth, _)| depth)
                .collect()
        };
        let found = Comparison::new(&chain_a, &chain_b).keys_needed().unwrap();
        prop_assert_eq!(found, (needed(&a), needed(&b)));
    }
}

#[test]
fn the_base_of_a_chain_is_the_rest_of_it() {
    let layers = [vec![Sector::Unallocated; 3], vec![Sector::Data(1); 5], vec![Sector::Zero; 7]];
    let chain = chain(&layers, &files());
    let base = chain.base(1).unwrap();
    assert_eq!(base.virtual_size().get(), 5 * SECTOR_SIZE);
    assert_eq!(base.layers().len(), 2);
    assert_eq!(base.base(1).unwrap().virtual_size().get(), 7 * SECTOR_SIZE);
    assert!(base.base(2).is_none() && chain.base(3).is_none() && chain.base(u32::MAX).is_none());
}

#[test]
fn the_first_error_ends_the_comparison() {
    let files = files();
    let (a, b) = ([vec![Sector::Data(1); 4]], [vec![Sector::Zero; 4]]);
    let (a, b) = (chain(&a, &files), chain(&b, &files));
    let comparison = Comparison::new(&a, &b);
    let stop = || Err(Error::invalid("enough"));
    assert!(comparison.for_each_mapping(|_| stop(), |_| Ok(())).is_err());
    assert!(comparison.for_each_mapping(|_| Ok(()), |_| stop()).is_err());
    assert!(comparison.for_each_content(&Ciphers::new(), |_| stop(), |_| Ok(())).is_err());
    assert!(comparison.for_each_content(&Ciphers::new(), |_| Ok(()), |_| stop()).is_err());
}

#[test]
fn chains_that_are_not_encrypted_are_not_walked_for_keys() {
    let (a, b) = (crate::chain::tests::torn(), crate::chain::tests::torn());
    let comparison = Comparison::new(&a, &b);
    assert!(comparison.for_each_mapping(|_| Ok(()), |_| Ok(())).is_err(), "a walk would fail");
    assert_eq!(comparison.keys_needed().unwrap(), (BTreeSet::new(), BTreeSet::new()));
}
