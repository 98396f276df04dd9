//! Compressed clusters: inflated once into a scratch file that nobody sees and that goes
//! with the device.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::libc;
use nix::sys::signal::Signal;

use crate::args;
use crate::content::{assert_attached_as_qemu, assert_attached_is};
use crate::guest::*;

/// Text-like, constant, random and empty pieces, none of a cluster's length.
fn mixture(length: u64, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut all = Vec::new();
    while (all.len() as u64) < length {
        let piece = 512 * (1 + random.below(200));
        let piece = usize::try_from(piece).unwrap();
        match random.below(5) {
            0 => all.resize(all.len() + piece, 0),
            1 => all.resize(all.len() + piece, random.bytes(1)[0]),
            2 => all.extend(random.bytes(piece / 4)),
            _ => {
                let end = all.len() + piece;
                while all.len() < end {
                    writeln!(all, "line {} of {}", random.below(1000), all.len()).unwrap();
                }
            }
        }
    }
    all.truncate(usize::try_from(length).unwrap());
    all
}

/// `qemu-img convert -c` of a mixture, with these options; gives the image.
#[track_caller]
fn converted(scratch: &Scratch, name: &str, length: u64, options: &[&str]) -> PathBuf {
    let raw = scratch.path("mixture.raw");
    fs::write(&raw, mixture(length, length + 1)).unwrap();
    let image = scratch.path(name);
    let mut line = command("qemu-img", ["convert", "-c", "-f", "raw"]);
    run(line.args(options).arg(&raw).arg(&image)).ok();
    fs::remove_file(raw).unwrap();
    image
}

/// Where the stream of a qcow2's compressed cluster starts and how far it goes at most.
/// For images of one L2 table.
fn stream(image: &Path, cluster: u64) -> (u64, u64) {
    let file = File::open(image).unwrap();
    let number = |offset: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes)
    };
    let shift = 62 - ((number(16) & 0xffff_ffff) - 8);
    let l2 = number(number(40)) & 0x00ff_ffff_ffff_fe00;
    let entry = number(l2 + 8 * cluster);
    assert_eq!(entry >> 62, 1, "cluster {cluster} is not compressed: {entry:#x}");
    let start = entry & ((1 << shift) - 1);
    let sectors = (entry >> shift & ((1 << (62 - shift)) - 1)) + 1;
    (start, (start & !511) + 512 * sectors)
}

/// 1 MiB of compressed text in clusters of 64 KiB.
pub(crate) fn text(scratch: &Scratch, name: &str, options: &[&str]) -> PathBuf {
    let raw = scratch.path("text.raw");
    let mut text = Vec::new();
    for number in 0u64.. {
        writeln!(text, "line {number}, {}", number * number % 1009).unwrap();
        if text.len() > 1 << 20 {
            break;
        }
    }
    text.truncate(1 << 20);
    fs::write(&raw, text).unwrap();
    let image = scratch.path(name);
    let mut line = command("qemu-img", ["convert", "-c", "-f", "raw", "-O", "qcow2"]);
    run(line.args(options).arg(raw).arg(&image)).ok();
    image
}

/// imgdm attach of an image with a scratch directory.
pub(crate) fn into(place: &Path, image: &Path) -> [std::ffi::OsString; 3] {
    args!["--scratch-dir", place, image]
}

// --- Contents -------------------------------------------------------------------------

#[test]
fn converted_images_read_as_qemu_reads_them_with_either_compression_and_clusters_of_every_size() {
    let scratch = Scratch::new();
    for compression in ["zlib", "zstd"] {
        for shift in 9..=21 {
            let cluster = 1u64 << shift;
            // Not in whole clusters, and more than one table where they are small.
            let length = (cluster * 3 / 2).max(100 * KIB).next_multiple_of(512);
            let option = format!("compression_type={compression},cluster_size={cluster}");
            let name = format!("{compression}{cluster}.qcow2");
            // Subclusters are for clusters of 16 KiB and more.
            for more in ["", ",extended_l2=on"] {
                if more.is_empty() || shift >= 14 {
                    let options = ["-O", "qcow2", "-o", &format!("{option}{more}")];
                    let image = converted(&scratch, &name, length, &options);
                    assert_attached_as_qemu(&scratch, &image);
                    fs::remove_file(image).unwrap();
                }
            }
        }
    }
}

