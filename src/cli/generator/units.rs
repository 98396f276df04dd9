//! From entries of imgdmtab to units: text in, text out.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use imgdm::device::name::DmName;
use imgdm::imgdmtab::{AttachOption, BootOptions, DEFAULT_PATH, Entry};

use super::escape;

/// What comes before the instance in the name of an entry's service.
const PREFIX: &str = "imgdm-tab@";

/// Something for the generator to make, below its directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Made {
    /// Where.
    pub(crate) path: PathBuf,
    /// What.
    pub(crate) what: What,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum What {
    File(String),
    Link(String),
}

/// What all units have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting<'a> {
    /// The program that they call, a path of UTF-8.
    pub(crate) program: &'a str,
    /// The table.
    pub(crate) tab: &'a Path,
    /// The devices that fstab mounts.
    pub(crate) mounted: &'a BTreeSet<PathBuf>,
    /// Directories, each with the line of an entry, that its service can't wait for.
    pub(crate) circular: &'a BTreeSet<(usize, PathBuf)>,
}

/// The units of one entry; none where systemd takes no names so long.
pub(crate) fn of_entry(entry: &Entry, setting: &Setting<'_>) -> Option<Vec<Made>> {
    let service = escape::unit(format!("{PREFIX}{}.service", escape::instance(&entry.name)))?;
    let devices = devices(entry, setting.mounted);
    // Without these nothing could wait for the image.
    devices.first()?;
    let boot = &entry.boot;
    let mut made = vec![file(&service, service_text(entry, &devices, setting))];
    let needs = if boot.nofail { "wants" } else { "requires" };
    if !boot.noauto {
        made.push(link(&format!("{}.{needs}", target(entry)), &service));
        if !boot.netdev {
            made.push(link("sysinit.target.wants", "imgdm.target"));
        }
    }
    for device in &devices {
        made.push(link(&format!("{}.requires", device.unit), &service));
        if !boot.noauto && !boot.nofail && device.is_sure {
            // To inflate an image may take longer than systemd waits for a device; and where
            // that fails, the device's job fails with it. (Ordering the device after the
            // service is no way: to stop the service then never ends.)
            let text = "[Unit]\nJobTimeoutSec=0\n";
            made.push(drop_in(&device.unit, "40-imgdm.conf", text));
        }
        if let Some(time) = &boot.device_timeout {
            made.push(timeout(&device.unit, entry, time));
        }
    }
    if let (Some(time), Some(image)) = (&boot.device_timeout, image_unit(&entry.image)) {
        made.push(timeout(&image, entry, time));
    }
    Some(made)
}

/// The units of a line that is wrong: only so that what waits for its device is told at once.
pub(crate) fn of_wrong_line(name: &str, line: usize, setting: &Setting<'_>) -> Option<Vec<Made>> {
    let entry = Entry {
        line,
        name: name.to_owned(),
        image: PathBuf::from("/"),
        // It writes nothing, and so needs no place for it.
        options: vec![AttachOption { name: "compressed", value: Some("refuse".into()) }],
        boot: BootOptions { noauto: true, nofail: true, ..BootOptions::default() },
    };
    of_entry(&entry, setting)
}

/// The device units of one of an entry's devices.
struct DeviceUnits {
    /// It is there once the service has started.
    is_sure: bool,
    unit: String,
    /// What mounts come after, so that they are gone before the device goes.
    blockdev: String,
}

impl DeviceUnits {
    fn new(path: &Path, is_sure: bool) -> Option<Self> {
        let path = escape::path(path);
        Some(Self {
            is_sure,
            unit: escape::unit(format!("{path}.device"))?,
            blockdev: escape::unit(format!("blockdev@{path}.target"))?,
        })
    }
}

/// The devices of an entry that may be waited for: its own first.
fn devices(entry: &Entry, mounted: &BTreeSet<PathBuf>) -> Vec<DeviceUnits> {
    let sure = sure_paths(entry);
    let units = sure.iter().filter_map(|path| DeviceUnits::new(path, true));
    let found = mounted_partitions(entry, mounted);
    units.chain(found.filter_map(|path| DeviceUnits::new(path, false))).collect()
}

