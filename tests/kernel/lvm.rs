//! Logical volumes of a guest, beside the devices that LVM itself makes of them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::args;
use crate::faults::{faulty, steps};
use crate::guest::*;

pub(crate) const GROUP: &str = "guestvg";
/// Where the two partitions start, and how long they are.
const PARTS: [u64; 2] = [MIB, 31 * MIB];
const PART_BYTES: u64 = 30 * MIB;

/// A disk with two partitions, each a physical volume, while LVM sees it.
pub(crate) struct Host {
    pub(crate) raw: PathBuf,
    pub(crate) loops: Vec<String>,
    /// LVM's configuration for these two alone.
    config: String,
}

impl Host {
    pub(crate) fn new(scratch: &Scratch) -> Self {
        let raw = scratch.path("guest.raw");
        File::create(&raw).unwrap().set_len(64 * MIB).unwrap();
        let lines: String = PARTS
            .iter()
            .map(|start| format!("start={}, size={}, type=lvm\n", start / 512, PART_BYTES / 512))
            .collect();
        let shown = raw.display();
        sh(&format!("printf 'label: gpt\n{lines}' | sfdisk -q '{shown}'"));
        let loops: Vec<_> = PARTS
            .iter()
            .map(|start| {
                let (offset, limit) = (start.to_string(), PART_BYTES.to_string());
                let part = args!["-o", offset, "--sizelimit", limit, "-f", "--show", &raw];
                tool("losetup", part).trim().to_owned()
            })
            .collect();
        let accepted: String = loops.iter().map(|node| format!("\"a|^{node}$|\",")).collect();
        // There is no udev to wait for, and nothing to be asked.
        let config = format!(
            "devices {{ use_devicesfile=0 global_filter=[{accepted}\"r|.*|\"] \
             obtain_device_list_from_udev=0 }} activation {{ udev_sync=0 udev_rules=0 }} \
             backup {{ backup=0 archive=0 }} global {{ thin_check_executable=\"\" }}"
        );
        Self { raw, loops, config }
    }

    #[track_caller]
    pub(crate) fn lvm(&self, line: &str) -> String {
        let mut words = line.split_whitespace();
        let mut tool = command(words.next().unwrap(), ["--config", &self.config]);
        tool.args(words).env("LVM_SUPPRESS_FD_WARNINGS", "1");
        run(&mut tool).ok()
    }

    /// Makes the group, with a volume of each kind, and writes to those that can be had.
    #[track_caller]
    fn make(&self) {
        let [first, second] = &self.loops[..] else { panic!("{:?}", self.loops) };
        self.lvm(&format!("pvcreate -qq {first} {second}"));
        self.lvm(&format!("vgcreate -qq -s 1M {GROUP} {first} {second}"));
        let create = "lvcreate -qq -y -Wn -Zn";
        self.lvm(&format!("{create} -L 4M -n root {GROUP} {first}"));
        self.lvm(&format!("{create} -L 2M -n origin {GROUP} {first}"));
        // In two pieces, one on each side of the one that was in the way.
        self.lvm(&format!("lvextend -qq -L 7M {GROUP}/root {first}"));
        self.lvm(&format!("{create} -i 2 -I 16k -L 6M -n striped {GROUP}"));
        self.lvm(&format!("{create} --type raid1 -m 1 -L 2M -n mirrored {GROUP}"));
        self.lvm(&format!("lvcreate -qq -y --type thin-pool -L 2M -n pool {GROUP}"));
        self.lvm(&format!("lvcreate -qq -y -V 2M --thinpool pool -n thin {GROUP}"));
        let mut random = Random(0x1f2e_3d4c);
        for (name, mebibytes) in [("root", 7), ("origin", 2), ("striped", 6)] {
            let bytes = random.bytes(mebibytes << 20);
            fs::write(self.device(name), bytes).unwrap();
        }
        self.lvm(&format!("lvcreate -qq -y -s -L 2M -n snap {GROUP}/origin"));
        // Goes to the origin, and what was there to the snapshot.
        let origin = fs::OpenOptions::new().write(true).open(self.device("origin")).unwrap();
        origin.write_all_at(&random.bytes(64 << 10), MIB).unwrap();
        origin.sync_all().unwrap();
    }

