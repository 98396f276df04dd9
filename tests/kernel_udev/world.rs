//! What udev makes of the guest's devices.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use crate::guest::*;

/// A directory of a test's own, in a guest where udev runs. Nothing of imgdm may be left
/// once udev is through when it goes.
#[derive(Debug)]
pub(crate) struct World(Scratch);

impl World {
    /// `init` is the `--init` of tests/guest/run that the test is meant for.
    #[track_caller]
    pub(crate) fn new(init: &str) -> Self {
        let here = std::env::var("IMGDM_GUEST");
        assert_eq!(here.as_deref(), Ok(init), "run tests/kernel_udev/run");
        settle();
        Self(Scratch::new())
    }
}

impl Deref for World {
    type Target = Scratch;

    fn deref(&self) -> &Scratch {
        &self.0
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Its workers look at devices for a moment, and that is no leftover.
        let _ = run(&mut command("udevadm", ["settle", "--timeout=30"]));
    }
}

/// Waits until udev has dealt with all events.
#[track_caller]
pub(crate) fn settle() {
    tool("udevadm", ["settle", "--timeout=30"]);
}

/// Has udev deal with all block devices again: `change` as after a write, `add` as at
/// the cold plug after switch-root.
#[track_caller]
pub(crate) fn trigger(action: &str) {
    let action = format!("--action={action}");
    tool("udevadm", ["trigger", "--subsystem-match=block", &action, "--settle"]);
}

/// The guest's own disk, whose file system nobody may shadow (IMGDM_HOST_DISK).
pub(crate) fn host_disk() -> PathBuf {
    std::env::var_os("IMGDM_HOST_DISK").expect("IMGDM_HOST_DISK names no disk").into()
}

/// A file whose copy is a raw image with the UUID of the host's disk.
pub(crate) fn host_uuid() -> String {
    std::env::var("IMGDM_HOST_UUID").expect("IMGDM_HOST_UUID is not set")
}

/// A block device, as udev knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// `loop0`, `dm-1`.
    pub(crate) kernel_name: String,
    /// `7:0`.
    pub(crate) number: String,
}

impl Node {
    pub(crate) fn named(kernel_name: &str) -> Self {
        let number = fs::read_to_string(format!("/sys/class/block/{kernel_name}/dev"));
        let number = number.unwrap_or_else(|error| panic!("{kernel_name}: {error}"));
        Self { kernel_name: kernel_name.to_owned(), number: number.trim().to_owned() }
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.kernel_name)
    }

    /// What it lies on, and what that lies on.
    fn below(&self, all: &mut Vec<Self>) {
        let slaves = fs::read_dir(format!("/sys/class/block/{}/slaves", self.kernel_name));
        for slave in slaves.into_iter().flatten().flatten() {
            let slave = Self::named(&slave.file_name().to_string_lossy());
            if !all.contains(&slave) {
                all.push(slave.clone());
                slave.below(all);
            }
        }
    }

    /// Its properties in udev's database, `NAME=value`.
    #[track_caller]
    pub(crate) fn properties(&self) -> Vec<String> {
        let printed = tool("udevadm", args!["info", "--query=property", self.path()]);
        printed.lines().map(str::to_owned).collect()
    }

    pub(crate) fn property(&self, name: &str) -> Option<String> {
        let properties = self.properties();
        properties.iter().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix('=')?.into()))
    }

    /// The links that udev would point at it, were it alone, whoever has them now.
    pub(crate) fn claims(&self) -> BTreeSet<String> {
        let id = format!("b{}", self.number);
        let all = fs::read_dir("/run/udev/links").into_iter().flatten().flatten();
        let mine = all.filter(|link| link.path().join(&id).symlink_metadata().is_ok());
        mine.map(|link| link.file_name().to_string_lossy().replace("\\x2f", "/")).collect()
    }
}