/// The paths of an entry's devices.
pub(crate) fn paths(entry: &Entry, mounted: &BTreeSet<PathBuf>) -> Vec<PathBuf> {
    let mut paths = sure_paths(entry);
    paths.extend(mounted_partitions(entry, mounted).cloned());
    paths
}

fn mapper(name: &DmName) -> PathBuf {
    PathBuf::from(format!("/dev/mapper/{name}"))
}

fn by_imgdm(name: &str) -> PathBuf {
    PathBuf::from(format!("/dev/disk/by-imgdm/{name}"))
}

fn partition(name: &DmName, number: u32) -> [PathBuf; 2] {
    [mapper(&name.partition(number)), by_imgdm(&format!("{name}-part{number}"))]
}

/// The devices that are there once the entry is attached: its own first.
fn sure_paths(entry: &Entry) -> Vec<PathBuf> {
    let Ok(name) = DmName::new(&entry.name) else { return Vec::new() };
    let mut all = vec![mapper(&name), by_imgdm(name.as_str())];
    let numbers = entry.values("partition").filter_map(|number| number.to_str()?.parse().ok());
    all.extend(numbers.flat_map(|number| partition(&name, number)));
    let volumes = entry.values("lv").filter_map(|volume| volume.to_str()?.split_once('/'));
    let volumes = volumes.filter_map(|(_, volume)| name.logical_volume(volume).ok());
    all.extend(volumes.flat_map(|volume| [mapper(&volume), by_imgdm(volume.as_str())]));
    all
}

/// Which partitions there are of an entry with all of them is only known once it is
/// attached: those that fstab mounts.
fn mounted_partitions<'a>(
    entry: &Entry,
    mounted: &'a BTreeSet<PathBuf>,
) -> impl Iterator<Item = &'a PathBuf> {
    let name = DmName::new(&entry.name).ok().filter(|_| entry.has("partitions"));
    mounted.iter().filter(move |path| {
        let text = path.to_str().unwrap_or_default();
        let digits = text.len() - text.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        let number = text.get(text.len() - digits..).and_then(|digits| digits.parse().ok());
        let both = name.as_ref().zip(number);
        both.is_some_and(|(name, number)| partition(name, number).contains(path))
    })
}

/// The target that an entry belongs to.
fn target(entry: &Entry) -> &'static str {
    if entry.boot.netdev { "remote-fs.target" } else { "imgdm.target" }
}

/// The device unit of an image that is a block device.
fn image_unit(image: &Path) -> Option<String> {
    let path = PathBuf::from(escape::mountable(image));
    path.strip_prefix("/dev").ok()?;
    escape::unit(format!("{}.device", escape::path(&path)))
}

