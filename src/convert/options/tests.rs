use super::*;
use crate::format::qcow2::Compression;

fn parse(format: Format, text: &str) -> Result<FormatOptions> {
    FormatOptions::parse(format, &[text])
}

fn qcow2(text: &str) -> Qcow2Options {
    match parse(Format::Qcow2, text).unwrap() {
        FormatOptions::Qcow2(options) => options,
        other => panic!("{other:?}"),
    }
}

/// What is said of a text that is refused.
fn refusal(format: Format, text: &str) -> String {
    let error = parse(format, text).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Usage(_)), "{error:?}");
    error.to_string()
}

#[test]
fn without_options_an_image_is_as_qemu_img_makes_it() {
    let options = qcow2("");
    assert_eq!(options, Qcow2Options::default());
    assert_eq!((options.compat(), options.cluster_size()), (CompatibilityLevel::V3, 65536));
    assert_eq!(options.compression(), Compression::Zlib);
}

#[test]
fn options_are_read_from_several_texts() {
    let texts = ["cluster_size=1M,refcount_bits=1", "extended_l2", "data_file=a,,b"];
    let FormatOptions::Qcow2(options) = FormatOptions::parse(Format::Qcow2, &texts).unwrap() else {
        panic!("not qcow2");
    };
    assert_eq!((options.cluster_size(), options.granularity()), (1 << 20, 1 << 15));
    assert_eq!(options.refcount_order, 0);
    assert_eq!(options.data_file(), Some(("a,b", false)));
    assert_eq!(qcow2("compat=0.10"), qcow2("compat=v2"));
    assert_eq!(qcow2("compat=1.1,lazy_refcounts=off"), Qcow2Options::default());
}

#[test]
fn a_raw_data_file_has_all_of_the_disk() {
    let options = qcow2("data_file=x,data_file_raw=on");
    assert_eq!(options.preallocation(), Preallocation::Metadata);
    assert!(options.check(false, true).unwrap_err().to_string().contains("-B"));
}

#[test]
fn what_the_format_does_not_have_is_refused_by_name() {
    for (text, says) in [
        ("cluster_size=256", "cluster_size=256"),
        ("cluster_size=4M", "from 512 to 2M"),
        ("cluster_size=65k", "a power of two"),
        ("cluster_size=lots", "a number of bytes"),
        ("cluster_size", "cluster_size=on"),
        ("refcount_bits=128", "32 or 64"),
        ("refcount_bits=3", "32 or 64"),
        ("refcount_bits=0", "32 or 64"),
        ("compat=v4", "v2 (0.10) or v3 (1.1)"),
        ("compression_type=lzma", "zlib or zstd"),
        ("lazy_refcounts=perhaps", "on or off"),
        ("preallocation=some", "off, metadata, falloc or full"),
        ("data_file=", "the name of a file"),
        ("clustersize=4k", "no option 'clustersize'"),
        ("cluster_size=4k,cluster_size=4k", "given twice"),
        ("size=1G", "the size of the input"),
        ("backing_file=base", "-B"),
        ("backing_fmt=raw", "-F"),
        ("encryption=on", "qemu-img convert"),
        ("encrypt.format=luks,encrypt.key-secret=s", "encrypt.format"),
        ("nocow=on", "chattr"),
    ] {
        let message = refusal(Format::Qcow2, text);
        assert!(message.contains(says), "{text}: {message}");
    }
    assert!(refusal(Format::Raw, "preallocation=metadata").contains("off, falloc or full"));
    assert!(refusal(Format::Raw, "cluster_size=4k").contains("raw has no option"));
    assert!(refusal(Format::Qcow, "cluster_size=4k").contains("qcow has no option"));
    assert!(refusal(Format::Cow, "").contains("not written"));
    // What only says how the file system is to store it.
    assert_eq!(qcow2("nocow=off,extent_size_hint=1M"), Qcow2Options::default());
}

#[test]
fn what_does_not_go_together_is_refused() {
    for (text, says) in [
        ("compat=v2,extended_l2=on", "extended_l2"),
        ("compat=v2,lazy_refcounts=on", "lazy_refcounts"),
        ("compat=v2,refcount_bits=8", "refcount_bits"),
        ("compat=v2,data_file=x", "data_file"),
        ("compat=v2,compression_type=zstd", "zstd"),
        ("extended_l2=on,cluster_size=8k", "at least 16k"),
        ("data_file_raw=on", "data_file=FILE"),
    ] {
        let message = refusal(Format::Qcow2, text);
        assert!(message.contains(says), "{text}: {message}");
    }
    let goes = |text: &str, compressed, backing| {
        parse(Format::Qcow2, text).unwrap().check(compressed, backing).is_ok()
    };
    assert!(goes("", true, true));
    assert!(!goes("data_file=x", true, false));
    assert!(!goes("preallocation=metadata", true, false));
    assert!(!goes("preallocation=metadata", false, true));
    assert!(goes("preallocation=metadata,extended_l2=on", false, true));
    let raw = parse(Format::Raw, "preallocation=full").unwrap();
    assert!(raw.check(false, false).is_ok());
    assert!(raw.check(true, false).is_err() && raw.check(false, true).is_err());
}

#[test]
fn help_names_every_option_that_is_taken() {
    let help = FormatOptions::help(Format::Qcow2).unwrap();
    for option in [
        "cluster_size",
        "compat",
        "compression_type",
        "data_file",
        "data_file_raw",
        "extended_l2",
        "lazy_refcounts",
        "preallocation",
        "refcount_bits",
    ] {
        assert!(help.lines().any(|line| line.starts_with(&format!("{option}="))), "{option}");
    }
    assert!(help.lines().all(|line| line.len() <= 96));
    assert!(FormatOptions::asks_for_help(&["cluster_size=4k,help"]));
    assert!(FormatOptions::asks_for_help(&["?"]));
    assert!(!FormatOptions::asks_for_help(&["data_file=help"]));
}

#[test]
fn a_disk_can_be_as_large_as_its_l1_table_allows() {
    let largest = |text: &str| qcow2(text).max_virtual_size().get();
    assert_eq!(largest("cluster_size=512"), 128 << 30);
    assert_eq!(largest("cluster_size=64k"), 2 << 50);
    assert_eq!(largest("cluster_size=64k,extended_l2=on"), 1 << 50);
    assert_eq!(largest("cluster_size=2M"), 2 << 60);
}
