//! Which backings and tables a plan has, bottom up: crypt devices and what lies below
//! them, then the virtual disk.

use std::sync::Arc;

use super::build::{Stream, Tail};
use super::census::{Census, Split};
use super::facts::{Facts, chain_files};
use super::{
    Backing, BackingId, CryptId, PlanOptions, PlannedCrypt, PlannedTable, SegmentCounts, TableId,
    TableRole,
};
use crate::chain::Chain;
use crate::crypt::CryptHeader;
use crate::error::{Error, Result};
use crate::scratch::Found;
use crate::status::FileRole;
use crate::units::{GuestRange, SECTOR_SIZE, Sectors};

/// What a table holds.
#[derive(Clone, Debug)]
pub(super) enum Content {
    /// A stretch of a stream, and after it one sector of each file that has to stay open
    /// though no segment uses it.
    Stretch { stream: Stream, guest: GuestRange, keepers: Vec<BackingId> },
    /// Stretches of backings, one after the other: backing, offset and length.
    Join(Vec<(BackingId, Sectors, Sectors)>),
    /// A crypt target over the whole of a backing.
    Crypt { crypt: CryptId, below: BackingId },
}

/// A tail with its place in the scratch file.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlacedTail {
    pub(super) tail: Tail,
    /// Where in the scratch file it lies.
    pub(super) at: u64,
    /// Where in its own file it starts.
    pub(super) shown: u64,
}

/// All that is known of a plan once its streams were counted.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) backings: Vec<Backing>,
    /// The real id of each provisional one.
    pub(super) ids: Vec<Option<BackingId>>,
    pub(super) tables: Vec<PlannedTable>,
    /// One for each table.
    pub(super) contents: Vec<Content>,
    pub(super) crypts: Vec<PlannedCrypt>,
    pub(super) counts: SegmentCounts,
    pub(super) scratch_bytes: u64,
    /// 0 where nothing has to be written.
    pub(super) scratch_length: u64,
    pub(super) tails: Vec<PlacedTail>,
    /// Files under 512 bytes, which no loop device can show.
    pub(super) unheld: Vec<BackingId>,
}

/// One stream, counted.
struct Counted {
    counts: SegmentCounts,
    splits: Vec<Split>,
}

struct Builder<'c> {
    chain: &'c Chain,
    layout: Layout,
}

fn sectors(bytes: u64) -> Sectors {
    Sectors::new(bytes / SECTOR_SIZE)
}

