//! The live tables and the fresh extents, side by side in guest order.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::Tick;
use super::bytes::{Check, Checker, FreshSide, LiveSide, Outcome};
use super::finding::{Finding, FindingKind, Verification};
use super::fresh::{Fresh, finding_of};
use super::pieces::{FreshBytes, FreshPiece, pieces};
use crate::chain::{Extents, HoleQuery};
use crate::crypt::CryptHeader;
use crate::device::attach::Options;
use crate::device::list::Attached;
use crate::device::live::{LiveBytes, LiveCrypt, LiveDisk, LiveRun};
use crate::device::name::{DmUuid, LoopRole};
use crate::device::{DeviceNumber, Kernel, loop_node};
use crate::error::{Error, Result, printable};
use crate::extent::Extent;
use crate::read::{Ciphers, joined};
use crate::scratch::OnError;
use crate::status::{Encryption, FileRole};
use crate::units::{ByteLen, GuestOffset, GuestRange, SECTOR_SIZE};
use crate::worker::apart;

/// Where a plan asks files for holes.
const HOLES: HoleQuery = HoleQuery::DataFiles;

/// What a device at the bottom of the tables is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Below {
    /// It shows a file of the chain.
    File(u32, FileRole),
    /// The zero loop.
    Zeros,
    /// The scratch file.
    Scratch,
    /// None of those.
    Other,
}

/// How a piece compares.
enum Verdict {
    Same,
    /// The same if these bytes are.
    SameBytes(LiveSide, FreshSide),
    /// The image's side can't be seen any more.
    Unseen,
    Differs(FindingKind),
}

pub(super) struct Comparison<'a, K> {
    kernel: &'a K,
    attached: &'a Attached,
    /// The device that is compared.
    top: DeviceNumber,
    options: Options,
    fresh: &'a Fresh,
    disk: LiveDisk<'a, K>,
    below: BTreeMap<DeviceNumber, Below>,
    headers: BTreeMap<u32, CryptHeader>,
    /// The crypt target that was looked at last, for which layer, and whether it is right.
    known_crypt: Option<(Rc<LiveCrypt>, u32, bool)>,
    checker: Checker<'a>,
    /// All of the device is to be read.
    content: bool,
    tick: &'a Tick<'a>,
    pieces: Vec<FreshPiece>,
}

impl<'a, K: Kernel> Comparison<'a, K> {
    pub(super) fn new(
        kernel: &'a K,
        attached: &'a Attached,
        options: Options,
        fresh: &'a Fresh,
        content: Option<&'a Ciphers>,
        tick: &'a Tick<'a>,
    ) -> Self {
        let inner = attached.inner.iter().map(|inner| (inner.number, inner.uuid.clone()));
        let top = attached.disk();
        let files =
            fresh.devices().map(|((depth, role), number)| (number, Below::File(depth, role)));
        let mut below: BTreeMap<_, _> = files.collect();
        for each in &attached.loops {
            match each.info.role() {
                Some(LoopRole::Zero) => drop(below.insert(each.number, Below::Zeros)),
                Some(LoopRole::Scratch) => drop(below.insert(each.number, Below::Scratch)),
                _ => {}
            }
        }
        Self {
            kernel,
            attached,
            options,
            fresh,
            top: top.0,
            disk: LiveDisk::new(kernel, top, inner),
            below,
            headers: BTreeMap::new(),
            known_crypt: None,
            checker: Checker::new(fresh, content, options.on_error),
            content: content.is_some(),
            tick,
            pieces: Vec::new(),
        }
    }

