//! What imgdm gives to systemd, beside systemd's own tools.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::images::scratch_dir;
use crate::common::process::run;
use crate::imgdm::PROGRAM;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Runs the generator on a table, into the directory `units` below `dir`.
fn generate(dir: &Path, tab: &str) -> PathBuf {
    let units = dir.join("units");
    fs::create_dir(&units).unwrap();
    fs::write(dir.join("imgdmtab"), tab).unwrap();
    let generator = dir.join("imgdm-generator");
    symlink(PROGRAM, &generator).unwrap();
    let mut command = Command::new(generator);
    command.arg(&units).env("IMGDM_TAB", dir.join("imgdmtab")).env("SYSTEMD_IN_INITRD", "0");
    let ran = run(command.env("SYSTEMD_FSTAB", "/dev/null")).unwrap();
    assert_eq!((ran.code(), ran.stderr.as_str()), (Some(0), ""));
    units
}

fn escape(arguments: &[&str]) -> String {
    let ran = run(Command::new("systemd-escape").args(arguments)).and_then(|ran| ran.ok());
    ran.unwrap().text().trim_end_matches('\n').to_owned()
}

#[test]
fn units_have_the_names_that_systemd_gives_them() {
    let dir = scratch_dir("unit-names").unwrap();
    let names = ["disk", "a-b", "disk@before_update", "..a", ".hidden", "a:b", "#1", "x+y=z", "_"];
    let tab: String = names.iter().map(|name| format!("{name} /srv/x.qcow2\n")).collect();
    // A name must not begin a comment.
    let tab = tab.replace("\n#1", "\n\\0431");
    let units = generate(dir.path(), &tab);
    for name in names {
        let service = escape(&["--template=imgdm-tab@.service", name]);
        assert!(units.join(&service).is_file(), "no {service}");
        let device = escape(&["--path", "--suffix=device", &format!("/dev/mapper/{name}")]);
        assert!(units.join(format!("{device}.requires/{service}")).is_symlink(), "no {device}");
        let device = escape(&["--path", "--suffix=device", &format!("/dev/disk/by-imgdm/{name}")]);
        assert!(units.join(format!("{device}.requires/{service}")).is_symlink(), "no {device}");
    }
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let dir = scratch_dir("units").unwrap();
    let program_dir = Path::new(PROGRAM).parent().unwrap();
    let tab = "disk /srv/my\\040disk\\042\\134%i$HOME.qcow2 /etc/k nofail,snapshot=%n\n\
               block /dev/vg/lv - noauto,x-systemd.device-timeout=1min\\04030s\n\
               net /nfs/x.qcow2 - _netdev,cache\n\
               root /srv/root.qcow2 - x-initrd.attach,x-systemd.requires-mounts-for=/bases\n";
    let units = generate(dir.path(), tab);
    // And those that are installed.
    for entry in fs::read_dir(Path::new(ROOT).join("systemd")).unwrap().flatten() {
        let text = fs::read_to_string(entry.path()).unwrap();
        let name = entry.file_name().into_string().unwrap();
        let text = text.replace("@BINDIR@", &program_dir.display().to_string());
        assert!(!text.contains("@BIN"), "{name}");
        fs::write(units.join(name.trim_end_matches(".in")), text).unwrap();
    }
    // What holds for the service of a path holds for that of a line.
    let settings = |unit: &str| {
        let text = fs::read_to_string(units.join(unit)).unwrap();
        let (_, service) = text.split_once("[Service]\n").unwrap();
        let lines = service.lines().take_while(|line| !line.starts_with("Exec"));
        lines.filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(settings("imgdm@.service"), settings("imgdm-tab@disk.service"));
    let verify = |unit: &Path| {
        let mut command = Command::new("systemd-analyze");
        command.args(["verify", "--man=no"]).arg(unit);
        // The trailing colon stands for systemd's own directories.
        run(command.env("SYSTEMD_UNIT_PATH", format!("{}:", units.display()))).unwrap()
    };
    let mut all: Vec<_> = fs::read_dir(&units).unwrap().flatten().map(|e| e.path()).collect();
    all.retain(|path| path.is_file());
    all.push(units.join("imgdm@srv-my\\x20disk.qcow2.service"));
    assert!(all.len() >= 8, "{all:?}");
    for unit in all {
        let ran = verify(&unit);
        assert!(ran.code() == Some(0) && ran.stderr.is_empty(), "{}", ran.describe());
    }
    // It does find what is wrong.
    let wrong = units.join("wrong.service");
    fs::write(&wrong, "[Service]\nExecStart=/bin/true\nRestrictRealtimes=yes\n").unwrap();
    assert!(verify(&wrong).stderr.contains("RestrictRealtimes"));
}
