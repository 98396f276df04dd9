//! A chain of a thousand images: a thousand loop devices under one device.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::guest::*;

const CLUSTER: u64 = 4 * KIB;
const SIZE: u64 = 2 * MIB;

fn be64(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: u64, value: &[u8]) {
    let at = usize::try_from(at).unwrap();
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Images l0001.qcow2 to lNNNN.qcow2 over l0000.raw, each with one cluster of its own. They are
/// copies of one that QEMU wrote, with that cluster moved. Gives the active layer, and what the
/// disk holds.
fn chain(directory: &Path, overlays: u64) -> (PathBuf, Vec<u8>) {
    let mut content = Random(overlays).bytes(usize::try_from(SIZE).unwrap());
    fs::write(directory.join("l0000.raw"), &content).unwrap();
    let model = directory.join("model");
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096"];
    let mut line = command("qemu-img", create);
    line.args(["-F", "raw", "-b", "l0000.raw"]).arg(&model).current_dir(directory);
    run(&mut line).ok();
    write_image(&model, "qcow2", &["write -P 1 0 4k"]);
    let model = fs::read(model).unwrap();
    let table = be64(&model, be64(&model, 40)) & !(1 << 63);
    let entry = be64(&model, table);
    let (name_at, name_format) = (be64(&model, 8), model.windows(3).position(|w| w == b"raw"));
    for level in 1..=overlays {
        let mut image = model.clone();
        let guest = level * 7 % (SIZE / CLUSTER);
        put(&mut image, table, &[0; 8]);
        put(&mut image, table + guest * 8, &entry.to_be_bytes());
        let mut bytes = vec![0; usize::try_from(CLUSTER).unwrap()];
        put(&mut bytes, 8, &level.to_be_bytes());
        put(&mut image, entry & !(1 << 63), &bytes);
        put(&mut content, guest * CLUSTER, &bytes);
        if level > 1 {
            // The name is followed by what else is in its cluster, which nobody needs.
            let name = format!("l{:04}.qcow2", level - 1);
            put(&mut image, name_at, name.as_bytes());
            put(&mut image, 16, &u32::try_from(name.len()).unwrap().to_be_bytes());
            let format_at = u64::try_from(name_format.unwrap()).unwrap();
            put(&mut image, format_at - 4, &5u32.to_be_bytes());
            put(&mut image, format_at, b"qcow2");
        }
        fs::write(directory.join(format!("l{level:04}.qcow2")), image).unwrap();
    }
    (directory.join(format!("l{overlays:04}.qcow2")), content)
}

/// Bytes of memory that the kernel itself has in use.
fn kernel_memory() -> i64 {
    drop_caches();
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let of = |name: &str| -> i64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or(" 0 kB");
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
    };
    (of("MemTotal") - of("MemFree") - of("Cached") - of("Buffers") - of("AnonPages")) * 1024
}

#[test]
fn a_chain_of_a_thousand_images_is_attached_read_and_detached_in_bounded_time() {
    let scratch = Scratch::new();
    let mut report = String::new();
    let mut attaching = Vec::new();
    for layers in [250, 1000] {
        let directory = scratch.directory().join(layers.to_string());
        fs::create_dir(&directory).unwrap();
        let (image, content) = chain(&directory, layers - 1);
        let words = [OsStr::new("plan"), OsStr::new("--output=json"), image.as_os_str()];
        let plan: serde_json::Value = serde_json::from_str(&imgdm(words).ok()).unwrap();
        let before = kernel_memory();
        let mut timed = |what: &str, each: &mut dyn FnMut()| {
            let start = Instant::now();
            each();
            let time = start.elapsed();
            writeln!(report, "{layers} layers: {what} {time:?}").unwrap();
            time
        };
        let mut device = None;
        attaching.push(timed("attach", &mut || device = Some(attach([&image]))));
        let device = device.unwrap();
        let taken = kernel_memory() - before;
        let estimated = plan["kernel_bytes"].as_i64().unwrap();
        assert_same(&device.name, &device.bytes(), &content);
        timed("list", &mut || drop(imgdm(["list"]).ok()));
        timed("verify", &mut || drop(imgdm(["verify", &device.name]).ok()));
        timed("detach", &mut || device.detach());
        writeln!(report, "{layers} layers: memory {taken}, estimated {estimated}").unwrap();
        // What is counted includes what else the kernel does meanwhile.
        assert!(taken < 2 * estimated && estimated < 4 * taken, "{report}");
        fs::remove_dir_all(&directory).unwrap();
    }
    print!("{report}");
    // Four times the layers, and some for what a kernel does that looks at every loop.
    assert!(attaching[1] < attaching[0] * 10, "{report}");
}