#[test]
fn a_converted_qcow_reads_as_qemu_reads_it() {
    let scratch = Scratch::new();
    let (raw, image) = (scratch.path("mixture.raw"), scratch.path("disk.qcow"));
    fs::write(&raw, mixture(MIB, 3)).unwrap();
    // QEMU 10 ends with 1 and no word once all is written: what is there is what counts.
    let _ = qemu_img(args!["convert", "-c", "-f", "raw", "-O", "qcow", &raw, &image]);
    let wanted = qemu_content(&scratch, &image, &[]);
    assert_same("the image", &wanted, &fs::read(&raw).unwrap());
    assert!(fs::metadata(&image).unwrap().len() < 900 * KIB, "nothing is compressed");
    assert_attached_is(&scratch, &image, &[], &wanted);
}

#[test]
fn compressed_over_compressed_over_raw_reads_as_qemu_reads_it() {
    let scratch = Scratch::new();
    fs::write(scratch.path("base.raw"), mixture(MIB, 5)).unwrap();
    let options = ["-o", "cluster_size=4k", "-b", "base.raw", "-F", "raw"];
    let middle = scratch.create("qcow2", &options, "middle.qcow2", "");
    write_image(&middle, "qcow2", &["write -c -P 1 100k 300k", "write -P 2 160k 8k"]);
    let zstd = "compression_type=zstd,cluster_size=64k";
    let options = ["-o", zstd, "-b", "middle.qcow2", "-F", "qcow2"];
    let top = scratch.create("qcow2", &options, "top.qcow2", "");
    // Written over in part, a compressed cluster becomes a plain one of both contents.
    let commands = ["write -c -P 3 64k 64k", "write -c -P 4 640k 128k", "write -P 5 650k 1k"];
    write_image(&top, "qcow2", &commands);
    assert_attached_as_qemu(&scratch, &middle);
    assert_attached_as_qemu(&scratch, &top);
}

#[test]
fn snapshots_of_compressed_images_stand_beside_the_active_layer() {
    let scratch = Scratch::new();
    for cluster in ["8k", "64k"] {
        let option = format!("compression_type=zstd,cluster_size={cluster}");
        let image = converted(&scratch, "disk.qcow2", MIB, &["-O", "qcow2", "-o", &option]);
        let old = qemu_content(&scratch, &image, &[]);
        qemu_img(args!["snapshot", "-c", "old", &image]).ok();
        write_image(
            &image,
            "qcow2",
            &["discard 64k 128k", "write -c -P 3 64k 128k", "write -P 4 300k 100k"],
        );
        let new = qemu_content(&scratch, &image, &[]);
        assert!(old != new);
        let (active, snapshot) = (attach([&image]), attach(args!["-l", "old", &image]));
        for (device, wanted) in [(&active, &new), (&snapshot, &old)] {
            assert_same(&format!("{cluster}: {}", device.name), &device.bytes(), wanted);
            assert_random_reads(&device.path, wanted, 31);
        }
        // Each has a scratch file of its own.
        active.detach();
        assert_same("the snapshot alone", &snapshot.bytes(), &old);
        snapshot.detach();
        assert_nothing_left();
    }
}

#[test]
fn clusters_that_inflate_to_zeros_become_a_zero_segment() {
    let scratch = Scratch::new();
    let image = scratch.create("qcow2", &[], "disk.qcow2", "8M");
    write_image(
        &image,
        "qcow2",
        &["write -c -P 1 0 2M", "write -c -P 0 2M 4M", "write -c -P 2 6M 2M"],
    );
    let wanted = qemu_content(&scratch, &image, &[]);
    let device = attach([&image]);
    // Of all its devices: an inner one holds the image's own file.
    let tables = tool("dmsetup", ["table"]);
    let zeros: Vec<_> = tables.lines().filter(|line| line.trim_end().ends_with("zero")).collect();
    let [zeros] = zeros.as_slice() else { panic!("{tables}") };
    assert!(zeros.contains(": 4096 8192 zero"), "{tables}");
    assert_same("zeros between", &device.bytes(), &wanted);
    device.detach();
    assert_attached_is(&scratch, &image, &["--zero=loop"], &wanted);
}

