//! The checks that every image undergoes.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::images::{LayerMade, Recipe};
use crate::common::process::{Outcome, Ran, run};
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::imgdm::{EX_NOT_REPRESENTABLE, imgdm};
use crate::map::{plan_of, rows};
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
        let file = if rng.percent(50) { &layer.file } else { &absolute };
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

/// A raw copy of the disk by qemu-img, of a snapshot where one is named.
///
/// # Errors
/// qemu-img failed.
pub(crate) fn convert(dir: &Path, layer: &LayerMade, snapshot: Option<&str>, to: &str) -> Outcome {
    let mut args = strings(&["convert", "-f", layer.format, "-O", "raw"]);
    if let Some(name) = snapshot {
        args.extend(["-l".to_owned(), format!("snapshot.name={}", name.replace(',', ",,"))]);
    }
    args.extend([layer.file.clone(), to.to_owned()]);
    qemu::img(dir, &args).map(drop)
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

/// The table of the active layer, or of a snapshot, against a raw copy.
///
/// # Errors
/// The bytes differ, or it was refused though it should not be.
fn check_table(dir: &Path, recipe: &Recipe, snapshot: Option<(&str, &str)>, map: &Ran) -> Outcome {
    let extra = match snapshot {
        Some((argument, _)) => strings(&["-l", argument]),
        None => Vec::new(),
    };
    let ran = run_table(dir, recipe, &extra, &recipe.top().file)?;
    let compressed = rows(&map.stdout)?.iter().any(|row| row.compressed);
    if ran.code() == Some(EX_NOT_REPRESENTABLE) && (compressed || recipe.odd_size) {
        return if ran.stdout.is_empty() { Ok(()) } else { Err(ran.describe()) };
    }
    let odd_itself = recipe.odd_size && recipe.layers.len() == 1;
    if compressed || odd_itself {
        return Err(format!("should exit with {EX_NOT_REPRESENTABLE}:\n{}", ran.describe()));
    }
    let ran = ran.ok()?;
    let plan = Plan::parse(&ran.stdout)?;
    convert(dir, recipe.top(), snapshot.map(|(_, name)| name), "copy.raw")?;
    check_files(dir, recipe, &plan)
        .and_then(|()| compare(&plan, &dir.join("copy.raw")))
        .map_err(|error| format!("{error}\n{}", ran.describe()))
}

/// A snapshot's map and table against what `qemu-img snapshot -a` makes of a copy.
fn check_snapshot(dir: &Path, recipe: &Recipe, name: &str, rng: &mut Rng) -> Outcome {
    let top = recipe.top();
    // A copy beside the image, so that a relative backing name still leads somewhere.
    let copy = match top.file.rsplit_once('/') {
        Some((folder, _)) => format!("{folder}/applied"),
        None => "applied".to_owned(),
    };
    let mut cp = Command::new("cp");
    run(cp.current_dir(dir).args(["--sparse=auto", &top.file, &copy]))?.ok()?;
    qemu::img(dir, &["snapshot", "-a", name, &copy])?;
    let theirs = qemu::img_any(dir, &["map", "-f", "qcow2", "--output=json", &copy])?;
    let argument = match rng.below(3) {
        // A bare name could be another snapshot's ID, which goes first.
        0 if name.parse::<u64>().is_err() => name.to_owned(),
        _ => format!("snapshot.name={}", name.replace(',', ",,")),
    };
    let args = ["map", "-f", "qcow2", "--output=json", "-l", &argument, &top.file];
    let ours = imgdm(dir, &args)?;
    same(&theirs, &ours).map_err(|error| format!("snapshot '{name}': {error}"))?;
    check_table(dir, recipe, Some((&argument, name)), &theirs)
        .map_err(|error| format!("snapshot '{name}': {error}"))
}

/// Everything about one chain.
///
/// # Errors
/// What is not as qemu-img has it.
pub(crate) fn check_image(dir: &Path, recipe: &Recipe, rng: &mut Rng) -> Outcome {
    let map = check_maps(dir, recipe.top(), rng)?;
    check_table(dir, recipe, None, &map)?;
    for name in &recipe.top().snapshots {
        check_snapshot(dir, recipe, name, rng)?;
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
    convert(dir, top, None, "copy.raw")?;
    let plan = plan_of(&rows(&map.stdout)?, recipe, dir)?;
    compare(&plan, &dir.join("copy.raw")).map_err(|error| format!("{error}\n{}", map.describe()))
}