    pub(crate) fn device(&self, name: &str) -> PathBuf {
        Path::new("/dev").join(GROUP).join(name)
    }

    /// What LVM says of the segments of a volume: type, first extent, extents, and of a
    /// striped one bytes of a chunk.
    #[track_caller]
    fn segments(&self, name: &str) -> Vec<Vec<String>> {
        let printed = self.lvm(&format!(
            "lvs --segments --noheadings --nosuffix --units b --separator : -o \
             segtype,seg_start_pe,seg_size_pe,stripe_size {GROUP}/{name}"
        ));
        let lines = printed.lines();
        lines.map(|line| line.trim().split(':').map(str::to_owned).collect()).collect()
    }

    #[track_caller]
    pub(crate) fn leave(&self) {
        self.lvm(&format!("vgchange -qq -an {GROUP}"));
        for node in &self.loops {
            tool("losetup", ["-d", node]);
        }
    }
}

/// What `imgdm partitions` says of the segments of a volume, in LVM's way.
fn our_segments(group: &Value, name: &str) -> Vec<Vec<String>> {
    let volumes = group["logical_volumes"].as_array().unwrap();
    let volume = volumes.iter().find(|volume| volume["name"] == name).unwrap();
    let segment = |segment: &Value| {
        let chunk = segment["chunk_size"].as_u64().unwrap_or(0);
        vec![
            segment["type"].as_str().unwrap().to_owned(),
            segment["start"].to_string(),
            segment["extents"].to_string(),
            chunk.to_string(),
        ]
    };
    volume["segments"].as_array().unwrap().iter().map(segment).collect()
}

#[test]
fn logical_volumes_give_the_bytes_that_lvm_gives_and_others_are_refused() {
    let scratch = Scratch::new();
    let host = Host::new(&scratch);
    host.make();
    let volumes = ["root", "origin", "striped"];
    let wanted = volumes.map(|name| {
        let device = host.device(name);
        forget(&device);
        fs::read(device).unwrap()
    });
    let supported = volumes.map(|name| host.segments(name));
    let (raid, thin) = (host.segments("mirrored"), host.segments("thin"));
    let uuid = host.lvm(&format!("vgs --noheadings -o vg_uuid {GROUP}"));
    host.leave();

    let image = scratch.path("guest.qcow2");
    qemu_img(args!["convert", "-O", "qcow2", &host.raw, &image]).ok();
    let top =
        scratch.create("qcow2", &["-F", "qcow2", "-b", &image.to_string_lossy()], "top.qcow2", "");
    let printed = imgdm(args!["partitions", "--output=json", &top]).ok();
    let report: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(report["warnings"], Value::Array(Vec::new()));
    let group = &report["lvm"]["volume_groups"][0];
    assert_eq!(group["uuid"].as_str(), Some(uuid.trim()));
    for (name, segments) in volumes.iter().zip(supported) {
        assert_eq!(our_segments(group, name), segments);
    }
    assert_eq!(our_segments(group, "mirrored")[0][0], raid[0][0]);
    assert_eq!(our_segments(group, "thin")[0][0], thin[0][0]);

    let options = volumes.map(|name| format!("--lv={GROUP}/{name}"));
    let mut line = vec!["attach".into()];
    line.extend(options.iter().map(std::ffi::OsString::from));
    line.push(top.clone().into());
    let printed = imgdm(&line).ok();
    let paths: Vec<_> = printed.lines().collect();
    assert_eq!(paths[0], "/dev/mapper/top");
    for (name, wanted) in volumes.iter().zip(&wanted) {
        let path = PathBuf::from(format!("/dev/mapper/top-{name}"));
        assert!(paths.contains(&&*path.to_string_lossy()), "{printed}");
        forget(&path);
        assert_same(name, &fs::read(&path).unwrap(), wanted);
        assert_random_reads(&path, wanted, 7);
        assert_eq!(tool("blockdev", args!["--getro", &path]).trim(), "1");
    }
    // In a single step, straight on the disk.
    let table = tool("dmsetup", ["table", "top-striped"]);
    assert!(table.starts_with("0 12288 striped 2 32 "), "{table}");
    // Again: the same, and nothing changes.
    let before = dm_devices();
    assert_eq!(imgdm(&line).ok(), printed);
    assert_eq!(dm_devices(), before);

    let listed = listed();
    let listed = listed[0]["logical_volumes"].as_array().unwrap();
    let mut of_list: Vec<_> = listed.iter().map(|one| one["name"].as_str().unwrap()).collect();
    of_list.sort_unstable();
    assert_eq!(of_list, ["top-origin", "top-root", "top-striped"]);
    assert!(listed.iter().all(|one| one["open_count"] == 0), "{listed:?}");
    imgdm(["verify", "top"]).ok();

    // One that somebody has open keeps the attachment.
    let open = File::open("/dev/mapper/top-root").unwrap();
    let said = imgdm(["detach", "top"]).refused(75);
    assert!(said.contains("top-root"), "{said}");
    assert_eq!(dm_devices(), before);
    drop(open);
    // One that is not what it should be any more is found.
    tool("dmsetup", ["reload", "--readonly", "top-striped", "--table", "0 12288 zero"]);
    tool("dmsetup", ["resume", "--noudevsync", "top-striped"]);
    let ran = imgdm(["verify", "top"]);
    assert_eq!(ran.code(), Some(1), "{ran}");
    assert!(ran.stdout.contains("'top-striped' is not what LVM's metadata says"), "{ran}");
    assert_eq!(imgdm(["detach", "top"]).ok(), "");

    refused(&image);
    let packed = scratch.path("packed.qcow2");
    qemu_img(args!["convert", "-O", "qcow2", "-c", &image, &packed]).ok();
    refused(&packed);
    assert!(steps(&["--lv=guestvg/root"], &packed).iter().any(|step| step == "inflate"));
    missing(&scratch, &host.raw, &wanted[0]);
}