#[test]
fn compressed_clusters_are_refused_on_demand() {
    let scratch = Scratch::new();
    let image = text(&scratch, "disk.qcow2", &[]);
    let said = imgdm(args!["attach", "--compressed=refuse", &image]).refused(76);
    assert!(said.contains("compressed") && said.contains("disk.qcow2"), "{said}");
    assert_nothing_left();
}

// --- The scratch file -----------------------------------------------------------------

#[test]
fn the_scratch_file_has_no_name_and_its_space_is_free_after_detach() {
    let scratch = Scratch::new();
    let disk = Scratch::on_disk();
    let tmpfs = Tmpfs::over(scratch.path("tmpfs"), 8 * MIB);
    let image = text(&scratch, "disk.qcow2", &[]);
    let wanted = qemu_content(&scratch, &image, &[]);
    for place in [disk.directory(), &tmpfs.place] {
        let before = free_bytes(place);
        let device = attach(into(place, &image));
        let taken = before - free_bytes(place);
        assert!((MIB..MIB + 64 * KIB).contains(&taken), "{}: {taken}", place.display());
        assert_eq!(fs::read_dir(place).unwrap().count(), 0);
        assert_same("the device", &device.bytes(), &wanted);
        assert_random_reads(&device.path, &wanted, 37);
        assert_no_process(place);
        device.detach();
        assert_eq!(free_bytes(place), before, "{}", place.display());
        assert_nothing_left();
    }
}

#[test]
fn attaching_again_inflates_nothing_and_list_shows_the_scratch_file() {
    let scratch = Scratch::new();
    let image = text(&scratch, "disk.qcow2", &[]);
    let attaching = || {
        let mut line = imgdm_command(args!["attach", &image]);
        run(line.env("IMGDM_FAULT", "inflate:fail").stdin(Stdio::null()))
    };
    // The fault is one that inflating meets.
    let said = attaching().refused(1);
    assert!(said.contains("fault injected after inflate"), "{said}");
    assert_nothing_left();

    let device = attach([&image]);
    assert_eq!(attaching().ok(), "/dev/mapper/disk\n");
    let listed = listed();
    assert_eq!(listed.len(), 1, "{listed:?}");
    let loops = listed[0]["loops"].as_array().unwrap();
    let roles: Vec<_> = loops.iter().filter_map(|each| each["role"].as_str()).collect();
    assert!(roles.contains(&"scratch") && roles.contains(&"image"), "{listed:?}");
    assert!(imgdm(["list"]).ok().contains("disk.qcow2"));
    device.detach();
}

/// What `plan` says is in the way of attaching: kind and message.
#[track_caller]
fn obstacles(arguments: &[std::ffi::OsString]) -> Vec<(String, String)> {
    let line = args!["plan", "--output=json"];
    let printed = imgdm(line.iter().chain(arguments)).ok();
    let plan: serde_json::Value = serde_json::from_str(&printed).unwrap();
    let all = plan["obstacles"].as_array().unwrap();
    assert_eq!(plan["attachable"], all.is_empty(), "{plan}");
    all.iter()
        .map(|each| {
            let text = |name: &str| each[name].as_str().unwrap().to_owned();
            (text("kind"), text("message"))
        })
        .collect()
}

/// Attaching with these places is refused before anything is built, and `plan` says why.
#[track_caller]
fn assert_no_place(image: &Path, places: &[std::ffi::OsString], words: &[&str]) {
    // Before anything is built, so that no fault is met.
    let mut line = imgdm_command(args!["attach"].iter().chain(places).chain(&args![image]));
    let ran = run(line.env("IMGDM_FAULT", "1:kill").stdin(Stdio::null()));
    let said = ran.refused(73);
    let words_and = |text: &str| words.iter().all(|word| text.contains(word));
    assert!(words_and(&said), "{places:?}: {said}");
    let obstacles = obstacles(&[places, &args![image]].concat());
    let [(kind, message)] = obstacles.as_slice() else { panic!("{places:?}: {obstacles:?}") };
    assert_eq!(kind, "no-scratch");
    assert!(words_and(message), "{places:?}: {message}");
}

