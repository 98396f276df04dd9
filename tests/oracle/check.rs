//! The checks that every image undergoes.

use std::fs;
use std::path::Path;
use std::process::Command;

use imgdm::open::OpenPolicy;

use crate::common::images::{LayerMade, Recipe};
use crate::common::process::{Outcome, Ran, run};
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::device::{self, Reading};
use crate::imgdm::{EX_NOT_REPRESENTABLE, imgdm};
use crate::info::check_info;
use crate::map::{Row, plan_of, plan_of_full, rows};
use crate::read;
use crate::table::{Plan, compare};

/// `args` as owned strings.
pub(crate) fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(|&arg| arg.to_owned()).collect()
}

/// Fails unless both programs did the same: the same stdout, and both 0 or both not.
///
/// # Errors
/// The first line in which they differ.
pub(crate) fn same(theirs: &Ran, ours: &Ran) -> Outcome {
    if theirs.stdout != ours.stdout {
        let (a, b) = (theirs.text(), ours.text());
        let line = a.lines().zip(b.lines()).position(|(a, b)| a != b);
        let line = line.unwrap_or_else(|| a.lines().count().min(b.lines().count()));
        let show = |text: &str| text.lines().nth(line).unwrap_or("(no such line)").to_owned();
        return Err(format!(
            "line {} differs:\n  qemu-img: {}\n  imgdm:    {}\n$ {}\n{}",
            line + 1,
            show(&a),
            show(&b),
            theirs.command,
            ours.describe()
        ));
    }
    if theirs.status.success() != ours.status.success() {
        return Err(format!("one failed:\n{}{}", theirs.describe(), ours.describe()));
    }
    Ok(())
}

/// `imgdm map` beside `qemu-img map`, with these arguments.
///
/// # Errors
/// They differ.
pub(crate) fn same_map(dir: &Path, args: &[String]) -> Outcome<Ran> {
    let mut line = strings(&["map"]);
    line.extend_from_slice(args);
    let theirs = qemu::img_any(dir, &line)?;
    let ours = imgdm(dir, &line)?;
    let Err(difference) = same(&theirs, &ours) else { return Ok(theirs) };
    // The host's file system may have changed its mind between the two (delayed
    // allocation decides whether QEMU takes an image for preallocated).
    let again = qemu::img_any(dir, &line)?;
    if again.stdout == theirs.stdout {
        return Err(difference);
    }
    same(&again, &imgdm(dir, &line)?)?;
    Ok(again)
}

/// All of `imgdm map`'s forms beside qemu-img's for one image.
///
/// # Errors
/// They differ.
pub(crate) fn check_maps(dir: &Path, layer: &LayerMade, rng: &mut Rng) -> Outcome<Ran> {
    let absolute = dir.join(&layer.file).to_string_lossy().into_owned();
    let mut whole = None;
    for output in ["--output=json", "--output=human"] {
        let relative = layer.data_file.is_some() || rng.percent(50);
        let file = if relative { &layer.file } else { &absolute };
        let ran = same_map(dir, &strings(&["-f", layer.format, output, file]))?;
        whole.get_or_insert(ran);
        // A part: its edges may be anywhere, also past the end.
        let start = match rng.below(4) {
            0 => 0,
            1 => rng.below(layer.size / 512 + 1) * 512,
            _ => rng.below(layer.size + 4096),
        };
        let mut args = strings(&["-f", layer.format, output]);
        args.push(format!("--start-offset={start}"));
        if rng.percent(80) {
            args.push(format!("--max-length={}", rng.range(0, layer.size)));
        }
        args.push(layer.file.clone());
        same_map(dir, &args)?;
    }
    whole.ok_or("no map at all".to_owned())
}

/// A raw copy of an image's disk by qemu-img.
///
/// # Errors
/// qemu-img failed.
pub(crate) fn convert(dir: &Path, format: &str, image: &str, to: &str) -> Outcome {
    qemu::img(dir, &["convert", "-f", format, "-O", "raw", image, to]).map(drop)
}

/// Runs `imgdm table --output=json`.
///
/// # Errors
/// It could not be run.
pub(crate) fn run_table(dir: &Path, recipe: &Recipe, extra: &[String], file: &str) -> Outcome<Ran> {
    let mut args = strings(&["table", "--output=json"]);
    if recipe.undeclared {
        args.push("--probe-backing".to_owned());
    }
    args.extend_from_slice(extra);
    args.push(file.to_owned());
    imgdm(dir, &args)
}

