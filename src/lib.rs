//! imgdm turns a virtual-machine disk image into a block device that the Linux
//! kernel serves alone.
//!
//! The way of the data:
//!
//! ```text
//! open -> parse -> block status -> chain -> extents -> plan | bind -> table -> load
//! ```
//!
//! Left of the bar is pure: bytes in, values out; no root, no ioctl, no clock. Right
//! of it is one narrow seam to the machine, [`device`].
//!
//! | module | what it holds |
//! |---|---|
//! | [`units`] | offsets, lengths and sectors, each its own type |
//! | [`error`] | the one error: kind, file, offset, cause |
//! | [`signature`] | what lies on a partition: file systems, swap, RAID, LVM |
//! | [`source`] | reading files and block devices; holes |
//! | [`lock`] | QEMU-compatible locks |
//! | [`holes`] | holes and unwritten extents under a range of a file |
//! | [`open`] | which files may be opened; names, formats, depth, cycles |
//! | [`filesystem`] | what it takes to look into a file system and leave it as it is |
//! | [`format`](mod@format) | raw, qcow2, qcow, cow |
//! | [`crypt`] | encrypted images: from passphrase to volume key |
//! | [`check`](mod@check) | what is wrong with an image's metadata |
//! | [`status`] | what one layer says of a guest range |
//! | [`damage`] | what damage spoils, where resolving goes on past it |
//! | [`chain`] | folding the layers, top first |
//! | [`extent`] | a row of a map |
//! | [`explain`] | where one byte of the disk comes from, and who uses a byte of a file |
//! | [`inflate`] | inflating a compressed cluster |
//! | [`read`] | reading the disk through its chain: at any offset, or a range on all cores |
//! | [`hash`] | sha256 and BLAKE3 of the disk, or of a file |
//! | [`metadata`] | where every piece of metadata lies, and what nothing refers to |
//! | [`info`] | what an image says of itself, as `qemu-img info` has it |
//! | [`convert`](mod@convert) | copying a disk into a new image |
//! | [`diff`] | where two disks differ, by mapping or by bytes |
//! | [`picture`] | what a picture of the disk shows: bytes of each state in cells, fragmentation |
//! | [`partition`] | partition tables of the virtual disk |
//! | [`lvm`] | LVM on the virtual disk: volume groups, and what logical volumes are made of |
//! | [`imgdmtab`] | `/etc/imgdmtab`: what is attached at boot |
//! | [`plan`] | extents to segments, backings and tables; what stands in the way |
//! | [`scratch`] | what the image's files don't hold as it is: inflated clusters, partial sectors |
//! | [`overlay`] | the store of a writable device: what ties it to its image, and what was changed |
//! | [`worker`] | the threads that read images |
//! | `sandbox` | shutting threads off from files and from most system calls (feature `sandbox`) |
//! | [`table`] | `dmsetup` text, printed and parsed |
//! | [`device`] | loop devices and device-mapper, real and fake |

mod buffer;
pub mod chain;
pub mod check;
pub mod convert;
pub mod crypt;
pub mod damage;
pub mod device;
pub mod diff;
pub mod error;
pub mod explain;
pub mod extent;
pub mod filesystem;
pub mod format;
pub mod hash;
pub mod holes;
pub mod imgdmtab;
pub mod inflate;
pub mod info;
pub mod lock;
pub mod lvm;
pub mod metadata;
pub mod open;
pub mod overlay;
pub mod partition;
pub mod picture;
pub mod plan;
pub mod read;
#[cfg(feature = "sandbox")]
pub mod sandbox;
pub mod scratch;
pub mod signature;
pub mod source;
pub mod status;
pub mod table;
pub mod units;
mod vectorized;
pub mod worker;

pub use error::{Error, ErrorKind, Result};
