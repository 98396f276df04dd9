//! Every option of `-o`, and those that can't be.

use std::path::Path;

use super::{Input, Output, check_copy, clean, described, listing, ours, same_content};
use crate::check::strings;
use crate::common::images::scratch_dir;
use crate::common::process::Outcome;
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::imgdm::{imgdm, refused};

const INPUT: Input = Input { file: "in.qcow2", format: "qcow2", snapshot: None };

/// 5 MiB and 3 sectors, of every kind of cluster.
fn make_input(dir: &Path) -> Outcome {
    let size = ((5 << 20) + 3 * 512).to_string();
    qemu::img(dir, &["create", "-q", "-f", "qcow2", "in.qcow2", &size])?;
    let commands = [
        "write -P 1 0 1000k",
        "write -s @PATTERNS@/p1 1M 200k",
        "write -z 1200k 300k",
        "write -P 7 2M 4k",
        "write -P 0 3M 300k",
        "write -s @PATTERNS@/p2 5M 1k",
    ];
    let patterns = crate::common::images::Recipe::pattern(0)?;
    let patterns = patterns.parent().unwrap().to_string_lossy().into_owned();
    let commands = commands.map(|command| command.replace("@PATTERNS@", &patterns));
    qemu::io(dir, "qcow2", "in.qcow2", &commands)?;
    INPUT.expected(dir)
}

/// Each of them alone, and some with another.
const OPTIONS: [(&str, &str); 41] = [
    ("compat=0.10", ""),
    ("compat=v2", ""),
    ("compat=1.1", ""),
    ("compat=v3", ""),
    ("cluster_size=512", ""),
    ("cluster_size=1024", ""),
    ("cluster_size=4k", ""),
    ("cluster_size=64K", ""),
    ("cluster_size=1M", ""),
    ("cluster_size=2097152", ""),
    ("cluster_size=2M", "-c"),
    ("extended_l2=on", ""),
    ("extended_l2=on,cluster_size=16k", ""),
    ("extended_l2=on,cluster_size=2M", ""),
    ("extended_l2=on", "-c"),
    ("extended_l2=off", ""),
    ("refcount_bits=1", ""),
    ("refcount_bits=2", ""),
    ("refcount_bits=4,cluster_size=512", ""),
    ("refcount_bits=8", ""),
    ("refcount_bits=16,compat=0.10", ""),
    ("refcount_bits=32", ""),
    ("refcount_bits=64,cluster_size=512", ""),
    ("lazy_refcounts=on", ""),
    ("lazy_refcounts=off", ""),
    ("compression_type=zlib", "-c"),
    ("compression_type=zstd", "-c"),
    ("compression_type=zstd", ""),
    ("compression_type=zlib,compat=0.10", "-c"),
    ("preallocation=off", ""),
    ("preallocation=metadata", ""),
    ("preallocation=falloc", ""),
    ("preallocation=full", ""),
    ("preallocation=metadata,cluster_size=512", ""),
    ("preallocation=metadata,extended_l2=on", ""),
    ("preallocation=metadata,compat=0.10", ""),
    ("data_file=@.data", ""),
    ("data_file=@.data,data_file_raw=on", ""),
    ("data_file=@.data,extended_l2=on", ""),
    ("data_file=@.data,preallocation=metadata", ""),
    ("data_file=@.data,data_file_raw=on,preallocation=falloc", ""),
];

fn output(options: &str, switches: &str) -> Output {
    let options: Vec<_> = options.split(',').filter(|option| !option.is_empty()).collect();
    Output::of("qcow2", &options, &switches.split_whitespace().collect::<Vec<_>>())
}

