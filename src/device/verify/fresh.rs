//! Opening an attached image anew: by its names, as attach would, and where these lead
//! elsewhere by now, through the loop devices that still hold the files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::finding::{Finding, FindingKind, Verification};
use crate::chain::{Chain, Layer};
use crate::device::attach::Options;
use crate::device::fiemap::Fiemap;
use crate::device::list::Attached;
use crate::device::name::{DmUuid, FileIdentity, LoopRole, snapshot_hash};
use crate::device::{DeviceNumber, Kernel, LoopPath, PathState, loop_node};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::format::Format;
use crate::format::qcow2::{SnapshotSelector, read_snapshots};
use crate::lock::{self, Claim, OthersLock, Permission};
use crate::open::{LocalName, OpenPolicy, OpenedChain, Reach, Warning, WarningKind, open_chain};
use crate::source::{FileId, Source};
use crate::status::FileRole;
use crate::units::SECTOR_SIZE;
use crate::worker::apart;

/// Which of a chain's files: depth of its layer, and role.
type FileKey = (u32, FileRole);

const FORMATS: [Format; 4] = [Format::Raw, Format::Qcow2, Format::Qcow, Format::Cow];

/// The image as it is now.
#[derive(Debug)]
pub(super) struct Fresh {
    pub(super) chain: Chain,
    /// The live device that shows each file, where there is one.
    devices: BTreeMap<FileKey, DeviceNumber>,
    /// Files that are read through their loop devices, which show whole sectors only.
    cut: BTreeSet<FileKey>,
}

impl Fresh {
    /// The live device that shows a file.
    pub(super) fn device(&self, depth: u32, role: FileRole) -> Option<DeviceNumber> {
        self.devices.get(&self.key(depth, role)).copied()
    }

    /// The files with the live devices that show them.
    pub(super) fn devices(&self) -> impl Iterator<Item = (FileKey, DeviceNumber)> {
        self.devices.iter().map(|(&key, &device)| (key, device))
    }

    /// Length in bytes of a file.
    pub(super) fn length(&self, depth: u32, role: FileRole) -> u64 {
        self.source(depth, role).map_or(0, |source| source.length().get())
    }

    /// One of the chain's files.
    pub(super) fn source(&self, depth: u32, role: FileRole) -> Option<&Arc<Source>> {
        Some(self.chain.layers().get(depth as usize)?.file(role))
    }

    /// True where the end of a layer's image file may not be to be seen.
    pub(super) fn is_cut(&self, depth: u32) -> bool {
        self.is_cut_file(depth, FileRole::Image)
    }

    /// The same of any file.
    pub(super) fn is_cut_file(&self, depth: u32, role: FileRole) -> bool {
        self.cut.contains(&self.key(depth, role))
    }

    /// The image file's where a layer has no data file.
    fn key(&self, depth: u32, role: FileRole) -> FileKey {
        let layer = self.chain.layers().get(depth as usize);
        match layer {
            Some(Layer { data_file: None, .. }) => (depth, FileRole::Image),
            _ => (depth, role),
        }
    }
}

/// A file that a loop device of the attachment holds.
#[derive(Clone, Debug)]
struct Held {
    key: FileKey,
    number: DeviceNumber,
    id: FileId,
    path: Option<LoopPath>,
}

impl Held {
    fn is_in_place(&self) -> bool {
        self.path.as_ref().is_some_and(|path| path.state == PathState::Same)
    }
}

/// One way to open the image.
#[derive(Clone, Debug)]
struct Attempt<'a> {
    image: &'a Path,
    format: Option<Format>,
    data_file: Option<PathBuf>,
    in_place_of: BTreeMap<FileKey, PathBuf>,
}

struct Opener<'a, K> {
    kernel: &'a K,
    attached: &'a Attached,
    options: Options,
    held: Vec<Held>,
}

