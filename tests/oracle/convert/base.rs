//! `-B`: what stays a copy-on-write image, of which base.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::{
    Input, Output, allocation, clean, described, differences, good, input_of, ours, remove,
    same_allocation, same_bytes_again, same_content, theirs,
};
use crate::check::{convert, strings};
use crate::common::images::{LayerMade, MIXED, Recipe, Theme, scratch_dir};
use crate::common::process::Outcome;
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::imgdm::imgdm;
use crate::map::{Row, rows};
use crate::random::run_theme;

/// Ways to name a file, each an argument that leads to it.
fn another_name(dir: &Path, file: &str, rng: &mut Rng) -> Outcome<String> {
    let absolute = dir.join(file);
    let linked = |made: std::io::Result<()>, name: &str| {
        made.map(|()| name.to_owned()).map_err(|error| format!("{name}: {error}"))
    };
    // Beside it, where its own relative names lead to the same files.
    let link = match file.rsplit_once('/') {
        Some((folder, _)) => format!("{folder}/link"),
        None => "link".to_owned(),
    };
    let _ = fs::remove_file(dir.join(&link));
    Ok(match rng.below(5) {
        0 => absolute.to_string_lossy().into_owned(),
        1 => format!("sub/../{file}"),
        2 => linked(symlink(&absolute, dir.join(&link)), &link)?,
        3 => linked(fs::hard_link(&absolute, dir.join(&link)), &link)?,
        _ => file.to_owned(),
    })
}

/// Of each unit of the disk, whether any of it is answered above the layer at `depth`.
fn above(map: &[Row], depth: u64, unit: u64) -> Vec<bool> {
    let end = map.last().map_or(0, |row| row.start + row.length);
    let mut units = vec![false; usize::try_from(end.div_ceil(unit)).unwrap()];
    for row in map.iter().filter(|row| row.depth < depth) {
        let last = (row.start + row.length - 1) / unit;
        let touched = usize::try_from(row.start / unit).unwrap()..=usize::try_from(last).unwrap();
        units[touched].fill(true);
    }
    units
}

/// The new image answers by itself where a layer above the base did, and nowhere else.
fn check_rule(dir: &Path, input: &Input, depth: u64, output: &Output) -> Outcome {
    let map = qemu::img(dir, &["map", "-f", input.format, "--output=json", input.file])?;
    let wanted = rows(&map.stdout)?;
    let got = allocation(dir, output.format, "ours")?;
    let unit = output.granularity;
    let (wanted_fine, got_fine) = (above(&wanted, depth, unit), above(&got, 1, unit));
    if let Some(at) = wanted_fine.iter().zip(&got_fine).position(|(wanted, got)| *wanted && !*got) {
        return Err(format!("left to the base at {:#x}: {got:?}", at as u64 * unit));
    }
    // A compressed cluster is whole, also where its subclusters differ.
    let unit = if output.is_compressed() { output.cluster } else { unit };
    let (wanted, got) = (above(&wanted, depth, unit), above(&got, 1, unit));
    if let Some(at) = wanted.iter().zip(&got).position(|(wanted, got)| !*wanted && *got) {
        return Err(format!("not left to the base at {:#x}: {got:?}", at as u64 * unit));
    }
    Ok(())
}

/// An image with a base at some depth of its chain.
fn check_depth(dir: &Path, recipe: &Recipe, depth: usize, rng: &mut Rng) -> Outcome {
    let input = input_of(recipe);
    let base = &recipe.layers[recipe.layers.len() - 1 - depth];
    let output = Output::draw(rng, recipe.top().size, true);
    let name = another_name(dir, &base.file, rng)?;
    let more = strings(&["-B", &name, "-F", base.format]);
    let line = ours(dir, &input, &output, &more, "ours")?.command;
    let outcome = checked_depth(dir, &input, depth, base, &output, &more, rng);
    remove(dir, "ours");
    remove(dir, "theirs");
    outcome.map_err(|error| format!("depth {depth}: {error}\n$ {line}"))
}

fn checked_depth(
    dir: &Path,
    input: &Input,
    depth: usize,
    base: &LayerMade,
    output: &Output,
    more: &[String],
    rng: &mut Rng,
) -> Outcome {
    good(dir, output.format, "ours")?;
    check_rule(dir, input, depth as u64, output)?;
    let info = described(dir, output.format, "ours")?;
    if output.format == "qcow2" && info["backing-filename-format"] != base.format {
        return Err(format!("the backing file's format: {info}"));
    }
    if depth == 1 {
        theirs(dir, input, output, more, "theirs")?;
        same_allocation(dir, (input, output), true, "ours", "theirs")?;
    }
    if rng.percent(20) {
        same_bytes_again(dir, input, output, more, "ours")?;
    }
    Ok(())
}

