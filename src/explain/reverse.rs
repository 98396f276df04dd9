//! From a byte of a file up to who uses it.

use std::collections::HashMap;

use crate::chain::{Chain, HoleQuery, Layer};
use crate::damage::{Damage, DamageList, MAX_LISTED};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::extent::{Mapping, ZeroCause};
use crate::format::qcow2::{
    L2Entry, Qcow2Header, TableLocation, extension_name, refcount_of, trace_tables,
};
use crate::format::trace::{Refcount, TraceStep};
use crate::metadata::{
    Metadata, Owner, Piece, PieceKind, Problem, Problems, Qcow2Metadata, UsedRange,
};
use crate::status::{FileRole, HostPlace, ZeroStatus};
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};
use crate::worker::apart;

/// What one byte of a file of the chain is.
#[derive(Debug)]
pub struct ByteUse {
    /// The layer whose file it is.
    pub depth: u32,
    /// The byte.
    pub place: HostPlace,
    /// Length of the file: the byte may lie past its end.
    pub file_length: ByteLen,
    /// The metadata that holds it, with what to call it.
    pub metadata: Vec<(Piece, String)>,
    /// Who reads it: for each owner, and each of its guest clusters.
    pub guests: Vec<GuestUse>,
    /// What it is where nothing refers to it.
    pub unclaimed: Option<UsedRange>,
    /// There are more uses than these.
    pub truncated: bool,
    /// The refcount of its cluster, or why that can't be told; of qcow2 image files only.
    pub refcount: Option<Result<Refcount>>,
    /// Damaged metadata: of the layer's own tables, which may have led to the byte, and of
    /// those of all layers that the chain reads for its uses. At most [`MAX_LISTED`].
    pub problems: Vec<LayerProblem>,
    /// How many more there were.
    pub problems_omitted: u64,
}

/// Damaged metadata of a layer's image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerProblem {
    /// The layer: 0 the active layer, 1 its backing file, and so on.
    pub depth: u32,
    /// What is wrong.
    pub problem: Problem,
}

/// A snapshot as people know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotName {
    /// Its ID.
    pub id: String,
    /// Its name.
    pub name: String,
}

/// One use of the byte for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestUse {
    /// The snapshot whose use it is; none for the active layer.
    pub snapshot: Option<SnapshotName>,
    /// The byte of the disk that it is; of a compressed stream, the first byte of the
    /// cluster.
    pub guest: GuestOffset,
    /// What it is there.
    pub kind: GuestUseKind,
    /// Whether the chain shows it there.
    pub visibility: Visibility,
}

/// What a byte of a file is to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestUseKind {
    /// A byte of the disk, as it is or under a cipher.
    Data,
    /// A byte of a compressed stream, which gives a whole cluster.
    Compressed {
        /// Where the stream starts.
        stream: HostOffset,
        /// An upper bound of its length.
        length: ByteLen,
    },
    /// In the cluster of an entry (or subcluster) that reads as zero all the same.
    KeptForZeros,
    /// In the cluster of a subcluster that is unallocated all the same.
    KeptUnallocated,
    /// The entry's bits contradict each other.
    Contradiction,
    /// Past the virtual disk: a snapshot's VM state, or nothing that is read.
    PastDisk,
}

/// Whether the byte is what the chain shows at its place of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visibility {
    /// It is (of a compressed cluster: at least some of it).
    Shown,
    /// The layer at this depth answers there instead.
    HiddenBy(u32),
    /// The chain's disk ends before, or an overlay's on the way does.
    OutOfReach,
    /// The metadata of the layer at this depth, its own or an overlay, is damaged there:
    /// nobody can tell.
    Damaged(u32),
    /// It is another state of the image than the chain has: a snapshot, or the active layer
    /// where a snapshot was opened.
    OtherState,
    /// Its own layer answers there, but with something else, like zeros.
    NotRead,
}

/// What the byte at `offset` of a file of the chain is. The walk reads all tables of the
/// image whose file it is.
///
/// # Errors
/// The chain has no such layer or file; the image's header can't be read again. Damaged tables
/// are no error, but [problems](ByteUse::problems).
pub fn explain_reverse(
    chain: &Chain,
    depth: u32,
    role: FileRole,
    offset: HostOffset,
) -> Result<ByteUse> {
    apart(|| search(chain, depth, role, offset))
}

