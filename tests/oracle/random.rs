//! Chains drawn at random, by theme.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crate::check::{check_image, check_reference, strings};
use crate::common::images::{MIXED, Recipe, Step, Theme, scratch_dir};
use crate::common::process::Outcome;
use crate::common::rng::Rng;
use crate::far::{check_steps, create, write};

/// Threads that make and check images.
const WORKERS: usize = 2;

/// A number from the environment, decimal or with 0x.
pub(crate) fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    Some(parsed.unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

/// Draws, makes and checks the cases of one theme.
pub(crate) fn run_theme(
    name: &str,
    cases: u64,
    theme: &Theme,
    check: impl Fn(&std::path::Path, &Recipe, &mut Rng) -> Outcome + Sync,
) {
    let seed = setting("IMGDM_SEED").unwrap_or(0x0069_6d67_646d);
    let only = setting("IMGDM_CASE");
    let cases = only.map_or(setting("IMGDM_CASES").unwrap_or(cases), |case| case + 1);
    let next = AtomicU64::new(only.unwrap_or(0));
    let failed = Mutex::new(Vec::new());
    let one = |index| -> Outcome {
        let mut rng = Rng::for_case(seed, name, index);
        let recipe = theme.draw(&mut rng);
        let dir = scratch_dir(name)?;
        let outcome = recipe.make(dir.path()).and_then(|()| check(dir.path(), &recipe, &mut rng));
        outcome.map_err(|error| {
            let kept = dir.keep();
            format!(
                "--- IMGDM_SEED={seed:#x} IMGDM_CASE={index} cargo test --test oracle {name}\n\
                 {error}\nmade by:\n{}",
                recipe.script(&kept)
            )
        })
    };
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    // A few failures say what there is to say.
                    if index >= cases || failed.lock().unwrap().len() >= 3 {
                        break;
                    }
                    if let Err(error) = one(index) {
                        failed.lock().unwrap().push(error);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    let run = next.into_inner().min(cases);
    assert!(failed.is_empty(), "{} of {run} cases failed:\n{}", failed.len(), failed.join("\n"));
}

/// The cases in which qemu-img's map says where all bytes are.
fn has_reference(theme: &Theme) -> bool {
    theme.odd_size == 0 && theme.compressed == 0
}

macro_rules! themes {
    ($($(#[$doc:meta])* $name:ident: $cases:literal, $theme:expr;)*) => {
        $(
            $(#[$doc])*
            #[test]
            fn $name() {
                run_theme(stringify!($name), $cases, &$theme, check_image);
            }
        )*

        /// Without imgdm: says that images, qemu-img and the comparison agree.
        #[test]
        fn the_map_of_qemu_img_read_over_the_files_is_its_own_copy() {
            for (name, theme) in [$((stringify!($name), $theme)),*] {
                if has_reference(&theme) {
                    run_theme(name, 3, &theme, |dir, recipe, _| check_reference(dir, recipe));
                }
            }
        }
    };
}

themes! {
    mixed_chains: 90, MIXED;
    single_images: 40, Theme { depth: (1, 1), raw_base: 20, ..MIXED };
    subclusters: 40, Theme {
        depth: (1, 3), cluster_bits: (14, 21), extended_l2: 100, qcow: 0, preallocation: 25, ..MIXED
    };
    small_clusters: 30, Theme { depth: (1, 4), cluster_bits: (9, 11), qcow: 0, ..MIXED };
    data_files: 40, Theme {
        depth: (1, 3), raw_base: 10, qcow: 0, data_file: 75, preallocation: 35, ..MIXED
    };
    snapshots: 40, Theme {
        // Applying a snapshot moves what QEMU takes for preallocation.
        depth: (1, 3), raw_base: 20, qcow: 0, data_file: 0, snapshot: 100, preallocation: 0,
        resize: 30, empty: 0, ..MIXED
    };
    version_2: 20, Theme { depth: (1, 4), qcow: 0, v2: 100, data_file: 0, extended_l2: 0, ..MIXED };
    qcow_of_version_1: 30, Theme { depth: (1, 4), qcow: 70, ..MIXED };
    raw_bases_with_holes: 30, Theme { depth: (1, 2), raw_base: 100, preallocation: 40, ..MIXED };
    preallocated: 30, Theme { depth: (1, 2), raw_base: 10, qcow: 0, preallocation: 100, ..MIXED };
    odd_raw_sizes: 20, Theme { depth: (1, 3), raw_base: 100, odd_size: 100, ..MIXED };
    compressed: 40, Theme {
        // With smaller clusters QEMU 10 itself damages images in which it writes
        // compressed clusters between snapshots, and marks them corrupt.
        depth: (1, 3), raw_base: 30, qcow: 20, compressed: 60, cluster_bits: (13, 21), ..MIXED
    };
}

/// Found by `data_files`: offset 0 of a data file is a place for data, and none for
/// zeros, also where the entry has the COPIED bit and the next one a place.
#[test]
fn a_zero_cluster_at_offset_0_of_a_data_file_has_no_place_but_the_next_one_has() {
    let dir = scratch_dir("zero-at-0").unwrap();
    let options = ["cluster_size=4k", "data_file=x.data"];
    let io = |commands: &[&str]| Step::Io {
        format: "qcow2",
        file: "x.qcow2".to_owned(),
        commands: strings(commands),
    };
    let steps = vec![
        create("x.qcow2", "qcow2", &options, None, 1 << 20),
        write("x.qcow2", "qcow2", &[(0, 4 * 4096)]),
        io(&["write -z 0 8192"]),
    ];
    check_steps(dir.path(), steps, &[("x.qcow2", "qcow2", Some("x.data"), 1 << 20)]);
}
