//! `/etc/imgdmtab`: what the generator makes of it, and what is said of its lines.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use snapbox::data::DataFormat;
use snapbox::{Assert, Data, Redactions};

use crate::images::imgdm;

const TAB: &str = "\
# NAME  IMAGE                    KEY         OPTIONS
disk    /srv/my\\040100%\\042.qcow2
part9   /srv/part.raw            -           partitions,nofail,x-systemd.requires-mounts-for=/bases
a-b@c   /dev/vg/lv               /etc/a.key  noauto,x-systemd.device-timeout=5min
net     /nfs/net.qcow2           none        _netdev,cache,data-file=/data/net.raw,lv=vg/lv-1
root    /srv/../root.qcow2       -           x-initrd.attach,compressed=refuse,partition=2
typo    /srv/typo.qcow2          -           nofial
disk    /srv/other.qcow2
a/b     /srv/c.qcow2
tmp     /srv/tmp.raw             -           format=raw
relative disk.qcow2
";
const FSTAB: &str = "\
# DEVICE MOUNTPOINT
/dev/mapper/part9p2 /a auto ro 0 0
/dev/mapper/part92  /b auto ro 0 0
\t/dev/disk/by-imgdm/part9-part10 /c auto ro 0 0
UUID=x /d auto ro 0 0
/dev/mapper/tmp /var/tmp/ ext4 ro 0 0
";

/// A table, an fstab, and the program by its other name.
struct World(tempfile::TempDir);

impl World {
    fn new(tab: &str) -> Self {
        let world = Self(tempfile::tempdir().unwrap());
        fs::write(world.path().join("imgdmtab"), tab).unwrap();
        fs::write(world.path().join("fstab"), FSTAB).unwrap();
        fs::create_dir(world.path().join("units")).unwrap();
        symlink(env!("CARGO_BIN_EXE_imgdm"), world.path().join("imgdm-generator")).unwrap();
        world
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn generate(&self, in_initrd: &str) -> Output {
        let mut command = Command::new(self.path().join("imgdm-generator"));
        let units = self.path().join("units");
        command.args([&units, Path::new("/nowhere/early"), Path::new("/nowhere/late")]);
        command.env("IMGDM_TAB", self.path().join("imgdmtab"));
        command.env("SYSTEMD_FSTAB", self.path().join("fstab"));
        command.env("SYSTEMD_IN_INITRD", in_initrd).env_remove("SYSTEMD_SCOPE");
        command.output().unwrap()
    }

    /// All that was made, in words.
    fn units(&self) -> String {
        let mut all = Vec::new();
        collect(&self.path().join("units"), "", &mut all);
        all.sort();
        all.concat()
    }
}

fn collect(directory: &Path, above: &str, all: &mut Vec<String>) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let name = format!("{above}{}", entry.file_name().to_string_lossy());
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            collect(&entry.path(), &format!("{name}/"), all);
        } else if kind.is_symlink() {
            let target = fs::read_link(entry.path()).unwrap();
            all.push(format!("{name} -> {}\n\n", target.display()));
        } else {
            all.push(format!("{name}:\n{}\n", fs::read_to_string(entry.path()).unwrap()));
        }
    }
}

fn check(text: String, directory: &Path, golden: &str) {
    let mut redactions = Redactions::new();
    let program = Path::new(env!("CARGO_BIN_EXE_imgdm")).canonicalize().unwrap();
    redactions.insert("[IMGDM]", program.display().to_string()).unwrap();
    redactions.insert("[DIR]", directory.display().to_string()).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/golden").join(golden);
    Assert::new()
        .action_env("SNAPSHOTS")
        // Which would take the escapes of systemd for Windows's.
        .normalize_paths(false)
        .redact_with(redactions)
        .eq(text, Data::read_from(&golden, Some(DataFormat::Text)));
}

#[test]
fn units_of_a_table_and_messages_of_its_wrong_lines() {
    let world = World::new(TAB);
    let output = world.generate("0");
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    check(world.units(), world.path(), "generator.txt");
    let said = String::from_utf8(output.stderr).unwrap();
    check(said, world.path(), "generator-errors.txt");
}

