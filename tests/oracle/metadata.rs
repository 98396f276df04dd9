//! `imgdm check --metadata`: each piece where a walk of the bytes finds it, and no byte of the
//! file left out.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::check::strings;
use crate::common::images::{MIXED, Step, Theme, scratch_dir};
use crate::common::patch::{self, Patch};
use crate::common::process::{Outcome, run};
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::far::{create, recipe_of, write};
use crate::imgdm::{PROGRAM, imgdm, sound};
use crate::random::run_theme;
use crate::viscera::{Viscera, covers};

const SIZE: u64 = 4 << 20;

/// What `imgdm check -M --output=json` prints of an image, whatever it exits with.
fn dump(dir: &Path, image: &str, options: &[&str]) -> Outcome<Value> {
    let mut line = vec!["check", "-M", "--output=json"];
    line.extend_from_slice(options);
    line.push(image);
    let ran = imgdm(dir, &line)?;
    serde_json::from_slice(&ran.stdout).map_err(|error| format!("{error}: {}", ran.describe()))
}

/// Checks what is said of a healthy image against a walk of its bytes and qemu-img check.
fn agree(dir: &Path, image: &str) -> Outcome<Viscera> {
    let bytes = fs::read(dir.join(image)).map_err(|error| error.to_string())?;
    let length = bytes.len() as u64;
    let is_qcow2 = bytes[7] >= 2;
    let walk = Viscera::of(bytes);
    let said = dump(dir, image, &[])?;
    walk.compare(&said["viscera"])?;
    covers(&said["viscera"], length)?;
    if is_qcow2 {
        let theirs = qemu::img_any(dir, &["check", "--output=json", image])?;
        let theirs: Value =
            serde_json::from_slice(&theirs.stdout).map_err(|error| error.to_string())?;
        let leaks = walk.leaked_clusters();
        if theirs["leaks"].as_u64().unwrap_or(0) != leaks {
            return Err(format!("{leaks} leaks, qemu-img finds {}", theirs["leaks"]));
        }
        for key in ["image-end-offset", "total-clusters", "check-errors", "allocated-clusters"] {
            if said[key] != theirs[key] {
                return Err(format!("{key} is {}, qemu-img's {}", said[key], theirs[key]));
            }
        }
    }
    let human = imgdm(dir, &["check", "-M", image])?.text();
    rows_cover(&human, length).map_err(|error| format!("{error}:\n{human}"))?;
    Ok(walk)
}

/// Checks that the table for people is sorted and leaves nothing out.
fn rows_cover(human: &str, length: u64) -> Outcome {
    let mut at = 0;
    let mut last = 0;
    let rows = human.lines().skip_while(|line| !line.starts_with("Offset")).skip(1);
    for row in rows {
        let mut words = row.split_whitespace();
        let mut number = || {
            let word = words.next().unwrap_or_default();
            let hex = word.strip_prefix("0x");
            hex.map_or_else(|| word.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok())
                .ok_or(format!("no number in '{row}'"))
        };
        let (offset, size) = (number()?, number()?);
        if offset < last || offset > at {
            return Err(format!("after {last:#x} (up to {at:#x}) comes {offset:#x}"));
        }
        last = offset;
        at = at.max(offset + size);
    }
    if at < length { Err(format!("ends at {at:#x}, not {length:#x}")) } else { Ok(()) }
}

fn snapshot(file: &str, name: &str) -> Step {
    Step::Snapshot { action: "-c", name: name.to_owned(), file: file.to_owned() }
}

fn bitmap(file: &str, name: &str) -> Step {
    Step::Bitmap { name: name.to_owned(), file: file.to_owned() }
}

fn io(file: &str, commands: &[&str]) -> Step {
    Step::Io { format: "qcow2", file: file.to_owned(), commands: strings(commands) }
}

fn make(dir: &Path, steps: Vec<Step>) {
    let recipe = recipe_of(steps, &[]);
    recipe.make(dir).unwrap_or_else(|error| panic!("{error}\n{}", recipe.script(dir)));
}

