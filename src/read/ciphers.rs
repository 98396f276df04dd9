//! The unlocked ciphers of a chain's encrypted layers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::HOLES;
use crate::chain::Chain;
use crate::crypt::{CryptHeader, SectorCipher, VolumeKey};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Mapping;
use crate::units::GuestRange;

/// Ciphers with their keys, by the depth of the layer that each is for (0 the active
/// layer). None are needed for a chain in the clear.
#[derive(Clone, Debug, Default)]
pub struct Ciphers(pub(super) BTreeMap<u32, Arc<SectorCipher>>);

impl Ciphers {
    /// No layer unlocked.
    pub fn new() -> Self {
        Self::default()
    }

    /// Unlocks the layer at `depth` by its volume's key, which is not kept.
    ///
    /// # Errors
    /// `WrongKey` where the key is not as long as the cipher's.
    pub fn insert(&mut self, depth: u32, header: &CryptHeader, key: &VolumeKey) -> Result<()> {
        self.0.insert(depth, Arc::new(SectorCipher::new(header, key)?));
        Ok(())
    }

    /// Those of [`Chain::base`] at that depth.
    #[must_use]
    pub fn of_base(&self, depth: u32) -> Self {
        let below = self.0.range(depth..);
        Self(below.map(|(at, cipher)| (at - depth, Arc::clone(cipher))).collect())
    }

    /// The cipher of the layer at `depth` of `chain`.
    pub(super) fn get(&self, chain: &Chain, depth: u32) -> Result<&SectorCipher> {
        self.0.get(&depth).map(Arc::as_ref).ok_or_else(|| {
            let message = format!("layer {depth} is encrypted, and its key is missing");
            let error = Error::new(ErrorKind::WrongKey(message));
            match chain.layers().get(depth as usize) {
                Some(layer) => error.at_path(layer.source.path()),
                None => error,
            }
        })
    }
}

impl Chain {
    /// False where no layer is encrypted.
    pub(crate) fn can_need_keys(&self) -> bool {
        self.layers().iter().any(|layer| !matches!(layer.image.crypt_header(), Ok(None)))
    }

    /// The depths of the layers whose ciphertext is to be seen in `range`: reading it takes
    /// their keys, and no others. Layers that are covered, or hold only compressed
    /// clusters (which are never encrypted), need none.
    ///
    /// # Errors
    /// What a layer's metadata says.
    pub fn keys_needed(&self, range: GuestRange) -> Result<BTreeSet<u32>> {
        let mut needed = BTreeSet::new();
        if !self.can_need_keys() {
            return Ok(needed);
        }
        self.map_windows(
            range,
            HOLES,
            |_, extents| {
                let encrypted = |mapping| matches!(mapping, Mapping::Encrypted { .. });
                let mut depths: Vec<u32> = extents
                    .filter(|extent| encrypted(extent.mapping))
                    .map(|extent| extent.depth)
                    .collect();
                depths.dedup();
                depths
            },
            |depths| {
                needed.extend(depths);
                Ok(())
            },
        )?;
        Ok(needed)
    }
}
