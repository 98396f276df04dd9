//! What becomes of our images: a guest writes to them, and QEMU's tools work on them.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{
    Input, Output, clean, good, ours, raw_data_file_is_the_disk, remove, same_content, same_disk,
};
use crate::check::strings;
use crate::common::images::{MIXED, Recipe, Theme, scratch_dir};
use crate::common::process::Outcome;
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::random::run_theme;

/// Outputs unlike each other.
fn outputs() -> Vec<Output> {
    let of = |options: &[&str], switches: &[&str]| Output::of("qcow2", options, switches);
    vec![
        of(&[], &[]),
        of(&["compat=0.10"], &[]),
        of(&["cluster_size=512"], &[]),
        of(&["cluster_size=512", "refcount_bits=64"], &[]),
        of(&["cluster_size=2M", "refcount_bits=1"], &[]),
        of(&["cluster_size=16k", "extended_l2=on"], &[]),
        of(&["cluster_size=128k", "extended_l2=on", "compression_type=zstd"], &["-c"]),
        of(&["lazy_refcounts=on", "cluster_size=4k"], &["-c"]),
        of(&["compression_type=zstd"], &["-c"]),
        of(&["cluster_size=4k", "compat=0.10"], &["-c"]),
        of(&["preallocation=metadata", "cluster_size=4k"], &[]),
        of(&["preallocation=full", "cluster_size=8k"], &[]),
        of(&["data_file=@.data", "cluster_size=16k"], &[]),
        of(&["data_file=@.data", "data_file_raw=on"], &[]),
        of(&["cluster_size=4k"], &["-S", "0"]),
        Output::of("qcow", &[], &[]),
        Output::of("qcow", &[], &["-c"]),
        Output::of("raw", &[], &[]),
    ]
}

/// An overlay of 3 MiB over a raw base with a hole, with all that a cluster can be.
fn make_input(dir: &Path) -> Outcome {
    let file = std::fs::File::create(dir.join("base.raw")).map_err(|e| e.to_string())?;
    file.set_len(2 << 20).map_err(|e| e.to_string())?;
    let base = ["write -P 1 0 700k", "write -P 2 1500k 200k"];
    qemu::io(dir, "raw", "base.raw", &strings(&base))?;
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=8k", "-b", "base.raw"];
    qemu::img(dir, &[&create[..], &["-F", "raw", "in.qcow2", "3M"]].concat())?;
    let top = [
        "write -P 3 40k 100k",
        "write -z 300k 100k",
        "write -c -P 4 1600k 8k",
        "write -P 5 2100k 333k",
        "write -P 0 2500k 64k",
        "discard 504k 64k",
    ];
    qemu::io(dir, "qcow2", "in.qcow2", &strings(&top))?;
    INPUT.expected(dir)
}

const INPUT: Input = Input { file: "in.qcow2", format: "qcow2", snapshot: None };

/// Writes as a guest may do, into the image and into expected.raw.
fn writes_of_a_guest(dir: &Path, format: &'static str, image: &str, rng: &mut Rng) -> Outcome {
    let plain = OpenOptions::new().write(true).open(dir.join("expected.raw"));
    let plain = plain.map_err(|error| error.to_string())?;
    let size = plain.metadata().map_err(|error| error.to_string())?.len();
    let mut commands = Vec::new();
    for _ in 0..24 {
        let at = rng.below(size / 512) * 512;
        let length = (rng.range(1, 200) * 512).min(size - at);
        let byte = u8::try_from(rng.below(256)).unwrap_or(0);
        let (command, byte) = match rng.below(4) {
            0 => (format!("write -z {at} {length}"), 0),
            1 if format == "qcow2" => (format!("write -z -u {at} {length}"), 0),
            _ => (format!("write -P {byte} {at} {length}"), byte),
        };
        commands.push(command);
        let bytes = vec![byte; usize::try_from(length).unwrap()];
        plain.write_all_at(&bytes, at).map_err(|error| error.to_string())?;
    }
    qemu::io(dir, format, image, &commands)?;
    clean(dir, format, image)?;
    same_content(dir, format, image)
        .map_err(|error| format!("{error}\nafter {}", commands.join("; ")))
}

#[test]
fn a_guest_writes_to_the_new_image_and_it_stays_sound() {
    for (n, output) in (0..).zip(outputs()) {
        let dir = scratch_dir("convert-guest").unwrap();
        let dir = dir.path();
        make_input(dir).unwrap();
        let run = || -> Outcome {
            ours(dir, &INPUT, &output, &[], "out")?;
            good(dir, output.format, "out")?;
            let mut rng = Rng::new(n);
            writes_of_a_guest(dir, output.format, "out", &mut rng)?;
            // And back through imgdm.
            let again = Input { file: "out", format: output.format, snapshot: None };
            ours(dir, &again, &Output::of("qcow2", &[], &[]), &[], "again")?;
            good(dir, "qcow2", "again")
        };
        run().unwrap_or_else(|error| panic!("{output:?}: {error}"));
    }
}