/// Snapshots, bitmaps with bits in them, compressed clusters, a backing file.
fn full(dir: &Path, options: &[&str], with_snapshots: bool) {
    let mut steps = vec![
        create("base.raw", "raw", &[], None, SIZE),
        create("x.qcow2", "qcow2", options, Some(("base.raw", "raw")), SIZE),
        write("x.qcow2", "qcow2", &[(0, 200_192), (1_000_448, 40_960)]),
        io("x.qcow2", &["write -c -P 5 2M 64k", "write -c -P 6 2162688 64k"]),
    ];
    if with_snapshots {
        steps.push(snapshot("x.qcow2", "first one"));
        steps.push(write("x.qcow2", "qcow2", &[(100_352, 65_536)]));
        steps.push(snapshot("x.qcow2", "zwei \u{e9}"));
        steps.push(write("x.qcow2", "qcow2", &[(3 << 20, 65_536)]));
        steps.push(snapshot("x.qcow2", "three"));
        steps.push(Step::Snapshot {
            action: "-d",
            name: "zwei \u{e9}".to_owned(),
            file: "x.qcow2".to_owned(),
        });
    }
    if !options.contains(&"compat=0.10") {
        // One that records nothing, one that records writes, one added at the end.
        steps.push(bitmap("x.qcow2", "still"));
        steps.push(bitmap("x.qcow2", "live"));
        steps.push(io("x.qcow2", &["write -P 7 1M 100k", "write -P 8 3500032 512"]));
        steps.push(bitmap("x.qcow2", "late"));
    }
    make(dir, steps);
}

#[test]
fn every_piece_is_where_a_walk_of_the_bytes_finds_it() {
    let widths = ["1", "2", "4", "8", "16", "32", "64"];
    for (index, width) in widths.into_iter().enumerate() {
        // A compressed cluster counts once for each stream in it, in each snapshot: fewer bits
        // than these don't hold that.
        for (cluster, more, enough) in
            [("512", "", 4), ("4k", "lazy_refcounts=on", 3), ("64k", "extended_l2=on", 2)]
        {
            let dir = scratch_dir("metadata").unwrap();
            let dir = dir.path();
            let (cluster, bits) =
                (format!("cluster_size={cluster}"), format!("refcount_bits={width}"));
            let mut options = vec![cluster.as_str(), bits.as_str()];
            options.extend((!more.is_empty()).then_some(more));
            full(dir, &options, index >= enough);
            agree(dir, "x.qcow2").unwrap_or_else(|error| panic!("{options:?}: {error}"));
        }
    }
    let dir = scratch_dir("metadata").unwrap();
    full(dir.path(), &["compat=0.10"], true);
    agree(dir.path(), "x.qcow2").unwrap();
}

#[test]
fn images_of_all_kinds_are_covered_to_the_byte() {
    let theme = Theme { compressed: 30, snapshot: 60, bitmap: 40, max_size: 8 << 20, ..MIXED };
    run_theme("viscera", 60, &theme, |dir, recipe, _| {
        for layer in &recipe.layers {
            if layer.format == "raw" {
                let said = dump(dir, &layer.file, &["-f", "raw"])?;
                let length = fs::metadata(dir.join(&layer.file)).map_err(|e| e.to_string())?.len();
                covers(&said["viscera"], length)?;
            } else {
                agree(dir, &layer.file).map_err(|error| format!("{}: {error}", layer.file))?;
            }
        }
        Ok(())
    });
}

#[test]
fn bitmaps_are_listed_whether_they_are_in_use_or_not() {
    let dir = scratch_dir("metadata").unwrap();
    let dir = dir.path();
    full(dir, &["cluster_size=4k"], false);
    // Killed, so that it can't take back the flag.
    let writes = strings(&["write -P 1 0 1M", "sigraise 9"]);
    let _ = qemu::io_any(dir, "qcow2", "x.qcow2", &writes);
    let info = qemu::img(dir, &["info", "--output=json", "x.qcow2"]).unwrap().text();
    assert!(info.contains("in-use"), "{info}");
    let bytes = fs::read(dir.join("x.qcow2")).unwrap();
    let said = dump(dir, "x.qcow2", &[]).unwrap();
    Viscera::of(bytes).compare(&said["viscera"]).unwrap();
    assert_eq!(said["viscera"]["bitmaps"]["nb-bitmaps"], 3);

    // Without its autoclear bit the extension has to be ignored: its clusters leak.
    let image = Patch::open(&dir.join("x.qcow2")).unwrap();
    let autoclear = image.u64(patch::INCOMPATIBLE + 16).unwrap();
    image.put_u64(patch::INCOMPATIBLE + 16, autoclear & !1).unwrap();
    let walk = Viscera::of(fs::read(dir.join("x.qcow2")).unwrap());
    let said = dump(dir, "x.qcow2", &[]).unwrap();
    walk.compare(&said["viscera"]).unwrap();
    assert!(said["viscera"].get("bitmaps").is_none());
    assert!(walk.leaked_clusters() >= 4);
}

