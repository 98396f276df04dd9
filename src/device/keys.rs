//! Keys of encrypted layers on their way to the kernel.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::table::CryptKey;

/// The keys of an attachment, by layer. Once its tables are loaded the kernel has copies
/// of its own, and these are taken away.
#[derive(Debug, Default)]
pub struct Keys(Mutex<BTreeMap<u32, CryptKey>>);

impl Keys {
    fn all(&self) -> MutexGuard<'_, BTreeMap<u32, CryptKey>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The key of the layer at this depth is this one.
    pub fn insert(&self, layer: u32, key: CryptKey) {
        self.all().insert(layer, key);
    }

    /// The key of a layer.
    pub(super) fn of_layer(&self, layer: u32) -> Option<CryptKey> {
        self.all().get(&layer).cloned()
    }

    /// Takes all of them away.
    pub(super) fn take(&self) -> BTreeMap<u32, CryptKey> {
        std::mem::take(&mut *self.all())
    }
}