#[test]
fn a_directory_in_which_no_scratch_file_can_be_is_refused_by_name_before_the_start() {
    let scratch = Scratch::new();
    let image = text(&scratch, "disk.qcow2", &[]);
    let small = Tmpfs::over(scratch.path("small"), MIB / 2);
    let full = Tmpfs::over(scratch.path("full"), 8 * MIB);
    tool("mount", args!["-o", "remount,nr_inodes=2", &full.place]);
    fs::write(full.place.join("last"), "").unwrap();
    let bound = scratch.path("bound");
    fs::create_dir(&bound).unwrap();
    tool("mount", args!["--bind", scratch.directory(), &bound]);
    tool("mount", args!["-o", "remount,bind,ro", &bound]);
    let (missing, file) = (scratch.path("missing"), image.clone());
    let (proc, sys) = (PathBuf::from("/proc"), PathBuf::from("/sys/kernel"));
    let result = std::panic::catch_unwind(|| {
        for (place, why) in [
            (&small.place, "free"),
            (&full.place, "No space left"),
            (&bound, "Read-only"),
            (&missing, "No such file"),
            (&file, "Not a directory"),
            (&proc, "no scratch file can be made"),
            (&sys, "no scratch file can be made"),
        ] {
            let words = [place.to_str().unwrap(), why];
            assert_no_place(&image, &args!["--scratch-dir", place], &words);
        }
        for (place, why) in [
            (&small.place, "free"),
            (&full.place.join("a/b"), "No space left"),
            (&bound.join("cache"), "Read-only"),
            (&file, "not one"),
            (&proc.join("cache"), "file can be"),
            (&sys.join("cache"), "file can be"),
        ] {
            // By its own name, or that of the directory which it would be made in.
            let there = place.ancestors().find(|path| path.exists()).unwrap();
            let words = [there.to_str().unwrap(), why];
            assert_no_place(&image, &args!["--compressed=cache", "--cache-dir", place], &words);
        }
        let others = scratch.path("others");
        fs::create_dir(&others).unwrap();
        let line = args!["--compressed=cache", "--cache-dir", &others];
        tool("chmod", args!["0777", &others]);
        assert_no_place(&image, &line, &[others.to_str().unwrap(), "others can write", "777"]);
        tool("chmod", args!["0755", &others]);
        tool("chown", args!["1000", &others]);
        assert_no_place(&image, &line, &[others.to_str().unwrap(), "user 1000"]);
        assert_eq!(fs::read_dir(&others).unwrap().count(), 0);
    });
    tool("umount", [&bound]);
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
    assert_nothing_left();
}

#[test]
fn without_a_writable_var_tmp_the_scratch_file_is_in_run_and_counted_as_memory() {
    let scratch = Scratch::new();
    let image = text(&scratch, "disk.qcow2", &[]);
    let wanted = qemu_content(&scratch, &image, &[]);
    let plan = || -> serde_json::Value {
        let printed = imgdm(args!["plan", "--output=json", &image]).ok();
        serde_json::from_str(&printed).unwrap()
    };
    let usual = plan();
    assert_eq!(usual["scratch_dir"]["path"], "/var/tmp", "{usual}");
    let _covered = Tmpfs::read_only("/var/tmp");
    let plan = plan();
    assert_eq!(plan["scratch_dir"]["path"], "/run", "{plan}");
    assert_eq!(plan["scratch_in_memory"], true, "{plan}");
    assert!(plan["kernel_bytes"].as_u64().unwrap() >= 1 << 20, "{plan}");
    let before = free_bytes(Path::new("/run"));
    let device = attach([&image]);
    assert!(before - free_bytes(Path::new("/run")) >= MIB);
    assert_same("in /run", &device.bytes(), &wanted);
    device.detach();
    assert_eq!(free_bytes(Path::new("/run")), before);
}

// --- Damage ---------------------------------------------------------------------------

