//! Building an attachment: a transaction that the kernel undoes.
//!
//! [`build`] makes loop devices, the devices inside, the top one and what was asked for on
//! top of it, bottom up, so that until the commit everything hangs on this process's
//! descriptors (see `stacked.rs`). [`Pending::commit`] takes the marks for removal from the
//! top device and what stands on it; the devices inside keep theirs and go when the top one
//! does.

mod build;
mod overlay;
mod pending;

use std::fmt;
use std::fs::File;
use std::path::PathBuf;

pub use super::above::{Above, AboveWarning, AttachedAbove, Partitions};
use super::compare::{describe, same_tables, store_of};
use super::keys::Keys;
pub use super::memory::MemoryLimit;
use super::name::{self, DeviceRole, DmName, DmUuid, FileIdentity};
pub use super::options::{DirectIo, Options, Overlay};
use super::stacked::Stack;
use super::{Access, DeviceId, DeviceInfo, DeviceNumber, Interrupt, Kernel};
use crate::chain::Layer;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{KernelMemory, TableId, TableSource};
use crate::source::{FileId, Source};
use crate::status::FileRole;
use crate::units::Sectors;
use build::build_tables;
pub use pending::Pending;
use pending::{Given, Terms};

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
    /// The store of what is written, where the options ask for one.
    pub store: Option<OverlayStore<'a>>,
    /// The keys of the encrypted layers. They are taken away once they are loaded.
    pub keys: &'a Keys,
    /// Options that change what is attached.
    pub options: Options,
    /// What is to stand on the device.
    pub above: &'a Above,
    /// Where it is attached already and marked for removal, take the mark away.
    pub keep: bool,
    /// What it may take of the kernel's memory, unless it is attached already.
    pub memory: MemoryLimit,
    /// Asks to stop.
    pub interrupt: Interrupt<'a>,
}

/// Where what is written to a device goes.
#[derive(Clone, Copy, Debug)]
pub struct OverlayStore<'a> {
    /// The store, open for reading and writing, and locked where it is kept; none as long as it
    /// is but looked for what is attached already.
    pub file: Option<&'a File>,
    /// Which file it is; none where a store is yet to be made, or is not kept.
    pub id: Option<FileId>,
    /// Size of its chunks.
    pub chunk: Sectors,
    /// Its size, where one is asked for.
    pub room: Option<Sectors>,
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
    /// What was asked for on top of it, some of which may have been there before.
    pub above: Vec<AttachedAbove>,
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

    /// Name and UUID of the device of a table. Where writes are taken, the disk that never
    /// changes lies inside, and the top one is over it.
    pub(super) fn device_of(&self, table: TableId, top: &DmUuid) -> (DmName, DmUuid) {
        let last = self.tables.tables().len().saturating_sub(1);
        if usize::try_from(table.0) == Ok(last) && self.options.access() == Access::ReadOnly {
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

/// The attachment, where the image is attached already as `request` says, with what is asked
/// for on top of it: then nothing has to be written, and no key is needed.
///
/// # Errors
/// As [`build`]; it is not attached, and would take too much of the kernel's memory.
pub fn find_attached<'k, K: Kernel>(
    kernel: &'k K,
    request: &Request<'_>,
) -> Result<Option<Pending<'k, K>>, AttachError> {
    let (uuid, lock) = begin(kernel, request)?;
    match already_attached(kernel, request, &uuid)? {
        None => {
            check_memory(kernel, request)?;
            Ok(None)
        }
        Some(there) => there_before(kernel, request, uuid, &there, lock)?
            .with_above(request.above, &request.interrupt)
            .map(Some),
    }
}