impl Layout {
    /// Lays out what `census`, the count of the virtual disk, asks for.
    ///
    /// # Errors
    /// What resolving says; an encrypted layer's header is invalid.
    pub(super) fn new(
        chain: &Chain,
        facts: &Facts,
        census: &Census<'_>,
        options: PlanOptions,
        max_segments: u64,
    ) -> Result<Self> {
        let files = chain_files(chain);
        let mut backings: Vec<Backing> =
            files.map(|(layer, role)| Backing::File { layer, role }).collect();
        let mut ids: Vec<_> = (0..).map(BackingId).map(Some).take(backings.len()).collect();
        ids.resize(facts.backing_count(), None);

        let mut used = census.used.clone();
        let mut scratch_bytes = census.scratch_bytes;
        let ciphertext_facts = facts.for_ciphertext();
        let mut ciphers = Vec::new();
        for (depth, role) in chain_files(chain) {
            let (file, _) = facts.shown(depth, role);
            if !used[facts.crypt_backing(file).0 as usize] {
                continue;
            }
            let header = crypt_header(chain, depth)?;
            let mut counted = None;
            match &header {
                CryptHeader::Luks(_) => used[file.0 as usize] = true,
                CryptHeader::Aes => {
                    let stream = Stream::Ciphertext(depth);
                    let holes = options.holes;
                    let census = Census::of(chain, &ciphertext_facts, stream, holes, max_segments)?;
                    for (used, more) in used.iter_mut().zip(&census.used) {
                        *used |= more;
                    }
                    scratch_bytes += census.scratch_bytes;
                    counted = Some(Counted { counts: census.counts, splits: census.splits });
                }
            }
            ciphers.push((depth, role, header, counted));
        }

        if census.longest_zero > Sectors::default() {
            ids[facts.zero_backing.0 as usize] = Some(next_id(&backings));
            backings.push(Backing::Zero { length: census.longest_zero });
        }
        let tails = place_tails(chain, facts, census);
        let tail_bytes = tails.iter().map(|placed| placed.tail.end - placed.shown).sum::<u64>();
        scratch_bytes += tail_bytes;
        let scratch_length =
            if scratch_bytes > 0 { chain.virtual_size().get() + tail_bytes } else { 0 };
        if used[facts.scratch_backing.0 as usize] || !tails.is_empty() {
            ids[facts.scratch_backing.0 as usize] = Some(next_id(&backings));
            backings.push(Backing::Scratch { length: sectors(scratch_length) });
        }

        let layout = Self {
            backings,
            ids,
            tables: Vec::new(),
            contents: Vec::new(),
            crypts: Vec::new(),
            counts: SegmentCounts::default(),
            scratch_bytes,
            scratch_length,
            tails,
            unheld: Vec::new(),
        };
        let mut builder = Builder { chain, layout };
        for (depth, role, header, counted) in ciphers {
            let (file, shown) = facts.shown(depth, role);
            let (below, size) = match counted {
                Some(counted) => {
                    let whole = builder.stream(Stream::Ciphertext(depth), &counted, Vec::new());
                    (whole, sectors(chain.virtual_size().get()))
                }
                None => builder.with_tail(facts, file, shown),
            };
            let crypt = builder.crypt(depth, role, &header, below, size);
            builder.layout.ids[facts.crypt_backing(file).0 as usize] = Some(crypt);
        }
        let keepers = builder.keepers(&used);
        let guest = Counted { counts: census.counts, splits: census.splits.clone() };
        builder.guest(&guest, keepers);
        Ok(builder.layout)
    }
}

fn next_id(backings: &[Backing]) -> BackingId {
    BackingId(u32::try_from(backings.len()).unwrap_or(u32::MAX))
}

/// What the layer's image says of its cipher.
fn crypt_header(chain: &Chain, depth: u32) -> Result<CryptHeader> {
    let layer = &chain.layers()[depth as usize];
    layer.image.crypt_header()?.ok_or_else(|| {
        Error::invalid("clusters are encrypted, but the header names no cipher")
            .at_path(layer.source.path())
    })
}

/// The tails lie after the virtual disk's end, one after the other.
fn place_tails(chain: &Chain, facts: &Facts, census: &Census<'_>) -> Vec<PlacedTail> {
    let mut at = chain.virtual_size().get();
    let mut placed = Vec::new();
    for &tail in census.tails.values() {
        let (_, shown) = facts.shown(tail.depth, tail.role);
        placed.push(PlacedTail { tail, at, shown });
        at += tail.end - shown;
    }
    placed
}

