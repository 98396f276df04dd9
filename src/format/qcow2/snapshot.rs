//! Internal snapshots (docs/interop/qcow2, section "Snapshots").

use std::fmt;
use std::str::FromStr;

use super::header::{MAX_SNAPSHOTS, Qcow2Header, TableLocation};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::source::Source;
use crate::units::{ByteLen, HostOffset};

const FIXED_LENGTH: usize = 40;
/// QCOW_MAX_SNAPSHOT_EXTRA_DATA in QEMU's block/qcow2.h.
pub(crate) const MAX_EXTRA_DATA: usize = 1024;
/// QCOW_MAX_SNAPSHOTS_SIZE.
pub(crate) const MAX_TABLE_BYTES: u64 = 1024 * 65536;
/// QCOW_MAX_L1_SIZE.
const MAX_L1_BYTES: u64 = 32 << 20;

/// One entry of the snapshot table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique ID string, as QEMU's `ID` column shows it.
    pub id: String,
    /// Name (QEMU's `TAG`).
    pub name: String,
    /// Where its entry of the snapshot table lies in the file.
    pub entry_offset: HostOffset,
    /// The L1 table; its bounds are checked only when the snapshot is used.
    pub l1_offset: HostOffset,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// Size of the virtual disk when it was taken, in bytes; checked only when the snapshot
    /// is used.
    pub virtual_size: ByteLen,
    /// Seconds since 1970 when it was taken.
    pub date_seconds: u32,
    /// The nanoseconds to it.
    pub date_nanoseconds: u32,
    /// Time that the guest had run, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Bytes of the VM state.
    pub vm_state_size: u64,
    /// Instructions that the guest had run, where they were counted.
    pub instruction_count: Option<u64>,
}

impl Snapshot {
    /// The snapshot's L1 table, checked.
    ///
    /// # Errors
    /// It is unaligned, or larger than 32 MiB.
    pub fn l1_table(&self, header: &Qcow2Header) -> Result<TableLocation> {
        let length = u64::from(self.l1_entries) * 8;
        let offset = self.l1_offset.get();
        let bad = |what: &str| {
            Err(Error::invalid(format!(
                "the L1 table of snapshot '{}' {what} (offset {offset:#x}, {length} bytes)",
                printable(&self.name)
            ))
            .at_offset(self.entry_offset.get()))
        };
        if length > MAX_L1_BYTES {
            return bad("is too large");
        }
        if !offset.is_multiple_of(header.cluster_size()) {
            return bad("does not start on a cluster boundary");
        }
        if i64::try_from(offset).is_err() {
            return bad("lies past 2^63");
        }
        Ok(TableLocation { offset: self.l1_offset, length: ByteLen::new(length) })
    }

    /// The snapshot's virtual size, checked.
    ///
    /// # Errors
    /// It is 2^63 bytes or more.
    pub fn checked_virtual_size(&self) -> Result<ByteLen> {
        if i64::try_from(self.virtual_size.get()).is_err() {
            return Err(Error::invalid(format!(
                "the virtual size of snapshot '{}' is past 2^63 bytes",
                printable(&self.name)
            ))
            .at_offset(self.entry_offset.get()));
        }
        Ok(self.virtual_size)
    }
}

/// Reads the whole snapshot table.
///
/// # Errors
/// It is cut off, larger than 64 MiB, or an entry has more than 1024 bytes of extra data.
pub(crate) fn read_table(source: &Source, header: &Qcow2Header) -> Result<Vec<Snapshot>> {
    let mut snapshots = Vec::new();
    read_table_into(source, header, &mut snapshots)?;
    Ok(snapshots)
}

