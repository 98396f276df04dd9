//! The sums against a model that counts byte by byte.

use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::chain::tests::{Sector, chain_of, layers, model};
use crate::units::SECTOR_SIZE;

fn picture(chain: &Chain, cells: usize) -> Picture {
    let done = Mutex::new(0);
    let progress = |bytes: ByteLen| *done.lock().unwrap() += bytes.get();
    let options =
        PictureOptions { cells, layers: &|_| true, holes: HoleQuery::AsQemu, progress: &progress };
    let picture = Picture::of(chain, &options).unwrap();
    assert_eq!(*done.lock().unwrap(), options.work(chain).get());
    picture
}

fn state(sector: Sector) -> State {
    match sector {
        Sector::Unallocated => State::Unallocated,
        Sector::Zero => State::Zero,
        Sector::Data(_) => State::Data,
        Sector::Encrypted(_) => State::Encrypted,
        Sector::Compressed => State::Compressed,
    }
}

/// Sums of the sectors in each cell, and of those past the last.
fn expected(grid: Grid, sectors: impl Iterator<Item = Sector>) -> (Vec<Sums>, Sums) {
    let mut cells = vec![Sums::default(); grid.cells()];
    let mut beyond = Sums::default();
    for (byte, sector) in (0..).zip(sectors.flat_map(|s| [s; 512])) {
        let cell = cells.get_mut(grid.cell_at(GuestOffset::new(byte)));
        cell.unwrap_or(&mut beyond).add(state(sector), 1);
    }
    (cells, beyond)
}

proptest! {
    #[test]
    fn cells_hold_what_the_sectors_in_them_are(layers in layers(), cells in 1..80usize) {
        let chain = chain_of(layers.clone());
        let picture = picture(&chain, cells);
        let disk = layers[0].len();
        let (whole, _) =
            expected(picture.grid, (0..disk).map(|sector| model(&layers, sector).1));
        prop_assert_eq!(&picture.whole.cells, &whole);
        prop_assert_eq!(picture.whole.total.total(), chain.virtual_size().get());
        prop_assert_eq!(picture.layers.len(), layers.len());
        for (strip, sectors) in picture.layers.iter().zip(&layers) {
            let (cells, beyond) = expected(picture.grid, sectors.iter().copied());
            prop_assert_eq!(&strip.strip.cells, &cells);
            prop_assert_eq!(strip.beyond, beyond);
            prop_assert_eq!(strip.strip.total.total(), sectors.len() as u64 * SECTOR_SIZE);
        }
        let mut visible = vec![Sums::default(); layers.len()];
        for sector in 0..disk {
            let (depth, found) = model(&layers, sector);
            visible[depth as usize].add(state(found), SECTOR_SIZE);
        }
        prop_assert_eq!(&picture.visible, &visible);
        let mut rows = 0;
        chain.for_each_extent(chain.whole(), HoleQuery::AsQemu, &mut |_| {
            rows += 1;
            Ok(())
        }).unwrap();
        prop_assert_eq!(picture.segments, rows);
    }

    #[test]
    fn a_disk_of_many_windows_is_its_parts(
        layers in layers(), cells in 1..80usize, repeats in 1..150usize,
    ) {
        // Windows are of 1 MiB and more: 2048 sectors.
        let layers: Vec<Vec<Sector>> = layers.iter().map(|layer| layer.repeat(repeats)).collect();
        let chain = chain_of(layers);
        let picture = picture(&chain, cells);
        let mut whole = WholePart::of(picture.grid, chain.whole(), SECTOR_SIZE, Extents::Folded([].iter().copied()));
        chain.for_each_extent(chain.whole(), HoleQuery::AsQemu, &mut |extent| {
            whole.area.push(extent);
            whole.segments.push(*extent);
            Ok(())
        }).unwrap();
        prop_assert_eq!(picture.segments, whole.segments.count);
        prop_assert_eq!(picture.whole, whole.area.into_strip());
    }
}

#[test]
fn one_cluster_of_an_empty_disk_is_seen() {
    let mut sums = Sums::default();
    assert_eq!(sums.look(), None);
    sums.add(State::Unallocated, 1 << 40);
    assert_eq!(sums.look().unwrap().state, State::Unallocated);
    sums.add(State::Zero, 512);
    assert_eq!(sums.look(), Some(Look { state: State::Zero, bytes: 512, of: (1 << 40) + 512 }));
    sums.add(State::Compressed, 512);
    let look = sums.look().unwrap();
    assert_eq!((look.state, look.density()), (State::Compressed, Density::Trace));
    sums.add(State::Data, 1024);
    let look = sums.look().unwrap();
    assert_eq!((look.state, look.bytes), (State::Data, 1536));
}

#[test]
fn a_density_starts_where_the_one_below_ends() {
    let density = |bytes, of| Look { state: State::Data, bytes, of }.density();
    let found = [1, 99, 100, 499, 500, 899, 900, 1000].map(|bytes| density(bytes, 1000));
    let [trace, some, most, full] = [Density::Trace, Density::Some, Density::Most, Density::Full];
    assert_eq!(found, [trace, trace, some, some, most, most, full, full]);
    assert_eq!(density(u64::MAX, u64::MAX), full);
}

#[test]
fn only_the_layers_asked_for_are_walked() {
    let sectors = |sector| vec![sector; 8];
    let chain = chain_of(vec![
        sectors(Sector::Unallocated),
        sectors(Sector::Unallocated),
        sectors(Sector::Data(3)),
    ]);
    let options = PictureOptions {
        cells: 4,
        layers: &|depth| depth == 1,
        holes: HoleQuery::AsQemu,
        progress: &|_| {},
    };
    let picture = Picture::of(&chain, &options).unwrap();
    assert_eq!(picture.layers.iter().map(|layer| layer.depth).collect::<Vec<_>>(), [1]);
    assert_eq!(options.work(&chain).get(), 2 * 8 * SECTOR_SIZE);
    assert_eq!(picture.visible[2].get(State::Data), 8 * SECTOR_SIZE);
}
