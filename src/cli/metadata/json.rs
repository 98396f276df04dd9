//! `viscera`: the metadata in JSON, with the names and shapes of the proposal to dump qcow2
//! metadata (qemu-devel, December 2019), and more. Lists are written as the tables are read.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use imgdm::format::qcow2::bitmap::BitmapTableEntry;
use imgdm::format::qcow2::{ExtensionPlace, TableLocation};
use imgdm::metadata::{
    BitmapPlace, CowMetadata, CryptPlace, Found, L1Table, Layout, Metadata, Owner, Piece, Problem,
    Qcow2Metadata, QcowMetadata, RangeUse, UsedRange, Walk,
};
use imgdm::open::{LocalName, resolve_beside};
use serde::{Serialize, Serializer};

use super::super::output::JsonPath;
use super::{Content, problems};

/// A list that is written as it is read, and read anew each time that it is written.
struct Listed<'a, T>(Box<dyn Fn() -> Box<dyn Iterator<Item = T> + 'a> + 'a>);

impl<'a, T> Listed<'a, T> {
    fn new<I: Iterator<Item = T> + 'a>(list: impl Fn() -> I + 'a) -> Self {
        Self(Box::new(move || Box::new(list())))
    }
}

impl<T: Serialize> Serialize for Listed<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((self.0)())
    }
}

/// Bytes of a file.
#[derive(Serialize)]
struct Location {
    offset: u64,
    size: u64,
}

impl From<TableLocation> for Location {
    fn from(table: TableLocation) -> Self {
        Self { offset: table.offset.get(), size: table.length.get() }
    }
}

impl From<Piece> for Location {
    fn from(piece: Piece) -> Self {
        Self { offset: piece.offset.get(), size: piece.length.get() }
    }
}

/// The pieces of a walk, without what is wrong with them.
fn locations(found: impl Iterator<Item = Found>) -> impl Iterator<Item = Location> {
    found.filter_map(Result::ok).map(Location::from)
}

/// An object with nothing but a place.
#[derive(Serialize)]
struct Place {
    location: Location,
}

impl<T: Into<Location>> From<T> for Place {
    fn from(location: T) -> Self {
        Self { location: location.into() }
    }
}

#[derive(Serialize)]
struct Header {
    location: Location,
    version: u32,
}