#[test]
fn leaks_and_what_is_hidden_in_unused_places_are_told() {
    let dir = scratch_dir("metadata").unwrap();
    let dir = dir.path();
    full(dir, &["cluster_size=4k"], true);
    let clean = agree(dir, "x.qcow2").unwrap().leaked_clusters();
    assert_eq!(clean, 0);
    let image = Patch::open(&dir.join("x.qcow2")).unwrap();
    // A cluster more that has a refcount, then three with none, one of which holds a message.
    let length = image.length().unwrap().next_multiple_of(4096);
    image.set_length(length + 4 * 4096).unwrap();
    let block = image.u64(image.u64(patch::REFCOUNT_OFFSET).unwrap()).unwrap();
    image.put(block + length / 4096 * 2, &[0, 1]).unwrap();
    image.put(length + 2 * 4096 + 17, b"evidence").unwrap();
    // In the header's cluster, and after the snapshot table.
    image.put(4090, b"x").unwrap();
    let snapshots = image.u64(patch::SNAPSHOTS_OFFSET).unwrap();
    image.put(snapshots + 4095, b"y").unwrap();
    let walk = agree(dir, "x.qcow2").unwrap();
    assert_eq!(walk.leaked_clusters(), 1);
    let viscera = &dump(dir, "x.qcow2", &[]).unwrap()["viscera"];
    assert_eq!(
        viscera["unreferenced"],
        json!([{"offset": length, "size": 4096, "all-zeros": true}])
    );
    let last = viscera["unused"].as_array().unwrap().last().unwrap();
    let (offset, first) = (length + 4096, length + 2 * 4096 + 17);
    assert_eq!(
        *last,
        json!({"offset": offset, "size": 12288, "all-zeros": false, "first-non-zero": first})
    );
    let found = |first: u64| {
        let slack = viscera["slack"].as_array().unwrap();
        slack.iter().any(|range| range["first-non-zero"] == first)
    };
    assert!(found(4090) && found(snapshots + 4095), "{:#}", viscera["slack"]);
}

#[test]
fn a_snapshot_of_an_impossible_size_hides_no_other() {
    let dir = scratch_dir("metadata").unwrap();
    let dir = dir.path();
    let mut steps = vec![create("x.qcow2", "qcow2", &[], None, SIZE)];
    for (name, at) in [("one", 0), ("two", 1 << 20), ("three", 2 << 20)] {
        steps.push(write("x.qcow2", "qcow2", &[(at, 100_352)]));
        steps.push(snapshot("x.qcow2", name));
    }
    steps.push(write("x.qcow2", "qcow2", &[(0, SIZE)]));
    make(dir, steps);
    let map = |name: &str| imgdm(dir, &["map", "-l", name, "--output=json", "x.qcow2"]);
    let before: Vec<_> =
        ["two", "three"].map(|name| map(name).unwrap().ok().unwrap().text()).into();
    let said_before = dump(dir, "x.qcow2", &[]).unwrap();

    let image = Patch::open(&dir.join("x.qcow2")).unwrap();
    let size = image.u64(patch::SNAPSHOTS_OFFSET).unwrap() + 48;
    assert_eq!(image.u64(size).unwrap(), SIZE);
    image.put_u64(size, SIZE | 1 << 63).unwrap();
    let said = dump(dir, "x.qcow2", &[]).unwrap();
    for key in ["snapshot-table", "unreferenced", "unused", "slack"] {
        assert_eq!(said["viscera"][key], said_before["viscera"][key], "{key}");
    }
    assert_eq!(said["viscera"]["snapshot-table"]["l1-list"].as_array().unwrap().len(), 3);
    assert_eq!(said["viscera"]["unreferenced"], json!([]));
    let problems = &said["viscera"]["problems"];
    assert!(problems.to_string().contains("snapshot 'one' is past 2^63"), "{problems:#}");
    for (name, before) in ["two", "three"].into_iter().zip(&before) {
        assert_eq!(map(name).unwrap().ok().unwrap().text(), *before, "{name}");
        qemu::img(dir, &["convert", "-l", name, "-O", "raw", "x.qcow2", "x.raw"]).unwrap();
    }
    let refused = map("one").unwrap();
    assert!(refused.stderr.contains("past 2^63"), "{}", refused.describe());
}

