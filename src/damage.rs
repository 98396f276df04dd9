//! Damage that resolving goes on past: which guest ranges it spoils, and why.
//!
//! A layer whose metadata contradicts its format is an error to whoever hands its bytes
//! on. To whoever only looks (`map`, `plan`) it is a finding among others: the layer's
//! answer for what the damage spoils is [`BlockStatus::Damaged`], and the damage itself
//! is put on a [`DamageList`].

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::status::BlockStatus;
use crate::units::{GuestOffset, GuestRange};

/// Damage that a [`DamageList`] keeps in full; what comes after is only counted. An image
/// of a few GiB can hold millions of bad entries.
pub const MAX_LISTED: usize = 100;

/// A guest range that a layer can't tell of, and why.
#[derive(Debug)]
pub struct Damage {
    /// The layer: 0 the active layer, 1 its backing file, and so on.
    pub depth: u32,
    /// All that is spoiled, as far as the layer's disk reaches: a cluster, what an L2
    /// table describes, or what the lost part of an L1 table or bitmap does. It may reach
    /// out of the range that was asked for.
    pub range: GuestRange,
    /// What is wrong, with the file and the place in it.
    pub error: Error,
}

/// How much damage one layer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerDamage {
    /// How many ranges are spoiled.
    pub count: u64,
    /// Start of the first one.
    pub first: GuestOffset,
    /// Start of the last one: what is found next may be the same, seen from another window.
    last: GuestOffset,
}

/// Damage in the order in which it was found: in guest order within each layer.
#[derive(Debug, Default)]
pub struct DamageList {
    listed: Vec<Damage>,
    layers: BTreeMap<u32, LayerDamage>,
    /// The layer that is being asked.
    asked: u32,
}

impl DamageList {
    /// What is found from now on is of the layer at this depth.
    pub(crate) fn set_layer(&mut self, depth: u32) {
        self.asked = depth;
    }

    /// True where nothing was found.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// How many ranges are spoiled, in all layers.
    pub fn count(&self) -> u64 {
        self.layers.values().map(|layer| layer.count).sum()
    }

    /// The first of the damage, at most [`MAX_LISTED`].
    pub fn listed(&self) -> &[Damage] {
        &self.listed
    }

    /// The damaged layers by depth.
    pub fn layers(&self) -> impl Iterator<Item = (u32, LayerDamage)> + '_ {
        self.layers.iter().map(|(&depth, &layer)| (depth, layer))
    }

    /// Adds damage of the layer that is being asked, unless it is the last one again.
    fn push(&mut self, range: GuestRange, error: Error) {
        let depth = self.asked;
        let found = LayerDamage { count: 1, first: range.start, last: range.start };
        if self.count_in(depth, found) > 0 && self.listed.len() < MAX_LISTED {
            self.listed.push(Damage { depth, range, error });
        }
    }

    /// Counts what was found in a layer after what is known of it; says how much of it is
    /// news.
    fn count_in(&mut self, depth: u32, later: LayerDamage) -> u64 {
        let Some(known) = self.layers.get_mut(&depth) else {
            self.layers.insert(depth, later);
            return later.count;
        };
        let news = later.count - u64::from(known.last == later.first);
        known.count += news;
        known.last = later.last;
        news
    }

    /// Forgets the damage of all layers but those at these depths.
    pub(crate) fn retain_layers(&mut self, keep: impl Fn(u32) -> bool) {
        self.listed.retain(|damage| keep(damage.depth));
        self.layers.retain(|&depth, _| keep(depth));
    }

    /// Adds what was found in windows further on.
    pub fn append(&mut self, later: DamageList) {
        let known_ends: Vec<_> = later
            .layers
            .iter()
            .filter(|(depth, found)| {
                self.layers.get(depth).is_some_and(|known| known.last == found.first)
            })
            .map(|(&depth, found)| (depth, found.first))
            .collect();
        for (&depth, &found) in &later.layers {
            self.count_in(depth, found);
        }
        let room = MAX_LISTED.saturating_sub(self.listed.len());
        let is_news = |damage: &Damage| !known_ends.contains(&(damage.depth, damage.range.start));
        self.listed.extend(later.listed.into_iter().filter(is_news).take(room));
    }
}

/// What a layer says of a range that damage spoils: where `list` is there, the damage is
/// put on it and resolving goes on.
///
/// # Errors
/// `error` itself, where there is no list.
pub(crate) fn spoil(
    list: &mut Option<DamageList>,
    spoiled: GuestRange,
    error: Error,
) -> Result<BlockStatus> {
    let Some(list) = list else { return Err(error) };
    list.push(spoiled, error);
    Ok(BlockStatus::Damaged { from: spoiled.start })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> GuestRange {
        GuestRange::new(GuestOffset::new(start), GuestOffset::new(end))
    }

    fn found(depth: u32, starts: &[u64]) -> DamageList {
        let mut list = Some(DamageList::default());
        list.as_mut().unwrap().set_layer(depth);
        for &start in starts {
            spoil(&mut list, range(start, start + 10), Error::invalid(format!("{start}"))).unwrap();
        }
        list.unwrap()
    }

    fn starts(list: &DamageList) -> Vec<(u32, u64)> {
        list.listed().iter().map(|damage| (damage.depth, damage.range.start.get())).collect()
    }

    #[test]
    fn without_a_list_damage_is_an_error() {
        let error = spoil(&mut None, range(0, 1), Error::invalid("bad")).unwrap_err();
        assert_eq!(error.to_string(), "bad");
    }

    #[test]
    fn what_several_windows_see_counts_once_in_each_layer() {
        let mut list = found(0, &[10, 20, 20]);
        assert_eq!(list.count(), 2);
        list.append(found(1, &[20, 30]));
        list.append(found(0, &[20, 40]));
        list.append(DamageList::default());
        list.append(found(1, &[30]));
        assert_eq!(starts(&list), [(0, 10), (0, 20), (1, 20), (1, 30), (0, 40)]);
        assert_eq!(list.count(), 5);
        let layers: Vec<_> = list.layers().map(|(d, l)| (d, l.count, l.first.get())).collect();
        assert_eq!(layers, [(0, 3, 10), (1, 2, 20)]);
    }

    #[test]
    fn the_list_is_bounded_and_the_count_is_not() {
        let mut list = DamageList::default();
        for window in 0..10 {
            // Each window sees the last of the one before.
            let starts: Vec<u64> = (window * 50..=window * 50 + 50).collect();
            list.append(found(3, &starts));
        }
        assert_eq!((list.count(), list.listed().len()), (501, MAX_LISTED));
        let expected: Vec<_> = (0..MAX_LISTED as u64).map(|start| (3, start)).collect();
        assert_eq!(starts(&list), expected);
    }
}
