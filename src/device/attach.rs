//! Building an attachment: a transaction that the kernel undoes.
//!
//! Each device in turn, bottom up: create it; load a table of one zero sector, which
//! makes its node appear and holds nothing; open it; mark it for removal at its last
//! close; only then load the real table, and resume. Loop devices let go of their file
//! at the last close. So until the commit everything hangs on this process's
//! descriptors, and its death undoes it. The commit takes the mark from the top device;
//! the devices inside keep theirs and go when the top one does.

use std::fmt;
use std::fs::File;
use std::path::PathBuf;

use super::compare::{describe, same_tables};
use super::fault;
use super::keys::Keys;
use super::name::{DeviceRole, DmName, DmUuid, FileIdentity, LoopRole, UUID_PREFIX};
pub use super::options::{DirectIo, Options};
use super::{
    DeviceId, DeviceInfo, DeviceNumber, Interrupt, Kernel, LoopHandle, LoopOptions, PATIENCE,
    UdevRules, loop_node,
};
use crate::chain::Layer;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{
    Backing, BackingId, Bindings, CryptId, MAX_SEGMENTS_PER_TABLE, Segment, SegmentTarget, TableId,
    TableSource,
};
use crate::source::Source;
use crate::status::FileRole;
use crate::table::{DeviceRef, TableLine, Target};
use crate::units::{ByteLen, Sectors};

/// The files of one layer, as far as the device side needs them.
#[derive(Clone, Copy, Debug)]
pub struct LayerFiles<'a> {
    /// The name of the layer's format.
    pub format: &'a str,
    /// The image file, locked.
    pub image: &'a Source,
    /// The external data file, where the image has one, locked.
    pub data_file: Option<&'a Source>,
}

impl<'a> LayerFiles<'a> {
    /// The files of a layer of a chain; `format` is its name.
    pub fn of(layer: &'a Layer, format: &'a str) -> Self {
        Self { format, image: &layer.source, data_file: layer.data_file.as_deref() }
    }

    fn file(&self, role: FileRole) -> Option<&'a Source> {
        match role {
            FileRole::Image => Some(self.image),
            FileRole::DataFile => self.data_file,
        }
    }
}

/// What is to be attached.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// The device's name.
    pub name: &'a DmName,
    /// The layers, the active one first; every [`Source`] is open and locked.
    pub layers: &'a [LayerFiles<'a>],
    /// ID and name of the snapshot that is meant.
    pub snapshot: Option<(&'a str, &'a str)>,
    /// What to load.
    pub tables: &'a dyn TableSource,
    /// The scratch file, written and unlinked or kept, where the tables lie on one.
    pub scratch: Option<&'a File>,
    /// The keys of the encrypted layers. They are taken away once they are loaded.
    pub keys: &'a Keys,
    /// Options that change what is attached.
    pub options: Options,
    /// Where it is attached already and marked for removal, take the mark away.
    pub keep: bool,
    /// Asks to stop.
    pub interrupt: Interrupt<'a>,
}

/// An attached image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// /dev/mapper/NAME.
    pub path: PathBuf,
    /// Its name.
    pub name: DmName,
    /// The UUID of its top device.
    pub uuid: DmUuid,
    /// The numbers of its top device.
    pub number: DeviceNumber,
    /// It was there before.
    pub already_attached: bool,
}

/// Why nothing was attached, and what could not be taken away again.
#[derive(Debug)]
pub struct AttachError {
    /// What went wrong.
    pub cause: Error,
    /// What is left of the attempt, in words; usually nothing.
    pub leftovers: Vec<String>,
}

impl From<Error> for AttachError {
    fn from(cause: Error) -> Self {
        Self { cause, leftovers: Vec::new() }
    }
}

impl fmt::Display for AttachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cause)?;
        if !self.leftovers.is_empty() {
            write!(f, "; left behind: {}", self.leftovers.join(", "))?;
        }
        Ok(())
    }
}

impl std::error::Error for AttachError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.cause)
    }
}