/// Opens the image that is attached. None, with a finding, where that can't be done.
pub(super) fn open<K: Kernel>(
    kernel: &K,
    attached: &Attached,
    options: Options,
    image: Option<&Path>,
    found: &mut Verification,
) -> Result<Option<Fresh>> {
    let held = attached.loops.iter().filter_map(|each| match each.info.role() {
        Some(LoopRole::File { layer, role, .. }) => Some(Held {
            key: (layer, role),
            number: each.number,
            id: each.info.file,
            path: each.info.path.clone(),
        }),
        _ => None,
    });
    let opener = Opener { kernel, attached, options, held: held.collect() };
    let Some(opened) = opener.open(image, found)? else { return Ok(None) };
    for Warning { path, kind } in &opened.warnings {
        match kind {
            WarningKind::InUse(how) => {
                found.note(format!("{}: {how}", printable(&path.to_string_lossy())));
            }
            // No such image is attached.
            WarningKind::Damaged(what) => {
                found.add(Finding::new(FindingKind::Image, what.as_str()).at_path(path));
            }
            _ => {}
        }
    }
    let fresh = opener.fresh(opened.chain);
    opener.check_holders(&fresh, found);
    let has_locks = !opened.warnings.iter().any(|w| w.kind == WarningKind::NotLocked);
    if has_locks && !options.direct_block {
        for (_, source) in fresh.chain.layers().iter().flat_map(Layer::files) {
            if !source.length().floor_to_sector().is_zero()
                && opener.loop_of(source).is_none_or(|held| held.is_in_place())
                && !others_keep_writers_out(source)
            {
                found.note(format!(
                    "{}: no lock keeps a virtual machine from writing to it (attached with --force-share?)",
                    printable(&source.path().to_string_lossy())
                ));
            }
        }
    }
    Ok(Some(fresh))
}

