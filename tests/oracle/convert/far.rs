//! Large disks with little in them: offsets past 4 GiB and 2 TiB, tables of many entries.

use std::time::{Duration, Instant};

use super::{Input, Output, allocation, good, ours, remove, same_allocation, theirs};
use crate::check::strings;
use crate::common::images::scratch_dir;
use crate::common::qemu;

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

const INPUT: Input = Input { file: "in.qcow2", format: "qcow2", snapshot: None };

/// The longest that an almost empty disk may take.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn data_past_4_gib_and_2_tib_goes_where_it_belongs() {
    let dir = scratch_dir("convert-far").unwrap();
    let dir = dir.path();
    let size = 3 * TIB + 512;
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "in.qcow2"];
    qemu::img(dir, &[&create[..], &[size.to_string().as_str()]].concat()).unwrap();
    let places = [0, 4 * GIB - 4096, 5 * GIB, 2 * TIB - 1024, 2 * TIB + GIB, size - 512];
    let commands: Vec<_> =
        (1..).zip(places).map(|(n, at)| format!("write -P {n} {at} 512")).collect();
    qemu::io(dir, "qcow2", "in.qcow2", &commands).unwrap();
    for output in [
        Output::of("raw", &[], &[]),
        Output::of("qcow2", &[], &[]),
        Output::of("qcow2", &["cluster_size=2M", "extended_l2=on"], &[]),
        Output::of("qcow2", &["compat=0.10"], &["-c"]),
        Output::of("qcow2", &["refcount_bits=64", "cluster_size=16k"], &[]),
        Output::of("qcow2", &["data_file=@.data"], &[]),
    ] {
        let start = Instant::now();
        ours(dir, &INPUT, &output, &[], "ours").unwrap();
        assert!(start.elapsed() < PATIENCE, "{output:?} took {:?}", start.elapsed());
        theirs(dir, &INPUT, &output, &[], "theirs").unwrap();
        same_allocation(dir, (&INPUT, &output), false, "ours", "theirs").unwrap();
        super::clean(dir, output.format, "ours").unwrap();
        super::same_disk(dir, ("qcow2", "in.qcow2"), (output.format, "ours")).unwrap();
        remove(dir, "ours");
        remove(dir, "theirs");
    }
    // As an overlay: of its own content over an empty base of that size.
    qemu::img(dir, &["create", "-q", "-f", "qcow2", "base", &size.to_string()]).unwrap();
    qemu::img(dir, &["rebase", "-q", "-u", "-b", "base", "-F", "qcow2", "in.qcow2"]).unwrap();
    let more = strings(&["-B", "base", "-F", "qcow2"]);
    let output = Output::of("qcow2", &["cluster_size=2M"], &[]);
    ours(dir, &INPUT, &output, &more, "ours").unwrap();
    assert_eq!(
        allocation(dir, "qcow2", "ours").unwrap(),
        allocation(dir, "qcow2", "in.qcow2").unwrap()
    );
    super::same_disk(dir, ("qcow2", "in.qcow2"), ("qcow2", "ours")).unwrap();
}

#[test]
fn a_disk_too_large_for_the_format_is_refused_before_anything_is_made() {
    let dir = scratch_dir("convert-far").unwrap();
    let dir = dir.path();
    std::fs::File::create(dir.join("in.raw")).unwrap().set_len(8 * TIB).unwrap();
    let refused = |args: &[&str]| {
        let line = [&["convert", "-f", "raw"], args, &["in.raw", "out"]].concat();
        let ran = crate::imgdm::imgdm(dir, &line).unwrap();
        crate::imgdm::refused(&ran, &[64, 73, 76], &["large"]).unwrap();
        assert_eq!(super::listing(dir), ["in.raw"]);
    };
    refused(&["-O", "qcow2", "-o", "cluster_size=512"]);
    refused(&["-O", "qcow2", "-o", "cluster_size=2k"]);
    // What qemu-img takes is taken.
    for options in ["cluster_size=64k", "cluster_size=16k,extended_l2=on", "cluster_size=4k"] {
        let name = options.replace([',', '='], "-");
        let line = ["convert", "-f", "raw", "-O", "qcow2", "-o", options, "in.raw", &name];
        crate::imgdm::imgdm(dir, &line).unwrap().ok().unwrap();
        qemu::img(dir, &["check", "-q", "-f", "qcow2", &name]).unwrap();
        qemu::img(dir, &["create", "-q", "-f", "qcow2", "-o", options, "theirs", "8T"]).unwrap();
        remove(dir, "theirs");
        remove(dir, &name);
    }
}

#[test]
fn many_rows_of_single_sectors_are_converted() {
    let dir = scratch_dir("convert-far").unwrap();
    let dir = dir.path();
    // Every second sector of 4 MiB.
    let mut disk = vec![0u8; 4 << 20];
    for (number, sector) in (0u32..).zip(disk.chunks_mut(512)) {
        if number % 2 == 0 {
            sector.fill(u8::try_from(1 + number % 255).unwrap());
        }
    }
    std::fs::write(dir.join("expected.raw"), &disk).unwrap();
    let options = ["convert", "-f", "raw", "-O", "qcow2", "-S", "512", "-o", "cluster_size=512"];
    qemu::img(dir, &[&options[..], &["expected.raw", "in.qcow2"]].concat()).unwrap();
    for output in [
        Output::of("raw", &[], &[]),
        Output::of("raw", &[], &["-S", "512"]),
        Output::of("qcow2", &[], &[]),
        Output::of("qcow2", &["cluster_size=512"], &["-S", "512"]),
        Output::of("qcow2", &["cluster_size=16k", "extended_l2=on"], &["-S", "512"]),
        Output::of("qcow2", &["cluster_size=2M", "extended_l2=on"], &["-c"]),
        Output::of("qcow", &[], &["-S", "512"]),
    ] {
        ours(dir, &INPUT, &output, &[], "ours").unwrap();
        good(dir, output.format, "ours").unwrap();
        theirs(dir, &INPUT, &output, &[], "theirs").unwrap();
        same_allocation(dir, (&INPUT, &output), false, "ours", "theirs")
            .unwrap_or_else(|error| panic!("{output:?}: {error}"));
        remove(dir, "ours");
        remove(dir, "theirs");
    }
}