/// What qemu-img does to a qcow2 image.
fn work_of_qemu_img(dir: &Path, output: &Output) -> Outcome {
    let img = |line: &[&str]| qemu::img(dir, line).map(drop);
    let mut rng = Rng::new(3);
    ours(dir, &INPUT, output, &[], "out")?;
    let has_data_file = output.has("data_file=@.data");
    if !has_data_file {
        // Snapshots share clusters: refcounts of one bit can't say so.
        let shares = !output.has("refcount_bits=1");
        if shares {
            img(&["snapshot", "-c", "before", "out"])?;
            clean(dir, "qcow2", "out")?;
            std::fs::copy(dir.join("expected.raw"), dir.join("before.raw"))
                .map_err(|e| e.to_string())?;
            writes_of_a_guest(dir, "qcow2", "out", &mut rng)?;
            img(&["snapshot", "-a", "before", "out"])?;
            same_disk(dir, ("raw", "before.raw"), ("qcow2", "out"))?;
            img(&["snapshot", "-d", "before", "out"])?;
            INPUT.expected(dir)?;
            good(dir, "qcow2", "out")?;
        }
    }
    let raw_data_file = output.has("data_file_raw=on");
    if !output.has("compat=0.10") {
        img(&["amend", "-f", "qcow2", "-o", "lazy_refcounts=on", "out"])?;
        img(&["amend", "-f", "qcow2", "-o", "lazy_refcounts=off", "out"])?;
        if !output.has("refcount_bits=1") {
            img(&["amend", "-f", "qcow2", "-o", "refcount_bits=32", "out"])?;
        }
        good(dir, "qcow2", "out")?;
        img(&["bitmap", "--add", "-f", "qcow2", "out", "b"])?;
        writes_of_a_guest(dir, "qcow2", "out", &mut rng)?;
        img(&["bitmap", "--remove", "-f", "qcow2", "out", "b"])?;
    } else {
        img(&["amend", "-f", "qcow2", "-o", "compat=1.1", "out"])?;
        good(dir, "qcow2", "out")?;
    }
    let grown = 5 << 20;
    img(&["resize", "-q", "-f", "qcow2", "out", &grown.to_string()])?;
    img(&["resize", "-q", "-f", "raw", "expected.raw", &grown.to_string()])?;
    writes_of_a_guest(dir, "qcow2", "out", &mut rng)?;
    img(&["resize", "-q", "--shrink", "-f", "qcow2", "out", "1M"])?;
    img(&["resize", "-q", "--shrink", "-f", "raw", "expected.raw", "1M"])?;
    good(dir, "qcow2", "out")?;
    if raw_data_file {
        raw_data_file_is_the_disk(dir, "out.data")?;
    }
    Ok(())
}

#[test]
fn qemu_img_takes_snapshots_of_the_new_image_and_amends_and_resizes_it() {
    for output in outputs().into_iter().filter(|output| output.format == "qcow2") {
        let dir = scratch_dir("convert-guest").unwrap();
        make_input(dir.path()).unwrap();
        work_of_qemu_img(dir.path(), &output).unwrap_or_else(|error| panic!("{output:?}: {error}"));
    }
}

/// An overlay of ours, written to, committed into its base, and made independent of it.
fn overlay_lives(dir: &Path, recipe: &Recipe, rng: &mut Rng) -> Outcome {
    let top = recipe.top();
    let input = Input { file: &top.file, format: top.format, snapshot: None };
    let depth = 1 + usize::try_from(rng.below(recipe.layers.len() as u64 - 1)).unwrap();
    let base = &recipe.layers[recipe.layers.len() - 1 - depth];
    let output = Output::draw(rng, top.size, true);
    let more = strings(&["-B", &base.file, "-F", base.format]);
    input.expected(dir)?;
    ours(dir, &input, &output, &more, "out")?;
    writes_of_a_guest(dir, output.format, "out", rng)?;
    if output.format == "qcow2" {
        // Without a backing file at all.
        ours(dir, &input, &output, &more, "free")?;
        qemu::img(dir, &["rebase", "-q", "-f", "qcow2", "-b", "", "free"])?;
        clean(dir, "qcow2", "free")?;
        input.expected(dir)?;
        same_content(dir, "qcow2", "free")?;
        remove(dir, "free");
        ours(dir, &input, &output, &more, "free")?;
        writes_of_a_guest(dir, "qcow2", "free", rng)?;
    } else {
        std::fs::rename(dir.join("out"), dir.join("free")).map_err(|error| error.to_string())?;
    }
    // The base takes what the overlay has; longer ones make it grow.
    let can_take_it = base.format != "qcow" || base.size >= top.size;
    if can_take_it && base.bitmaps.is_empty() && base.snapshots.is_empty() && !recipe.odd_size {
        qemu::img(dir, &["commit", "-q", "-f", output.format, "free"])?;
        clean(dir, output.format, "free")?;
        same_disk(dir, ("raw", "expected.raw"), (output.format, "free"))?;
        if top.size >= base.size {
            qemu::img(
                dir,
                &["compare", "-f", "raw", "-F", base.format, "expected.raw", &base.file],
            )?;
        }
    }
    Ok(())
}

#[test]
fn overlays_of_ours_are_written_to_rebased_and_committed() {
    let theme = Theme { depth: (2, 4), max_size: 4 << 20, data_file: 0, v2: 10, qcow: 0, ..MIXED };
    run_theme("overlays_of_ours_are_written_to_rebased_and_committed", 15, &theme, overlay_lives);
}
