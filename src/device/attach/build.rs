//! Building what a plan says: loop devices over the files, and the tables on them.

use std::fs::File;

use super::{Request, index_of, not_a_file, table_ids};
use crate::device::blocks::reads_sectors_directly;
use crate::device::name::{DeviceRole, DmUuid, LoopRole};
use crate::device::options::DirectIo;
use crate::device::stacked::{NewDevice, Stack};
use crate::device::{Access, DeviceNumber, Kernel, LoopHandle, LoopOptions, UdevRules};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{
    Backing, BackingId, Bindings, CryptId, LineMaker, MAX_SEGMENTS_PER_TABLE, Segment,
    SegmentTarget, TableId,
};
use crate::status::FileRole;
use crate::table::DeviceRef;
use crate::units::{ByteLen, Sectors};

/// What a backing of the plan became.
struct Bound {
    size: Sectors,
    /// Sectors of a logical block.
    alignment: u64,
}

/// Builds all devices of `request.tables` on the stack, and gives the top one's numbers.
///
/// # Errors
/// Whatever went wrong; what was built is on the stack.
pub(super) fn build_tables<K: Kernel>(
    stack: &mut Stack<'_, K>,
    request: &Request<'_>,
    top: &DmUuid,
) -> Result<DeviceNumber> {
    Build { stack, request, top }.run()
}

struct Build<'b, 'k, K: Kernel> {
    stack: &'b mut Stack<'k, K>,
    request: &'b Request<'b>,
    /// The UUID of the top device.
    top: &'b DmUuid,
}

impl<K: Kernel> Build<'_, '_, K> {
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
        self.stack.top().ok_or_else(|| {
            Error::new(ErrorKind::NotRepresentable("the plan has no table".to_owned()))
        })
    }

    fn bind_file(&mut self, layer: u32, role: FileRole) -> Result<Option<(DeviceNumber, Bound)>> {
        let source = self.request.source(layer, role)?;
        let here = |error: Error| error.at_path(source.path());
        if self.request.is_direct(source) {
            let id = source.id().ok_or_else(|| not_a_file(source))?;
            let number = DeviceNumber::from_dev(id.device);
            let (size, block) = self.stack.kernel.block_device(number).map_err(here)?;
            let alignment = (u64::from(block) / crate::units::SECTOR_SIZE).max(1);
            return Ok(Some((number, Bound { size, alignment })));
        }
        let file = source.file().ok_or_else(|| not_a_file(source))?;
        let snapshot = match (layer, role, self.request.snapshot) {
            (0, FileRole::Image, Some((_, name))) => Some(name.to_owned()),
            _ => None,
        };
        let role = LoopRole::File { layer, role, snapshot };
        let wanted = self.request.options.direct_io;
        let direct_io = match wanted {
            DirectIo::Auto => reads_sectors_directly(file),
            DirectIo::On => true,
            DirectIo::Off => false,
        };
        let bound = self.bind_loop(file, LoopOptions { role, direct_io }).map_err(here)?;
        if wanted == DirectIo::On && !self.stack.last_loop().is_some_and(LoopHandle::direct_io) {
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
        let file = self.stack.kernel.zeros(ByteLen::new(bytes))?;
        self.bind_loop(&file, LoopOptions { role: LoopRole::Zero, direct_io: false })
    }

    fn bind_scratch(&mut self) -> Result<(DeviceNumber, Bound)> {
        let file = self.request.scratch.ok_or_else(|| {
            Error::new(ErrorKind::Usage("the plan needs a scratch file".to_owned()))
        })?;
        self.bind_loop(file, LoopOptions { role: LoopRole::Scratch, direct_io: false })
    }

    fn bind_loop(&mut self, file: &File, options: LoopOptions) -> Result<(DeviceNumber, Bound)> {
        let (number, size) = self.stack.bind_loop(file, &options, &self.request.interrupt)?;
        Ok((number, Bound { size, alignment: 1 }))
    }

    fn build_device(
        &mut self,
        table: TableId,
        bindings: &Bindings,
        bounds: &[Option<Bound>],
    ) -> Result<DeviceNumber> {
        let (request, kernel) = (self.request, self.stack.kernel);
        let (name, uuid) = request.device_of(table, self.top);
        let rules = match uuid.role {
            DeviceRole::Inner(_) => UdevRules::Hide,
            _ => request.options.rules(),
        };
        let device = NewDevice { name, uuid, rules };
        self.stack.build(device, &request.interrupt, &mut |uuid| {
            load_table(kernel, request, (table, uuid), bindings, bounds)
        })
    }
}

/// Loads the real table, checked line by line: the kernel's own word for all that
/// can be wrong is EINVAL.
fn load_table<K: Kernel>(
    kernel: &K,
    request: &Request<'_>,
    (table, uuid): (TableId, &str),
    bindings: &Bindings,
    bounds: &[Option<Bound>],
) -> Result<()> {
    let plan = request.tables;
    let planned = &plan.tables()[index_of(table)];
    let interrupt = request.interrupt;
    kernel.load(uuid, Access::ReadOnly, planned.segments, &mut |each| {
        let (mut end, mut count) = (0u64, 0u64);
        let mut maker = LineMaker::new(bindings);
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
                    return Err(past_the_end(request, backing, offset, segment.length, bound.size));
                }
                if (offset.get() | segment.length.get()) % bound.alignment != 0 {
                    return wrong("is not aligned to the blocks of the device that it lies on: do without --direct-block");
                }
            }
            (end, count) = (next, count + 1);
            each(maker.line(&segment)?)
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
    request: &Request<'_>,
    backing: BackingId,
    offset: Sectors,
    length: Sectors,
    size: Sectors,
) -> Error {
    let error = Error::invalid(format!(
        "sectors {offset}+{length} are mapped, but the device over the file has only {size}: the file became shorter while it was read"
    ));
    let backing = usize::try_from(backing.0).ok().and_then(|at| request.tables.backings().get(at));
    match backing {
        Some(Backing::File { layer, role }) => match request.source(*layer, *role) {
            Ok(source) => error.at_path(source.path()),
            Err(_) => error,
        },
        _ => error,
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