fn search(chain: &Chain, depth: u32, role: FileRole, offset: HostOffset) -> Result<ByteUse> {
    let layer = chain
        .layers()
        .get(depth as usize)
        .ok_or_else(|| Error::new(ErrorKind::Usage(format!("the chain has no layer {depth}"))))?;
    let place = HostPlace { file: role, offset };
    let metadata = Metadata::read(std::sync::Arc::clone(&layer.source), layer.image.format())?;
    let found = metadata.pieces_at(place);
    let mut reverse = Reverse::new(chain, layer, depth, place, &metadata);
    let mut pieces = Vec::new();
    let mut guests = Vec::new();
    for piece in found.pieces {
        match piece.kind {
            PieceKind::Data { owner, guest } => {
                let guest = guest.saturating_add(offset.since(piece.offset));
                guests.push(reverse.guest_use(owner, guest, None));
            }
            PieceKind::Compressed { owner, guest } => {
                guests.push(reverse.guest_use(owner, guest, Some(piece)));
            }
            _ => {
                let what = describe(&piece, metadata.qcow2());
                pieces.push((piece, what));
            }
        }
    }
    let refcount = metadata.qcow2().filter(|_| role == FileRole::Image).map(|qcow2| {
        let cluster_size = qcow2.header.cluster_size();
        let cluster = HostOffset::new(offset.get() / cluster_size * cluster_size);
        refcount_of(&layer.source, &qcow2.header, cluster)
    });
    let (problems, problems_omitted) = list_problems(depth, &found.problems, &reverse.damage);
    Ok(ByteUse {
        depth,
        place,
        file_length: layer.file(role).length(),
        metadata: pieces,
        guests,
        unclaimed: found.unclaimed,
        truncated: found.truncated,
        refcount,
        problems,
        problems_omitted,
    })
}

/// What is wrong with the tables of the image at `depth`, then what is wrong on the chain's
/// way to the byte's uses; and how much more there is.
fn list_problems(
    depth: u32,
    of_image: &Problems,
    of_chain: &DamageList,
) -> (Vec<LayerProblem>, u64) {
    let known = |damage: &Damage| {
        let is_it = |problem: &Problem| Some(problem.offset.get()) == damage.error.offset();
        damage.depth == depth && of_image.iter().any(is_it)
    };
    let of_image_listed =
        of_image.iter().map(|problem| LayerProblem { depth, problem: problem.clone() });
    let twice = of_chain.listed().iter().filter(|damage| known(damage)).count();
    let of_chain_listed =
        of_chain.listed().iter().filter(|damage| !known(damage)).map(|damage| LayerProblem {
            depth: damage.depth,
            problem: Problem::of_error(&damage.error, HostOffset::ZERO),
        });
    let all = of_image.iter().len() as u64 + of_image.omitted() + of_chain.count();
    let listed: Vec<_> = of_image_listed.chain(of_chain_listed).take(MAX_LISTED).collect();
    let omitted = all.saturating_sub((listed.len() + twice) as u64);
    (listed, omitted)
}

/// What to call a piece of metadata.
fn describe(piece: &Piece, qcow2: Option<&Qcow2Metadata>) -> String {
    let of = |owner: Owner| match owner {
        Owner::Active => "the active layer".to_owned(),
        Owner::Snapshot(number) => match snapshot_name(qcow2, number) {
            Some(SnapshotName { id, name }) => {
                format!("snapshot {} ({})", printable(&id), printable(&name))
            }
            None => format!("snapshot number {number}"),
        },
    };
    let bitmap_name = |bitmap: u32| {
        let bitmap = qcow2.and_then(|qcow2| qcow2.bitmaps.get(bitmap as usize));
        bitmap.map_or_else(String::new, |bitmap| format!(" '{}'", printable(&bitmap.name)))
    };
    match piece.kind {
        PieceKind::Header => "the header".to_owned(),
        PieceKind::HeaderExtension(kind) => match extension_name(kind) {
            Some(name) => format!("the header extension {name}"),
            None => format!("a header extension of the unknown type {kind:#010x}"),
        },
        PieceKind::BackingFileName => "the backing file's name".to_owned(),
        PieceKind::RefcountTable => "the refcount table".to_owned(),
        PieceKind::RefcountBlock { index } => {
            format!("the refcount block of refcount table entry {index}")
        }
        PieceKind::L1Table(owner) => format!("the L1 table of {}", of(owner)),
        PieceKind::L2Table { owner, l1_index } => {
            format!("the L2 table of L1 entry {l1_index} of {}", of(owner))
        }
        PieceKind::SnapshotTable => "the snapshot table".to_owned(),
        PieceKind::BitmapDirectory => "the bitmap directory".to_owned(),
        PieceKind::BitmapTable { bitmap } => format!("the table of bitmap{}", bitmap_name(bitmap)),
        PieceKind::BitmapCluster { bitmap } => format!("bits of bitmap{}", bitmap_name(bitmap)),
        PieceKind::CryptHeader => "the LUKS header and its key material".to_owned(),
        PieceKind::SectorBitmap => "the bitmap of sectors".to_owned(),
        PieceKind::Data { .. } | PieceKind::Compressed { .. } => "the guest's data".to_owned(),
    }
}