#[derive(Serialize)]
struct CowHeader {
    location: Location,
    layout: String,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Extension {
    /// The specification's name, `unknown` where it has none.
    #[serde(rename = "type")]
    name: &'static str,
    type_number: u32,
    location: Location,
}

impl From<&ExtensionPlace> for Extension {
    fn from(place: &ExtensionPlace) -> Self {
        Self {
            name: place.name().unwrap_or("unknown"),
            type_number: place.kind,
            // The padding to a multiple of 8 is its own.
            location: Location {
                offset: place.offset.get(),
                size: place.length.get().next_multiple_of(8),
            },
        }
    }
}

#[derive(Serialize)]
struct BackingName {
    location: Location,
    #[serde(flatten)]
    name: JsonPath,
}

impl BackingName {
    fn new(location: TableLocation, name: &[u8]) -> Self {
        let name = JsonPath::from(Path::new(OsStr::from_bytes(name)));
        Self { location: location.into(), name }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct L1<'a> {
    name: String,
    location: Location,
    l2_list: Listed<'a, Location>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct SnapshotTable<'a> {
    location: Location,
    l1_list: Listed<'a, L1<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Bitmaps<'a> {
    bitmap_dir: BitmapDirectory<'a>,
    nb_bitmaps: usize,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct BitmapDirectory<'a> {
    location: Location,
    dir_entries: Listed<'a, Bitmap<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Bitmap<'a> {
    bitmap_name: &'a str,
    bitmap_table: BitmapTable<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct BitmapTable<'a> {
    location: Location,
    table_entries: Listed<'a, BitmapEntry>,
}

#[derive(Serialize)]
struct BitmapEntry {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<Location>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct CryptHeader {
    location: Location,
    #[serde(skip_serializing_if = "Option::is_none")]
    luks_header: Option<Location>,
    key_slots: Vec<KeySlot>,
}

#[derive(Serialize)]
struct KeySlot {
    active: bool,
    location: Location,
}

impl From<&CryptPlace> for CryptHeader {
    fn from(crypt: &CryptPlace) -> Self {
        let slot =
            |&(active, place): &(bool, TableLocation)| KeySlot { active, location: place.into() };
        Self {
            location: crypt.location.into(),
            luks_header: crypt.header.map(Location::from),
            key_slots: crypt.slots.iter().map(slot).collect(),
        }
    }
}

/// The external data file.
#[derive(Serialize)]
struct DataFile {
    /// As the image stores it.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<JsonPath>,
    /// Whether it is a raw image by itself.
    raw: bool,
    /// Where the name leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<JsonPath>,
    found: bool,
}

/// Where a snapshot's VM state is mapped: past the end of the virtual disk.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct VmState<'a> {
    name: &'a str,
    /// Bytes of it.
    size: u64,
    l2_list: Listed<'a, Location>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct DataClusters<'a> {
    /// L2 entries that name a cluster in this file; an L2 table that is shared counts once.
    count: u64,
    compressed_streams: u64,
    /// L2 entries that name a cluster of the data file.
    in_data_file: u64,
    /// Bytes of `ranges`.
    bytes: u64,
    ranges: Listed<'a, Location>,
}

/// A range that nothing refers to.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Unclaimed {
    offset: u64,
    size: u64,
    /// Null where it can't be read.
    all_zeros: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_non_zero: Option<u64>,
}

#[derive(Serialize)]
struct JsonProblem {
    kind: &'static str,
    offset: u64,
    message: String,
}

impl From<&Problem> for JsonProblem {
    fn from(problem: &Problem) -> Self {
        Self {
            kind: problem.kind.name(),
            offset: problem.offset.get(),
            message: problem.to_string(),
        }
    }
}

/// The value of the key `viscera`.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Viscera<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    qcow2_header: Option<Header>,
    #[serde(skip_serializing_if = "Option::is_none")]
    qcow_header: Option<Header>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cow_header: Option<CowHeader>,
    #[serde(skip_serializing_if = "Option::is_none")]
    header_extensions: Option<Vec<Extension>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_file_name: Option<BackingName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sector_bitmap: Option<Place>,
    #[serde(skip_serializing_if = "Option::is_none")]
    active_l1: Option<L1<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refcount_table: Option<Place>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refcount_blocks: Option<Listed<'a, Location>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot_table: Option<SnapshotTable<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vm_state: Option<Vec<VmState<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<Bitmaps<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    crypt_header: Option<CryptHeader>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<DataFile>,
    data_clusters: DataClusters<'a>,
    slack: Listed<'a, Unclaimed>,
    unused: Listed<'a, Unclaimed>,
    unreferenced: Listed<'a, Unclaimed>,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_examined: Option<Listed<'a, Unclaimed>>,
    problems: Vec<JsonProblem>,
    #[serde(skip_serializing_if = "is_zero")]
    problems_omitted: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl<'a> Viscera<'a> {
    /// What a walk found.
    pub(crate) fn new(metadata: &'a Metadata, walk: &'a Walk<'a>) -> Self {
        let unclaimed = |used| Listed::new(move || unclaimed(metadata, walk, used));
        let problems = problems(walk);
        let is_examined = !walk.ranges().any(|range| range.used == RangeUse::NotExamined);
        let viscera = Self {
            qcow2_header: None,
            qcow_header: None,
            cow_header: None,
            header_extensions: None,
            backing_file_name: None,
            sector_bitmap: None,
            active_l1: None,
            refcount_table: None,
            refcount_blocks: None,
            snapshot_table: None,
            vm_state: None,
            bitmaps: None,
            crypt_header: None,
            data_file: None,
            data_clusters: data_clusters(walk),
            slack: unclaimed(RangeUse::Slack),
            unused: unclaimed(RangeUse::Unused),
            unreferenced: unclaimed(RangeUse::Unreferenced),
            not_examined: (!is_examined).then(|| unclaimed(RangeUse::NotExamined)),
            problems: problems.iter().map(JsonProblem::from).collect(),
            problems_omitted: problems.omitted(),
        };
        match metadata.layout() {
            Layout::Qcow2(qcow2) => viscera.with_qcow2(metadata, qcow2),
            Layout::Qcow(qcow) => viscera.with_qcow(metadata, qcow),
            Layout::Cow(cow) => viscera.with_cow(cow),
            Layout::Raw => viscera,
        }
    }

    fn with_qcow2(self, metadata: &'a Metadata, qcow2: &'a Qcow2Metadata) -> Self {
        let header = &qcow2.header;
        let backing = header.backing_name.zip(qcow2.backing_name.as_ref());
        let active = qcow2.l1_tables.iter().find(|l1| l1.owner == Owner::Active);
        Self {
            qcow2_header: Some(Header {
                location: Location { offset: 0, size: header.cluster_size() },
                version: header.version,
            }),
            header_extensions: Some(qcow2.extensions.places.iter().map(Extension::from).collect()),
            backing_file_name: backing.map(|(place, name)| BackingName::new(place, name)),
            active_l1: active.map(|l1| l1_table(metadata, qcow2, l1, 0)),
            refcount_table: Some(header.refcount_table.into()),
            refcount_blocks: Some(Listed::new(move || {
                locations(qcow2.refcount_blocks(metadata.source()))
            })),
            snapshot_table: qcow2.snapshot_table.map(|table| SnapshotTable {
                location: table.into(),
                l1_list: Listed::new(move || {
                    let snapshots = qcow2.l1_tables.iter().filter(|l1| l1.owner != Owner::Active);
                    snapshots.map(move |l1| l1_table(metadata, qcow2, l1, 0))
                }),
            }),
            vm_state: vm_states(metadata, qcow2),
            bitmaps: qcow2.bitmap_directory.map(|directory| Bitmaps {
                bitmap_dir: BitmapDirectory {
                    location: directory.into(),
                    dir_entries: Listed::new(move || {
                        qcow2.bitmaps.iter().map(move |place| bitmap(metadata, qcow2, place))
                    }),
                },
                nb_bitmaps: qcow2.bitmaps.len(),
            }),
            crypt_header: qcow2.crypt.as_ref().map(CryptHeader::from),
            data_file: header.has_data_file().then(|| data_file(metadata, qcow2)),
            ..self
        }
    }

    fn with_qcow(self, metadata: &'a Metadata, qcow: &'a QcowMetadata) -> Self {
        let location = Location { offset: 0, size: imgdm::format::qcow::QcowHeader::LENGTH as u64 };
        Self {
            qcow_header: Some(Header { location, version: 1 }),
            backing_file_name: qcow.backing_name().map(|place| {
                let name = qcow.read_backing_name(metadata.source()).unwrap_or_default();
                BackingName::new(place, &name)
            }),
            active_l1: Some(L1 {
                name: ACTIVE_NAME.to_owned(),
                location: qcow.l1_table().into(),
                l2_list: Listed::new(move || locations(qcow.l2_tables(metadata.source()))),
            }),
            ..self
        }
    }

    fn with_cow(self, cow: &'a CowMetadata) -> Self {
        let header = cow.header();
        let name = header.backing_file();
        Self {
            cow_header: Some(CowHeader {
                location: Location { offset: 0, size: header.length().get() },
                layout: header.layout().to_string(),
            }),
            backing_file_name: (!name.is_empty())
                .then(|| BackingName::new(cow.backing_name(), name)),
            sector_bitmap: Some(cow.bitmap().into()),
            ..self
        }
    }
}

const ACTIVE_NAME: &str = "L1 active table";

fn l1_table<'a>(
    metadata: &'a Metadata,
    qcow2: &'a Qcow2Metadata,
    l1: &'a L1Table,
    first: u64,
) -> L1<'a> {
    let name = match l1.owner {
        Owner::Active => ACTIVE_NAME.to_owned(),
        Owner::Snapshot(_) => qcow2.owner_name(l1.owner).to_owned(),
    };
    let l2_list = Listed::new(move || locations(qcow2.l2_tables(metadata.source(), l1, first)));
    L1 { name, location: l1.table.into(), l2_list }
}

/// Those of snapshots that have a VM state.
fn vm_states<'a>(metadata: &'a Metadata, qcow2: &'a Qcow2Metadata) -> Option<Vec<VmState<'a>>> {
    let of_snapshot = |l1: &'a L1Table| {
        let Owner::Snapshot(number) = l1.owner else { return None };
        let snapshot = qcow2.snapshots.get(usize::try_from(number).ok()?)?;
        (snapshot.vm_state_size > 0).then(|| VmState {
            name: &snapshot.name,
            size: snapshot.vm_state_size,
            l2_list: l1_table(metadata, qcow2, l1, l1.vm_state_index).l2_list,
        })
    };
    let states: Vec<_> = qcow2.l1_tables.iter().filter_map(of_snapshot).collect();
    (!states.is_empty()).then_some(states)
}

fn bitmap<'a>(
    metadata: &'a Metadata,
    qcow2: &'a Qcow2Metadata,
    place: &'a BitmapPlace,
) -> Bitmap<'a> {
    let size = qcow2.header.cluster_size();
    let entry = move |entry| {
        let (kind, cluster) = match entry {
            BitmapTableEntry::AllZeros => ("all-zeros", None),
            BitmapTableEntry::AllOnes => ("all-ones", None),
            BitmapTableEntry::Serialized(offset) => {
                ("serialized", Some(Location { offset: offset.get(), size }))
            }
        };
        BitmapEntry { kind, cluster }
    };
    Bitmap {
        bitmap_name: &place.name,
        bitmap_table: BitmapTable {
            location: place.table.into(),
            table_entries: Listed::new(move || {
                qcow2.bitmap_entries(metadata.source(), place).filter_map(Result::ok).map(entry)
            }),
        },
    }
}

