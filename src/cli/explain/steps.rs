//! The steps of an explanation: JSON objects, and sentences.

use std::fmt;

use imgdm::error::printable;
use imgdm::format::qcow2::L2Entry;
use imgdm::format::trace::{Refcount, TraceStep};
use serde::Serialize;

use crate::cli::output::JsonPath;

/// A number as it is stored in a table: all 64 bits, which not every reader of JSON keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stored(pub(super) u64);

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)
    }
}

impl Serialize for Stored {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What an L2 entry or a subcluster's bits say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Meaning {
    Unallocated,
    Data,
    Zero,
    ZeroAllocated,
    Compressed,
    Contradiction,
}

#[derive(Debug, Serialize)]
pub(super) struct JsonSnapshot {
    pub(super) id: String,
    pub(super) name: String,
}

/// One step. All numbers are bytes from the start of the layer's image file, but those of
/// sectors.
#[derive(Debug, Serialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub(super) enum Step {
    /// A layer is asked.
    Layer {
        depth: u32,
        #[serde(flatten)]
        file: JsonPath,
        format: &'static str,
        virtual_size: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        snapshot: Option<JsonSnapshot>,
    },
    L1Entry {
        index: u64,
        at: u64,
        value: Stored,
        /// Whether COPIED is set; qcow2 only.
        #[serde(skip_serializing_if = "Option::is_none")]
        copied: Option<bool>,
        #[serde(skip_serializing_if = "Option::is_none")]
        l2_table: Option<u64>,
    },
    NoL1Entry {
        index: u64,
        entries: u64,
    },
    L2Entry {
        index: u64,
        at: u64,
        value: Stored,
        meaning: Meaning,
        #[serde(skip_serializing_if = "Option::is_none")]
        copied: Option<bool>,
        /// Where the cluster or the compressed stream is.
        #[serde(skip_serializing_if = "Option::is_none")]
        host: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        stream_length: Option<u64>,
    },
    Subcluster {
        at: u64,
        bitmap: Stored,
        number: u64,
        allocated: bool,
        zero: bool,
        meaning: Meaning,
    },
    /// It takes no part in reading.
    Refcount {
        cluster: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        table_entry_at: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        table_entry: Option<Stored>,
        /// Where the refcount itself lies; none where there is no block for it.
        #[serde(skip_serializing_if = "Option::is_none")]
        at: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        count: Option<u64>,
        /// Why it can't be read.
        #[serde(skip_serializing_if = "Option::is_none")]
        problem: Option<String>,
    },
    SectorBit {
        sector: u64,
        at: u64,
        byte: u8,
        bit: u8,
        set: bool,
    },
    NoSectorBit {
        sector: u64,
    },
    /// The layer leaves the byte to its backing file.
    GoesOn {
        to: u32,
    },
    PastBackingEnd {
        backing_size: u64,
    },
    NoBacking,
    Encryption {
        method: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        cipher: Option<String>,
        iv_sector: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        problem: Option<String>,
    },
    /// What the host's file system says of the place.
    FileSystem {
        #[serde(flatten)]
        file: JsonPath,
        offset: u64,
        says: &'static str,
    },
    Damage {
        message: String,
    },
    /// A device-mapper device of the attachment, and its line that serves the sector.
    #[cfg(feature = "device")]
    Device {
        name: String,
        number: String,
        sector: u64,
        line: String,
    },
    /// Whether the chunk was written on a device that takes writes: then it is in the store,
    /// and what the image has there does not show.
    #[cfg(feature = "device")]
    Written {
        written: bool,
        #[serde(skip_serializing_if = "Option::is_none")]
        store: Option<JsonPath>,
        /// Where the byte is in the store's file.
        #[serde(skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
    },
    /// Where the live tables end.
    #[cfg(feature = "device")]
    Loop {
        device: JsonPath,
        #[serde(skip_serializing_if = "Option::is_none")]
        file: Option<JsonPath>,
        sector: u64,
        offset: u64,
        /// Whether that is the place that the image's own metadata gives; of data only.
        #[serde(skip_serializing_if = "Option::is_none")]
        agrees: Option<bool>,
    },
}

const COPIED: u64 = 1 << 63;