#[test]
fn a_vm_state_is_where_the_l2_tables_past_the_disk_say() {
    let dir = scratch_dir("metadata").unwrap();
    let dir = dir.path();
    make(
        dir,
        vec![
            create("x.qcow2", "qcow2", &["cluster_size=4k"], None, SIZE),
            write("x.qcow2", "qcow2", &[(0, 65_536)]),
            io("x.qcow2", &["write -b -P 3 0 5M"]),
            snapshot("x.qcow2", "with state"),
        ],
    );
    // qemu-img takes no state of its own; that there is one is for QEMU to write.
    let image = Patch::open(&dir.join("x.qcow2")).unwrap();
    let entry = image.u64(patch::SNAPSHOTS_OFFSET).unwrap();
    image.put_u64(entry + 40, 5 << 20).unwrap();
    image.put_u32(entry + 32, 5 << 20).unwrap();
    agree(dir, "x.qcow2").unwrap();
    let viscera = &dump(dir, "x.qcow2", &[]).unwrap()["viscera"];
    let state = &viscera["vm-state"][0];
    assert_eq!((&state["name"], &state["size"]), (&"with state".into(), &(5 << 20).into()));
    // 2 MiB for each L2 table; the disk is 2 of them.
    let all = viscera["snapshot-table"]["l1-list"][0]["l2-list"].as_array().unwrap();
    let of_state = state["l2-list"].as_array().unwrap();
    assert_eq!(of_state.as_slice(), &all[all.len() - 3..]);
    assert!(all.len() > 3, "{viscera:#}");
}

#[test]
fn a_luks_header_and_its_key_slots_are_told() {
    let dir = scratch_dir("metadata").unwrap();
    let dir = dir.path();
    let secret = ["--object", "secret,id=s,data=oracle"];
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let mut line = vec!["create", "-q", "-f", "qcow2"];
    line.extend(secret);
    line.extend(["-o", options, "x.qcow2", "4M"]);
    qemu::img(dir, &line).unwrap();
    let mut io = Command::new("qemu-io");
    let image = "driver=qcow2,file.filename=x.qcow2,encrypt.key-secret=s";
    io.current_dir(dir).args(secret).args(["--image-opts", image, "-c", "write -P 5 65536 4096"]);
    run(&mut io).unwrap().ok().unwrap();
    let viscera = &dump(dir, "x.qcow2", &[]).unwrap()["viscera"];
    let crypt = &viscera["crypt-header"];
    let bytes = fs::read(dir.join("x.qcow2")).unwrap();
    Viscera::of(bytes.clone()).compare(viscera).unwrap();
    covers(viscera, bytes.len() as u64).unwrap();
    let start = usize::try_from(crypt["location"]["offset"].as_u64().unwrap()).unwrap();
    assert_eq!(&bytes[start..start + 6], b"LUKS\xba\xbe");
    let slots = crypt["key-slots"].as_array().unwrap();
    assert_eq!(slots.iter().filter(|slot| slot["active"] == true).count(), 1, "{crypt:#}");
    // aes-256-xts has a key of 64 bytes, in 4000 stripes; the first slot is at sector 8.
    let location = json!({"offset": start + 8 * 512, "size": 64 * 4000});
    assert_eq!((slots.len(), &slots[0]["location"]), (8, &location));
}

#[test]
fn a_data_file_is_named_and_its_clusters_are_not_the_images() {
    for raw in ["data_file_raw=off", "data_file_raw=on"] {
        let dir = scratch_dir("metadata").unwrap();
        let dir = dir.path();
        let options = ["data_file=x.data", raw];
        make(
            dir,
            vec![
                create("x.qcow2", "qcow2", &options, None, SIZE),
                write("x.qcow2", "qcow2", &[(65_536, 131_072)]),
            ],
        );
        agree(dir, "x.qcow2").unwrap();
        let viscera = &dump(dir, "x.qcow2", &[]).unwrap()["viscera"];
        let file = &viscera["data-file"];
        let path = dir.canonicalize().unwrap().join("x.data");
        assert_eq!(file["name"]["path"], "x.data", "{file}");
        assert_eq!(file["file"]["path"], path.to_str().unwrap());
        assert_eq!((&file["raw"], &file["found"]), (&raw.ends_with("on").into(), &true.into()));
        assert_eq!(viscera["data-clusters"]["bytes"], 0);
        fs::remove_file(path).unwrap();
        let viscera = &dump(dir, "x.qcow2", &[]).unwrap()["viscera"];
        assert_eq!(viscera["data-file"]["found"], false);
    }
}

#[test]
fn a_compressed_qcow_is_covered_to_the_byte() {
    let dir = scratch_dir("metadata").unwrap();
    let dir = dir.path();
    make(
        dir,
        vec![
            create("base.raw", "raw", &[], None, SIZE),
            Step::Io {
                format: "raw",
                file: "base.raw".to_owned(),
                commands: strings(&["write -P 9 2M 1M"]),
            },
            create("x.qcow", "qcow", &[], Some(("base.raw", "raw")), SIZE),
            write("x.qcow", "qcow", &[(0, 100_352), (3_000_320, 4096)]),
        ],
    );
    // QEMU's last step with a compressed qcow fails without a word, when all is written.
    let line = ["convert", "-c", "-O", "qcow", "base.raw", "c.qcow"];
    assert_eq!(qemu::img_any(dir, &line).unwrap().stderr, "");
    assert!(agree(dir, "c.qcow").unwrap().streams > 200);
    assert!(agree(dir, "x.qcow").unwrap().data_references > 0);
}