fn data_file(metadata: &Metadata, qcow2: &Qcow2Metadata) -> DataFile {
    let name = qcow2.extensions.data_file.as_deref();
    let local = name.and_then(|name| LocalName::parse(name).ok());
    let path = local.map(|local| resolve_beside(metadata.source().path(), &local.path));
    DataFile {
        name: name.map(|name| JsonPath::from(Path::new(OsStr::from_bytes(name)))),
        raw: qcow2.data_file_is_raw(),
        found: path.as_ref().is_some_and(|path| path.exists()),
        file: path.map(|path| JsonPath::from(std::path::absolute(&path).unwrap_or(path).as_path())),
    }
}

fn data_clusters<'a>(walk: &'a Walk<'a>) -> DataClusters<'a> {
    let counts = walk.counts();
    let ranges = move || walk.ranges().filter(|range| range.used == RangeUse::Data);
    DataClusters {
        count: counts.data_references,
        compressed_streams: counts.compressed_streams,
        in_data_file: counts.data_file_references,
        bytes: ranges().map(|range| range.length.get()).sum(),
        ranges: Listed::new(move || {
            ranges().map(|UsedRange { offset, length, .. }| Location {
                offset: offset.get(),
                size: length.get(),
            })
        }),
    }
}

fn unclaimed<'a>(
    metadata: &'a Metadata,
    walk: &'a Walk<'a>,
    used: RangeUse,
) -> impl Iterator<Item = Unclaimed> + 'a {
    walk.ranges().filter(move |range| range.used == used).map(move |range| {
        let Content { all_zeros, first_non_zero } = Content::of(metadata, &range);
        let (offset, size) = (range.offset.get(), range.length.get());
        Unclaimed { offset, size, all_zeros, first_non_zero }
    })
}