/// Appends the entries of the snapshot table, up to where it is damaged.
///
/// # Errors
/// Those of [`read_table`].
pub(crate) fn read_table_into(
    source: &Source,
    header: &Qcow2Header,
    snapshots: &mut Vec<Snapshot>,
) -> Result<()> {
    if header.snapshot_count > MAX_SNAPSHOTS {
        return Err(Error::invalid(format!(
            "{} snapshots are more than {MAX_SNAPSHOTS}",
            header.snapshot_count
        ))
        .at_path(source.path())
        .at_offset(60));
    }
    let start = header.snapshots_offset.get();
    if header.snapshot_count > 0 && i64::try_from(start).is_err() {
        let message = format!("the snapshot table at {start:#x} lies past 2^63");
        return Err(Error::invalid(message).at_path(source.path()).at_offset(64));
    }
    let mut at = start;
    for index in 0..header.snapshot_count {
        at = at.next_multiple_of(8);
        let (snapshot, length) = read_entry(source, HostOffset::new(at), header)
            .map_err(|error| error.at_path(source.path()).at_offset(at))?;
        snapshots.push(snapshot);
        at += length;
        if at - start > MAX_TABLE_BYTES {
            return Err(Error::invalid(format!(
                "the snapshot table is larger than {MAX_TABLE_BYTES} bytes at entry {index}"
            ))
            .at_path(source.path())
            .at_offset(at));
        }
    }
    Ok(())
}

/// Reads one entry; gives its length as well, at most 40 + 1024 + 2 * 65535 bytes.
pub(crate) fn read_entry(
    source: &Source,
    at: HostOffset,
    header: &Qcow2Header,
) -> Result<(Snapshot, u64)> {
    const WHAT: &str = "the snapshot table";
    let mut fixed = [0; FIXED_LENGTH];
    source.read_exact(at, &mut fixed, WHAT)?;
    let u16_at = |i: usize| u16::from_be_bytes([fixed[i], fixed[i + 1]]);
    let u32_at =
        |i: usize| u32::from_be_bytes([fixed[i], fixed[i + 1], fixed[i + 2], fixed[i + 3]]);
    let extra_length = u32_at(36) as usize;
    if extra_length > MAX_EXTRA_DATA {
        return Err(Error::invalid(format!(
            "a snapshot has {extra_length} bytes of extra data, {MAX_EXTRA_DATA} at most are allowed"
        )));
    }
    let id_length = usize::from(u16_at(12));
    let name_length = usize::from(u16_at(14));
    let mut rest = vec![0; extra_length + id_length + name_length];
    source.read_exact(at.saturating_add(ByteLen::new(FIXED_LENGTH as u64)), &mut rest, WHAT)?;
    let (extra, strings) = rest.split_at(extra_length);
    let (id, name) = strings.split_at(id_length);
    let extra_u64 = |i: usize| extra.get(i..i + 8).map(|bytes| crate::format::be64(bytes, 0));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let snapshot = Snapshot {
        id: text(id),
        name: text(name),
        entry_offset: at,
        l1_offset: HostOffset::new(crate::format::be64(&fixed, 0)),
        l1_entries: u32_at(8),
        virtual_size: extra_u64(8).map_or(header.virtual_size, ByteLen::new).floor_to_sector(),
        date_seconds: u32_at(16),
        date_nanoseconds: u32_at(20),
        vm_clock_nanoseconds: crate::format::be64(&fixed, 3),
        vm_state_size: extra_u64(0).unwrap_or_else(|| u64::from(u32_at(32))),
        instruction_count: extra_u64(16).filter(|&count| count != u64::MAX),
    };
    Ok((snapshot, (FIXED_LENGTH + rest.len()) as u64))
}

/// Which snapshot the user means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotSelector {
    /// This ID, else this name (`-l WORD`).
    IdOrName(String),
    /// `-l snapshot.id=` and `-l snapshot.name=`: what is given must match.
    Exact {
        /// The ID, where given.
        id: Option<String>,
        /// The name, where given.
        name: Option<String>,
    },
}

