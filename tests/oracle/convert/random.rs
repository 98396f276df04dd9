//! Chains and options drawn at random.

use std::path::Path;

use super::{Input, Output, check_copy, check_copy_of, input_of};
use crate::check::{applied, snapshots};
use crate::common::images::{MIXED, Recipe, Theme};
use crate::common::process::Outcome;
use crate::common::rng::Rng;
use crate::random::run_theme;

/// Several outputs of one chain.
fn check(dir: &Path, recipe: &Recipe, rng: &mut Rng) -> Outcome {
    let input = input_of(recipe);
    input.expected(dir)?;
    for _ in 0..3 {
        check_copy(dir, &input, &Output::draw(rng, recipe.top().size, false), rng)?;
    }
    Ok(())
}

/// Each snapshot of an image, and what came after.
fn check_snapshots(dir: &Path, recipe: &Recipe, rng: &mut Rng) -> Outcome {
    check(dir, recipe, rng)?;
    if recipe.top().snapshots.is_empty() {
        return Ok(());
    }
    for (id, _) in snapshots(dir, &recipe.top().file)? {
        let snapshot = format!("snapshot.id={id}");
        let input = Input { snapshot: Some(&snapshot), ..input_of(recipe) };
        // By `-l` QEMU reads it with the size that the image has now.
        let copy = applied(dir, recipe.top(), &id)?;
        let reference = Input { file: &copy, ..input_of(recipe) };
        reference.expected(dir)?;
        let output = Output::draw(rng, recipe.top().size, false);
        check_copy_of(dir, &input, &reference, &output, rng)?;
    }
    Ok(())
}

const SMALL: Theme = Theme { depth: (1, 4), max_size: 8 << 20, ..MIXED };

#[test]
fn any_chain_becomes_any_image_allocated_as_by_qemu_img() {
    run_theme("any_chain_becomes_any_image_allocated_as_by_qemu_img", 25, &SMALL, check);
}

#[test]
fn compressed_clusters_and_odd_tails_are_converted() {
    let theme = Theme {
        raw_base: 70,
        odd_size: 60,
        compressed: 60,
        cluster_bits: (13, 21),
        qcow: 20,
        ..SMALL
    };
    run_theme("compressed_clusters_and_odd_tails_are_converted", 15, &theme, check);
}

#[test]
fn subclusters_and_data_files_are_converted() {
    let theme = Theme {
        cluster_bits: (14, 21),
        extended_l2: 70,
        data_file: 50,
        preallocation: 30,
        qcow: 0,
        ..SMALL
    };
    run_theme("subclusters_and_data_files_are_converted", 15, &theme, check);
}

#[test]
fn snapshots_are_converted() {
    let theme = Theme {
        depth: (1, 3),
        raw_base: 20,
        qcow: 0,
        data_file: 0,
        snapshot: 100,
        preallocation: 0,
        resize: 40,
        compressed: 30,
        cluster_bits: (13, 18),
        bitmap: 0,
        empty: 0,
        ..SMALL
    };
    run_theme("snapshots_are_converted", 8, &theme, check_snapshots);
}
