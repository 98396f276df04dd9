//! Offsets that need more than 32 bits, and more than 32 bits of sectors. All files
//! are sparse.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::check::{check_image, check_maps, convert, run_table, same_map, strings};
use crate::common::images::{LayerMade, Recipe, Step, scratch_dir};
use crate::common::patch::{OFFSET_MASK, Patch};
use crate::common::rng::Rng;
use crate::table::{Plan, compare};

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// Makes and checks a chain of these steps; `layers` are (file, format, data file, size).
pub(crate) fn check_steps(
    dir: &Path,
    steps: Vec<Step>,
    layers: &[(&str, &'static str, Option<&str>, u64)],
) -> Recipe {
    let recipe = recipe_of(steps, layers);
    recipe.make(dir).unwrap_or_else(|error| panic!("{error}\n{}", recipe.script(dir)));
    check_again(dir, &recipe);
    recipe
}

pub(crate) fn check_again(dir: &Path, recipe: &Recipe) {
    check_image(dir, recipe, &mut Rng::new(7))
        .unwrap_or_else(|error| panic!("{error}\n{}", recipe.script(dir)));
}

pub(crate) fn recipe_of(
    steps: Vec<Step>,
    layers: &[(&str, &'static str, Option<&str>, u64)],
) -> Recipe {
    let layers = layers
        .iter()
        .map(|&(file, format, data_file, size)| LayerMade {
            file: file.to_owned(),
            format,
            data_file: data_file.map(str::to_owned),
            size,
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
        })
        .collect();
    Recipe { steps, layers, ..Recipe::default() }
}

pub(crate) fn create(
    file: &str,
    format: &'static str,
    options: &[&str],
    backing: Option<(&str, &'static str)>,
    size: u64,
) -> Step {
    Step::Create {
        format,
        options: strings(options),
        backing: backing.map(|(name, format)| (name.to_owned(), format)),
        file: file.to_owned(),
        size,
    }
}

/// Writes of random bytes at these places.
pub(crate) fn write(file: &str, format: &'static str, places: &[(u64, u64)]) -> Step {
    let command = |(index, (at, length)): (usize, &(u64, u64))| {
        format!("write -s @PATTERNS@/p{} {at} {length}", index % 6)
    };
    let commands = places.iter().enumerate().map(command).collect();
    Step::Io { format, file: file.to_owned(), commands }
}

#[test]
fn qcow2_host_offsets_past_4_gib_and_2_tib() {
    let dir = scratch_dir("far").unwrap();
    // With metadata preallocated, host offsets are about the guest's.
    for (name, cluster, size) in
        [("a.qcow2", "cluster_size=64k", 6 * GIB), ("b.qcow2", "cluster_size=2M", 2 * TIB + GIB)]
    {
        let options = [cluster, "preallocation=metadata"];
        let places = [
            (0, 4096),
            (4 * GIB - 1024, 4096),
            (4 * GIB + 12 * 65536, 65536),
            (size / 2 + 512, 3 * 65536),
            (size - 70_000 / 512 * 512, 70_000 / 512 * 512),
        ];
        let steps =
            vec![create(name, "qcow2", &options, None, size), write(name, "qcow2", &places)];
        check_steps(dir.path(), steps, &[(name, "qcow2", None, size)]);
    }
}

#[test]
fn an_l2_entry_that_points_5_tib_into_the_file() {
    let dir = scratch_dir("far").unwrap();
    let steps = vec![
        create("x.qcow2", "qcow2", &["cluster_size=64k"], None, 1 << 20),
        write("x.qcow2", "qcow2", &[(0, 65536), (3 * 65536, 65536), (4 * 65536, 65536)]),
    ];
    let recipe = check_steps(dir.path(), steps, &[("x.qcow2", "qcow2", None, 1 << 20)]);
    // Two neighbours go far out, in the wrong order.
    let patch = Patch::open(&dir.path().join("x.qcow2")).unwrap();
    for (guest, to) in [(3 * 65536, 5 * TIB + 65536), (4 * 65536, 5 * TIB)] {
        let entry = patch.l2_entry(guest).unwrap();
        let old = patch.u64(entry).unwrap();
        let bytes: [u8; 65536] = patch.bytes(old & OFFSET_MASK).unwrap();
        patch.put(to, &bytes).unwrap();
        patch.put_u64(entry, (old & !OFFSET_MASK) | to).unwrap();
    }
    check_again(dir.path(), &recipe);
}

#[test]
fn a_raw_base_and_its_overlays_past_2_tib() {
    let dir = scratch_dir("far").unwrap();
    let size = 3 * TIB + 512;
    let steps = vec![
        create("base.raw", "raw", &[], None, size),
        write(
            "base.raw",
            "raw",
            &[(0, 4096), (4 * GIB - 4096, 8192), (2 * TIB - 4096, 8192), (size - 4608, 4608)],
        ),
    ];
    check_steps(dir.path(), steps.clone(), &[("base.raw", "raw", None, size)]);
    let mut steps = steps;
    steps.extend([
        create("top.qcow2", "qcow2", &["cluster_size=2M"], Some(("base.raw", "raw")), size),
        write("top.qcow2", "qcow2", &[(2 * TIB + 65536, 512), (2 * TIB - 512, 512)]),
    ]);
    let layers = [("base.raw", "raw", None, size), ("top.qcow2", "qcow2", None, size)];
    check_steps(dir.path(), steps, &layers);
}

#[test]
fn a_qcow_of_version_1_past_4_gib() {
    // QEMU goes through it cluster by cluster, so only what is needed.
    let dir = scratch_dir("far").unwrap();
    let size = 4 * GIB + (64 << 20);
    let steps = vec![
        create("old.qcow", "qcow", &[], None, size),
        write("old.qcow", "qcow", &[(4 * GIB - 8192, 16384), (size - 512, 512)]),
    ];
    let recipe = recipe_of(steps, &[("old.qcow", "qcow", None, size)]);
    recipe.make(dir.path()).unwrap();
    same_map(dir.path(), &strings(&["--output=json", "-f", "qcow", "old.qcow"])).unwrap();
    let ran = run_table(dir.path(), &recipe, &[], "old.qcow").unwrap().ok().unwrap();
    convert(dir.path(), "qcow", "old.qcow", "copy.raw").unwrap();
    compare(&Plan::parse(&ran.stdout).unwrap(), &dir.path().join("copy.raw")).unwrap();
}

#[test]
fn a_data_file_past_2_tib() {
    let dir = scratch_dir("far").unwrap();
    let size = 2 * TIB + 64 * GIB;
    let places = [(0, 512), (4 * GIB - 512, 1024), (2 * TIB, 4096), (size - 512, 512)];
    let options = ["data_file=a.data", "cluster_size=1M"];
    let steps =
        vec![create("a.qcow2", "qcow2", &options, None, size), write("a.qcow2", "qcow2", &places)];
    check_steps(dir.path(), steps, &[("a.qcow2", "qcow2", Some("a.data"), size)]);
    let length = fs::metadata(dir.path().join("a.data")).unwrap().len();
    assert_eq!(length, size, "the case is what its name says");
}

#[test]
fn a_raw_data_file_past_2_tib() {
    // qemu-img convert would read all of it; but the data file itself is the copy.
    let dir = scratch_dir("far").unwrap();
    let size = 2 * TIB + 64 * GIB;
    let options = ["data_file=b.data", "data_file_raw=on", "cluster_size=2M"];
    let steps = vec![
        create("b.qcow2", "qcow2", &options, None, size),
        write("b.qcow2", "qcow2", &[(0, 512), (4 * GIB - 512, 1024), (size - 512, 512)]),
    ];
    let recipe = recipe_of(steps, &[("b.qcow2", "qcow2", Some("b.data"), size)]);
    recipe.make(dir.path()).unwrap();
    check_maps(dir.path(), recipe.top(), &mut Rng::new(1)).unwrap();
    let ran = run_table(dir.path(), &recipe, &[], "b.qcow2").unwrap().ok().unwrap();
    compare(&Plan::parse(&ran.stdout).unwrap(), &dir.path().join("b.data")).unwrap();
}

#[test]
fn a_byte_past_2_tib_is_compared_too() {
    let dir = scratch_dir("far").unwrap();
    let size = 3 * TIB;
    let steps = vec![
        create("base.raw", "raw", &[], None, size),
        write("base.raw", "raw", &[(size - 4096, 4096)]),
    ];
    let recipe = check_steps(dir.path(), steps, &[("base.raw", "raw", None, size)]);
    let ran = run_table(dir.path(), &recipe, &[], "base.raw").unwrap().ok().unwrap();
    let plan = Plan::parse(&ran.stdout).unwrap();
    let copy = dir.path().join("copy.raw");
    compare(&plan, &copy).unwrap();
    let file = crate::common::images::open_to_patch(&copy).unwrap();
    file.write_all_at(&[1], 2 * TIB + 5).unwrap();
    compare(&plan, &copy).unwrap_err();
}
