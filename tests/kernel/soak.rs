//! Many times, many at once, and several at a time: nothing leaks, nothing slows down, and
//! of those who race one wins.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::args;
use crate::guest::*;

/// How many times an image is attached and detached, unless IMGDM_SOAK says otherwise.
const CYCLES: u32 = 40;
/// How often who races does, and as many times more as there are more cycles.
const ROUNDS: u32 = 6;
/// What a cycle may leave in the kernel's memory: less than a page, which is the least that a
/// device, a queue or a thread would.
const BYTES_A_CYCLE: u64 = 1024;
/// What the kernel's memory goes up and down by itself.
const NOISE: u64 = 512 * KIB;

fn cycles() -> u32 {
    let wanted = std::env::var("IMGDM_SOAK").ok().and_then(|text| text.parse().ok());
    wanted.unwrap_or(CYCLES)
}

fn rounds() -> u32 {
    (cycles() / CYCLES).max(1) * ROUNDS
}

/// A line of /proc/meminfo, in bytes.
fn memory(what: &str) -> u64 {
    let all = fs::read_to_string("/proc/meminfo").unwrap();
    let line = all.lines().find_map(|line| line.strip_prefix(what)?.strip_prefix(':'));
    let number = line.unwrap_or_else(|| panic!("no {what} in {all}")).trim();
    number.trim_end_matches(" kB").parse::<u64>().unwrap() * KIB
}

/// What could leak, counted.
#[derive(Clone, Copy, Debug)]
struct Held {
    unreclaimable: u64,
    vmalloc: u64,
    stacks: u64,
    files: u64,
    processes: usize,
    loop_nodes: usize,
}

impl Held {
    fn now() -> Self {
        drop_caches();
        // Devices and their queues are freed after a grace period or by a worker.
        std::thread::sleep(Duration::from_millis(300));
        drop_caches();
        let files = fs::read_to_string("/proc/sys/fs/file-nr").unwrap();
        let nodes = fs::read_dir("/sys/block").unwrap().flatten();
        let is_loop = |name: OsString| name.to_string_lossy().starts_with("loop");
        Self {
            unreclaimable: memory("SUnreclaim"),
            vmalloc: memory("VmallocUsed"),
            stacks: memory("KernelStack"),
            files: files.split_whitespace().next().unwrap().parse().unwrap(),
            processes: processes().len(),
            loop_nodes: nodes.filter(|entry| is_loop(entry.file_name())).count(),
        }
    }
}

/// A fresh overlay over a fragmented image, of which some is zeros: loop devices over files
/// and over zeros, an inner device and the top one.
fn image(scratch: &Scratch, name: &str) -> PathBuf {
    let base = format!("{name}-base.qcow2");
    let path = scratch.create("qcow2", &[], &base, "4M");
    write_image(&path, "qcow2", &["write -P 2 2M 64k", "write -P 1 0 64k", "write -z 128k 64k"]);
    let options = ["-b", &base, "-F", "qcow2"];
    scratch.create("qcow2", &options, &format!("{name}.qcow2"), "")
}

#[test]
fn attached_and_detached_many_times_nothing_leaks() {
    let cycles = cycles();
    let scratch = Scratch::new();
    let image = image(&scratch, "disk");
    let cycle = || {
        attach([&image]).detach();
    };
    for _ in 0..20 {
        cycle();
    }
    let before = Held::now();
    let start = Instant::now();
    for round in 0..cycles {
        cycle();
        if round % 50 == 0 {
            assert_nothing_left();
        }
    }
    let took = start.elapsed();
    assert_nothing_left();
    let after = Held::now();
    println!("{cycles} cycles in {took:?}; before: {before:?}; after: {after:?}");
    let allowed = NOISE + u64::from(cycles) * BYTES_A_CYCLE;
    for (what, before, after) in [
        ("slab", before.unreclaimable, after.unreclaimable),
        ("vmalloc", before.vmalloc, after.vmalloc),
        ("stacks", before.stacks, after.stacks),
    ] {
        assert!(after <= before + allowed, "{what}: {before} bytes, then {after}");
    }
    assert!(after.files <= before.files + 32, "{before:?} {after:?}");
    assert!(after.processes <= before.processes + 4, "{before:?} {after:?}");
    assert!(after.loop_nodes <= before.loop_nodes, "{before:?} {after:?}");
}

