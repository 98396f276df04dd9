use std::os::unix::fs::FileExt;

use super::*;
use crate::convert::create::StoredBacking;
use crate::convert::options::FormatOptions;
use crate::format::Format;

fn options(text: &str) -> Qcow2Options {
    match FormatOptions::parse(Format::Qcow2, &[text]).unwrap() {
        FormatOptions::Qcow2(options) => options,
        other => panic!("{other:?}"),
    }
}

fn range(start: u64, end: u64) -> GuestRange {
    GuestRange::new(GuestOffset::new(start), GuestOffset::new(end))
}

fn new_image(file: &File, size: u64) -> NewImage<'_> {
    NewImage { file, data_file: None, size: ByteLen::new(size), backing: None }
}

#[test]
fn neighbours_lie_together_and_the_header_comes_last() {
    let file = tempfile::tempfile().unwrap();
    let mut writer = Qcow2Writer::new(&new_image(&file, 1 << 20), &options("")).unwrap();
    let mut placed = Vec::new();
    writer.data(range(0, 0x2_0000), &mut placed).unwrap();
    writer.data(range(0x2_0000, 0x3_0000), &mut placed).unwrap();
    writer.data(range(0x8_0000, 0x9_0000), &mut placed).unwrap();
    // Header, refcount block, L1 table, L2 table.
    let at = |start, end, offset| Placed { range: range(start, end), offset };
    assert_eq!(
        placed,
        [
            at(0, 0x3_0000, HostOffset::new(0x4_0000)),
            at(0x8_0000, 0x9_0000, HostOffset::new(0x7_0000))
        ]
    );
    let mut magic = [0; 4];
    assert_eq!(file.read_at(&mut magic, 0).unwrap(), 0, "nothing is there");
    writer.finish().unwrap();
    file.read_exact_at(&mut magic, 0).unwrap();
    assert_eq!(&magic, b"QFI\xfb");
}

#[test]
fn what_comes_out_of_order_is_refused() {
    let file = tempfile::tempfile().unwrap();
    let mut writer = Qcow2Writer::new(&new_image(&file, 1 << 20), &options("")).unwrap();
    let mut placed = Vec::new();
    writer.data(range(0x2_0000, 0x3_0000), &mut placed).unwrap();
    assert!(writer.data(range(0x1_0000, 0x2_0000), &mut placed).is_err());
    assert!(writer.data(range(0x3_0200, 0x4_0000), &mut placed).is_err());
    assert!(writer.data(range(0x10_0000, 0x11_0000), &mut placed).is_err());
}

#[test]
fn a_disk_too_large_for_its_clusters_is_refused_with_a_size_that_is_enough() {
    let file = tempfile::tempfile().unwrap();
    let new = new_image(&file, 1 << 40);
    let error = Qcow2Writer::new(&new, &options("cluster_size=512")).unwrap_err().to_string();
    assert!(error.contains("take cluster_size=2048 or more"), "{error}");
    assert!(Qcow2Writer::new(&new, &options("cluster_size=2k")).is_ok());
}

#[test]
fn a_backing_name_takes_what_room_the_first_cluster_has() {
    let file = tempfile::tempfile().unwrap();
    let backing = |length| StoredBacking { name: vec![b'x'; length], format: Some(Format::Raw) };
    let fits = |length, text| {
        let backing = backing(length);
        let new = NewImage { backing: Some(&backing), ..new_image(&file, 1 << 20) };
        Qcow2Writer::new(&new, &options(text)).is_ok()
    };
    assert!(fits(1023, ""));
    assert!(!fits(1024, ""));
    // A header of 112 bytes, the format's extension of 16, the end mark of 8.
    assert!(fits(376, "cluster_size=512"));
    assert!(!fits(377, "cluster_size=512"));
}