impl<K: Kernel> Opener<'_, K> {
    /// The loop of the attachment that shows this file, or by which it was opened.
    fn loop_of(&self, source: &Source) -> Option<&Held> {
        let id = source.id()?;
        self.held.iter().find(|held| held.id == id).or_else(|| {
            let number = (id.inode == 0).then(|| DeviceNumber::from_dev(id.device))?;
            self.held.iter().find(|held| held.number == number)
        })
    }

    fn identities(&self, chain: &Chain) -> Vec<FileIdentity> {
        let layers = (0..).zip(chain.layers());
        let files = layers.flat_map(|(depth, layer)| {
            layer.files().filter_map(move |(role, source)| {
                let id = self.loop_of(source).map_or(source.id(), |held| Some(held.id))?;
                let format = layer.image.format().name().to_owned();
                Some(FileIdentity { layer: depth, role, id, format })
            })
        });
        files.collect()
    }

    /// True where these are the files that are attached, in these formats.
    fn is_attached(&self, opened: &OpenedChain) -> bool {
        self.attached.uuid.is_of_files(&self.identities(&opened.chain))
    }

    fn policy(&self, attempt: &Attempt<'_>) -> Result<OpenPolicy> {
        let from = attempt.in_place_of.get(&(0, FileRole::Image));
        let from = from.map_or(attempt.image, PathBuf::as_path);
        Ok(OpenPolicy {
            format: attempt.format,
            snapshot: snapshot_of(&self.attached.uuid, from)?,
            report_in_use: true,
            // What attach had to be told to accept, it was told.
            probe_backing: true,
            allow_changed_backing: true,
            allow_corrupt: true,
            past_damage: true,
            reach: Reach { allowed: self.places(), policy_file: None },
            data_file: attempt.data_file.clone(),
            in_place_of: attempt.in_place_of.clone(),
            unwritten: (!self.options.no_fiemap).then(|| Arc::new(Fiemap) as _),
            ..OpenPolicy::default()
        })
    }

    /// Where the attached files lie, as far as the kernel knows.
    fn places(&self) -> Vec<PathBuf> {
        let paths = self.held.iter().filter_map(|held| Some(&held.path.as_ref()?.path));
        // The directory of a block device's node has those of the host's own disks, too.
        let place = |path: &PathBuf| match path.parent() {
            Some(directory) if !directory.starts_with("/dev") => directory.to_owned(),
            _ => path.clone(),
        };
        let block_devices = self.attached.block_devices.iter();
        let nodes = block_devices.map(|&number| self.kernel.block_device_path(number));
        paths.map(place).chain(nodes).collect()
    }

    fn try_open(&self, attempt: &Attempt<'_>) -> Result<OpenedChain> {
        open_chain(attempt.image, &self.policy(attempt)?)
    }

    /// Where the image is, by the name that somebody gave or the kernel knows.
    fn image_paths(&self, given: Option<&Path>) -> Vec<PathBuf> {
        let active = self.held.iter().find(|held| held.key == (0, FileRole::Image));
        match active {
            Some(active) => {
                let given = given.filter(|path| FileId::of_path(path) == Some(active.id));
                let known = active.path.as_ref().map(|path| path.path.as_path());
                given.or(known).into_iter().map(Path::to_owned).collect()
            }
            // A device that was mapped without a loop, and no label says which it is.
            None => {
                let all = self.attached.block_devices.iter();
                all.map(|&number| self.kernel.block_device_path(number)).collect()
            }
        }
    }

    fn open(&self, given: Option<&Path>, found: &mut Verification) -> Result<Option<OpenedChain>> {
        for held in &self.held {
            let Some(LoopPath { path, state }) = &held.path else { continue };
            let what = match state {
                PathState::Same => continue,
                PathState::Deleted => "the attached file is not at its path any more",
                PathState::Other => "another file than the attached one is at its path now",
            };
            let what = format!("{what}; {} still holds it", loop_node(held.number).display());
            found.add(Finding::new(FindingKind::File, what).at_path(path));
        }
        let images = self.image_paths(given);
        let data_file = self.held.iter().find(|held| held.key == (0, FileRole::DataFile));
        let data_file = data_file.and_then(|held| Some(held.path.as_ref()?.path.clone()));

        // As attach would without options; then with those that the UUID does not record.
        let mut by_name = None;
        for image in &images {
            let plain =
                Attempt { image, format: None, data_file: None, in_place_of: BTreeMap::new() };
            let first = self.try_open(&plain);
            if first.as_ref().is_ok_and(|opened| self.is_attached(opened)) {
                return Ok(first.ok());
            }
            by_name.get_or_insert(first);
            let data_files = std::iter::once(None).chain(data_file.clone().map(Some));
            for data_file in data_files {
                for format in std::iter::once(None).chain(FORMATS.map(Some)) {
                    let attempt = Attempt { format, data_file: data_file.clone(), ..plain.clone() };
                    if let Ok(opened) = self.try_open(&attempt)
                        && self.is_attached(&opened)
                    {
                        return Ok(Some(opened));
                    }
                }
            }
        }
        // The attached files themselves, whatever the names say.
        let in_place_of: BTreeMap<_, _> =
            self.held.iter().map(|held| (held.key, self.path_of(held))).collect();
        let mut through_loops = None;
        for image in images.iter().take(usize::from(!in_place_of.is_empty())) {
            for format in std::iter::once(None).chain(FORMATS.map(Some)) {
                let in_place_of = in_place_of.clone();
                let attempt = Attempt { image, format, data_file: None, in_place_of };
                let Ok(opened) = self.try_open(&attempt) else { continue };
                if self.is_attached(&opened) {
                    if found.findings().iter().all(|finding| finding.kind != FindingKind::File)
                        && !self.names_lead_there(&opened.chain)
                    {
                        found.add(self.elsewhere(by_name, &opened.chain));
                    }
                    return Ok(Some(opened));
                }
                // A format that was only tried says nothing of what the file is now.
                if format.is_none() {
                    through_loops = Some(opened);
                }
            }
        }
        // Not the layers that are attached: compared as far as they are the same files.
        match (by_name, through_loops) {
            (Some(Ok(opened)), _) | (_, Some(opened)) => {
                let depth = opened.chain.layers().len();
                let formats = opened.chain.layers().iter().take(8);
                let formats: Vec<_> = formats.map(|layer| layer.image.format().name()).collect();
                let what = format!(
                    "the chain has {depth} layers now ({}{}), not the {} with the files and formats that are attached",
                    formats.join(", "),
                    if depth > formats.len() { ", ..." } else { "" },
                    self.attached.depth
                );
                let path = opened.chain.layers()[0].source.path().to_owned();
                found.add(Finding::new(FindingKind::Layers, what).at_path(path));
                Ok(Some(opened))
            }
            (Some(Err(error)), None) => {
                found.add(finding_of(&error));
                Ok(None)
            }
            (None, None) => {
                let name = printable(&self.attached.name);
                Err(Error::new(ErrorKind::NotFound(format!(
                    "no loop device under '{name}' shows its image, so where that is can't be told (a file under 512 bytes can't be held)"
                ))))
            }
        }
    }

    /// Where a file that is held can be opened.
    fn path_of(&self, held: &Held) -> PathBuf {
        match &held.path {
            Some(LoopPath { path, state: PathState::Same }) => path.clone(),
            _ => self.kernel.block_device_path(held.number),
        }
    }

    /// True where the stored names of backing and data files are such that from some
    /// directory they lead to the attached files: the image was attached by the path of a
    /// symbolic link, which nobody recorded.
    fn names_lead_there(&self, chain: &Chain) -> bool {
        let leads = |key: FileKey, name: &Path| {
            let held = self.held.iter().find(|held| held.key == key);
            let path = held.and_then(|held| held.path.as_ref());
            let tail: PathBuf =
                name.components().filter(|part| matches!(part, Component::Normal(_))).collect();
            name.is_relative() && path.is_some_and(|path| path.path.ends_with(&tail))
        };
        let by_path = |key: FileKey, name: &Path| {
            let held = self.held.iter().find(|held| held.key == key);
            held.is_none_or(|held| FileId::of_path(name) == Some(held.id))
        };
        (0..).zip(chain.layers()).all(|(depth, layer)| {
            let backing = layer.backing().is_none_or(|backing| {
                let key = (depth + 1, FileRole::Image);
                LocalName::parse(&backing.name)
                    .is_ok_and(|name| leads(key, &name.path) || by_path(key, &name.path))
            });
            let data_file = match layer.image.data_file() {
                Some(Some(name)) => {
                    let key = (depth, FileRole::DataFile);
                    leads(key, &name) || by_path(key, &name)
                }
                _ => true,
            };
            backing && data_file
        })
    }

    /// The names lead to other files than are attached, or nowhere.
    fn elsewhere(&self, by_name: Option<Result<OpenedChain>>, attached: &Chain) -> Finding {
        let opened = match by_name {
            Some(Ok(opened)) => opened,
            Some(Err(error)) => return finding_of(&error),
            None => return Finding::new(FindingKind::Image, "no path of the image is known"),
        };
        for (layer, was) in opened.chain.layers().iter().zip(attached.layers()) {
            for ((_, file), (_, was)) in layer.files().zip(was.files()) {
                if self.loop_of(file).map(|held| held.number)
                    != self.loop_of(was).map(|held| held.number)
                {
                    let was = printable(&was.path().to_string_lossy());
                    let what = format!("the chain leads to this file now; attached is {was}");
                    return Finding::new(FindingKind::File, what).at_path(file.path());
                }
            }
        }
        let (now, was) = (opened.chain.layers().len(), attached.layers().len());
        let what = format!("the chain has {now} layers now; attached are {was}");
        Finding::new(FindingKind::Layers, what).at_path(opened.chain.layers()[0].source.path())
    }

    fn fresh(&self, chain: Chain) -> Fresh {
        let mut devices = BTreeMap::new();
        let mut cut = BTreeSet::new();
        for (depth, layer) in (0..).zip(chain.layers()) {
            for (role, source) in layer.files() {
                let held = self.loop_of(source);
                let direct = || {
                    let id = source.id().filter(|_| source.is_block_device())?;
                    let number = DeviceNumber::from_dev(id.device);
                    self.attached.block_devices.contains(&number).then_some(number)
                };
                if let Some(number) = held.map(|held| held.number).or_else(direct) {
                    devices.insert((depth, role), number);
                }
                // By its own path it is longer than its loop device shows, or as long.
                if held.is_some_and(|held| source.id() != Some(held.id)) {
                    cut.insert((depth, role));
                }
            }
        }
        Fresh { chain, devices, cut }
    }

    /// Every file has to be held by a loop device, for its locks' sake.
    fn check_holders(&self, fresh: &Fresh, found: &mut Verification) {
        for (depth, layer) in (0..).zip(fresh.chain.layers()) {
            for (role, source) in layer.files() {
                let too_short = source.length().get() < SECTOR_SIZE;
                if fresh.device(depth, role).is_none() && !too_short {
                    let what =
                        format!("no loop device of the attachment holds this file (layer {depth})");
                    found.add(Finding::new(FindingKind::NotHeld, what).at_path(source.path()));
                }
            }
        }
    }
}