/// How long something takes, in runs of an imgdm that reads one image: whatever else this
/// machine does meanwhile, it does to both.
fn cost(image: &Path, work: impl FnOnce()) -> f64 {
    let time = |work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    let mut read = || drop(imgdm(args!["info", image]).ok());
    let before = time(&mut read);
    let mut work = Some(work);
    let took = time(&mut || work.take().into_iter().for_each(|work| work()));
    took / (before + time(&mut read)) * 2.0
}

/// The most memory that `imgdm list` takes, in KiB.
fn list_peak(wanted: usize) -> u64 {
    let ran = run(command("busybox", ["time", "-v"]).arg(imgdm_path()).args(["list"]));
    assert_eq!(ran.code(), Some(0), "{ran}");
    assert_eq!(ran.stdout.lines().count(), wanted + 1, "a line each, and one for their heads");
    let line = ran.stderr.lines().find(|line| line.contains("Maximum resident")).unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

fn median(costs: &[f64]) -> f64 {
    let mut costs = costs.to_vec();
    costs.sort_by(f64::total_cmp);
    costs[costs.len() / 2]
}

#[test]
fn many_at_once_are_no_slower_each_and_leave_nothing() {
    let count = if cycles() > CYCLES { 200 } else { 40 };
    // So many are measured, the first and the last.
    let some = count / 8;
    let scratch = Scratch::new();
    let first = scratch.create("qcow2", &[], "a0.qcow2", "4M");
    write_image(&first, "qcow2", &["write -P 2 2M 64k", "write -P 1 0 64k"]);
    let before = Held::now();
    let (mut costs, mut lists) = (Vec::new(), Vec::new());
    for number in 0..count {
        let image = scratch.path(&format!("a{number}.qcow2"));
        if number > 0 {
            fs::copy(&first, &image).unwrap_or_default();
        }
        if (some..count - some).contains(&number) {
            attach([&image]);
        } else {
            costs.push(cost(&image, || drop(attach([&image]))));
        }
        if [some, count].contains(&(number + 1)) {
            let all: Vec<_> = (0..5).map(|_| cost(&image, || drop(imgdm(["list"]).ok()))).collect();
            lists.push((median(&all), list_peak(number + 1)));
        }
    }
    let during = Held::now();
    let (early, late) = (median(&costs[..some]), median(&costs[some..]));
    let each = during.unreclaimable.saturating_sub(before.unreclaimable) / count as u64;
    println!("attach: {early:.1} runs with few, {late:.1} with {count}; {each} bytes of slab each");
    println!("list of {some} and {count}, in runs, and its peak in KiB: {lists:.1?}");
    assert!(late < early * 4.0, "{early}, then {late}");
    let [(short, little), (long, much)] = lists[..] else { panic!("{lists:?}") };
    // Eight times as many, and not sixty-four times the time.
    assert!(long < short * 20.0, "{short}, then {long}");
    assert!(much < little + 2048, "{little} KiB, then {much} KiB");
    // Of the four bytes that are locked three are next to each other.
    assert_eq!(locks().len(), count * 2);
    let mut random = Random(200);
    for _ in 0..10 {
        let path = format!("/dev/mapper/a{}", random.below(count as u64));
        assert_eq!(read_direct(Path::new(&path), 2 * MIB, 4096).unwrap(), [2; 4096]);
    }
    let start = Instant::now();
    imgdm(["detach", "--all"]).ok();
    println!("detach --all: {:?}", start.elapsed());
    assert_nothing_left();
    let after = Held::now();
    println!("before: {before:?}, during: {during:?}, after: {after:?}");
    assert!(after.processes <= before.processes + 4, "{before:?} {after:?}");
    // Free loop devices stay, as the driver has it, with their queues of about 48 KiB, and are
    // used again: leaks of less than that are found by the many times one by one.
    let nodes = (after.loop_nodes - before.loop_nodes) as u64;
    let allowed = before.unreclaimable + 2 * NOISE + nodes * 64 * KIB;
    assert!(after.unreclaimable <= allowed, "{before:?} {after:?}");
}

/// Starts all lines at once and gives how each ended.
fn at_once(lines: &[Vec<OsString>]) -> Vec<Ran> {
    let start_one = |line: &Vec<OsString>| start(imgdm_command(line).stdin(Stdio::null()));
    let running: Vec<_> = lines.iter().map(start_one).collect();
    running.into_iter().map(Running::finish).collect()
}

#[test]
fn of_those_who_attach_one_image_at_once_all_get_the_one_device() {
    let scratch = Scratch::new();
    let image = image(&scratch, "disk");
    for round in 0..rounds() {
        let lines = vec![args!["attach", &image].to_vec(); 4];
        for ran in at_once(&lines) {
            assert_eq!(ran.ok(), "/dev/mapper/disk\n", "round {round}");
        }
        assert_eq!(listed().len(), 1);
        let tops = dm_devices().into_iter().filter(|(name, _)| name == "disk").count();
        assert_eq!(tops, 1);
        imgdm(["detach", "disk"]).ok();
        assert_nothing_left();
    }
}

#[test]
fn of_those_who_want_one_name_for_their_own_images_one_wins_and_the_others_say_so() {
    let scratch = Scratch::new();
    let images: Vec<_> = (0..4).map(|number| image(&scratch, &format!("image{number}"))).collect();
    for round in 0..rounds() {
        let lines: Vec<_> =
            images.iter().map(|image| args!["attach", "--name=same", image].to_vec()).collect();
        let mut winners = 0;
        for ran in at_once(&lines) {
            if ran.code() == Some(0) {
                assert_eq!(ran.stdout, "/dev/mapper/same\n", "round {round}");
                winners += 1;
            } else {
                let said = ran.refused(73);
                assert!(said.contains("'same' is taken by an imgdm device of"), "{said}");
            }
        }
        assert_eq!(winners, 1, "round {round}");
        imgdm(["detach", "same"]).ok();
        assert_nothing_left();
    }
}

#[test]
fn attach_and_detach_at_once_end_well_or_say_why_not() {
    let scratch = Scratch::new();
    let image = image(&scratch, "disk");
    for round in 0..rounds() {
        let attach_line = args!["attach", &image].to_vec();
        let lines = [
            attach_line.clone(),
            args!["detach", "disk"].to_vec(),
            attach_line,
            args!["detach", &image].to_vec(),
        ];
        for (ran, line) in at_once(&lines).into_iter().zip(&lines) {
            match (ran.code(), line[0].to_str()) {
                (Some(0), Some("attach")) => assert_eq!(ran.stdout, "/dev/mapper/disk\n"),
                (Some(0), Some("detach")) => {}
                (Some(66), Some("detach")) => assert!(ran.stderr.contains("attached"), "{ran}"),
                _ => panic!("round {round}: {ran}"),
            }
        }
        let attached = listed();
        assert!(attached.len() <= 1, "{attached:?}");
        imgdm(["detach", "--if-attached", "disk"]).ok();
        assert_nothing_left();
    }
}

#[test]
fn what_a_killed_attach_has_left_is_in_nobodys_way() {
    let scratch = Scratch::new();
    let image = image(&scratch, "disk");
    let mut random = Random(77);
    for round in 0..3 * rounds() {
        let killed = start(imgdm_command(args!["attach", &image]).stdin(Stdio::null()));
        std::thread::sleep(Duration::from_millis(random.below(40)));
        killed.signal(nix::sys::signal::Signal::SIGKILL);
        // At once, whatever is on its way out.
        for ran in at_once(&vec![args!["attach", &image].to_vec(); 2]) {
            assert_eq!(ran.ok(), "/dev/mapper/disk\n", "round {round}");
        }
        killed.finish();
        imgdm(["detach", "disk"]).ok();
        assert_nothing_left_soon();
    }
}