/// What a plan owes besides the right bytes: every file of the chain stays in the
/// tree, so that its lock is held.
fn check_files(dir: &Path, recipe: &Recipe, plan: &Plan) -> Outcome {
    let held = plan.paths();
    for layer in &recipe.layers {
        for file in std::iter::once(&layer.file).chain(&layer.data_file) {
            let path = dir.join(file);
            let length = fs::metadata(&path).map_err(|error| error.to_string())?.len();
            let real = fs::canonicalize(&path).map_err(|error| error.to_string())?;
            if length >= 512
                && !held.iter().any(|held| fs::canonicalize(held).is_ok_and(|h| h == real))
            {
                return Err(format!("no backing holds {}: {held:?}", path.display()));
            }
        }
    }
    Ok(())
}

/// The table of the active layer, or of a snapshot (the argument of `-l`), against a
/// raw copy of `image`, which holds the same disk as its active layer.
fn check_table(
    dir: &Path,
    recipe: &Recipe,
    snapshot: Option<&str>,
    image: &str,
    map: &Ran,
    rng: &mut Rng,
) -> Outcome {
    let top = recipe.top();
    let zero = rng.pick(&["--zero=auto", "--zero=dm", "--zero=loop"]);
    let mut extra = strings(&[zero]);
    if let Some(argument) = snapshot {
        extra.extend(strings(&["-l", argument]));
    }
    let ran = run_table(dir, recipe, &extra, &top.file)?;
    let compressed = rows(&map.stdout)?.iter().any(|row| row.compressed);
    let ran = ran.ok()?;
    let plan = Plan::parse(&ran.stdout)?;
    convert(dir, top.format, image, "copy.raw")?;
    if compressed {
        let refused = run_table(
            dir,
            recipe,
            &[extra.clone(), strings(&["--compressed=refuse"])].concat(),
            &top.file,
        )?;
        if refused.code() != Some(EX_NOT_REPRESENTABLE) || !refused.stdout.is_empty() {
            return Err(refused.describe());
        }
    }
    let policy = OpenPolicy {
        snapshot: snapshot.map(|text| text.parse()).transpose().map_err(|e| format!("{e}"))?,
        probe_backing: true,
        ..OpenPolicy::default()
    };
    read::compare_image(dir, &top.file, &policy, "copy.raw", rng)?;
    if plan.backings.iter().any(|backing| backing.kind == "scratch") {
        check_files(dir, recipe, &plan)?;
        let reading = Reading { policy, ..Reading::default() };
        return device::compare(dir, &top.file, &reading, "copy.raw").map(drop);
    }
    if compressed {
        return Err(format!("should need a scratch file:\n{}", ran.describe()));
    }
    check_files(dir, recipe, &plan)
        .and_then(|()| compare(&plan, &dir.join("copy.raw")))
        .map_err(|error| format!("{error}\n{}", ran.describe()))?;
    if recipe.odd_size {
        return Ok(()); // Its map is not of whole sectors.
    }
    // The maps that qemu-img does not have say the same bytes.
    for (form, deep) in [("--output=json-full", rng.percent(50)), ("--output=json", true)] {
        let mut args = strings(&["map", form, "-f", top.format, &top.file]);
        args.extend(snapshot.iter().flat_map(|argument| strings(&["-l", argument])));
        if deep {
            args.push("--deep".to_owned());
        }
        let ran = imgdm(dir, &args)?.ok()?;
        let plan = match form {
            "--output=json" => plan_of(&rows(&ran.stdout)?, recipe, dir),
            _ => plan_of_full(&ran.stdout),
        };
        plan.and_then(|plan| compare(&plan, &dir.join("copy.raw")))
            .map_err(|error| format!("{error}\n{}", ran.describe()))?;
    }
    Ok(())
}

/// A map without what the host's file system says of the holes below data: whether
/// QEMU asks it depends on how much of the image's file is in use, and that is not
/// the same for an image and for its copy to which a snapshot was applied.
fn without_holes(map: &[u8]) -> Outcome<Vec<Row>> {
    let mut joined: Vec<Row> = Vec::new();
    for mut row in rows(map)? {
        row.zero &= !row.data;
        match joined.last_mut() {
            Some(last) if last.absorbs(&row) => last.length += row.length,
            _ => joined.push(row),
        }
    }
    Ok(joined)
}