/// Whether another descriptor than this one holds a lock that refuses writers.
fn others_keep_writers_out(source: &Source) -> bool {
    let wanted = OthersLock { permission: Permission::Write, claim: Claim::DoesNotShare };
    lock::others(source).contains(&wanted)
}

/// An error of the image as a finding.
pub(super) fn finding_of(error: &Error) -> Finding {
    let kind = match error.kind() {
        ErrorKind::SnapshotNotFound(_) => FindingKind::Snapshot,
        _ => FindingKind::Image,
    };
    let finding = Finding::new(kind, error.to_string());
    match error.path() {
        Some(path) => finding.at_path(path),
        None => finding,
    }
}

/// The snapshot that the UUID's hash is of; none for the active layer.
fn snapshot_of(uuid: &DmUuid, image: &Path) -> Result<Option<SnapshotSelector>> {
    if !uuid.is_snapshot() {
        return Ok(None);
    }
    let source = Source::open(image)?;
    let snapshots = apart(|| read_snapshots(&source)).map_err(|error| error.at_path(image))?;
    let is_it = |id: &str, name: &str| snapshot_hash(Some((id, name))) == uuid.snapshot;
    let snapshot = snapshots.into_iter().find(|each| is_it(&each.id, &each.name));
    let snapshot = snapshot.ok_or_else(|| {
        let what = "the snapshot that is attached is not in the image any more";
        Error::new(ErrorKind::SnapshotNotFound(what.to_owned())).at_path(image)
    })?;
    Ok(Some(SnapshotSelector::Exact { id: Some(snapshot.id), name: Some(snapshot.name) }))
}
