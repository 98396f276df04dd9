//! Keys of encrypted layers on their way to the kernel.

use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::table::CryptKey;

/// The keys of an attachment, by layer. Once its tables are loaded the kernel has copies
/// of its own, and these are taken away.
#[derive(Debug, Default)]
pub struct Keys(RefCell<BTreeMap<u32, CryptKey>>);

impl Keys {
    /// The key of the layer at this depth is this one.
    pub fn insert(&self, layer: u32, key: CryptKey) {
        self.0.borrow_mut().insert(layer, key);
    }

    /// The key of a layer.
    pub(super) fn of_layer(&self, layer: u32) -> Option<CryptKey> {
        self.0.borrow().get(&layer).cloned()
    }

    /// Takes all of them away.
    pub(super) fn take(&self) -> BTreeMap<u32, CryptKey> {
        self.0.take()
    }
}
