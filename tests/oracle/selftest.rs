//! The oracle checks itself: a wrong table and a wrong image must not pass.

use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::check::{check_image, convert, run_table};
use crate::common::images::{MIXED, Recipe, SECTOR, Theme, open_to_patch, scratch_dir};
use crate::common::rng::Rng;
use crate::table::{Plan, compare};

/// A chain whose plan has all that a plan can have: several files, zeros and data.
fn made(dir: &Path) -> (Recipe, Plan) {
    let theme = Theme { depth: (3, 3), raw_base: 100, qcow: 0, empty: 0, other_size: 0, ..MIXED };
    for seed in 0.. {
        let recipe = theme.draw(&mut Rng::for_case(seed, "selftest", 0));
        let files = tempfile::tempdir_in(dir).unwrap().keep();
        recipe.make(&files).unwrap();
        let top = recipe.top();
        convert(&files, top.format, &top.file, "copy.raw").unwrap();
        std::fs::rename(files.join("copy.raw"), dir.join("copy.raw")).unwrap();
        let ran = run_table(&files, &recipe, &[], &recipe.top().file).unwrap().ok().unwrap();
        let plan = Plan::parse(&ran.stdout).unwrap();
        let segments = &plan.top().unwrap().segments;
        let files = plan.paths().len();
        if segments.len() > 20 && segments.iter().any(|s| s.target == "zero") && files >= 3 {
            return (recipe, plan);
        }
    }
    unreachable!("some seed gives such a chain")
}

/// All segments of all tables, by index of the table and of the segment.
fn places(plan: &Plan) -> Vec<(usize, usize)> {
    let tables = plan.tables.iter().enumerate();
    tables.flat_map(|(t, table)| (0..table.segments.len()).map(move |s| (t, s))).collect()
}

/// Mutates each segment in turn by `mutate` (which says whether it could), and counts
/// how many of the mutated plans the comparison refuses.
///
/// Some mutations change nothing: a segment over bytes that are zero, moved by a
/// sector. But where the segment's bytes are not zero throughout, it must be seen.
fn count(
    plan: &Plan,
    copy: &Path,
    mutate: impl Fn(&mut Plan, usize, usize) -> bool,
) -> (usize, usize) {
    let (mut tried, mut seen) = (0, 0);
    for (table, segment) in places(plan) {
        let mut mutant = plan.clone();
        if mutate(&mut mutant, table, segment) {
            tried += 1;
            seen += usize::from(compare(&mutant, copy).is_err());
        }
    }
    (tried, seen)
}

/// Whether the disk is other than zero somewhere in each sector of the segment.
fn has_data(plan: &Plan, copy: &Path, table: usize, segment: usize) -> bool {
    let top = plan.tables[table].role == "top";
    let part = &plan.tables[table].segments[segment];
    let mut sector = [0; 512];
    let file = std::fs::File::open(copy).unwrap();
    file.read_exact_at(&mut sector, part.start * SECTOR).is_ok()
        && top
        && sector.iter().any(|&byte| byte != 0)
}

/// Whether the file's bytes behind the segment are the disk's: where a small write
/// made QEMU copy the rest of the cluster from the backing file, they are.
fn carries_on(plan: &Plan, copy: &Path, table: usize, segment: usize) -> bool {
    let part = &plan.tables[table].segments[segment];
    let backing = plan.backings.iter().find(|backing| Some(backing.id) == part.backing);
    let (Some(path), Some(offset)) = (backing.and_then(|b| b.path.as_ref()), part.offset) else {
        return false;
    };
    let sector = |path: &Path, number: u64| {
        let mut bytes = [0; 512];
        let file = std::fs::File::open(path).unwrap();
        file.read_exact_at(&mut bytes, number * SECTOR).map(|()| bytes).ok()
    };
    sector(path, offset + part.length) == sector(copy, part.start + part.length)
}