#[test]
fn the_initrd_has_units_of_its_own_lines_only() {
    let world = World::new(TAB);
    assert!(world.generate("1").status.success());
    let units = world.units();
    let services = units.lines().filter_map(|line| line.strip_prefix("imgdm-tab@"));
    // Those of wrong lines, for what waits for them there: they fail at once.
    let wanted = ["relative.service:", "root.service:", "typo.service:"];
    assert_eq!(services.collect::<Vec<_>>(), wanted);
}

#[test]
fn without_a_table_there_are_no_units() {
    let world = World::new("");
    assert!(world.generate("0").status.success());
    fs::remove_file(world.path().join("imgdmtab")).unwrap();
    let output = world.generate("0");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    assert_eq!(world.units(), "");
}

#[test]
fn a_unit_that_cannot_be_made_keeps_no_other_from_being_made() {
    let world = World::new("a /a\nb /b\n");
    let there = world.path().join("units/imgdm-tab@a.service");
    fs::write(&there, "another's").unwrap();
    let output = world.generate("0");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("imgdm-tab@a.service"));
    assert_eq!(fs::read_to_string(&there).unwrap(), "another's");
    assert!(world.path().join("units/imgdm-tab@b.service").exists());
    assert!(world.path().join("units/imgdm.target.requires/imgdm-tab@b.service").is_symlink());
}

#[test]
fn a_name_that_is_too_long_for_a_unit_is_told_and_the_others_are_made() {
    let long = "+".repeat(100);
    let world = World::new(&format!("{long} /a\nb /b\n"));
    let output = world.generate("0");
    assert!(output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("line 1: ") && said.contains("too long"), "{said}");
    let units = world.units();
    assert!(units.contains("imgdm-tab@b.service:") && !units.contains("\\x2b"), "{units}");
}

#[test]
fn check_prints_what_each_line_amounts_to() {
    let world = World::new(TAB);
    let output = imgdm(world.path(), &["attach-tab", "--check", "--file", "imgdmtab"]);
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    check(String::from_utf8(output.stdout).unwrap(), world.path(), "attach-tab-check.txt");
    check(String::from_utf8(output.stderr).unwrap(), world.path(), "attach-tab-errors.txt");

    let world = World::new("# nothing\na /a - nofail,compressed=cache\n");
    let output = imgdm(world.path(), &["attach-tab", "--check", "--file", "imgdmtab"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn a_line_that_is_missing_or_wrong_ends_with_its_own_status() {
    let world = World::new("a /a - zero=always\nb /b - foo\nc /nowhere/c\nc /c\n");
    for (name, status, what) in [
        ("a", 78, "imgdm: imgdmtab: line 1: invalid value 'always' for '--zero <MODE>'"),
        ("b", 78, "imgdm: imgdmtab: line 2: unknown option 'foo'"),
        ("c", 66, "/nowhere/c"),
        ("d", 66, "imgdm: imgdmtab: no line has the name 'd'"),
    ] {
        let output = imgdm(world.path(), &["attach-tab", "--file", "imgdmtab", name]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{said}");
        assert!(said.contains(what) && output.stdout.is_empty(), "{said}");
    }
    // Nothing is attached where a name is wrong, and all is tried with --all.
    let output = imgdm(world.path(), &["attach-tab", "--file", "imgdmtab", "c", "d"]);
    assert!(!String::from_utf8_lossy(&output.stderr).contains("/nowhere/c"), "{output:?}");
    let output = imgdm(world.path(), &["attach-tab", "--file", "imgdmtab", "--all"]);
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    let parts = ["line 1: ", "line 2: ", "line 4: ", "/nowhere/c"];
    assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    let output = imgdm(world.path(), &["attach-tab", "--file", "nowhere", "a"]);
    assert_eq!(output.status.code(), Some(66), "{output:?}");
}
