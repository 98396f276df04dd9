//! Long chains, and chains without an end.

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::time::Duration;

use crate::check::{convert, same, strings};
use crate::common::images::{Step, scratch_dir};
use crate::common::patch::Patch;
use crate::common::process::{Outcome, run_within};
use crate::common::qemu;
use crate::far::{create, recipe_of, write};
use crate::imgdm::{EX_INVALID, PROGRAM, imgdm, refused};
use crate::map::rows;
use crate::table::{Plan, compare};

const SIZE: u64 = 2 << 20;

/// A byte that stands for a layer's own data in the models of [`chain`].
const MARK: u8 = 0xab;

/// Makes l0000.raw and `overlays` images over it, half of them with data of their own.
/// They are copies of a few that qemu-img and qemu-io wrote, with other names and
/// bytes in them: to write to a deep image QEMU would have to open all that is below.
fn chain(dir: &Path, overlays: usize) -> Outcome<String> {
    let mut steps = vec![
        create("l0000.raw", "raw", &[], None, SIZE),
        write("l0000.raw", "raw", &[(0, 65536), (SIZE - 4096, 4096)]),
        create("l0001.qcow2", "qcow2", &[], Some(("l0000.raw", "raw")), SIZE),
    ];
    let models = 16;
    for model in 0..models {
        let file = format!("model{model}");
        let backing = Some(("l0001.qcow2", "qcow2"));
        steps.push(create(&file, "qcow2", &["cluster_size=512"], backing, SIZE));
        if model % 2 == 1 {
            let commands = [
                format!("write -P {MARK} {} 1536", model * 2048),
                format!("write -P {MARK} {} 512", SIZE - 65536 + model * 1024),
                format!("write -z {} 512", model * 16384),
            ];
            steps.push(Step::Io { format: "qcow2", file, commands: commands.into() });
        }
    }
    recipe_of(steps, &[]).make(dir)?;
    for level in 2..=overlays {
        let mut image = fs::read(dir.join(format!("model{}", level as u64 % models)))
            .map_err(|error| error.to_string())?;
        let name_at = image
            .windows(11)
            .position(|window| window == b"l0001.qcow2")
            .ok_or("the backing file's name should be in the image")?;
        image[name_at..name_at + 11].copy_from_slice(format!("l{:04}.qcow2", level - 1).as_bytes());
        for cluster in image.chunks_exact_mut(512) {
            if cluster.iter().all(|&byte| byte == MARK) {
                cluster[..8].copy_from_slice(&(level as u64).to_be_bytes());
            }
        }
        let name = format!("l{level:04}.qcow2");
        fs::write(dir.join(&name), image).map_err(|error| error.to_string())?;
    }
    Ok(format!("l{overlays:04}.qcow2"))
}

/// The disk as qemu-img's map says it: `qemu-img convert` itself runs out of stack in
/// a chain of a thousand.
fn copy_by_map(dir: &Path, map: &[u8], layers: usize, to: &Path) -> Outcome {
    let fail = |error: std::io::Error| error.to_string();
    let copy = fs::File::create(to).map_err(fail)?;
    copy.set_len(SIZE).map_err(fail)?;
    for row in rows(map)?.iter().filter(|row| row.data) {
        let level = layers as u64 - 1 - row.depth;
        let name = if level == 0 { "l0000.raw".to_owned() } else { format!("l{level:04}.qcow2") };
        let bytes = fs::read(dir.join(name)).map_err(fail)?;
        let at = usize::try_from(row.offset.ok_or("data without an offset")?).unwrap_or(0);
        let end = at + usize::try_from(row.length).unwrap_or(0);
        copy.write_all_at(&bytes[at..end], row.start).map_err(fail)?;
    }
    Ok(())
}

fn check(dir: &Path, top: &str, layers: usize) {
    let line = strings(&["map", "-f", "qcow2", "--output=json", top]);
    let map = qemu::img(dir, &line).unwrap();
    same(&map, &imgdm(dir, &line).unwrap()).unwrap();
    let copy = dir.join("copy.raw");
    copy_by_map(dir, &map.stdout, layers, &copy).unwrap();
    let ran = imgdm(dir, &["table", "--output=json", top]).unwrap().ok().unwrap();
    let plan = Plan::parse(&ran.stdout).unwrap();
    assert_eq!(plan.paths().len(), layers, "all files are held");
    compare(&plan, &copy).unwrap();
}