fn snapshot_name(qcow2: Option<&Qcow2Metadata>, number: u32) -> Option<SnapshotName> {
    let snapshot = qcow2?.snapshots.get(number as usize)?;
    Some(SnapshotName { id: snapshot.id.clone(), name: snapshot.name.clone() })
}

/// What the uses of one byte are told by.
struct Reverse<'a> {
    chain: &'a Chain,
    layer: &'a Layer,
    depth: u32,
    place: HostPlace,
    qcow2: Option<&'a Qcow2Metadata>,
    /// Where each owner's L1 table is, and how much of the disk it describes.
    tables: HashMap<Owner, (TableLocation, u64)>,
    /// Whose state of its image the chain has.
    in_chain: Owner,
    /// What the chain came upon on its way to the uses.
    damage: DamageList,
}

impl<'a> Reverse<'a> {
    fn new(
        chain: &'a Chain,
        layer: &'a Layer,
        depth: u32,
        place: HostPlace,
        metadata: &'a Metadata,
    ) -> Self {
        let qcow2 = metadata.qcow2();
        let disk_end = |owner: Owner| match (owner, qcow2) {
            (Owner::Snapshot(number), Some(qcow2)) => {
                qcow2.snapshots.get(number as usize).map_or(0, |s| s.virtual_size.get())
            }
            (_, Some(qcow2)) => qcow2.header.virtual_size.get(),
            (_, None) => layer.image.virtual_size().get(),
        };
        let tables = qcow2.iter().flat_map(|qcow2| &qcow2.l1_tables);
        let tables = tables.map(|l1| (l1.owner, (l1.table, disk_end(l1.owner)))).collect();
        let in_chain = match (layer.image.snapshot(), qcow2) {
            (Some(open), Some(qcow2)) => {
                let mut numbered = (0u32..).zip(&qcow2.snapshots);
                let same = numbered.find(|(_, known)| known.entry_offset == open.entry_offset);
                same.map_or(Owner::Snapshot(u32::MAX), |(number, _)| Owner::Snapshot(number))
            }
            _ => Owner::Active,
        };
        Self { chain, layer, depth, place, qcow2, tables, in_chain, damage: DamageList::default() }
    }

    fn guest_use(&mut self, owner: Owner, guest: GuestOffset, stream: Option<Piece>) -> GuestUse {
        let kind = self.kind(owner, guest, stream);
        let snapshot = match owner {
            Owner::Active => None,
            Owner::Snapshot(number) => {
                let unknown = || SnapshotName { id: String::new(), name: format!("#{number}") };
                Some(snapshot_name(self.qcow2, number).unwrap_or_else(unknown))
            }
        };
        let visibility = if owner == self.in_chain {
            self.visibility(guest, kind)
        } else {
            Visibility::OtherState
        };
        GuestUse { snapshot, guest, kind, visibility }
    }