#[test]
fn a_table_with_one_mutated_segment_is_seen() {
    let dir = scratch_dir("selftest").unwrap();
    let copy = dir.path().join("copy.raw");
    let (_, plan) = made(dir.path());
    compare(&plan, &copy).unwrap();
    let data = |t, s| has_data(&plan, &copy, t, s);
    let linear = |t: usize, s: usize| plan.tables[t].segments[s].target == "linear";

    let (tried, seen) = count(&plan, &copy, |mutant, t, s| {
        let segment = &mut mutant.tables[t].segments[s];
        segment.offset = segment.offset.map(|offset| offset + 1);
        linear(t, s) && data(t, s)
    });
    assert!(tried > 5 && seen == tried, "an offset one sector on: {seen} of {tried} seen");

    let (tried, seen) = count(&plan, &copy, |mutant, t, s| {
        let segment = &mut mutant.tables[t].segments[s];
        segment.offset = segment.offset.map(|offset| offset.wrapping_sub(1));
        linear(t, s) && data(t, s)
    });
    assert!(tried > 5 && seen == tried, "an offset one sector back: {seen} of {tried} seen");

    let (tried, seen) = count(&plan, &copy, |mutant, t, s| {
        let segment = &mut mutant.tables[t].segments[s];
        (segment.target, segment.backing, segment.offset) = ("zero".to_owned(), None, None);
        linear(t, s) && data(t, s)
    });
    assert!(tried > 5 && seen == tried, "zero instead of linear: {seen} of {tried} seen");

    let files: Vec<u64> =
        plan.backings.iter().filter(|backing| backing.kind == "file").map(|b| b.id).collect();
    let (tried, seen) = count(&plan, &copy, |mutant, t, s| {
        let segment = &mut mutant.tables[t].segments[s];
        let other = files.iter().find(|&&id| Some(id) != segment.backing);
        segment.backing = other.copied();
        linear(t, s) && data(t, s)
    });
    assert!(tried > 5 && seen == tried, "the wrong backing: {seen} of {tried} seen");

    let (tried, seen) = count(&plan, &copy, |mutant, t, s| {
        let segments = &mut mutant.tables[t].segments;
        if s + 1 >= segments.len() || !data(t, s + 1) || carries_on(&plan, &copy, t, s) {
            return false;
        }
        segments[s].length += 1;
        let next = &mut segments[s + 1];
        (next.start, next.length) = (next.start + 1, next.length - 1);
        next.offset = next.offset.map(|offset| offset + 1);
        next.length > 0
    });
    assert!(tried > 5 && seen == tried, "a sector of the neighbour's: {seen} of {tried} seen");

    let (tried, seen) = count(&plan, &copy, |mutant, t, s| {
        mutant.tables[t].segments.remove(s);
        true
    });
    assert!(tried > 5 && seen == tried, "a segment left out: {seen} of {tried} seen");

    let (tried, seen) = count(&plan, &copy, |mutant, t, s| {
        let segments = &mut mutant.tables[t].segments;
        segments[s].length += 1;
        s + 1 < segments.len()
    });
    assert!(tried > 5 && seen == tried, "an overlap: {seen} of {tried} seen");

    let mut longer = plan.clone();
    let top = longer.tables.iter().position(|table| table.role == "top").unwrap();
    longer.tables[top].segments.last_mut().unwrap().length += 1;
    longer.sectors += 1;
    assert!(compare(&longer, &copy).is_err(), "a device that is too long");
}

#[test]
fn an_image_with_one_flipped_byte_is_seen() {
    let dir = scratch_dir("selftest").unwrap();
    let copy = dir.path().join("copy.raw");
    let (_, plan) = made(dir.path());
    let mut flipped = 0;
    for segment in &plan.top().unwrap().segments {
        let (Some(backing), Some(offset)) = (segment.backing, segment.offset) else { continue };
        let backing = plan.backings.iter().find(|b| b.id == backing).unwrap();
        let Some(path) = backing.path.as_deref() else { continue };
        let file = open_to_patch(path).unwrap();
        let at = (offset + segment.length) * SECTOR - 1;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        assert!(compare(&plan, &copy).is_err(), "{segment:?} of {}", path.display());
        file.write_all_at(&byte, at).unwrap();
        flipped += 1;
    }
    assert!(flipped > 5);
    compare(&plan, &copy).unwrap();
}

#[test]
fn a_map_with_one_changed_digit_is_seen() {
    // check_image() itself has to fail, and not only the parts it is made of: here
    // qemu-img is shown a chain that has lost its base between the two.
    let dir = scratch_dir("selftest").unwrap();
    let theme = Theme { depth: (2, 2), raw_base: 100, qcow: 0, empty: 0, other_size: 0, ..MIXED };
    let mut rng = Rng::for_case(1, "selftest", 1);
    let recipe = theme.draw(&mut rng);
    recipe.make(dir.path()).unwrap();
    check_image(dir.path(), &recipe, &mut rng).unwrap();
    let theirs = crate::common::qemu::img(
        dir.path(),
        &["map", "--output=json", "-f", recipe.top().format, &recipe.top().file],
    )
    .unwrap();
    for index in 0..theirs.stdout.len() {
        if !theirs.stdout[index].is_ascii_digit() {
            continue;
        }
        let mut wrong = theirs.stdout.clone();
        wrong[index] = if wrong[index] == b'7' { b'8' } else { b'7' };
        let ran = crate::common::process::Ran {
            command: "a wrong map".to_owned(),
            status: theirs.status,
            stdout: wrong,
            stderr: String::new(),
        };
        assert!(crate::check::same(&theirs, &ran).is_err(), "digit {index}");
    }
}