/// Attaches an image of 1 MiB whose cluster at 64 KiB times `cluster` can't be had, each
/// way that --on-error knows; elsewhere it reads as `wanted`.
#[track_caller]
fn assert_one_lost(scratch: &Scratch, image: &Path, cluster: u64, wanted: &[u8], words: &[&str]) {
    let place = Tmpfs::over(scratch.path("place"), 8 * MIB);
    let before = free_bytes(&place.place);
    let (start, end) = (cluster * 64 * KIB, (cluster + 1) * 64 * KIB);
    let attaching = |option: &str| {
        let line = [&args!["attach", option][..], &into(&place.place, image)].concat();
        imgdm(line)
    };
    let said = attaching("--on-error=refuse").refused(65);
    for word in words.iter().copied().chain([&format!("{start:#x}")[..], "disk.qcow2"]) {
        assert!(said.contains(word), "no '{word}' in: {said}");
    }
    assert_nothing_left();
    assert_eq!(free_bytes(&place.place), before);

    let (from, to) = (usize::try_from(start).unwrap(), usize::try_from(end).unwrap());
    let mut zeroed = wanted.to_owned();
    zeroed[from..to].fill(0);
    for option in ["--on-error=zero", "--on-error=error-target"] {
        let ran = attaching(option);
        let mut listing = ran.stderr.lines().filter(|line| line.contains("guest range"));
        let listed = listing.next().unwrap_or_else(|| panic!("{ran}"));
        for word in [&format!("{start:#x}")[..], &format!("{end:#x}"), "disk.qcow2"] {
            assert!(listed.contains(word), "no '{word}' in: {listed}");
        }
        assert_eq!(listing.next(), None, "{ran}");
        assert_eq!(ran.ok(), "/dev/mapper/disk\n");
        let device = Device { name: "disk".into(), path: "/dev/mapper/disk".into() };
        if option == "--on-error=zero" {
            assert_same(option, &device.bytes(), &zeroed);
        } else {
            for cluster in 0..16 {
                let read = read_direct(&device.path, cluster * 64 * KIB, 65536);
                let at = usize::try_from(cluster * 64 * KIB).unwrap();
                if at == from {
                    assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::EIO));
                } else {
                    assert_same(option, &read.unwrap(), &wanted[at..at + 65536]);
                }
            }
            // To the sector.
            read_direct(&device.path, start, 512).unwrap_err();
            read_direct(&device.path, end - 512, 512).unwrap_err();
        }
        device.detach();
        assert_nothing_left();
        assert_eq!(free_bytes(&place.place), before);
    }
}

#[test]
fn a_stream_that_does_not_inflate_is_named_or_read_as_zeros_or_an_error() {
    let scratch = Scratch::new();
    for compression in ["zlib", "zstd"] {
        let option = format!("compression_type={compression}");
        let image = text(&scratch, "disk.qcow2", &["-o", &option]);
        let wanted = qemu_content(&scratch, &image, &[]);
        let (host, end) = stream(&image, 5);
        // Neither a kind of block that deflate knows nor a frame of zstd.
        patch(&image, host, &[0xff]);
        let words = [&format!("{host:#x}")[..], &format!("{end:#x}"), "inflate"];
        assert_one_lost(&scratch, &image, 5, &wanted, &words);
        fs::remove_file(image).unwrap();
    }
}

#[test]
fn a_file_cut_off_in_its_last_stream_is_refused_or_lacks_that_cluster_alone() {
    let scratch = Scratch::new();
    let image = text(&scratch, "disk.qcow2", &[]);
    let wanted = qemu_content(&scratch, &image, &[]);
    let (host, _) = stream(&image, 15);
    File::options().write(true).open(&image).unwrap().set_len(host + 700).unwrap();
    assert_one_lost(&scratch, &image, 15, &wanted, &[&format!("{host:#x}")]);
}

// --- In the middle --------------------------------------------------------------------

/// An image of few bytes that takes two batches to inflate, which are of 64 MiB.
pub(crate) fn long(scratch: &Scratch) -> PathBuf {
    let options = ["-o", "compression_type=zstd,cluster_size=2M"];
    let image = scratch.create("qcow2", &options, "long.qcow2", "100M");
    write_image(&image, "qcow2", &["write -c -P 7 0 100M"]);
    image
}

/// Attaching it, with that fault after the first batch.
fn inflating(image: &Path, place: &Path, fault: &str) -> Running {
    let mut line = imgdm_command([&args!["attach"][..], &into(place, image)].concat());
    start(line.env("IMGDM_FAULT", format!("inflate:{fault}")).stdin(Stdio::null()))
}