impl Builder<'_> {
    fn table(
        &mut self,
        role: TableRole,
        size: Sectors,
        segments: u64,
        content: Content,
    ) -> BackingId {
        let id = TableId(u32::try_from(self.layout.tables.len()).unwrap_or(u32::MAX));
        self.layout.tables.push(PlannedTable { role, size, segments });
        self.layout.contents.push(content);
        let backing = next_id(&self.layout.backings);
        if role == TableRole::Inner {
            self.layout.backings.push(Backing::Table(id));
        }
        backing
    }

    fn join(&mut self, role: TableRole, parts: Vec<(BackingId, Sectors, Sectors)>) -> BackingId {
        let size = Sectors::new(parts.iter().map(|(_, _, length)| length.get()).sum());
        let segments = parts.len() as u64;
        self.layout.counts.linear += segments;
        self.table(role, size, segments, Content::Join(parts))
    }

    /// The tables of a stream, and the parts of the disk that they are.
    fn stretches(
        &mut self,
        stream: Stream,
        counted: &Counted,
        role: TableRole,
        keepers: &[BackingId],
    ) -> Vec<(BackingId, Sectors, Sectors)> {
        let whole = self.chain.whole();
        let total = counted.counts.total();
        let first = Split { at: whole.start, before: 0 };
        let end = Split { at: whole.end, before: total };
        let splits = counted.splits.iter().copied();
        let bounds: Vec<Split> = [first].into_iter().chain(splits).chain([end]).collect();
        let mut parts = Vec::new();
        self.layout.counts.add(counted.counts);
        for pair in bounds.windows(2) {
            let guest = GuestRange::new(pair[0].at, pair[1].at);
            let keepers = if guest.end == whole.end { keepers.to_vec() } else { Vec::new() };
            let kept = keepers.len() as u64;
            let segments = pair[1].before - pair[0].before;
            let length = sectors(guest.length().get());
            let size = Sectors::new(length.get() + kept);
            self.layout.counts.linear += kept;
            let content = Content::Stretch { stream, guest, keepers };
            let backing = self.table(role, size, segments + kept, content);
            parts.push((backing, Sectors::default(), length));
        }
        parts
    }

    /// A stream as one inner device.
    fn stream(&mut self, stream: Stream, counted: &Counted, keepers: Vec<BackingId>) -> BackingId {
        let parts = self.stretches(stream, counted, TableRole::Inner, &keepers);
        match parts[..] {
            [(only, ..)] => only,
            _ => self.join(TableRole::Inner, parts),
        }
    }

    /// A file to its last whole cluster: with its tail, where it has one.
    fn with_tail(&mut self, facts: &Facts, file: BackingId, shown: u64) -> (BackingId, Sectors) {
        let of_file =
            |placed: &&PlacedTail| facts.shown(placed.tail.depth, placed.tail.role).0 == file;
        let Some(&placed) = self.layout.tails.iter().find(of_file) else {
            return (file, sectors(shown));
        };
        let scratch = self.layout.ids[facts.scratch_backing.0 as usize].unwrap_or(file);
        let tail = (scratch, sectors(placed.at), sectors(placed.tail.end - shown));
        let mut parts = vec![(file, Sectors::default(), sectors(shown)), tail];
        parts.retain(|(_, _, length)| *length > Sectors::default());
        (self.join(TableRole::Inner, parts), sectors(placed.tail.end))
    }

    fn crypt(
        &mut self,
        layer: u32,
        role: FileRole,
        header: &CryptHeader,
        below: BackingId,
        size: Sectors,
    ) -> BackingId {
        let crypt = CryptId(u32::try_from(self.layout.crypts.len()).unwrap_or(u32::MAX));
        self.layout.crypts.push(PlannedCrypt {
            layer,
            role,
            cipher: header.cipher_spec(),
            key_bytes: header.key_bytes(),
        });
        self.layout.counts.crypt += 1;
        self.table(TableRole::Inner, size, 1, Content::Crypt { crypt, below })
    }

    /// The files that no segment uses, but that have to stay open and locked.
    fn keepers(&mut self, used: &[bool]) -> Vec<BackingId> {
        let mut keepers = Vec::new();
        for ((id, &used), (layer, role)) in
            (0..).map(BackingId).zip(used).zip(chain_files(self.chain))
        {
            let file = self.chain.layers()[layer as usize].file(role);
            if used {
                continue;
            }
            if file.length().floor_to_sector().is_zero() {
                self.layout.unheld.push(id);
            } else {
                keepers.push(id);
            }
        }
        keepers
    }

    /// The virtual disk: one table, or inner ones under a top one.
    fn guest(&mut self, counted: &Counted, keepers: Vec<BackingId>) {
        let stacked = !counted.splits.is_empty() || !keepers.is_empty();
        let role = if stacked { TableRole::Inner } else { TableRole::Top };
        let parts = self.stretches(Stream::Guest, counted, role, &keepers);
        if stacked {
            self.join(TableRole::Top, parts);
        }
    }
}

/// What inflating found, sorted by place.
pub(super) fn sorted(found: &[Found]) -> Arc<[Found]> {
    let mut found = found.to_vec();
    found.sort_by_key(|found| found.range.start);
    found.into()
}
