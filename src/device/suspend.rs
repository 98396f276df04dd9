//! Devices that are held still for a while, so that what lies on them is of one moment.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::sys::prctl;

use super::below::Below;
use super::dm::Dm;
use super::nodes::{self, DEVICE_MAPPER};
use super::sys::{IgnoredStops, Watch, watch};
use super::{DeviceId, DeviceInfo, DeviceNumber, Interrupt, Kernel, fault};
use crate::device::linux::LinuxKernel;
use crate::error::{Error, ErrorKind, Result, printable};

/// Devices on each other, at most.
const MAX_DEPTH: usize = 64;

/// Devices that are suspended: nobody can read or write them, and who tries waits. Dropped,
/// they go on; also where this process is killed, for another one watches over it.
#[derive(Debug)]
#[must_use = "the devices go on when this is dropped"]
pub struct Suspended<'k> {
    dm: &'k Dm,
    /// Bottom last.
    devices: Vec<(DeviceNumber, String)>,
    /// So that nobody removes them meanwhile.
    _held: Vec<File>,
    _watch: Watch,
    _steady: Steady,
}

impl Suspended<'_> {
    /// Lets them go on, the lowest first.
    ///
    /// # Errors
    /// One of them can't be resumed.
    pub fn resume(mut self) -> Result<()> {
        self.go_on()
    }

    fn go_on(&mut self) -> Result<()> {
        let mut failed = None;
        while let Some((number, name)) = self.devices.pop() {
            let resumed = self.dm.go_on(number).map_err(|error| {
                let name = printable(&name);
                Error::io(
                    format!("cannot resume the device '{name}': 'dmsetup resume {name}'"),
                    error,
                )
            });
            failed = failed.or(resumed.err());
        }
        failed.map_or(Ok(()), Err)
    }
}

impl Drop for Suspended<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.go_on() {
            log::warn!("{error}");
        }
    }
}

/// As long as this lives, no terminal stops this process, and its end is quick: a shell that
/// waits for the devices can't say `fg`, and a core dump would wait for them, too, where it
/// goes there.
#[derive(Debug)]
struct Steady {
    dumped: bool,
    _stops: IgnoredStops,
}

impl Steady {
    fn begin() -> io::Result<Self> {
        let stops = IgnoredStops::begin()?;
        let dumped = prctl::get_dumpable()?;
        prctl::set_dumpable(false)?;
        Ok(Self { dumped, _stops: stops })
    }
}

impl Drop for Steady {
    fn drop(&mut self) {
        let _ = prctl::set_dumpable(self.dumped);
    }
}

/// A device and all devices of device-mapper that stand on it, which are to be suspended
/// together: only so file systems on its partitions are brought into order first.
#[derive(Debug)]
pub struct Still {
    /// From the top down; the device itself comes last.
    devices: Vec<DeviceInfo>,
}

impl Still {
    /// Looks at what stands on the device.
    ///
    /// # Errors
    /// What the system says; the device is suspended already, by others.
    pub fn of(kernel: &LinuxKernel, number: DeviceNumber) -> Result<Self> {
        let mut devices = Vec::new();
        let mut level = vec![number];
        for _ in 0..MAX_DEPTH {
            let mut next = Vec::new();
            for &number in &level {
                // One that stands on two others comes before both.
                devices.retain(|known: &DeviceInfo| known.number != number);
                devices.extend(kernel.device(DeviceId::Number(number))?);
                next.extend(kernel.dependents(number)?);
            }
            level = next;
        }
        devices.reverse();
        for device in &devices {
            let failed = |error| Error::io("cannot look at a device", error);
            if kernel.dm()?.is_suspended(device.number).map_err(failed)? {
                let name = printable(&device.name);
                return Err(Error::new(ErrorKind::InUse(format!(
                    "the device '{name}' is suspended by somebody else: where nobody is at work on it, 'dmsetup resume {name}'"
                ))));
            }
        }
        Ok(Self { devices })
    }

    /// Refuses to hold still what this process needs to go on: files that are to be written,
    /// which go by these names; its own program, and what memory is swapped to.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a file, [`ErrorKind::InUse`] for the others.
    pub fn check(&self, kernel: &LinuxKernel, files: &[(&Path, &File)]) -> Result<()> {
        let refuse = |kind: fn(String) -> ErrorKind, what: &str, below: &Below| match self
            .devices
            .iter()
            .find(|device| below.has(device.number, &kernel.block_device_path(device.number)))
        {
            None => Ok(()),
            Some(device) => Err(Error::new(kind(format!(
                "{what} lies on the device '{}', which is held still while it is copied: that would never end",
                printable(&device.name)
            )))),
        };
        for (name, file) in files {
            refuse(ErrorKind::Usage, "this", &Below::of_file(file))
                .map_err(|error| error.at_path(name))?;
        }
        for stream in ["/proc/self/fd/1", "/proc/self/fd/2"] {
            let what = "what is printed goes to a file that";
            refuse(ErrorKind::Usage, what, &Below::of_path(Path::new(stream)))?;
        }
        refuse(ErrorKind::InUse, "this program itself", &Below::of_program())?;
        refuse(ErrorKind::InUse, "swap space", &Below::of_swap())
    }

    /// Suspends them all.
    ///
    /// # Errors
    /// What the system says, or `interrupt` came: then all of them go on.
    pub fn suspend<'k>(
        &self,
        kernel: &'k LinuxKernel,
        interrupt: &Interrupt<'_>,
    ) -> Result<Suspended<'k>> {
        let dm = kernel.dm()?;
        let mut held = Vec::new();
        for device in &self.devices {
            let path = kernel.block_device_path(device.number);
            let opened = nodes::open_block(device.number, &path);
            held.push(opened.map_err(|e| Error::io("cannot open the device", e).at_path(path))?);
        }
        // Before the watch, which inherits it.
        let steady = Steady::begin()
            .map_err(|error| Error::io("cannot have the terminal's stops ignored", error))?;
        let failed = |error| Error::io("cannot start a process that watches over this one", error);
        // The lowest first, as whoever is alive does it.
        let all = self.devices.iter().rev();
        let remedies: Result<Vec<_>, _> = all.map(|device| Dm::resumption(device.number)).collect();
        let control = DEVICE_MAPPER.open()?;
        let watch = remedies.and_then(|remedies| watch(control.as_fd(), &remedies));
        let mut suspended = Suspended {
            dm,
            devices: Vec::new(),
            _held: held,
            _watch: watch.map_err(failed)?,
            _steady: steady,
        };
        for device in &self.devices {
            interrupt.check()?;
            if let Err(error) = dm.suspend(device.number) {
                interrupt.check()?;
                let name = printable(&device.name);
                return Err(Error::io(format!("cannot suspend the device '{name}'"), error));
            }
            suspended.devices.push((device.number, device.name.clone()));
            fault::point(format_args!("suspend"))?;
        }
        interrupt.check()?;
        Ok(suspended)
    }
}