impl Request<'_> {
    /// The UUID of the top device.
    ///
    /// # Errors
    /// A layer is no file (an image in memory).
    pub fn uuid(&self) -> Result<DmUuid> {
        let mut files = Vec::new();
        for (depth, layer) in self.layers.iter().enumerate() {
            for role in [FileRole::Image, FileRole::DataFile] {
                let Some(source) = layer.file(role) else { continue };
                let id = source.id().ok_or_else(|| not_a_file(source))?;
                let layer_number = u32::try_from(depth).unwrap_or(u32::MAX);
                let format = layer.format.to_owned();
                files.push(FileIdentity { layer: layer_number, role, id, format });
            }
        }
        Ok(DmUuid::for_top(self.name, &files, self.snapshot, self.options.bits()))
    }

    /// The file that a backing stands for.
    pub(super) fn source(&self, layer: u32, role: FileRole) -> Result<&Source> {
        usize::try_from(layer).ok().and_then(|depth| self.layers.get(depth)?.file(role)).ok_or_else(
            || Error::new(ErrorKind::Usage(format!("the plan's layer {layer} has no such file"))),
        )
    }

    /// True where a backing is mapped without a loop device.
    pub(super) fn is_direct(&self, source: &Source) -> bool {
        self.options.direct_block && source.is_block_device()
    }

    /// Name and UUID of the device of a table.
    pub(super) fn device_of(&self, table: TableId, top: &DmUuid) -> (DmName, DmUuid) {
        let last = self.tables.tables().len().saturating_sub(1);
        if usize::try_from(table.0) == Ok(last) {
            (self.name.clone(), top.clone())
        } else {
            (self.name.inner(table.0), top.with_role(DeviceRole::Inner(table.0)))
        }
    }
}

fn not_a_file(source: &Source) -> Error {
    Error::new(ErrorKind::Usage("an image in memory can't be attached".to_owned()))
        .at_path(source.path())
}

/// The attachment, where the image is attached already as `request` says: then nothing
/// has to be written, and no key is needed.
///
/// # Errors
/// Its name is taken by something else; the kernel lacks what the tables need.
pub fn find_attached<K: Kernel>(
    kernel: &K,
    request: &Request<'_>,
) -> Result<Option<Attachment>, AttachError> {
    let uuid = request.uuid()?;
    kernel.prepare(&targets(request))?;
    let _lock = kernel.lock(&request.interrupt)?;
    sweep(kernel)?;
    let Some(there) = already_attached(kernel, request, &uuid)? else { return Ok(None) };
    Ok(Some(published_again(kernel, request, uuid, there.number)?))
}