/// The device of an attachment, the devices inside and its loops, top first.
#[track_caller]
pub(crate) fn tree(device: &Device) -> Vec<Node> {
    let node = fs::canonicalize(&device.path).unwrap();
    let mut all = vec![Node::named(&node.file_name().unwrap().to_string_lossy())];
    let top = all[0].clone();
    top.below(&mut all);
    assert!(all.iter().any(|node| node.kernel_name.starts_with("loop")), "no loop: {all:?}");
    all
}

/// The links under /dev/disk, each with its target; without those by sequence number,
/// which every loop device has, and our own.
pub(crate) fn disk_links() -> BTreeMap<PathBuf, PathBuf> {
    let mut links = BTreeMap::new();
    for directory in fs::read_dir("/dev/disk").into_iter().flatten().flatten() {
        if directory.file_name() == "by-diskseq" || directory.file_name() == "by-imgdm" {
            continue;
        }
        for link in fs::read_dir(directory.path()).into_iter().flatten().flatten() {
            links.insert(link.path(), fs::read_link(link.path()).unwrap_or_default());
        }
    }
    links
}

/// The links in /dev/disk/by-imgdm, each with its target.
pub(crate) fn by_imgdm() -> BTreeMap<String, PathBuf> {
    let links = fs::read_dir("/dev/disk/by-imgdm").into_iter().flatten().flatten();
    let target = |link: &fs::DirEntry| fs::read_link(link.path()).unwrap_or_default();
    links.map(|link| (link.file_name().to_string_lossy().into_owned(), target(&link))).collect()
}

/// What is in /dev/mapper beside the control node.
pub(crate) fn mapper() -> Vec<String> {
    let all = fs::read_dir("/dev/mapper").into_iter().flatten().flatten();
    let all = all.map(|entry| entry.file_name().to_string_lossy().into_owned());
    // ".#...": a link that udev is about to put in place by renaming it.
    all.filter(|name| name != "control" && !name.starts_with(".#")).collect()
}

/// A plain read-only loop device, as any tool would make it.
#[derive(Debug)]
pub(crate) struct PlainLoop(Node);

impl PlainLoop {
    #[track_caller]
    pub(crate) fn over(file: &Path) -> Self {
        let printed = tool("losetup", args!["-r", "-f", "--show", file]);
        Self(Node::named(printed.trim().trim_start_matches("/dev/")))
    }
}

impl Deref for PlainLoop {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.0
    }
}

impl Drop for PlainLoop {
    fn drop(&mut self) {
        let _ = run(&mut command("losetup", args!["-d", self.path()]));
        let _ = run(&mut command("udevadm", ["settle", "--timeout=30"]));
    }
}

/// A file of udev's configuration for as long as the test needs it.
#[derive(Debug)]
pub(crate) struct Rules(PathBuf);

impl Rules {
    /// A rule file in the directory that is above all others; without text it masks the
    /// file of that name in the others.
    #[track_caller]
    pub(crate) fn put(name: &str, text: &str) -> Self {
        let path = Path::new("/etc/udev/rules.d").join(name);
        assert!(path.symlink_metadata().is_err(), "{name} is there already");
        if text.is_empty() {
            std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        } else {
            fs::write(&path, text).unwrap();
        }
        tool("udevadm", ["control", "--reload"]);
        Self(path)
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
        let _ = run(&mut command("udevadm", ["control", "--reload"]));
    }
}

/// A raw file of that many MiB.
#[track_caller]
pub(crate) fn raw(world: &World, name: &str, mebibytes: u64) -> PathBuf {
    let path = world.path(name);
    fs::File::create(&path).unwrap().set_len(mebibytes * MIB).unwrap();
    path
}

/// A qcow2 overlay, without a cluster of its own, over a raw file: it needs a device
/// inside to be held.
#[track_caller]
pub(crate) fn overlay(world: &World, name: &str, base: &Path) -> PathBuf {
    world.create("qcow2", &["-F", "raw", "-b", &base.to_string_lossy()], name, "")
}

/// The kernel's log.
pub(crate) fn kernel_log() -> String {
    tool("dmesg", [""; 0])
}
