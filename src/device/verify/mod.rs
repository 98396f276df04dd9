//! Whether an attachment still means what its image says.
//!
//! The live tables are read back from the kernel and compared with a fresh resolution of
//! the image, under the options that the UUID records: not line by line, but by what each
//! guest range gets. Zeros are zeros whether by dm-zero, a hole, the zero loop or the
//! scratch file. What lies in files is the same by its place; what was written to the
//! scratch file is read and compared. With `--content` all of the device is read.

mod above;
mod bytes;
mod finding;
mod fresh;
mod mapping;
mod pieces;
#[cfg(test)]
mod tests;

use std::path::Path;

use super::attach::Options;
use super::list::Attached;
use super::{DeviceId, DeviceInfo, DeviceNumber, Kernel, LoopInfo, loop_node};
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result, printable};
use crate::format::Format;
use crate::read::Ciphers;
use crate::status::FileRole;

pub use finding::{Finding, FindingKind, Verification};
use fresh::Fresh;
use mapping::Comparison;

/// An attachment that is being verified. Its device is held open, so that it does not go
/// meanwhile.
pub struct Verifier<'k, K: Kernel> {
    kernel: &'k K,
    attached: Attached,
    options: Options,
    fresh: Option<Fresh>,
    found: Verification,
    _node: K::Node,
}

/// Called again and again with the guest offset up to which all is compared; an error
/// stops the work.
pub type Tick<'t> = dyn Fn(u64) -> Result<()> + Sync + 't;

impl<'k, K: Kernel> Verifier<'k, K> {
    /// Looks at an attachment's devices, and opens the image anew. `image` is the path by
    /// which somebody knows the image, if any: a name relative to it may lead elsewhere
    /// than from the path that the kernel knows.
    ///
    /// # Errors
    /// The kernel can't be asked, the UUID's options are not known, or nothing tells where
    /// the image is. What is wrong with the image is a finding and no error.
    pub fn open(kernel: &'k K, attached: Attached, image: Option<&Path>) -> Result<Self> {
        let options = Options::from_bits(attached.uuid.options)?;
        let node = kernel.open(attached.number)?;
        let mut found = Verification::default();
        check_devices(kernel, &attached, &mut found)?;
        above::check(kernel, &attached, &mut found)?;
        let fresh = fresh::open(kernel, &attached, options, image, &mut found)?;
        let mut verifier = Self { kernel, attached, options, fresh, found, _node: node };
        verifier.check_size();
        Ok(verifier)
    }

    /// The image's chain as it is now; none where it can't be opened any more.
    pub fn chain(&self) -> Option<&Chain> {
        self.fresh.as_ref().map(|fresh| &fresh.chain)
    }

    /// What was found by opening; [`Self::run`] adds to it. Where there is no chain, the last
    /// finding says why.
    pub fn found(&self) -> &Verification {
        &self.found
    }

    /// The live device that shows a file of the chain; none where no device does.
    pub fn device(&self, depth: u32, role: FileRole) -> Option<DeviceNumber> {
        self.fresh.as_ref()?.device(depth, role)
    }

    /// Compares. With `content` all of the device is read, and compared with what our own
    /// reader gives by these ciphers.
    ///
    /// # Errors
    /// The kernel can't be asked, a key is missing, or what `tick` says.
    pub fn run(mut self, content: Option<&Ciphers>, tick: &Tick<'_>) -> Result<Verification> {
        let Some(fresh) = &self.fresh else { return Ok(self.found) };
        let comparison =
            Comparison::new(self.kernel, &self.attached, self.options, fresh, content, tick);
        comparison.run(&mut self.found)?;
        Ok(self.found)
    }

    fn check_size(&mut self) {
        let Some(fresh) = &self.fresh else { return };
        let chain = &fresh.chain;
        let size = self.attached.size.to_bytes().unwrap_or(u64::MAX);
        let wanted = chain.virtual_size().get();
        // Through its loop device the last partial sector of a raw file is not to be seen.
        let is_raw = chain.layers()[0].image.format() == Format::Raw;
        if size == wanted || (is_raw && fresh.is_cut(0) && size == wanted + 512) {
            return;
        }
        self.found.add(Finding::new(
            FindingKind::Size,
            format!("the device has {size} bytes, the image's disk {wanted}"),
        ));
    }
}

fn check_devices<K: Kernel>(
    kernel: &K,
    attached: &Attached,
    found: &mut Verification,
) -> Result<()> {
    let top = kernel.device(DeviceId::Number(attached.number))?.ok_or_else(|| {
        let name = printable(&attached.name);
        Error::new(ErrorKind::NotAttached(format!("'{name}' was detached just now")))
    })?;
    let has_overlay = attached.overlay.is_some();
    if has_overlay {
        found.note(
            "the device takes writes: what was written is in its store; this is about the disk below",
        );
    }
    let devices = std::iter::once(&top).filter(|_| !has_overlay).chain(&attached.inner);
    for DeviceInfo { name, read_only, .. } in devices {
        if !read_only {
            let what = format!("the live table of '{}' is not read-only", printable(name));
            found.add(Finding::new(FindingKind::Writable, what));
        }
    }
    let store = attached.overlay.as_ref().and_then(|overlay| overlay.store);
    for each in attached.loops.iter().filter(|each| Some(each.number) != store) {
        let LoopInfo { read_only, offset, .. } = each.info;
        let node = loop_node(each.number);
        if !read_only {
            let what = format!("{} is not read-only", node.display());
            found.add(Finding::new(FindingKind::Writable, what));
        }
        if offset != 0 {
            let what =
                format!("{} does not start with its file, but at byte {offset}", node.display());
            found.add(Finding::new(FindingKind::LoopOffset, what));
        }
    }
    if top.deferred_remove {
        found.note("the device is marked for removal at its last close");
    }
    Ok(())
}