impl Step {
    /// The step of a table entry; `is_qcow2` where bit 63 stands for COPIED.
    pub(super) fn of_trace(step: &TraceStep, is_qcow2: bool) -> Self {
        let copied = |value: u64| is_qcow2.then_some(value & COPIED != 0);
        match step {
            TraceStep::L1Entry { index, at, value, l2_table } => Self::L1Entry {
                index: *index,
                at: at.get(),
                value: Stored(*value),
                copied: copied(*value),
                l2_table: l2_table.map(|table| table.get()),
            },
            TraceStep::NoL1Entry { index, entries } => {
                Self::NoL1Entry { index: *index, entries: *entries }
            }
            TraceStep::L2Entry { index, at, value, entry } => {
                let (meaning, host, stream_length) = match *entry {
                    L2Entry::Unallocated => (Meaning::Unallocated, None, None),
                    L2Entry::Standard(host) => (Meaning::Data, Some(host), None),
                    L2Entry::ZeroPlain => (Meaning::Zero, None, None),
                    L2Entry::ZeroAllocated(host) => (Meaning::ZeroAllocated, Some(host), None),
                    L2Entry::Compressed { host, stream_length } => {
                        (Meaning::Compressed, Some(host), Some(stream_length.get()))
                    }
                };
                Self::L2Entry {
                    index: *index,
                    at: at.get(),
                    value: Stored(*value),
                    meaning,
                    copied: copied(*value).filter(|_| meaning != Meaning::Compressed),
                    host: host.map(|host| host.get()),
                    stream_length,
                }
            }
            TraceStep::Subcluster { at, bitmap, number } => {
                let (allocated, zero) = TraceStep::subcluster_bits(*bitmap, *number);
                let meaning = match (allocated, zero) {
                    (false, false) => Meaning::Unallocated,
                    (true, false) => Meaning::Data,
                    (false, true) => Meaning::Zero,
                    (true, true) => Meaning::Contradiction,
                };
                let (at, bitmap, number) = (at.get(), Stored(*bitmap), *number);
                Self::Subcluster { at, bitmap, number, allocated, zero, meaning }
            }
            TraceStep::Refcount { cluster, found } => Self::of_refcount(cluster.get(), found),
            TraceStep::SectorBit { sector, at, byte, bit } => Self::SectorBit {
                sector: *sector,
                at: at.get(),
                byte: *byte,
                bit: *bit,
                set: byte.checked_shr(u32::from(*bit)).unwrap_or(0) & 1 == 1,
            },
            TraceStep::NoSectorBit { sector } => Self::NoSectorBit { sector: *sector },
        }
    }

    fn of_refcount(cluster: u64, found: &imgdm::Result<Refcount>) -> Self {
        match found {
            Ok(found) => Self::Refcount {
                cluster,
                table_entry_at: Some(found.table_entry_at.get()),
                table_entry: Some(Stored(found.table_entry)),
                at: found.at.map(|at| at.get()),
                count: Some(found.count),
                problem: None,
            },
            Err(error) => Self::Refcount {
                cluster,
                table_entry_at: None,
                table_entry: None,
                at: None,
                count: None,
                problem: Some(error.without_path()),
            },
        }
    }
}