/// The same disk, where it is attached under whatever name, unless `only_its_name`, and with
/// whatever options, but that one which takes writes is no longer the disk that its image has:
/// with what is asked for on top of it. It stays as it is.
///
/// # Errors
/// As [`build`]; its tables are not those that the files give now. Where it was attached with
/// options that make other tables, that is not compared.
pub fn find_same_disk<'k, K: Kernel>(
    kernel: &'k K,
    request: &Request<'_>,
    only_its_name: bool,
) -> Result<Option<Pending<'k, K>>, AttachError> {
    let (uuid, lock) = begin(kernel, request)?;
    let same_access = |other: &DmUuid| {
        let options = Options::from_bits(other.options);
        options.map_or(true, |options| options.access() == request.options.access())
    };
    let mut found = None;
    for device in kernel.devices()? {
        let is_named_so = device.name == request.name.as_str();
        let Ok(other) = device.uuid.parse::<DmUuid>() else { continue };
        if other.role == DeviceRole::Top
            && device.has_live_table
            && other.is_same_disk(&uuid)
            && same_access(&other)
            && (is_named_so || (found.is_none() && !only_its_name))
        {
            found = Some((device, other));
        }
    }
    let Some((there, uuid)) = found else { return Ok(None) };
    let options = Options::from_bits(uuid.options)?;
    // Whatever its store: that is as it is.
    let as_there = Request { options, store: None, ..*request };
    if options.is_same_plan(&request.options) && !same_tables(kernel, &as_there, &uuid)? {
        return Err(other_tables(&there.name).into());
    }
    let (rules, access) = (options.rules(), options.access());
    let terms = Terms { name: DmName::new(&there.name)?, keep: false, rules, access };
    // So that it does not go meanwhile.
    let held = vec![kernel.open(there.number)?];
    let (number, is_marked) = (there.number, there.deferred_remove);
    let top = Given { name: there.name, uuid, number, is_old: true, is_marked };
    Pending::new(terms, top, Stack::new(kernel), held, kernel.now(), lock)
        .with_above(request.above, &request.interrupt)
        .map(Some)
}

/// Builds an attachment up to the last step.
///
/// What is attached already, with the same files, snapshot, options and live table, is left
/// as it is: only what is missing on top of it is built.
///
/// # Errors
/// Whatever went wrong; then all that was built is gone again, or listed.
pub fn build<'k, K: Kernel>(
    kernel: &'k K,
    request: &Request<'_>,
) -> Result<Pending<'k, K>, AttachError> {
    let (uuid, lock) = begin(kernel, request)?;
    let pending = match already_attached(kernel, request, &uuid)? {
        Some(there) => there_before(kernel, request, uuid, &there, lock)?,
        None => newly_built(kernel, request, uuid, lock)?,
    };
    pending.with_above(request.above, &request.interrupt)
}

/// Attaches an image; returns once /dev/mapper/NAME can be opened: [`build`], and
/// [`Pending::commit`].
///
/// Attaching again what is attached already succeeds and changes nothing, but that what is
/// missing on top of it is added.
///
/// # Errors
/// As those.
pub fn attach<K: Kernel>(kernel: &K, request: &Request<'_>) -> Result<Attachment, AttachError> {
    build(kernel, request)?.commit(&request.interrupt)
}

/// The device-mapper targets that the tables need.
fn targets(request: &Request<'_>) -> Vec<&'static str> {
    let mut targets = vec!["linear", "zero", "error"];
    if !request.tables.crypts().is_empty() {
        targets.push("crypt");
    }
    if request.options.access() == Access::Writable {
        targets.push("snapshot");
    }
    targets
}

/// What comes before anything is looked for or built.
fn begin<K: Kernel>(kernel: &K, request: &Request<'_>) -> Result<(DmUuid, K::Lock)> {
    let uuid = request.uuid()?;
    kernel.prepare(&targets(request))?;
    request.interrupt.check()?;
    let lock = kernel.lock(&request.interrupt)?;
    sweep(kernel)?;
    Ok((uuid, lock))
}

/// The attachment whose top device is there already.
fn there_before<'k, K: Kernel>(
    kernel: &'k K,
    request: &Request<'_>,
    uuid: DmUuid,
    there: &DeviceInfo,
    lock: K::Lock,
) -> Result<Pending<'k, K>> {
    let (number, is_marked) = (there.number, there.deferred_remove);
    // So that it does not go meanwhile.
    let held = match is_marked || !request.above.is_empty() {
        true => vec![kernel.open(number)?],
        false => Vec::new(),
    };
    let top = Given { name: there.name.clone(), uuid, number, is_old: true, is_marked };
    let since = kernel.now();
    Ok(Pending::new(Terms::of(request), top, Stack::new(kernel), held, since, lock))
}

/// Refuses what would take too much of the kernel's memory.
fn check_memory<K: Kernel>(kernel: &K, request: &Request<'_>) -> Result<()> {
    request.memory.check(KernelMemory::of(request.tables), kernel.available_memory())
}