    /// What the owner's own entry says of the byte.
    fn kind(&self, owner: Owner, guest: GuestOffset, stream: Option<Piece>) -> GuestUseKind {
        let Some(qcow2) = self.qcow2 else {
            return match stream {
                _ if guest.get() >= self.layer.image.virtual_size().get() => GuestUseKind::PastDisk,
                Some(piece) => {
                    GuestUseKind::Compressed { stream: piece.offset, length: piece.length }
                }
                None => GuestUseKind::Data,
            };
        };
        let Some(&(l1_table, disk_end)) = self.tables.get(&owner) else {
            return GuestUseKind::Data;
        };
        if guest.get() >= disk_end {
            return GuestUseKind::PastDisk;
        }
        if let Some(piece) = stream {
            return GuestUseKind::Compressed { stream: piece.offset, length: piece.length };
        }
        self.kind_by_entry(&qcow2.header, l1_table, guest)
    }

    fn kind_by_entry(
        &self,
        header: &Qcow2Header,
        l1_table: TableLocation,
        guest: GuestOffset,
    ) -> GuestUseKind {
        let mut steps = Vec::new();
        let source = &self.layer.source;
        let entry = trace_tables(source, header, l1_table, guest, |_, _| true, &mut steps);
        let subcluster = steps.iter().find_map(|step| match step {
            TraceStep::Subcluster { bitmap, number, .. } => {
                Some(TraceStep::subcluster_bits(*bitmap, *number))
            }
            _ => None,
        });
        match (entry, subcluster) {
            (Some(L2Entry::ZeroAllocated(_)), _) | (_, Some((false, true))) => {
                GuestUseKind::KeptForZeros
            }
            (_, Some((false, false))) => GuestUseKind::KeptUnallocated,
            (_, Some((true, true))) => GuestUseKind::Contradiction,
            (_, Some((true, false)) | None) => GuestUseKind::Data,
        }
    }

    /// What the chain has at the guest's byte, or anywhere in a compressed cluster.
    fn visibility(&mut self, guest: GuestOffset, kind: GuestUseKind) -> Visibility {
        let length = match kind {
            GuestUseKind::Compressed { .. } => self.layer.image.cluster_size(),
            _ => 1,
        };
        let end = guest.saturating_add(ByteLen::new(length));
        let range = GuestRange::new(guest, end).intersection(self.chain.whole());
        if range.is_empty() {
            return Visibility::OutOfReach;
        }
        let mut resolver = self.chain.resolver_past_damage(HoleQuery::AsQemu);
        let mut best = Visibility::OutOfReach;
        for window in self.chain.windows(range, HoleQuery::AsQemu) {
            // Past damage nothing is an error.
            let Ok(mut extents) = resolver.resolve(window) else { continue };
            let is_shown = extents.any(|extent| {
                let is_it = extent.depth == self.depth
                    && match (extent.mapping, kind) {
                        (
                            Mapping::Compressed { host, .. },
                            GuestUseKind::Compressed { stream, .. },
                        ) => host == stream,
                        (mapping, GuestUseKind::Data) => self.is_place(mapping),
                        _ => false,
                    };
                let instead = match extent.mapping {
                    // Its own layer left it to the backing file.
                    _ if extent.depth > self.depth => Visibility::NotRead,
                    Mapping::Damaged { .. } => Visibility::Damaged(extent.depth),
                    _ if extent.depth == self.depth => Visibility::NotRead,
                    // That layer holds nothing: the one below it ends before.
                    Mapping::Zero(ZeroCause::PastBackingEnd(_)) => Visibility::OutOfReach,
                    _ => Visibility::HiddenBy(extent.depth),
                };
                // Where a compressed cluster has several, what can't be told goes first.
                if !matches!(best, Visibility::Damaged(_)) && instead != Visibility::OutOfReach {
                    best = instead;
                }
                is_it
            });
            if is_shown {
                best = Visibility::Shown;
                break;
            }
        }
        self.damage.append(resolver.take_damage());
        best
    }

    /// Whether a mapping of one byte reads the byte in question; a hole there is read too, but
    /// not a cluster that is only kept.
    fn is_place(&self, mapping: Mapping) -> bool {
        let place = match mapping {
            Mapping::Encrypted { place, .. } => Some(place),
            Mapping::Zero(
                ZeroCause::Layer(ZeroStatus::Allocated(_))
                | ZeroCause::Unallocated(_)
                | ZeroCause::PastBackingEnd(_),
            ) => None,
            mapping => mapping.place(),
        };
        place == Some(self.place)
    }
}