    /// Compares all of the disk.
    ///
    /// # Errors
    /// Not what is wrong with the image: those are findings.
    pub(super) fn run(mut self, found: &mut Verification) -> Result<()> {
        let chain = &self.fresh.chain;
        let join = |window, extents: Extents<'_>| {
            let mut all = Vec::new();
            joined(extents, &mut all);
            (window, all)
        };
        chain.map_windows_past_damage(chain.whole(), HOLES, join, |(window, extents)| {
            self.window(window, &extents, found)
        })?;
        self.check_bytes(found)
    }

    fn window(
        &mut self,
        window: GuestRange,
        extents: &[Extent],
        found: &mut Verification,
    ) -> Result<()> {
        extents.iter().try_for_each(|extent| self.extent(extent, found))?;
        (self.tick)(window.end.get())
    }

    fn extent(&mut self, extent: &Extent, found: &mut Verification) -> Result<()> {
        let all = pieces(self.fresh, extent, std::mem::take(&mut self.pieces));
        for piece in &all {
            let mut at = piece.range.start;
            while at < piece.range.end {
                let run = self.disk.at(at.get() / SECTOR_SIZE)?;
                let end = at.saturating_add(ByteLen::new(run.length)).min(piece.range.end);
                self.part(&piece.part(at, end), &run, found)?;
                at = end;
            }
        }
        self.pieces = all;
        Ok(())
    }

    fn part(&mut self, piece: &FreshPiece, run: &LiveRun, found: &mut Verification) -> Result<()> {
        let check = match self.verdict(piece, run)? {
            Verdict::Differs(kind) => {
                found.add_range(kind, piece.range, || self.difference(kind, piece, run));
                return Ok(());
            }
            Verdict::Unseen => {
                let more = piece.range.length().get();
                found.bytes_not_compared = ByteLen::new(found.bytes_not_compared.get() + more);
                return Ok(());
            }
            Verdict::SameBytes(live @ LiveSide::Fails, fresh) => (live, fresh),
            // What dm-zero gives is known without reading it.
            Verdict::Same if !self.content || run.bytes == LiveBytes::Zero => return Ok(()),
            Verdict::Same | Verdict::SameBytes(..)
                if self.content && run.bytes != LiveBytes::Error =>
            {
                (LiveSide::Device(self.top, piece.range.start.get()), FreshSide::Guest)
            }
            Verdict::Same => return Ok(()),
            Verdict::SameBytes(live, fresh) => (live, fresh),
        };
        if let LiveSide::Device(number, _) = check.0 {
            self.checker.open(self.kernel, number)?;
        }
        if self.checker.push(Check { range: piece.range, live: check.0, fresh: check.1 }) {
            self.check_bytes(found)?;
        }
        Ok(())
    }

    /// Whether the device gives what the image says, as far as that is known without
    /// reading it.
    fn verdict(&mut self, piece: &FreshPiece, run: &LiveRun) -> Result<Verdict> {
        use FindingKind::{Mapping, PastFileEnd};
        if matches!(piece.bytes, FreshBytes::Damaged(_)) {
            return Ok(Verdict::Differs(FindingKind::Image));
        }
        let same_cipher = match (piece.crypt, &run.crypt) {
            (None, None) => true,
            (Some((depth, cipher)), Some((crypt, iv))) => {
                let wanted = match (cipher, piece.bytes) {
                    (Encryption::Luks, FreshBytes::File(_, _, host)) => host,
                    _ => piece.range.start.get(),
                };
                *iv == wanted / SECTOR_SIZE && self.is_crypt_of(crypt, depth)?
            }
            _ => false,
        };
        if !same_cipher {
            return Ok(Verdict::Differs(Mapping));
        }
        let on_error = self.options.on_error;
        let fresh = match piece.bytes {
            FreshBytes::Lost(..) if on_error == OnError::Zero => FreshBytes::Zero(None),
            other => other,
        };
        let (number, offset) = match &run.bytes {
            LiveBytes::Unknown(_) => return Ok(Verdict::Differs(Mapping)),
            LiveBytes::Error => {
                return Ok(match fresh {
                    FreshBytes::Lost(..) if on_error == OnError::ErrorTarget => Verdict::Same,
                    FreshBytes::Inflate(..) if on_error == OnError::ErrorTarget => {
                        Verdict::SameBytes(LiveSide::Fails, FreshSide::Guest)
                    }
                    _ => Verdict::Differs(Mapping),
                });
            }
            LiveBytes::Zero => (None, 0),
            LiveBytes::Device { number, offset } => (Some(*number), *offset),
        };
        let below = number.map_or(Below::Zeros, |number| {
            self.below.get(&number).copied().unwrap_or(Below::Other)
        });
        let live = match (below, number) {
            (Below::Zeros, _) | (_, None) => LiveSide::Zeros,
            (_, Some(number)) => LiveSide::Device(number, offset),
        };
        Ok(match (fresh, below) {
            (FreshBytes::Unseen, Below::Zeros | Below::Scratch) => Verdict::Unseen,
            (FreshBytes::Lost(..), _) => Verdict::Differs(PastFileEnd),
            (FreshBytes::Unseen | FreshBytes::Damaged(_), _) | (_, Below::Other) => {
                Verdict::Differs(Mapping)
            }
            (_, Below::File(depth, role)) if self.is_past_end(depth, role, offset, piece) => {
                Verdict::Differs(PastFileEnd)
            }
            (FreshBytes::Zero(_), Below::Zeros) => Verdict::Same,
            (FreshBytes::Zero(Some(place)), Below::File(depth, role))
                if self.same_place(place, (depth, role, offset)) =>
            {
                Verdict::Same
            }
            (FreshBytes::Zero(_), _) => Verdict::SameBytes(live, FreshSide::Zeros),
            (FreshBytes::File(depth, role, at), Below::File(live_depth, live_role)) => {
                if self.same_place((depth, role, at), (live_depth, live_role, offset)) {
                    Verdict::Same
                } else {
                    Verdict::Differs(Mapping)
                }
            }
            (FreshBytes::File(depth, role, at), _) => {
                Verdict::SameBytes(live, FreshSide::File(depth, role, at))
            }
            (FreshBytes::Inflate(..), Below::File(..)) => Verdict::Differs(Mapping),
            (FreshBytes::Inflate(..), _) => Verdict::SameBytes(live, FreshSide::Guest),
        })
    }

    /// True where both are one place: a layer without a data file has but one file.
    fn same_place(&self, a: (u32, FileRole, u64), b: (u32, FileRole, u64)) -> bool {
        a.2 == b.2 && self.fresh.device(a.0, a.1) == self.fresh.device(b.0, b.1)
    }

    /// True where the loop device shows more than its file has by now.
    fn is_past_end(&self, depth: u32, role: FileRole, offset: u64, piece: &FreshPiece) -> bool {
        let end = offset.checked_add(piece.range.length().get());
        end.is_none_or(|end| end > self.fresh.length(depth, role))
    }

    fn is_crypt_of(&mut self, crypt: &Rc<LiveCrypt>, depth: u32) -> Result<bool> {
        if let Some((known, known_depth, is_right)) = &self.known_crypt
            && Rc::ptr_eq(known, crypt)
            && *known_depth == depth
        {
            return Ok(*is_right);
        }
        if !self.headers.contains_key(&depth) {
            let layer = self.fresh.chain.layers().get(depth as usize);
            let Some(header) = layer.and_then(|layer| layer.image.crypt_header().ok()).flatten()
            else {
                return Ok(false);
            };
            self.headers.insert(depth, header);
        }
        let Some(header) = self.headers.get(&depth) else { return Ok(false) };
        let uuid: &DmUuid = &self.attached.uuid;
        let is_right =
            crypt.cipher == header.cipher_spec() && crypt.has_key(uuid, depth, header.key_bytes());
        self.known_crypt = Some((Rc::clone(crypt), depth, is_right));
        Ok(is_right)
    }

    /// Compares the bytes of all that waits for it.
    fn check_bytes(&mut self, found: &mut Verification) -> Result<()> {
        let done = self.checker.run(self.tick)?;
        found.bytes_read = ByteLen::new(found.bytes_read.get().saturating_add(done.bytes));
        for (check, outcome) in &done.outcomes {
            let (kind, range, said) = match outcome {
                Outcome::Differs { range, at, live, fresh } => {
                    let said = format!("at {at} it reads {live:#04x} and should read {fresh:#04x}");
                    (FindingKind::Content, *range, said)
                }
                Outcome::LiveFails { range, error } => {
                    (FindingKind::Unreadable, *range, format!("the device can't be read: {error}"))
                }
                Outcome::LiveShouldRead { range } => {
                    let said = "reading the device fails, and the image can be read".to_owned();
                    (FindingKind::Unreadable, *range, said)
                }
                Outcome::FreshFails { range, error } => {
                    (FindingKind::Content, *range, format!("the image can't be read: {error}"))
                }
            };
            let live = match check.live {
                LiveSide::Device(number, _) if number == self.top => {
                    self.disk.at(range.start.get() / SECTOR_SIZE).map(|run| self.show_live(&run))?
                }
                LiveSide::Device(number, at) => {
                    let at = at + range.start.since(check.range.start).get();
                    self.show_device(number, at)
                }
                LiveSide::Zeros => "zeros".to_owned(),
                LiveSide::Fails => "an error (dm-error)".to_owned(),
            };
            let fresh = self.show_image(range.start);
            found.add_range(kind, range, || Finding {
                path: self.path_at(range.start),
                live: Some(live),
                fresh: Some(fresh),
                ..Finding::new(kind, said)
            });
        }
        Ok(())
    }

    fn difference(&self, kind: FindingKind, piece: &FreshPiece, run: &LiveRun) -> Finding {
        if let FreshBytes::Damaged(depth) = piece.bytes {
            let layer = self.fresh.chain.layers().get(depth as usize);
            let error = layer.and_then(|layer| layer.damage_at(piece.range.start));
            return finding_of(&error.unwrap_or_else(|| Error::invalid("damaged metadata")));
        }
        let (live, fresh) = (self.show_live(run), self.show_fresh(piece));
        let path = match piece.bytes {
            FreshBytes::File(depth, role, _) | FreshBytes::Lost(depth, role, _) => {
                self.fresh.source(depth, role)
            }
            FreshBytes::Inflate(depth, _) => self.fresh.source(depth, FileRole::Image),
            FreshBytes::Zero(_) | FreshBytes::Unseen | FreshBytes::Damaged(_) => None,
        };
        let message = match kind {
            FindingKind::PastFileEnd => "the file was cut off",
            _ => "from elsewhere than the image says",
        };
        Finding {
            path: path.map(|source| source.path().to_owned()),
            live: Some(live),
            fresh: Some(fresh),
            ..Finding::new(kind, message)
        }
    }

    fn show_file(&self, depth: u32, role: FileRole, offset: u64) -> String {
        let path = self.fresh.source(depth, role).map(|source| source.path().to_string_lossy());
        format!("{} at {offset:#x}", printable(&path.unwrap_or_default()))
    }

    fn show_device(&self, number: DeviceNumber, offset: u64) -> String {
        match self.below.get(&number) {
            Some(&Below::File(depth, role)) => self.show_file(depth, role, offset),
            Some(Below::Zeros) => "zeros (the zero loop)".to_owned(),
            Some(Below::Scratch) => format!("the scratch file at {offset:#x}"),
            Some(Below::Other) | None => {
                let held = self.attached.loops.iter().find(|each| each.number == number);
                match held.and_then(|each| each.info.path.as_ref()) {
                    Some(path) => {
                        let path = printable(&path.path.to_string_lossy());
                        format!("{path} at {offset:#x} (by {})", loop_node(number).display())
                    }
                    None => format!("the block device {number} at {offset:#x}"),
                }
            }
        }
    }

    fn show_live(&self, run: &LiveRun) -> String {
        let bytes = match &run.bytes {
            LiveBytes::Zero => "zeros (dm-zero)".to_owned(),
            LiveBytes::Error => "an error (dm-error)".to_owned(),
            LiveBytes::Unknown(what) => what.clone(),
            LiveBytes::Device { number, offset } => self.show_device(*number, *offset),
        };
        match &run.crypt {
            None => bytes,
            Some((crypt, iv)) => {
                let (cipher, key) = (printable(&crypt.cipher), printable(&crypt.key));
                format!("{bytes} decrypted by {cipher} with the key {key} from IV {iv} on")
            }
        }
    }

    fn show_fresh(&self, piece: &FreshPiece) -> String {
        let bytes = match piece.bytes {
            FreshBytes::Zero(None) => "zeros".to_owned(),
            FreshBytes::Zero(Some((depth, role, at))) => {
                format!("zeros (a hole of {})", self.show_file(depth, role, at))
            }
            FreshBytes::File(depth, role, at) => self.show_file(depth, role, at),
            FreshBytes::Lost(depth, role, at) => {
                format!("{}, past the file's end", self.show_file(depth, role, at))
            }
            FreshBytes::Inflate(depth, host) => {
                let file = self.show_file(depth, FileRole::Image, host.get());
                format!("the compressed cluster of {file}")
            }
            FreshBytes::Damaged(_) => "nothing: its metadata is damaged".to_owned(),
            FreshBytes::Unseen => "the end of a file that is not to be seen any more".to_owned(),
        };
        match piece.crypt {
            None => bytes,
            Some((depth, cipher)) => {
                let name = self.headers.get(&depth).map(CryptHeader::cipher_spec);
                let name = name.unwrap_or_else(|| format!("{cipher:?}"));
                let key = self.attached.uuid.key_description(depth);
                let iv = match (cipher, piece.bytes) {
                    (Encryption::Luks, FreshBytes::File(_, _, host)) => host,
                    _ => piece.range.start.get(),
                };
                let iv = iv / SECTOR_SIZE;
                format!("{bytes} decrypted by {name} with the key {key} from IV {iv} on")
            }
        }
    }

    /// The piece that has this guest byte.
    fn piece_at(&self, at: GuestOffset) -> Option<FreshPiece> {
        let start = at.get() / SECTOR_SIZE * SECTOR_SIZE;
        let one = GuestRange::new(GuestOffset::new(start), GuestOffset::new(start + SECTOR_SIZE));
        let chain = &self.fresh.chain;
        let extent = apart(|| chain.resolver(HOLES).resolve(one).ok().and_then(|mut e| e.next()))?;
        pieces(self.fresh, &extent, Vec::new()).first().copied()
    }

    fn show_image(&self, at: GuestOffset) -> String {
        self.piece_at(at).map_or_else(|| "nothing".to_owned(), |piece| self.show_fresh(&piece))
    }

    fn path_at(&self, at: GuestOffset) -> Option<std::path::PathBuf> {
        let (depth, role) = match self.piece_at(at)?.bytes {
            FreshBytes::File(depth, role, _) | FreshBytes::Lost(depth, role, _) => (depth, role),
            FreshBytes::Inflate(depth, _) | FreshBytes::Damaged(depth) => (depth, FileRole::Image),
            FreshBytes::Zero(_) | FreshBytes::Unseen => return None,
        };
        Some(self.fresh.source(depth, role)?.path().to_owned())
    }
}