impl SnapshotSelector {
    /// Finds the snapshot: an ID goes before a name, as in QEMU.
    ///
    /// # Errors
    /// There is none; the message lists those that are.
    pub fn find<'s>(&self, snapshots: &'s [Snapshot]) -> Result<&'s Snapshot> {
        let found = match self {
            Self::IdOrName(word) => snapshots
                .iter()
                .find(|s| s.id == *word)
                .or_else(|| snapshots.iter().find(|s| s.name == *word)),
            Self::Exact { id, name } => snapshots.iter().find(|s| {
                id.as_ref().is_none_or(|id| s.id == *id)
                    && name.as_ref().is_none_or(|name| s.name == *name)
            }),
        };
        found.ok_or_else(|| {
            const SHOWN: usize = 20;
            let short = |text: &str| {
                let cut: String = text.chars().take(64).collect();
                printable(&if cut.len() < text.len() { cut + "..." } else { cut })
            };
            let mut known: Vec<_> = snapshots
                .iter()
                .take(SHOWN)
                .map(|s| format!("{} ({})", short(&s.id), short(&s.name)))
                .collect();
            if let Some(more) = snapshots.len().checked_sub(SHOWN).filter(|&more| more > 0) {
                known.push(format!("and {more} more"));
            }
            Error::new(ErrorKind::SnapshotNotFound(if known.is_empty() {
                format!("no snapshot {self}: the image has no internal snapshots")
            } else {
                format!("no snapshot {self}; the image has: {}", known.join(", "))
            }))
        })
    }
}

impl fmt::Display for SnapshotSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IdOrName(word) => write!(f, "'{}'", printable(word)),
            Self::Exact { id, name } => {
                let id = id.iter().map(|id| format!("ID '{}'", printable(id)));
                let name = name.iter().map(|name| format!("name '{}'", printable(name)));
                f.write_str(&id.chain(name).collect::<Vec<_>>().join(" and "))
            }
        }
    }
}

impl FromStr for SnapshotSelector {
    type Err = Error;

    /// Understands `WORD`, `snapshot.id=ID` and `snapshot.name=NAME`, the latter two also
    /// together with a comma between (a doubled comma stands for one, as in QEMU).
    fn from_str(text: &str) -> Result<Self> {
        if !text.starts_with("snapshot.") {
            return Ok(Self::IdOrName(text.to_owned()));
        }
        let (mut id, mut name) = (None, None);
        for part in split_options(text) {
            match part.split_once('=') {
                Some(("snapshot.id", value)) => id = Some(value.to_owned()),
                Some(("snapshot.name", value)) => name = Some(value.to_owned()),
                _ => {
                    return Err(Error::new(ErrorKind::Usage(format!(
                        "'{part}' is neither snapshot.id=ID nor snapshot.name=NAME"
                    ))));
                }
            }
        }
        Ok(Self::Exact { id, name })
    }
}

/// Splits at single commas; `,,` is a comma.
fn split_options(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(id: &str, name: &str) -> Snapshot {
        Snapshot {
            id: id.to_owned(),
            name: name.to_owned(),
            entry_offset: HostOffset::ZERO,
            l1_offset: HostOffset::ZERO,
            l1_entries: 0,
            virtual_size: ByteLen::ZERO,
            date_seconds: 0,
            date_nanoseconds: 0,
            vm_clock_nanoseconds: 0,
            vm_state_size: 0,
            instruction_count: None,
        }
    }

    #[test]
    fn an_id_goes_before_a_name() {
        let table = [snapshot("1", "2"), snapshot("2", "x")];
        let find = |text: &str| {
            text.parse::<SnapshotSelector>().unwrap().find(&table).map(|s| s.id.clone())
        };
        assert_eq!(find("2").unwrap(), "2");
        assert_eq!(find("snapshot.name=2").unwrap(), "1");
        assert_eq!(find("snapshot.id=2,snapshot.name=x").unwrap(), "2");
        let error = find("3").unwrap_err();
        assert_eq!(error.to_string(), "no snapshot '3'; the image has: 1 (2), 2 (x)");
        assert!(find("snapshot.id=1,snapshot.name=x").is_err());
    }

    #[test]
    fn a_doubled_comma_is_one_of_the_name() {
        let selector: SnapshotSelector = "snapshot.name=a,,b".parse().unwrap();
        assert_eq!(selector, SnapshotSelector::Exact { id: None, name: Some("a,b".to_owned()) });
        assert!("snapshot.tag=x".parse::<SnapshotSelector>().is_err());
    }
}