#[test]
fn a_chain_of_100_layers() {
    let dir = scratch_dir("deep").unwrap();
    let top = chain(dir.path(), 99).unwrap();
    check(dir.path(), &top, 100);
    fs::rename(dir.path().join("copy.raw"), dir.path().join("by-map.raw")).unwrap();
    convert(dir.path(), "qcow2", &top, "copy.raw").unwrap();
    let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
    assert!(read("copy.raw") == read("by-map.raw"), "both ways to a copy lead to the same");
}

#[test]
fn a_chain_of_more_files_than_may_be_open_says_how_to_have_more() {
    let dir = scratch_dir("deep").unwrap();
    let top = chain(dir.path(), 99).unwrap();
    let limited = |limit: &str| {
        let mut program = std::process::Command::new("sh");
        let script = "ulimit -Sn 16 && ulimit -Hn \"$1\" && exec \"$0\" map \"$2\"";
        program.current_dir(dir.path()).args(["-ec", script, PROGRAM, limit, &top]);
        run_within(&mut program, Duration::from_secs(30)).unwrap()
    };
    refused(&limited("64"), &[1], &["LimitNOFILE", "Too many open files"]).unwrap();
    // The soft limit is raised as far as may be.
    limited("400").ok().unwrap();
}

#[test]
fn a_chain_of_1024_layers_is_read_and_one_of_1025_refused() {
    let dir = scratch_dir("deep").unwrap();
    let top = chain(dir.path(), 1024).unwrap();
    check(dir.path(), "l1023.qcow2", 1024);
    for command in ["map", "plan", "table"] {
        let ran = imgdm(dir.path(), &[command, &top]).unwrap();
        refused(&ran, &[EX_INVALID], &["1024 layers"]).unwrap();
    }
}

/// Fails unless each command refuses the chain, and soon.
fn refused_as_circle(dir: &Path, image: &str) {
    for command in ["map", "plan", "table"] {
        let mut program = std::process::Command::new(PROGRAM);
        program.current_dir(dir).args([command, image]);
        let ran = run_within(&mut program, Duration::from_secs(10)).unwrap();
        refused(&ran, &[EX_INVALID], &["circle"]).unwrap();
    }
}

#[test]
fn a_cycle_is_refused() {
    let dir = scratch_dir("deep").unwrap();
    let dir = dir.path();
    let steps = vec![
        create("a.qcow2", "qcow2", &[], None, SIZE),
        create("b.qcow2", "qcow2", &[], Some(("a.qcow2", "qcow2")), SIZE),
        create("c.qcow2", "qcow2", &[], Some(("b.qcow2", "qcow2")), SIZE),
        create("itself.qcow2", "qcow2", &[], Some(("a.qcow2", "qcow2")), SIZE),
    ];
    recipe_of(steps, &[]).make(dir).unwrap();
    // With -u QEMU does not look.
    let rebase = |image: &str, onto: &str| {
        let args = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", onto, image];
        qemu::img(dir, &args).map(drop).unwrap();
    };
    rebase("a.qcow2", "c.qcow2");
    refused_as_circle(dir, "a.qcow2");
    refused_as_circle(dir, "b.qcow2");
    // By other names for the same file.
    symlink("c.qcow2", dir.join("symlink.qcow2")).unwrap();
    fs::hard_link(dir.join("c.qcow2"), dir.join("hardlink.qcow2")).unwrap();
    symlink(".", dir.join("again")).unwrap();
    let image = Patch::open(&dir.join("itself.qcow2")).unwrap();
    let name_length = image.u32(crate::common::patch::BACKING_LENGTH).unwrap();
    assert_eq!(name_length, 7);
    image.put(image.u64(crate::common::patch::BACKING_OFFSET).unwrap(), b"itself.qcow2").unwrap();
    image.put_u32(crate::common::patch::BACKING_LENGTH, 12).unwrap();
    refused_as_circle(dir, "itself.qcow2");
    for name in ["symlink.qcow2", "hardlink.qcow2", "again/c.qcow2"] {
        let image = Patch::open(&dir.join("a.qcow2")).unwrap();
        let at = image.u64(crate::common::patch::BACKING_OFFSET).unwrap();
        image.put(at, name.as_bytes()).unwrap();
        let length = u32::try_from(name.len()).unwrap();
        image.put_u32(crate::common::patch::BACKING_LENGTH, length).unwrap();
        refused_as_circle(dir, "c.qcow2");
        refused_as_circle(dir, "a.qcow2");
    }
}
