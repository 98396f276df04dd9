//! The store of a writable device: what was written to a disk whose image never changes.
//!
//! dm-snapshot keeps the chunks that were changed in a copy-on-write device. Ours is a file,
//! the store, in this layout:
//!
//! | from | what |
//! |---|---|
//! | 0 | our [`StoreHeader`]: of which disk it is, and what tells that the image has changed |
//! | [`STORE_OFFSET`] | dm-snapshot's persistent exception store ([`persistent`]), to the end |
//!
//! [`exceptions`] says which chunks were changed and where they lie, and [`input`] makes of them
//! a disk to be copied over its image. Everything here but [`store`], which makes and opens the
//! file, is bytes in, values out.

pub mod exceptions;
pub mod header;
pub mod identity;
pub mod input;
pub mod persistent;
pub mod store;

pub use header::{STORE_OFFSET, StoreHeader, StoreSnapshot};
pub use identity::{StoreFile, StoreFileKind};
pub use persistent::PersistentHeader;
pub use store::Store;