fn copied_words(copied: Option<bool>) -> &'static str {
    if copied == Some(true) { ", COPIED" } else { "" }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layer { depth, file, format, virtual_size, snapshot } => {
                write!(f, "layer {depth}: {}", file.shown())?;
                if let Some(JsonSnapshot { id, name }) = snapshot {
                    write!(f, ", snapshot {} ({})", printable(id), printable(name))?;
                }
                write!(f, ": {format}, a disk of {virtual_size} bytes")
            }
            Self::L1Entry { index, at, value, copied, l2_table } => {
                write!(f, "L1 entry {index}, at {at:#x}, is {value}: ")?;
                match l2_table {
                    Some(table) => write!(f, "the L2 table at {table:#x}{}", copied_words(*copied)),
                    None => f.write_str("no L2 table, nothing is allocated"),
                }
            }
            Self::NoL1Entry { index, entries } => write!(
                f,
                "the L1 table has {entries} entries and no entry {index}: nothing is allocated"
            ),
            Self::L2Entry { index, at, value, meaning, copied, host, stream_length } => {
                write!(f, "L2 entry {index}, at {at:#x}, is {value}: ")?;
                let (host, copied) = (host.unwrap_or(0), copied_words(*copied));
                match meaning {
                    Meaning::Unallocated | Meaning::Contradiction => f.write_str("unallocated"),
                    Meaning::Data => write!(f, "the cluster at {host:#x}{copied}"),
                    Meaning::Zero => f.write_str("a zero cluster"),
                    Meaning::ZeroAllocated => {
                        write!(f, "a zero cluster that keeps the cluster at {host:#x}{copied}")
                    }
                    Meaning::Compressed => write!(
                        f,
                        "a compressed stream at {host:#x}, of at most {} bytes",
                        stream_length.unwrap_or(0)
                    ),
                }
            }
            Self::Subcluster { at, bitmap, number, allocated, zero, meaning } => {
                let what = match meaning {
                    Meaning::Data => "allocated",
                    Meaning::Zero => "reads as zero",
                    Meaning::Contradiction => "a contradiction",
                    _ => "unallocated",
                };
                write!(
                    f,
                    "subcluster {number} in the bitmap {bitmap} at {at:#x}: allocated {}, zero {}: {what}",
                    u8::from(*allocated),
                    u8::from(*zero)
                )
            }
            Self::Refcount { cluster, table_entry_at, table_entry, at, count, problem } => {
                write!(f, "refcount of the cluster at {cluster:#x}: ")?;
                if let Some(problem) = problem {
                    return write!(f, "can't be told: {}", printable(problem));
                }
                write!(f, "{}", count.unwrap_or(0))?;
                if let Some(at) = at {
                    write!(f, ", at {at:#x}")?;
                } else {
                    write!(f, ", there is no refcount block")?;
                }
                match (table_entry_at, table_entry) {
                    (Some(at), Some(entry)) => {
                        write!(f, " (refcount table entry at {at:#x}: {entry})")
                    }
                    _ => Ok(()),
                }
            }
            Self::SectorBit { sector, at, byte, bit, set } => {
                let whose = if *set { "is in this file" } else { "is the backing file's" };
                write!(
                    f,
                    "bit {bit} of byte {byte:#04x} at {at:#x} in the bitmap is {}: sector {sector} {whose}",
                    u8::from(*set)
                )
            }
            Self::NoSectorBit { sector } => {
                write!(f, "the bitmap has no bit for sector {sector}: it is the backing file's")
            }
            Self::GoesOn { to } => write!(f, "the backing file answers: layer {to}"),
            Self::PastBackingEnd { backing_size } => write!(
                f,
                "the backing file answers, but its disk ends after {backing_size} bytes: zero"
            ),
            Self::NoBacking => f.write_str("there is no backing file: zero"),
            Self::Encryption { method, cipher, iv_sector, problem } => {
                write!(f, "encrypted by {method}")?;
                match (cipher, problem) {
                    (Some(cipher), _) => write!(f, ", {}", printable(cipher))?,
                    (None, Some(problem)) => {
                        write!(f, ", the cipher can't be told ({})", printable(problem))?;
                    }
                    (None, None) => {}
                }
                write!(f, ", the IV is of sector {iv_sector}")
            }
            Self::FileSystem { file, offset, says } => {
                let says = match *says {
                    "hole" => "a hole",
                    "unwritten" => "an unwritten extent",
                    "past-end" => "nothing, the file ends before it,",
                    other => other,
                };
                write!(f, "the file system has {says} at {offset:#x} of {}", file.shown())
            }
            Self::Damage { message } => write!(f, "damaged: {}", printable(message)),
            #[cfg(feature = "device")]
            Self::Device { name, number, sector, line } => write!(
                f,
                "sector {sector} of the device {} ({number}) is served by its line: {}",
                printable(name),
                printable(line)
            ),
            #[cfg(feature = "device")]
            Self::Written { written: false, .. } => {
                f.write_str("its chunk was not written: the image shows")
            }
            #[cfg(feature = "device")]
            Self::Written { store, offset, .. } => {
                f.write_str("its chunk was written, and does NOT show what the image has: it is")?;
                if let Some(offset) = offset {
                    write!(f, " at {offset:#x} of")?;
                }
                match store {
                    Some(store) => write!(f, " the store {}", store.shown()),
                    None => f.write_str(" the store, which goes with the device"),
                }
            }
            #[cfg(feature = "device")]
            Self::Loop { device, file, sector, offset, agrees } => {
                write!(f, "sector {sector} of {}", device.shown())?;
                if let Some(file) = file {
                    write!(f, " is at {offset:#x} of {}", file.shown())?;
                }
                match agrees {
                    Some(true) => f.write_str(", as the image says"),
                    Some(false) => f.write_str(", which is NOT what the image says"),
                    None => Ok(()),
                }
            }
        }
    }
}