#[test]
fn an_empty_and_a_sparse_file_are_covered() {
    let dir = scratch_dir("metadata").unwrap();
    let dir = dir.path();
    fs::write(dir.join("empty"), b"").unwrap();
    let viscera = &dump(dir, "empty", &["-f", "raw"]).unwrap()["viscera"];
    covers(viscera, 0).unwrap();
    make(dir, vec![create("x.qcow2", "qcow2", &["cluster_size=512"], None, 1 << 20)]);
    let image = Patch::open(&dir.join("x.qcow2")).unwrap();
    image.set_length(1 << 42).unwrap();
    let viscera = &dump(dir, "x.qcow2", &[]).unwrap()["viscera"];
    covers(viscera, 1 << 42).unwrap();
    let unused = viscera["unused"].as_array().unwrap();
    assert!(unused.iter().any(|range| range["size"].as_u64() > Some(1 << 41)), "{unused:?}");
}

#[test]
fn fields_of_a_damaged_image_bring_no_panic_and_leave_no_byte_out() {
    let dir = scratch_dir("metadata").unwrap();
    let dir = dir.path();
    full(dir, &["cluster_size=4k"], true);
    let good = fs::read(dir.join("x.qcow2")).unwrap();
    let walk = Viscera::of(good.clone());
    // Every 8-byte field that some structure has, by where the structures are.
    let number = |value: &Value| value.as_u64().unwrap();
    let mut structures = vec![(0, 560)];
    for place in [
        &walk.expected["active-l1"]["location"],
        &walk.expected["active-l1"]["l2-list"][0],
        &walk.expected["refcount-blocks"][0],
        &walk.expected["snapshot-table"]["location"],
        &walk.expected["snapshot-table"]["l1-list"][0]["location"],
        &walk.expected["bitmaps"]["bitmap-dir"]["location"],
        &walk.expected["bitmaps"]["bitmap-dir"]["dir-entries"][1]["bitmap-table"]["location"],
    ] {
        structures.push((number(&place["offset"]), number(&place["size"]).min(256)));
    }
    let refcounts = &walk.expected["refcount-table"]["location"];
    structures.push((number(&refcounts["offset"]), 16));
    let mut rng = Rng::for_case(1, "viscera-fields", 0);
    let (mut dumped, mut refused, mut with_problems) = (0, 0, 0);
    for case in 0..400 {
        let (start, length) = *rng.pick(&structures);
        let at = usize::try_from(start + rng.below(length / 8) * 8).unwrap();
        let old = u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
        let new = match rng.below(6) {
            0 => 0,
            1 => u64::MAX,
            2 => old ^ 1 << rng.below(64),
            3 => old.wrapping_add(4096 << rng.below(40)),
            4 => rng.next(),
            _ => rng.below(good.len() as u64 * 2),
        };
        let mut bad = good.clone();
        bad[at..at + 8].copy_from_slice(&new.to_be_bytes());
        fs::write(dir.join("bad.qcow2"), &bad).unwrap();
        let what = format!("case {case}: at {at:#x} {old:#x} is {new:#x}");
        let mut command = Command::new("prlimit");
        command.current_dir(dir).args(["--as=1073741824", "--", PROGRAM]);
        command.args(["check", "-M", "-f", "qcow2", "--output=json", "bad.qcow2"]);
        let ran = sound(run(&mut command).unwrap()).unwrap_or_else(|e| panic!("{what}: {e}"));
        if ran.stdout.is_empty() {
            // Nothing goes without magic, version and cluster size.
            assert!(at < 24 && ran.code() == Some(65), "{what}: {}", ran.describe());
            refused += 1;
            continue;
        }
        let said: Value = serde_json::from_slice(&ran.stdout)
            .unwrap_or_else(|error| panic!("{what}: {error}: {}", ran.describe()));
        covers(&said["viscera"], bad.len() as u64).unwrap_or_else(|e| panic!("{what}: {e}"));
        dumped += 1;
        with_problems += u64::from(said["viscera"]["problems"] != json!([]));
    }
    assert!(dumped > 350 && with_problems > 100, "{dumped} {refused} {with_problems}");
}