fn check_depths(dir: &Path, recipe: &Recipe, rng: &mut Rng) -> Outcome {
    input_of(recipe).expected(dir)?;
    for depth in 1..recipe.layers.len() {
        check_depth(dir, recipe, depth, rng)?;
    }
    Ok(())
}

const CHAINS: Theme = Theme { depth: (2, 5), max_size: 8 << 20, empty: 4, ..MIXED };

#[test]
fn an_image_stays_one_of_any_layer_below() {
    run_theme("an_image_stays_one_of_any_layer_below", 25, &CHAINS, check_depths);
}

#[test]
fn layers_of_other_sizes_between_hide_what_they_hid() {
    let theme = Theme { depth: (3, 5), other_size: 90, resize: 40, ..CHAINS };
    run_theme("layers_of_other_sizes_between_hide_what_they_hid", 12, &theme, check_depths);
}

#[test]
fn compressed_layers_and_odd_bases_stay_below() {
    let theme = Theme {
        raw_base: 80,
        odd_size: 60,
        compressed: 60,
        cluster_bits: (13, 21),
        qcow: 20,
        ..CHAINS
    };
    run_theme("compressed_layers_and_odd_bases_stay_below", 12, &theme, check_depths);
}

/// The options by which a qcow2 image was made, as far as they say how it is allocated.
fn options_of(dir: &Path, image: &str) -> Outcome<Vec<String>> {
    let info = described(dir, "qcow2", image)?;
    let data = &info["format-specific"]["data"];
    let mut options = vec![
        format!("cluster_size={}", info["cluster-size"]),
        format!("compat={}", data["compat"].as_str().unwrap_or("1.1")),
    ];
    if data["extended-l2"] == true {
        options.push("extended_l2=on".to_owned());
    }
    Ok(options)
}

/// Beside `qemu-img rebase` of a copy, which compares what the layers hold: where they
/// hold the same, it leaves to the base what a layer above it has.
fn check_rebase(dir: &Path, recipe: &Recipe, rng: &mut Rng) -> Outcome {
    let (input, top) = (input_of(recipe), recipe.top());
    if top.format != "qcow2" || top.data_file.is_some() || !top.bitmaps.is_empty() {
        return Ok(());
    }
    input.expected(dir)?;
    let expected = super::bytes(dir, "expected.raw")?;
    let options = options_of(dir, &top.file)?;
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let output = Output::of("qcow2", &options, &[]);
    let folder =
        top.file.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
    let copy = format!("{folder}rebased");
    for depth in 1..recipe.layers.len() {
        let base = &recipe.layers[recipe.layers.len() - 1 - depth];
        let absolute = dir.join(&base.file).to_string_lossy().into_owned();
        fs::copy(dir.join(&top.file), dir.join(&copy)).map_err(|error| error.to_string())?;
        let rebase = ["rebase", "-q", "-f", "qcow2", "-b", &absolute, "-F", base.format, &copy];
        qemu::img(dir, &rebase)?;
        let more = strings(&["-B", &absolute, "-F", base.format]);
        let line = ours(dir, &input, &output, &more, "ours")?.command;
        same_content(dir, "qcow2", "ours")?;
        convert(dir, base.format, &base.file, "base.raw")?;
        let mut below = super::bytes(dir, "base.raw")?;
        below.resize(below.len().max(expected.len()), 0);

        let (a, b) = (allocation(dir, "qcow2", "ours")?, allocation(dir, "qcow2", &copy)?);
        for (x, y, start, end) in differences(&a, &b) {
            let range = usize::try_from(start).unwrap()..usize::try_from(end).unwrap();
            let same = expected.get(range.clone()) == below.get(range);
            if (x.depth == 0) != (y.depth == 0) && !(x.depth == 0 && same) {
                return Err(format!(
                    "{start:#x}-{end:#x} is not as rebase to depth {depth} leaves it:\n  imgdm    {x:?}\n  qemu-img {y:?}\n$ {line}"
                ));
            }
        }
        for image in ["ours", &copy] {
            remove(dir, image);
        }
    }
    let _ = rng;
    Ok(())
}

#[test]
fn a_base_further_down_is_allocated_over_as_rebase_leaves_it() {
    let theme = Theme { raw_base: 40, qcow: 0, data_file: 0, snapshot: 0, bitmap: 0, ..CHAINS };
    run_theme(
        "a_base_further_down_is_allocated_over_as_rebase_leaves_it",
        25,
        &theme,
        check_rebase,
    );
}