/// The device-mapper targets that the tables need.
fn targets(request: &Request<'_>) -> Vec<&'static str> {
    let mut targets = vec!["linear", "zero", "error"];
    if !request.tables.crypts().is_empty() {
        targets.push("crypt");
    }
    targets
}

fn published_again<K: Kernel>(
    kernel: &K,
    request: &Request<'_>,
    uuid: DmUuid,
    number: DeviceNumber,
) -> Result<Attachment> {
    let path = kernel.publish(request.name.as_str(), number, None, &request.interrupt)?;
    let name = request.name.clone();
    Ok(Attachment { path, name, uuid, number, already_attached: true })
}

/// Attaches an image; returns once /dev/mapper/NAME can be opened.
///
/// Attaching again what is attached already, with the same files, snapshot, options and
/// live table, succeeds and changes nothing.
///
/// # Errors
/// Whatever went wrong; then all that was built is gone again, or listed.
pub fn attach<K: Kernel>(kernel: &K, request: &Request<'_>) -> Result<Attachment, AttachError> {
    let interrupt = &request.interrupt;
    let uuid = request.uuid()?;
    kernel.prepare(&targets(request))?;
    interrupt.check()?;
    let lock = kernel.lock(interrupt)?;
    sweep(kernel)?;
    if let Some(there) = already_attached(kernel, request, &uuid)? {
        return Ok(published_again(kernel, request, uuid, there.number)?);
    }

    let since = kernel.now();
    let mut build = Build { kernel, request, uuid: &uuid, loops: Vec::new(), devices: Vec::new() };
    let watch = kernel.guard(&lock, &build.uuids())?;
    let built = build.run();
    for key in request.keys.take().values() {
        kernel.forget_key(key);
    }
    let number = match built {
        Ok(number) => number,
        Err(cause) => return Err(build.undo(cause)),
    };
    drop(watch);
    // The descriptors stay open until here: so a late failure is undone the same way. The
    // lock is held too: nobody else makes or removes the node of that name meanwhile.
    let published = fault::point(format_args!("commit"))
        .and_then(|()| kernel.publish(request.name.as_str(), number, Some(since), interrupt))
        .and_then(|path| fault::point(format_args!("publish")).map(|()| path))
        .and_then(|path| interrupt.check().map(|()| path));
    match published {
        Ok(path) => {
            let name = request.name.clone();
            Ok(Attachment { path, name, uuid, number, already_attached: false })
        }
        Err(cause) => {
            let _ = kernel.defer_removal(&uuid.to_string());
            let error = build.undo(cause);
            kernel.unpublish(request.name.as_str(), number);
            Err(error)
        }
    }
}

/// Removes what other runs left when they were killed: devices of ours that have no live
/// table and that nobody has open. Only under the lock, under which others build.
pub(super) fn sweep<K: Kernel>(kernel: &K) -> Result<()> {
    for device in kernel.devices()? {
        if device.uuid.starts_with(UUID_PREFIX) && !device.has_live_table && device.open_count == 0
        {
            log::info!("removing '{}', which a killed run left behind", device.name);
            kernel.remove(&device.uuid)?;
        }
    }
    Ok(())
}

/// The device of the same name, where it is the same attachment; an error where the
/// name or the UUID is taken by anything else.
fn already_attached<K: Kernel>(
    kernel: &K,
    request: &Request<'_>,
    uuid: &DmUuid,
) -> Result<Option<DeviceInfo>> {
    let name = request.name;
    let refuse = |message: String| Err(Error::new(ErrorKind::CannotCreate(message)));
    let text = uuid.to_string();
    let Some(there) = kernel.device(DeviceId::Name(name.as_str()))? else {
        return match kernel.device(DeviceId::Uuid(&text))? {
            None => Ok(None),
            Some(other) => {
                let other = crate::error::printable(&other.name);
                refuse(format!("the same image is attached already, as '{other}' (renamed)"))
            }
        };
    };
    let same_but_for_options = there.uuid.parse::<DmUuid>().is_ok_and(|other| {
        other.options != uuid.options && DmUuid { options: uuid.options, ..other } == *uuid
    });
    if same_but_for_options {
        return refuse(format!(
            "'{name}' is attached from the same files already, with other options: detach it first, or choose another name with --name"
        ));
    }
    if there.uuid != text {
        let whose = describe(kernel, &there);
        return refuse(format!(
            "the device name '{name}' is taken by {whose}: choose another with --name"
        ));
    }
    if !same_tables(kernel, request, uuid)? {
        return refuse(format!(
            "'{name}' is attached from the same files, but its live table is not the one that they give now: detach it first"
        ));
    }
    if there.deferred_remove {
        if !request.keep {
            return Err(Error::new(ErrorKind::InUse(format!(
                "'{name}' is attached, but marked for removal at its last close: --keep makes it permanent"
            ))));
        }
        kernel.cancel_deferred_removal(&text)?;
    }
    Ok(Some(there))
}

/// A device on its way.
struct Built<N> {
    name: DmName,
    uuid: String,
    number: DeviceNumber,
    node: Option<N>,
    marked: bool,
}

/// What a backing of the plan became.
struct Bound {
    size: Sectors,
    /// Sectors of a logical block.
    alignment: u64,
}

struct Build<'a, K: Kernel> {
    kernel: &'a K,
    request: &'a Request<'a>,
    uuid: &'a DmUuid,
    loops: Vec<K::Loop>,
    devices: Vec<Built<K::Node>>,
}