#[test]
fn each_option_makes_the_image_that_qemu_img_makes_of_it() {
    let dir = scratch_dir("convert-options").unwrap();
    let dir = dir.path();
    make_input(dir).unwrap();
    let mut failed = Vec::new();
    for (options, switches) in OPTIONS {
        let made = check_copy(dir, &INPUT, &output(options, switches), &mut Rng::new(1));
        failed.extend(made.err().map(|error| format!("-o {options} {switches}: {error}")));
    }
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn what_zeros_are_looked_for_is_as_qemu_img_has_it() {
    let dir = scratch_dir("convert-options").unwrap();
    let dir = dir.path();
    make_input(dir).unwrap();
    let mut failed = Vec::new();
    for format in ["raw", "qcow2", "qcow"] {
        for sparse in ["0", "512", "1k", "4k", "64k", "1M"] {
            let output = Output::of(format, &[], &["-S", sparse]);
            let made = check_copy(dir, &INPUT, &output, &mut Rng::new(1));
            failed.extend(made.err().map(|error| format!("{format} -S {sparse}: {error}")));
        }
    }
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn what_an_option_cannot_be_is_refused_by_its_name_and_nothing_is_made() {
    let dir = scratch_dir("convert-options").unwrap();
    let dir = dir.path();
    make_input(dir).unwrap();
    qemu::img(dir, &["convert", "-O", "raw", "in.qcow2", "disk.raw"]).unwrap();
    let before = listing(dir);
    let mut failed = Vec::new();
    // The arguments, and a word that the message has.
    for (args, word) in [
        ("-O qcow2 -o nonsense=1", "nonsense"),
        ("-O qcow2 -o cluster_size", "cluster_size"),
        ("-O qcow2 -o cluster_size=", "cluster_size"),
        ("-O qcow2 -o cluster_size=1000", "cluster_size"),
        ("-O qcow2 -o cluster_size=256", "cluster_size"),
        ("-O qcow2 -o cluster_size=4M", "cluster_size"),
        ("-O qcow2 -o cluster_size=0", "cluster_size"),
        ("-O qcow2 -o cluster_size=-1", "cluster_size"),
        ("-O qcow2 -o cluster_size=18446744073709551616", "cluster_size"),
        ("-O qcow2 -o compat=2", "compat"),
        ("-O qcow2 -o compat=1.10", "compat"),
        ("-O qcow2 -o refcount_bits=0", "refcount_bits"),
        ("-O qcow2 -o refcount_bits=3", "refcount_bits"),
        ("-O qcow2 -o refcount_bits=128", "refcount_bits"),
        ("-O qcow2 -o refcount_bits=8,compat=0.10", "refcount"),
        ("-O qcow2 -o lazy_refcounts=on,compat=0.10", "lazy_refcounts"),
        ("-O qcow2 -o lazy_refcounts=perhaps", "lazy_refcounts"),
        ("-O qcow2 -o extended_l2=on,cluster_size=8k", "extended_l2"),
        ("-O qcow2 -o extended_l2=on,compat=0.10", "extended_l2"),
        ("-O qcow2 -o compression_type=zstd,compat=0.10", "compression_type"),
        ("-O qcow2 -o compression_type=lz4", "compression_type"),
        ("-O qcow2 -o preallocation=some", "preallocation"),
        ("-O qcow2 -o preallocation=metadata -c", "preallocation"),
        ("-O qcow2 -o data_file=x.data,compat=0.10", "data_file"),
        ("-O qcow2 -o data_file=x.data -c", "data_file"),
        ("-O qcow2 -o data_file_raw=on", "data_file_raw"),
        ("-O qcow2 -o data_file=", "data_file"),
        ("-O qcow2 -o data_file=disk.raw,data_file_raw=on -B disk.raw -F raw", "data_file_raw"),
        ("-O qcow2 -o preallocation=metadata -B disk.raw -F raw", "preallocation"),
        ("-O raw -c", "raw"),
        ("-O raw -B disk.raw -F raw", "raw"),
        ("-O raw -o cluster_size=4k", "cluster_size"),
        ("-O qcow -o cluster_size=4k", "cluster_size"),
        ("-O qcow -o compat=1.1", "compat"),
        ("-O vmdk", "vmdk"),
        ("-O cow", "cow"),
        ("-O qcow2 -F raw", "-B"),
        ("-O qcow2 -B nowhere.raw -F raw", "nowhere.raw"),
        ("-O qcow2 -B disk.raw -F vmdk", "vmdk"),
        ("-O qcow2 -S 100", "-S"),
        ("-O qcow2 -S x", "-S"),
        ("-O qcow2 --reflink=perhaps", "reflink"),
        ("-O qcow2 -l nobody", "nobody"),
        ("-O qcow2 -f vmdk", "vmdk"),
    ] {
        let words: Vec<_> = args.split_whitespace().collect();
        let line = [&["convert"], &words[..], &["in.qcow2", "out"]].concat();
        let ran = imgdm(dir, &line).unwrap();
        let said = refused(&ran, &[64, 65, 66, 76], &[word]);
        failed.extend(said.err());
        if listing(dir) != before {
            failed.push(format!("{args}: leaves {:?}", listing(dir)));
            let _ = std::fs::remove_file(dir.join("out"));
        }
    }
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn o_help_lists_what_each_format_takes() {
    let dir = scratch_dir("convert-options").unwrap();
    let dir = dir.path();
    for line in [&["convert", "-o", "help"][..], &["convert", "-O", "qcow2", "-o", "?"]] {
        let ran = imgdm(dir, line).unwrap().ok().unwrap();
        assert_eq!(ran.stderr, "", "{}", ran.describe());
        let text = ran.text();
        let (_, qcow2) = text.split_once("qcow2:\n").unwrap();
        let qcow2 = qcow2.split("\n\n").next().unwrap();
        for option in [
            "compat",
            "cluster_size",
            "extended_l2",
            "refcount_bits",
            "compression_type",
            "preallocation",
            "data_file",
            "data_file_raw",
            "lazy_refcounts",
        ] {
            assert!(qcow2.contains(&format!("{option}=")), "{option}: {text}");
        }
    }
    assert!(listing(dir).is_empty());
}

#[test]
fn options_may_come_in_several_o() {
    let dir = scratch_dir("convert-options").unwrap();
    let dir = dir.path();
    make_input(dir).unwrap();
    let more = strings(&["-o", "lazy_refcounts=on,refcount_bits=8", "-o", "cluster_size=8k"]);
    ours(dir, &INPUT, &Output::of("qcow2", &[], &[]), &more, "out").unwrap();
    let info = described(dir, "qcow2", "out").unwrap();
    assert_eq!(info["cluster-size"], 8192);
    assert_eq!(info["format-specific"]["data"]["lazy-refcounts"], true);
    assert_eq!(info["format-specific"]["data"]["refcount-bits"], 8);
}

#[test]
fn a_comma_in_a_data_files_name_is_written_twice() {
    let dir = scratch_dir("convert-options").unwrap();
    let dir = dir.path();
    make_input(dir).unwrap();
    let output = Output::of("qcow2", &["data_file=a,,b.data"], &[]);
    ours(dir, &INPUT, &output, &[], "out").unwrap();
    assert!(dir.join("a,b.data").exists());
    clean(dir, "qcow2", "out").unwrap();
    same_content(dir, "qcow2", "out").unwrap();
}

#[test]
fn disks_of_every_small_size_and_of_none_are_converted() {
    let dir = scratch_dir("convert-options").unwrap();
    let dir = dir.path();
    let mut failed = Vec::new();
    for size in [0, 512, 1024, 4096, 65024, 65536, 66048, 1 << 20] {
        for (format, options) in [("raw", None), ("qcow2", Some("cluster_size=512"))] {
            let size = size.to_string();
            let create = [&["create", "-q", "-f", format][..], &["in", &size]].concat();
            qemu::img(dir, &create).unwrap();
            let input = Input { file: "in", format, snapshot: None };
            if size != "0" {
                let last = size.parse::<u64>().unwrap() - 512;
                let command = format!("write -P 9 {last} 512");
                qemu::io(dir, format, "in", &[command]).unwrap();
            }
            input.expected(dir).unwrap();
            for output in [
                Output::of("raw", &[], &[]),
                Output::of("qcow2", &[], &[]),
                Output::of("qcow2", options.as_slice(), &["-c"]),
                Output::of("qcow2", &["preallocation=full", "extended_l2=on"], &[]),
                Output::of("qcow", &[], &[]),
            ] {
                // qcow1 has no empty disks in QEMU.
                if output.format == "qcow" && size == "0" {
                    continue;
                }
                let made = check_copy(dir, &input, &output, &mut Rng::new(1));
                failed.extend(made.err().map(|e| format!("{format} of {size} to {output:?}: {e}")));
            }
        }
    }
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
}