/// Makes base.qcow2 of 1 MiB, mid.qcow2 of 256 KiB over it, and top.qcow2 of 1 MiB.
fn three_layers(dir: &Path) -> Outcome {
    let create = |args: &[&str]| {
        qemu::img(dir, &[&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"], args].concat())
    };
    create(&["base.qcow2", "1M"])?;
    create(&["-b", "base.qcow2", "-F", "qcow2", "mid.qcow2", "256k"])?;
    create(&["-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "1M"])?;
    let write = |file, commands: &[&str]| qemu::io(dir, "qcow2", file, &strings(commands));
    write("base.qcow2", &["write -P 1 0 1M"])?;
    write("mid.qcow2", &["write -P 2 16k 16k", "write -z 64k 8k", "discard 128k 8k"])?;
    write("top.qcow2", &["write -P 3 20k 4k", "write -z 100k 4k", "write -P 4 900k 4k"])?;
    top().expected(dir)
}

fn top() -> Input<'static> {
    Input { file: "top.qcow2", format: "qcow2", snapshot: None }
}

#[test]
fn what_an_image_left_to_a_base_that_was_moved_is_left_to_it_at_its_new_place() {
    let dir = scratch_dir("convert-base").unwrap();
    let dir = dir.path();
    three_layers(dir).unwrap();
    let before = allocation(dir, "qcow2", "top.qcow2").unwrap();
    fs::create_dir(dir.join("elsewhere")).unwrap();
    fs::rename(dir.join("base.qcow2"), dir.join("elsewhere/base.img")).unwrap();
    // The layer above it first: nothing of the old chain below it can be opened.
    let mid = Input { file: "mid.qcow2", ..top() };
    let same = Output::of("qcow2", &["cluster_size=4k"], &[]);
    let base = strings(&["-B", "elsewhere/base.img", "-F", "qcow2"]);
    let ran = ours(dir, &mid, &same, &base, "mid2.qcow2").unwrap();
    let said = ["base.qcow2", "backing file of mid.qcow2", "elsewhere/base.img takes its place"];
    assert!(said.iter().all(|words| ran.stderr.contains(words)), "{}", ran.describe());
    // Nobody is to guess: neither what it is, nor without -B.
    for args in [&["-B", "elsewhere/base.img"][..], &[]] {
        let line = [&["convert", "-O", "qcow2"], args, &["mid.qcow2", "out"]].concat();
        crate::imgdm::refused(&imgdm(dir, &line).unwrap(), &[66], &["base.qcow2"]).unwrap();
    }
    ours(dir, &top(), &same, &strings(&["-B", "mid2.qcow2", "-F", "qcow2"]), "ours").unwrap();
    good(dir, "qcow2", "ours").unwrap();
    assert_eq!(allocation(dir, "qcow2", "ours").unwrap(), before);
}

#[test]
fn a_base_that_was_converted_takes_the_place_of_the_old_one() {
    let dir = scratch_dir("convert-base").unwrap();
    let dir = dir.path();
    three_layers(dir).unwrap();
    for (format, options) in [
        ("raw", &[][..]),
        ("qcow", &[]),
        ("qcow2", &["cluster_size=64k"]),
        ("qcow2", &["cluster_size=512", "compat=0.10"]),
        ("qcow2", &["cluster_size=32k", "extended_l2=on"]),
    ] {
        let flat = Input { file: "mid.qcow2", ..top() };
        ours(dir, &flat, &Output::of(format, options, &[]), &[], "flat").unwrap();
        let more = strings(&["-B", "flat", "-F", format]);
        for output in [
            Output::of("qcow2", &["cluster_size=4k"], &[]),
            Output::of("qcow2", &["cluster_size=64k"], &["-c"]),
            Output::of("qcow2", &["cluster_size=512", "compat=v2"], &[]),
            Output { granularity: 512, cluster: 512, ..Output::of("qcow", &[], &[]) },
        ] {
            ours(dir, &top(), &output, &more, "ours").unwrap();
            theirs(dir, &top(), &output, &more, "theirs").unwrap();
            good(dir, output.format, "ours").unwrap_or_else(|error| panic!("{output:?}: {error}"));
            check_rule(dir, &top(), 1, &output).unwrap();
            same_allocation(dir, (&top(), &output), true, "ours", "theirs").unwrap();
            remove(dir, "ours");
            remove(dir, "theirs");
        }
        remove(dir, "flat");
    }
}

#[test]
fn zeros_of_a_short_layer_between_keep_hiding_what_the_base_has() {
    let dir = scratch_dir("convert-base").unwrap();
    let dir = dir.path();
    three_layers(dir).unwrap();
    // Past the short layer, all that top does not hold is zeros: in a format that has none
    // too, and where clusters are larger than the rows.
    for (format, options) in [
        ("qcow2", &["cluster_size=4k"][..]),
        ("qcow2", &["compat=0.10", "cluster_size=64k"]),
        ("qcow2", &["cluster_size=2M"]),
        ("qcow", &[]),
    ] {
        let mut output = Output::of(format, options, &[]);
        if format == "qcow" {
            (output.granularity, output.cluster) = (512, 512);
        }
        let more = strings(&["-B", "base.qcow2", "-F", "qcow2"]);
        ours(dir, &top(), &output, &more, "ours").unwrap();
        good(dir, format, "ours").unwrap();
        check_rule(dir, &top(), 2, &output).unwrap();
        remove(dir, "ours");
    }
}

#[test]
fn the_name_of_the_base_leads_there_from_where_the_new_image_is() {
    let dir = scratch_dir("convert-base").unwrap();
    let dir = dir.path();
    three_layers(dir).unwrap();
    fs::create_dir_all(dir.join("a/b")).unwrap();
    let same = Output::of("qcow2", &["cluster_size=4k"], &[]);
    let absolute = dir.join("base.qcow2").to_string_lossy().into_owned();
    for (out, base) in [
        ("a/b/new", "../../base.qcow2"),
        ("a/new", &absolute),
        ("new", "./a/../base.qcow2"),
        ("a/b/newer", "../b/../../base.qcow2"),
    ] {
        ours(dir, &top(), &same, &strings(&["-B", base, "-F", "qcow2"]), out).unwrap();
        good(dir, "qcow2", out).unwrap_or_else(|error| panic!("{out} {base}: {error}"));
        let info = described(dir, "qcow2", out).unwrap();
        assert_eq!(info["backing-filename"], base);
    }
    // As by qemu-img, it is not seen from where imgdm runs.
    let line = ["convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "top.qcow2", "a/x"];
    crate::imgdm::refused(&imgdm(dir, &line).unwrap(), &[66], &["a/base.qcow2"]).unwrap();
    // Moved together they still belong together.
    fs::create_dir(dir.join("moved")).unwrap();
    for name in ["a", "base.qcow2"] {
        fs::rename(dir.join(name), dir.join("moved").join(name)).unwrap();
    }
    same_content(dir, "qcow2", "moved/a/b/new").unwrap();
    clean(dir, "qcow2", "moved/a/b/new").unwrap();
}

#[test]
fn without_f_the_base_keeps_the_format_by_which_the_chain_declares_it() {
    let dir = scratch_dir("convert-base").unwrap();
    let dir = dir.path();
    three_layers(dir).unwrap();
    ours(dir, &top(), &Output::of("qcow2", &[], &[]), &strings(&["-B", "base.qcow2"]), "ours")
        .unwrap();
    good(dir, "qcow2", "ours").unwrap();
    assert_eq!(described(dir, "qcow2", "ours").unwrap()["backing-filename-format"], "qcow2");
    // A guest of a raw base can write anything into its first sector.
    qemu::img(dir, &["convert", "-O", "raw", "base.qcow2", "base.raw"]).unwrap();
    let line = ["convert", "-O", "qcow2", "-B", "base.raw", "top.qcow2", "raw-based"];
    let ran = imgdm(dir, &line).unwrap();
    if ran.status.success() {
        assert_eq!(described(dir, "qcow2", "raw-based").unwrap()["backing-filename-format"], "raw");
    } else {
        crate::imgdm::refused(&ran, &[64, 65], &["-F", "base.raw"]).unwrap();
        assert!(!dir.join("raw-based").exists());
    }
}

#[test]
fn a_middle_layer_that_ends_inside_of_a_cluster_has_the_bases_key_asked_for() {
    let dir = scratch_dir("convert-base").unwrap();
    let dir = dir.path();
    crate::crypt::create(dir, "qcow2", "base", crate::crypt::LUKS, "abc", "2M").unwrap();
    crate::crypt::write(dir, &[("qcow2", "base", "abc")], &["write -P 5 0 2M"]).unwrap();
    // Its last cluster is the base's up to the middle, and zeros from there on.
    let (mid, top) = (["-b", "base", "mid", "1049088"], ["-b", "mid", "top", "2M"]);
    for more in [&mid[..], &top] {
        qemu::img(dir, &[&["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2"], more].concat())
            .unwrap();
    }
    fs::write(dir.join("key"), "abc").unwrap();
    let convert = |line: &[&str]| {
        imgdm(dir, &[&["convert", "--key-file", "key", "top"], line].concat()).unwrap().ok()
    };
    convert(&["-O", "qcow2", "-B", "base", "-F", "qcow2", "out"]).unwrap();
    convert(&["expected.raw"]).unwrap();
    let copied = imgdm(dir, &["convert", "--key-file", "key", "out", "out.raw"]).unwrap();
    copied.ok().unwrap();
    assert!(super::bytes(dir, "out.raw").unwrap() == super::bytes(dir, "expected.raw").unwrap());
}