/// What can't be put together is refused by name, and nothing stays.
#[track_caller]
fn refused(image: &Path) {
    for (name, status, words) in [
        ("guestvg/mirrored", 76, &["guestvg/mirrored", "'raid1'"][..]),
        ("guestvg/thin", 76, &["guestvg/thin", "'thin'"]),
        ("guestvg/snap", 76, &["guestvg/snap", "'snapshot'"]),
        ("guestvg/home", 66, &["'guestvg/home'", "guestvg/root", "guestvg/striped"]),
        ("root", 64, &["'root'", "VG/LV", "vg0/root"]),
    ] {
        let said = run(&mut faulty(&["--lv", name], image, "list")).refused(status);
        for word in words {
            assert!(said.contains(word), "{word}: {said}");
        }
        // Nothing is inflated for it.
        assert!(!said.contains("inflate"), "{said}");
        assert_nothing_left();
    }
}

/// Of a group of which one physical volume is on another disk, what lies on the other alone
/// can be had.
#[track_caller]
fn missing(scratch: &Scratch, raw: &Path, root: &[u8]) {
    let half = scratch.path("half.raw");
    let mut bytes = vec![0; usize::try_from(PART_BYTES).unwrap()];
    File::open(raw).unwrap().read_exact_at(&mut bytes, PARTS[0]).unwrap();
    fs::write(&half, &bytes).unwrap();
    let said = imgdm(args!["attach", "-f", "raw", "--lv=guestvg/striped", &half]).refused(66);
    assert!(said.contains("guestvg/striped") && said.contains("not on this disk"), "{said}");
    assert_nothing_left();
    imgdm(args!["attach", "-f", "raw", "--lv=guestvg/root", &half]).ok();
    assert_same("root of the first half", &fs::read("/dev/mapper/half-root").unwrap(), root);
    assert_eq!(imgdm(["detach", "half"]).ok(), "");
}