impl<K: Kernel> Build<'_, K> {
    /// The UUIDs of all devices to be built.
    fn uuids(&self) -> Vec<String> {
        table_ids(self.request.tables)
            .map(|id| self.request.device_of(id, self.uuid).1.to_string())
            .collect()
    }

    /// Marks a step as taken: a place to be interrupted.
    fn step(&self, what: fmt::Arguments<'_>) -> Result<()> {
        fault::point(what)?;
        self.request.interrupt.check()
    }

    fn run(&mut self) -> Result<DeviceNumber> {
        let plan = self.request.tables;
        let mut bindings = Bindings::default();
        let mut bounds = Vec::new();
        for (index, backing) in plan.backings().iter().enumerate() {
            let id = BackingId(u32::try_from(index).unwrap_or(u32::MAX));
            let bound = match backing {
                Backing::File { layer, role } => self.bind_file(*layer, *role)?,
                Backing::Zero { length } => Some(self.bind_zeros(*length)?),
                Backing::Scratch { .. } => Some(self.bind_scratch()?),
                Backing::Table(_) => None,
            };
            if let Some((number, _)) = &bound {
                bindings.bind(id, DeviceRef::from_numbers(number.major, number.minor));
            }
            bounds.push(bound.map(|(_, bound)| bound));
        }
        for (crypt, id) in plan.crypts().iter().zip((0..).map(CryptId)) {
            let key = self.request.keys.of_layer(crypt.layer).ok_or_else(|| {
                Error::new(ErrorKind::WrongKey(format!("layer {} has no key", crypt.layer)))
            })?;
            bindings.bind_cipher(id, crypt.cipher.clone(), key);
        }
        for id in table_ids(plan) {
            let number = self.build_device(id, &bindings, &bounds)?;
            for (index, backing) in plan.backings().iter().enumerate() {
                if *backing == Backing::Table(id) {
                    let size = plan.tables()[index_of(id)].size;
                    let backing = BackingId(u32::try_from(index).unwrap_or(u32::MAX));
                    bindings.bind(backing, DeviceRef::from_numbers(number.major, number.minor));
                    bounds[index] = Some(Bound { size, alignment: 1 });
                }
            }
        }
        let top = self.devices.last().ok_or_else(|| {
            Error::new(ErrorKind::NotRepresentable("the plan has no table".to_owned()))
        })?;
        self.request.interrupt.check()?;
        self.kernel.cancel_deferred_removal(&top.uuid)?;
        Ok(top.number)
    }

    fn bind_file(&mut self, layer: u32, role: FileRole) -> Result<Option<(DeviceNumber, Bound)>> {
        let source = self.request.source(layer, role)?;
        let here = |error: Error| error.at_path(source.path());
        if self.request.is_direct(source) {
            let id = source.id().ok_or_else(|| not_a_file(source))?;
            let number = DeviceNumber::from_dev(id.device);
            let (size, block) = self.kernel.block_device(number).map_err(here)?;
            let alignment = (u64::from(block) / crate::units::SECTOR_SIZE).max(1);
            return Ok(Some((number, Bound { size, alignment })));
        }
        let file = source.file().ok_or_else(|| not_a_file(source))?;
        let snapshot = match (layer, role, self.request.snapshot) {
            (0, FileRole::Image, Some((_, name))) => Some(name.to_owned()),
            _ => None,
        };
        let role = LoopRole::File { layer, role, snapshot };
        let direct_io = self.request.options.direct_io == DirectIo::On;
        let bound = self.bind_loop(file, LoopOptions { role, direct_io }).map_err(here)?;
        if direct_io && !self.loops.last().is_some_and(LoopHandle::direct_io) {
            return Err(here(Error::new(ErrorKind::KernelLacks(
                "the file system or its disk does no direct I/O by 512 bytes: use --direct-io=auto"
                    .to_owned(),
            ))));
        }
        Ok(Some(bound))
    }

    fn bind_zeros(&mut self, length: Sectors) -> Result<(DeviceNumber, Bound)> {
        let bytes = length.to_bytes().ok_or_else(|| {
            Error::new(ErrorKind::NotRepresentable("zeros past 2^64 bytes".to_owned()))
        })?;
        let file = self.kernel.zeros(ByteLen::new(bytes))?;
        self.bind_loop(&file, LoopOptions { role: LoopRole::Zero, direct_io: false })
    }

    fn bind_scratch(&mut self) -> Result<(DeviceNumber, Bound)> {
        let file = self.request.scratch.ok_or_else(|| {
            Error::new(ErrorKind::Usage("the plan needs a scratch file".to_owned()))
        })?;
        self.bind_loop(file, LoopOptions { role: LoopRole::Scratch, direct_io: false })
    }

    fn bind_loop(&mut self, file: &File, options: LoopOptions) -> Result<(DeviceNumber, Bound)> {
        let made = self.kernel.set_up_loop(file, &options)?;
        let bound = (made.number(), Bound { size: made.size(), alignment: 1 });
        self.loops.push(made);
        self.step(format_args!("loop{}", self.loops.len() - 1))?;
        Ok(bound)
    }

    fn build_device(
        &mut self,
        table: TableId,
        bindings: &Bindings,
        bounds: &[Option<Bound>],
    ) -> Result<DeviceNumber> {
        let (name, uuid) = self.request.device_of(table, self.uuid);
        let (role, rules) = match uuid.role {
            DeviceRole::Top if self.request.options.publish => {
                ("top".to_owned(), UdevRules::Publish)
            }
            DeviceRole::Top => ("top".to_owned(), UdevRules::HideContent),
            DeviceRole::Inner(index) => (format!("inner{index}"), UdevRules::Hide),
        };
        let text = uuid.to_string();
        let kernel = self.kernel;

        let number = kernel.create(&name, &uuid)?;
        let index = self.devices.len();
        self.devices.push(Built { name, uuid: text.clone(), number, node: None, marked: false });
        self.step(format_args!("{role}.create"))?;

        let one_sector =
            TableLine { start: Sectors::new(0), length: Sectors::new(1), target: Target::Zero };
        kernel.load(&text, 1, &mut |each| each(&one_sector))?;
        self.step(format_args!("{role}.load-zero"))?;

        self.devices[index].node = Some(kernel.open(number)?);
        self.step(format_args!("{role}.open"))?;

        kernel.defer_removal(&text)?;
        self.devices[index].marked = true;
        self.step(format_args!("{role}.mark"))?;

        self.load_table(table, &text, bindings, bounds)?;
        self.step(format_args!("{role}.load"))?;

        kernel.resume(&text, rules)?;
        self.step(format_args!("{role}.resume"))?;
        Ok(number)
    }

    /// Loads the real table, checked line by line: the kernel's own word for all that
    /// can be wrong is EINVAL.
    fn load_table(
        &self,
        table: TableId,
        uuid: &str,
        bindings: &Bindings,
        bounds: &[Option<Bound>],
    ) -> Result<()> {
        let plan = self.request.tables;
        let planned = &plan.tables()[index_of(table)];
        let interrupt = self.request.interrupt;
        self.kernel.load(uuid, planned.segments, &mut |each| {
            let (mut end, mut count) = (0u64, 0u64);
            plan.for_each_segment(table, &mut |segment| {
                let wrong = |what: &str| {
                    Err(Error::new(ErrorKind::NotRepresentable(format!(
                        "segment {count} of table {} {what}",
                        table.0
                    ))))
                };
                if count % 4096 == 0 {
                    interrupt.check()?;
                }
                if count == MAX_SEGMENTS_PER_TABLE {
                    return wrong("is one too many for a table");
                }
                if segment.start.get() != end || segment.length.get() == 0 {
                    return wrong("does not follow on the one before");
                }
                let Some(next) = end.checked_add(segment.length.get()) else {
                    return wrong("ends past 2^64 sectors");
                };
                if let Some((backing, offset)) = below(&segment) {
                    let bound = usize::try_from(backing.0).ok().and_then(|at| bounds.get(at)?.as_ref());
                    let Some(bound) = bound else { return wrong("lies on nothing") };
                    let inside = offset
                        .get()
                        .checked_add(segment.length.get())
                        .is_some_and(|past| past <= bound.size.get());
                    if !inside {
                        return Err(self.past_the_end(backing, offset, segment.length, bound.size));
                    }
                    if (offset.get() | segment.length.get()) % bound.alignment != 0 {
                        return wrong("is not aligned to the blocks of the device that it lies on: do without --direct-block");
                    }
                }
                (end, count) = (next, count + 1);
                each(&bindings.line(&segment)?)
            })?;
            if end != planned.size.get() || end == 0 {
                return Err(Error::new(ErrorKind::NotRepresentable(format!(
                    "table {} has {end} sectors and should have {}",
                    table.0, planned.size
                ))));
            }
            Ok(())
        })
    }

    fn past_the_end(
        &self,
        backing: BackingId,
        offset: Sectors,
        length: Sectors,
        size: Sectors,
    ) -> Error {
        let error = Error::invalid(format!(
            "sectors {offset}+{length} are mapped, but the device over the file has only {size}: the file became shorter while it was read"
        ));
        let backing =
            usize::try_from(backing.0).ok().and_then(|at| self.request.tables.backings().get(at));
        match backing {
            Some(Backing::File { layer, role }) => match self.request.source(*layer, *role) {
                Ok(source) => error.at_path(source.path()),
                Err(_) => error,
            },
            _ => error,
        }
    }

    /// Takes down what was built, by closing it, and waits until it is gone.
    fn undo(&mut self, cause: Error) -> AttachError {
        let mut leftovers = Vec::new();
        for device in self.devices.iter_mut().rev() {
            device.node = None;
            if !device.marked {
                let _ = self.kernel.remove(&device.uuid);
            }
        }
        // The loops are held until the devices have let go of them: then it is our own
        // close that clears them, and they are clear when it returns.
        for device in self.devices.drain(..).rev() {
            let gone = || self.kernel.is_gone(device.number, &device.uuid);
            if !self.kernel.wait(PATIENCE, &mut || gone()) {
                let holders = self.kernel.holders(device.number);
                leftovers.push(with_holders(format!("the device '{}'", device.name), &holders));
            }
        }
        for held in self.loops.drain(..) {
            let (number, generation) = (held.number(), held.generation());
            drop(held);
            let clear = || self.kernel.loop_is_clear(number, generation);
            if !self.kernel.wait(PATIENCE, &mut || clear()) {
                let holders = self.kernel.holders(number);
                leftovers.push(with_holders(loop_node(number).display().to_string(), &holders));
            }
        }
        AttachError { cause, leftovers }
    }
}

/// The backing that a segment lies on, and where on it.
fn below(segment: &Segment) -> Option<(BackingId, Sectors)> {
    match segment.target {
        SegmentTarget::Linear { backing, offset } => Some((backing, offset)),
        SegmentTarget::Crypt { backing, .. } => Some((backing, Sectors::default())),
        SegmentTarget::Zero | SegmentTarget::Error => None,
    }
}

/// `what (held by ...)`.
pub(super) fn with_holders(what: String, holders: &[String]) -> String {
    if holders.is_empty() { what } else { format!("{what} (held by {})", holders.join(", ")) }
}

pub(super) fn index_of(table: TableId) -> usize {
    usize::try_from(table.0).unwrap_or(usize::MAX)
}

pub(super) fn table_ids(plan: &dyn TableSource) -> impl Iterator<Item = TableId> + use<> {
    (0..u32::try_from(plan.tables().len()).unwrap_or(u32::MAX)).map(TableId)
}

#[cfg(test)]
mod tests;