fn service_text(entry: &Entry, devices: &[DeviceUnits], setting: &Setting<'_>) -> String {
    let boot = &entry.boot;
    let mut text = String::from("[Unit]\n");
    let mut line = |key: &str, value: &str| {
        text.push_str(key);
        text.push('=');
        text.push_str(value);
        text.push('\n');
    };
    let tab = escape::mountable(setting.tab);
    line("Description", &format!("Disk Image {}", escape::specifiers(&entry.name)));
    line("Documentation", "man:imgdmtab(5) man:imgdm(8)");
    line("SourcePath", &escape::specifiers(&tab));
    line("DefaultDependencies", "no");
    line("IgnoreOnIsolate", "yes");
    // Scratch files are written once the root file system can be.
    line("After", "imgdm-pre.target systemd-udevd-kernel.socket systemd-remount-fs.service");
    line("Before", "umount.target");
    if boot.initrd {
        // What the initrd has attached stays to the end, and is not attached again.
        line("ConditionPathExists", &format!("!/dev/mapper/{}", entry.name));
    } else {
        line("Conflicts", "umount.target");
    }
    if boot.netdev {
        line("After", "remote-fs-pre.target network-online.target");
        line("Wants", "network-online.target");
    }
    if !boot.nofail {
        line("Before", target(entry));
    }
    match image_unit(&entry.image) {
        Some(unit) => {
            line("BindsTo", &unit);
            line("After", &unit);
        }
        None => line("RequiresMountsFor", &mounts_for(&entry.image)),
    }
    for path in other_paths(entry) {
        line("RequiresMountsFor", &mounts_for(&path));
    }
    for path in scratch_paths(entry) {
        let at = (entry.line, path);
        if !setting.circular.contains(&at) {
            line("RequiresMountsFor", &mounts_for(&at.1));
        }
    }
    for device in devices {
        line("Before", &device.blockdev);
        line("Wants", &device.blockdev);
    }

    let program = escape::word(setting.program);
    let name = &entry.name;
    let tab_option = match setting.tab == Path::new(DEFAULT_PATH) {
        true => String::new(),
        false => format!(" --file {}", escape::word(&tab)),
    };
    text.push_str("\n[Service]\nType=oneshot\nRemainAfterExit=yes\n");
    // To inflate an image may take long, and nothing else waits without end.
    text.push_str("TimeoutStartSec=infinity\n");
    text.push_str(HARDENING);
    // Without ':' systemd would look for variables in it.
    text.push_str(&format!("ExecStart=:{program} attach-tab{tab_option} {name}\n"));
    // Whoever has it open at shutdown is soon gone.
    text.push_str(&format!("ExecStop=:{program} detach --if-attached --deferred {name}\n"));
    text
}

/// What attach needs none of. Nothing that gives the service mounts of its own: its loop
/// devices would hold those, and `umount` of the images' file system would not see it. As in
/// systemd/imgdm@.service.in.
const HARDENING: &str = "UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
";

/// What else has to be mounted: keys, data files, stores, backing files.
pub(crate) fn other_paths(entry: &Entry) -> Vec<PathBuf> {
    let options = ["key-file", "data-file", "allow-path", "overlay"].into_iter();
    let mut paths: Vec<_> =
        options.flat_map(|option| entry.values(option)).map(PathBuf::from).collect();
    paths.extend(entry.boot.requires_mounts_for.iter().cloned());
    paths
}

/// Where an entry's scratch files may go, which has to be mounted, too.
pub(crate) fn scratch_paths(entry: &Entry) -> Vec<PathBuf> {
    let value = |option| entry.values(option).next().map(PathBuf::from);
    let compressed = value("compressed");
    // What is written goes to a scratch file where no store is named.
    let is_written = entry.has("overlay") && entry.values("overlay").next().is_none();
    // The initrd has other places.
    if entry.boot.initrd || (compressed.as_deref() == Some(Path::new("refuse")) && !is_written) {
        return Vec::new();
    }
    let mut paths = vec![value("scratch-dir").unwrap_or_else(|| PathBuf::from("/var/tmp"))];
    if compressed.as_deref() == Some(Path::new("cache")) {
        let cache = value("cache-dir");
        paths.push(cache.unwrap_or_else(|| PathBuf::from("/var/cache/imgdm")));
    }
    paths
}

fn mounts_for(path: &Path) -> String {
    escape::word(&escape::mountable(path))
}

fn file(path: &str, text: String) -> Made {
    let text = format!("# Automatically generated by imgdm-generator\n\n{text}");
    Made { path: path.into(), what: What::File(text) }
}

fn drop_in(unit: &str, name: &str, text: &str) -> Made {
    file(&format!("{unit}.d/{name}"), text.to_owned())
}

/// Before fstab's own (50-device-timeout.conf), so that that one counts. An image can be in
/// several entries.
fn timeout(unit: &str, entry: &Entry, time: &str) -> Made {
    let text = format!("[Unit]\nJobRunningTimeoutSec={time}\n");
    drop_in(unit, &format!("45-imgdm-{}.conf", escape::instance(&entry.name)), &text)
}

/// A link in a unit's directory of dependencies.
fn link(directory: &str, unit: &str) -> Made {
    Made { path: Path::new(directory).join(unit), what: What::Link(format!("../{unit}")) }
}