#[test]
fn killed_or_stopped_in_the_middle_of_inflating_attach_leaves_nothing_and_loses_no_space() {
    let scratch = Scratch::new();
    let disk = Scratch::on_disk();
    let tmpfs = Tmpfs::over(scratch.path("tmpfs"), 128 * MIB);
    let image = long(&scratch);
    let ways = [
        ("kill", None, libc::SIGKILL),
        ("term", None, libc::SIGTERM),
        ("stop", Some(Signal::SIGINT), libc::SIGINT),
        ("stop", Some(Signal::SIGKILL), libc::SIGKILL),
    ];
    for place in [&tmpfs.place, disk.directory()] {
        let before = free_bytes(place);
        // All ways on tmpfs; on a disk, whose writes take long, killed alone.
        let count = if place == disk.directory() { 1 } else { ways.len() };
        for (fault, signal, wanted) in ways.into_iter().rev().take(count) {
            let attaching = inflating(&image, place, fault);
            if let Some(signal) = signal {
                wait_for("it to stop", || attaching.is_stopped());
                // In the middle: some is written, and nothing is built yet.
                let taken = before - free_bytes(place);
                assert!((MIB * 60..MIB * 80).contains(&taken), "{taken} bytes are taken");
                assert_eq!(our_devices(), [""; 0]);
                let ran = qemu_io(&image, "qcow2", &["write -P 1 0 64k"]);
                assert!(ran.stderr.contains("lock"), "{ran}");
                attaching.signal(signal);
                if signal != Signal::SIGKILL {
                    attaching.signal(Signal::SIGCONT);
                }
            }
            let ran = attaching.finish();
            assert_eq!(ran.signal(), Some(wanted), "{fault}: {ran}");
            assert_eq!(ran.stdout, "", "{fault}");
            assert_nothing_left();
            wait_for("the space to be free again", || free_bytes(place) == before);
            assert_eq!(fs::read_dir(place).unwrap().count(), 0);
            write_image(&image, "qcow2", &["discard 0 2M", "write -c -P 7 0 2M"]);
        }
    }
    // And none of it stands in the way of another run.
    let device = attach(into(&tmpfs.place, &image));
    assert_eq!(read_direct(&device.path, 90 * MIB, 4096).unwrap(), vec![7; 4096]);
    device.detach();
}

#[test]
fn a_file_system_that_fills_up_while_inflating_is_an_error_that_leaves_nothing() {
    let scratch = Scratch::new();
    let tmpfs = Tmpfs::over(scratch.path("tmpfs"), 128 * MIB);
    let image = long(&scratch);
    let attaching = inflating(&image, &tmpfs.place, "stop");
    wait_for("it to stop", || attaching.is_stopped());
    let other = tmpfs.place.join("other");
    tool("fallocate", args!["-l", (free_bytes(&tmpfs.place) - 8 * MIB).to_string(), &other]);
    attaching.signal(Signal::SIGCONT);
    let said = attaching.finish().refused(73);
    assert!(said.contains("full") && said.contains(tmpfs.place.to_str().unwrap()), "{said}");
    assert_nothing_left();
    fs::remove_file(other).unwrap();
    assert!(free_bytes(&tmpfs.place) > 127 * MIB);
}

#[test]
fn an_image_that_is_written_to_while_it_is_inflated_is_refused_but_not_where_that_is_wanted() {
    let scratch = Scratch::new();
    let tmpfs = Tmpfs::over(scratch.path("tmpfs"), 128 * MIB);
    let image = long(&scratch);
    let end = fs::metadata(&image).unwrap().len();
    for share in [false, true] {
        let mut line = [&args!["attach"][..], &into(&tmpfs.place, &image)].concat();
        line.extend(share.then(|| "--force-share".into()));
        let mut line = imgdm_command(line);
        let attaching = start(line.env("IMGDM_FAULT", "inflate:stop").stdin(Stdio::null()));
        for batch in 0..2 {
            wait_for("it to stop", || attaching.is_stopped());
            if batch == 0 {
                // By one who knows nothing of QEMU's locks.
                patch(&image, end - 1, &[0]);
            }
            attaching.signal(Signal::SIGCONT);
        }
        let ran = attaching.finish();
        if share {
            assert_eq!(ran.ok(), "/dev/mapper/long\n");
            imgdm(args!["detach", &image]).ok();
        } else {
            let said = ran.refused(75);
            assert!(said.contains("long.qcow2: the file was written to"), "{said}");
        }
        assert_nothing_left();
    }
    assert!(free_bytes(&tmpfs.place) > 127 * MIB);
}