/// The attachment, built from the loop devices up.
fn newly_built<'k, K: Kernel>(
    kernel: &'k K,
    request: &Request<'_>,
    uuid: DmUuid,
    lock: K::Lock,
) -> Result<Pending<'k, K>, AttachError> {
    check_memory(kernel, request)?;
    let since = kernel.now();
    let mut stack = Stack::new(kernel);
    let mut uuids: Vec<_> =
        table_ids(request.tables).map(|id| request.device_of(id, &uuid).1.to_string()).collect();
    if request.options.access() == Access::Writable {
        uuids.push(uuid.to_string());
    }
    let watch = kernel.guard(&lock, &uuids)?;
    let built =
        build_tables(&mut stack, request, &uuid).and_then(|disk| match request.options.access() {
            Access::ReadOnly => Ok(disk),
            Access::Writable => overlay::build_overlay(&mut stack, request, &uuid, disk),
        });
    for key in request.keys.take().values() {
        kernel.forget_key(key);
    }
    let number = match built {
        Ok(number) => number,
        Err(cause) => return Err(AttachError { cause, leftovers: stack.undo() }),
    };
    drop(watch);
    let name = request.name.as_str().to_owned();
    let top = Given { name, uuid, number, is_old: false, is_marked: true };
    Ok(Pending::new(Terms::of(request), top, stack, Vec::new(), since, lock))
}

/// Removes what other runs left when they were killed: devices of ours that have no live
/// table and that nobody has open. Only under the lock, under which others build.
pub(super) fn sweep<K: Kernel>(kernel: &K) -> Result<()> {
    for device in kernel.devices()? {
        if name::is_ours(&device.uuid) && !device.has_live_table && device.open_count == 0 {
            log::info!("removing '{}', which a killed run left behind", device.name);
            kernel.remove(&device.uuid)?;
        }
    }
    Ok(())
}

/// The files have changed since they were attached, or the table has.
fn other_tables(name: &str) -> Error {
    let name = crate::error::printable(name);
    Error::new(ErrorKind::CannotCreate(format!(
        "'{name}' is attached from the same files, but its live table is not the one that they give now: detach it first"
    )))
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
    let same_but_for_options = there.uuid.parse::<DmUuid>().ok().filter(|other| {
        let same = DmUuid { options: uuid.options, ..other.clone() };
        other.options != uuid.options && same == *uuid
    });
    if let Some(other) = same_but_for_options {
        let is_overlay = |bits| Options::from_bits(bits).map(|o| o.access() == Access::Writable);
        let how = match (is_overlay(other.options), is_overlay(uuid.options)) {
            (Ok(true), Ok(false)) => " (it takes writes: --overlay)",
            (Ok(false), Ok(true)) => " (without --overlay)",
            _ => "",
        };
        return refuse(format!(
            "'{name}' is attached from the same files already, with other options{how}: detach it first, or choose another name with --name"
        ));
    }
    if there.uuid != text {
        let whose = describe(kernel, &there);
        return refuse(format!(
            "the device name '{name}' is taken by {whose}: choose another with --name"
        ));
    }
    check_store(kernel, request, uuid)?;
    if !same_tables(kernel, request, uuid)? {
        return Err(other_tables(name.as_str()));
    }
    Ok(Some(there))
}

/// Refuses what is attached with another kept store than is asked for, or one of another size.
fn check_store<K: Kernel>(kernel: &K, request: &Request<'_>, uuid: &DmUuid) -> Result<()> {
    let is_overlay = request.options.access() == Access::Writable;
    let Some(asked) = request.store.filter(|_| is_overlay) else { return Ok(()) };
    let refuse = |what: String| {
        Err(Error::new(ErrorKind::CannotCreate(format!(
            "'{}' is attached already, with {what}: detach it first, or choose another name with --name",
            request.name
        ))))
    };
    let there = store_of(kernel, uuid)?;
    let file = there.as_ref().map(|there| there.info.file);
    if request.options.overlay == Overlay::Kept && file != asked.id {
        let path = there.and_then(|there| there.info.path).map(|path| path.path);
        let path = crate::error::printable(&path.unwrap_or_default().to_string_lossy());
        return refuse(format!("another store ({path})"));
    }
    if let (Some(room), Some(there)) = (asked.room, there) {
        let (size, _) = kernel.block_device(there.number)?;
        if size != room {
            let [size, room] = [size, room].map(|size| size.to_bytes().unwrap_or(u64::MAX));
            return refuse(format!("a store of {size} bytes, where {room} are asked for"));
        }
    }
    Ok(())
}

pub(super) fn index_of(table: TableId) -> usize {
    usize::try_from(table.0).unwrap_or(usize::MAX)
}

pub(super) fn table_ids(plan: &dyn TableSource) -> impl Iterator<Item = TableId> + use<> {
    (0..u32::try_from(plan.tables().len()).unwrap_or(u32::MAX)).map(TableId)
}

#[cfg(test)]
mod tests;