/// IDs and names of a qcow2 image's snapshots.
///
/// # Errors
/// qemu-img failed.
pub(crate) fn snapshots(dir: &Path, image: &str) -> Outcome<Vec<(String, String)>> {
    let info = qemu::img(dir, &["info", "-f", "qcow2", "--output=json", image])?;
    let info: serde_json::Value =
        serde_json::from_slice(&info.stdout).map_err(|error| format!("qemu-img info: {error}"))?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let list = info["snapshots"].as_array().cloned().unwrap_or_default();
    Ok(list.iter().map(|one| (text(&one["id"]), text(&one["name"]))).collect())
}

/// Makes a copy of an image with a snapshot applied; gives its name.
///
/// # Errors
/// cp or qemu-img failed.
pub(crate) fn applied(dir: &Path, image: &LayerMade, id: &str) -> Outcome<String> {
    // A copy beside the image, so that a relative backing name still leads somewhere.
    let copy = match image.file.rsplit_once('/') {
        Some((folder, _)) => format!("{folder}/applied"),
        None => "applied".to_owned(),
    };
    let mut cp = Command::new("cp");
    run(cp.current_dir(dir).args(["--sparse=auto", &image.file, &copy]))?.ok()?;
    for bitmap in &image.bitmaps {
        // QEMU applies no snapshot to an image that has bitmaps.
        qemu::img(dir, &["bitmap", "--remove", "-f", "qcow2", &copy, bitmap])?;
    }
    qemu::img(dir, &["snapshot", "-a", id, &copy])?;
    Ok(copy)
}

/// A snapshot's map and table against what `qemu-img snapshot -a` makes of a copy.
fn check_snapshot(
    dir: &Path,
    recipe: &Recipe,
    (id, name): &(String, String),
    ids: &[(String, String)],
    rng: &mut Rng,
) -> Outcome {
    let top = recipe.top();
    let copy = applied(dir, top, id)?;
    let theirs = qemu::img_any(dir, &["map", "-f", "qcow2", "--output=json", &copy])?;
    let argument = match rng.below(4) {
        0 => id.clone(),
        1 => format!("snapshot.id={id}"),
        // A bare name could be another snapshot's ID, which goes first.
        2 if ids.iter().all(|(id, _)| id != name) => name.clone(),
        _ => format!("snapshot.name={}", name.replace(',', ",,")),
    };
    let args = ["map", "-f", "qcow2", "--output=json", "-l", &argument, &top.file];
    let ours = imgdm(dir, &args)?.ok()?;
    same(&theirs, &ours)
        .or_else(|error| {
            let same = without_holes(&theirs.stdout)? == without_holes(&ours.stdout)?;
            if same { Ok(()) } else { Err(error) }
        })
        .and_then(|()| check_table(dir, recipe, Some(&argument), &copy, &theirs, rng))
        .map_err(|error| format!("snapshot '{name}': {error}"))
}

/// Everything about one chain.
///
/// # Errors
/// What is not as qemu-img has it.
pub(crate) fn check_image(dir: &Path, recipe: &Recipe, rng: &mut Rng) -> Outcome {
    let map = check_maps(dir, recipe.top(), rng)?;
    check_info(dir, recipe.top(), rng)?;
    check_table(dir, recipe, None, &recipe.top().file, &map, rng)?;
    if !recipe.top().snapshots.is_empty() {
        let ids = snapshots(dir, &recipe.top().file)?;
        if ids.len() != recipe.top().snapshots.len() {
            return Err(format!("qemu-img knows the snapshots {ids:?}"));
        }
        ids.iter().try_for_each(|snapshot| check_snapshot(dir, recipe, snapshot, &ids, rng))?;
    }
    // A layer further down is an image too.
    let lower = &recipe.layers[..recipe.layers.len() - 1];
    if !lower.is_empty() {
        check_maps(dir, rng.pick(lower), rng)?;
    }
    Ok(())
}

/// That the images and the comparison are sound, without imgdm: qemu-img's own map,
/// read over the files, is qemu-img's copy.
///
/// # Errors
/// It is not.
pub(crate) fn check_reference(dir: &Path, recipe: &Recipe) -> Outcome {
    let top = recipe.top();
    let map = qemu::img(dir, &["map", "-f", top.format, "--output=json", &top.file])?;
    convert(dir, top.format, &top.file, "copy.raw")?;
    let plan = plan_of(&rows(&map.stdout)?, recipe, dir)?;
    compare(&plan, &dir.join("copy.raw")).map_err(|error| format!("{error}\n{}", map.describe()))
}
