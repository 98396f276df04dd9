//! Detach returns when everything is gone: not a moment before.

use crate::guest::*;

/// Times for each of the two file systems.
const TIMES: u32 = 25;

#[test]
fn detach_is_followed_at_once_by_a_qemu_writer_and_an_unmount_fifty_times() {
    let disk = Scratch::on_disk();
    for (kind, size) in [("ext4", 64 * MIB), ("xfs", 320 * MIB)] {
        let mounted = Mounted::make(kind, disk.directory(), size);
        let create = |name: &str, more: &[&str]| {
            let path = mounted.place.join(name);
            let mut line = command("qemu-img", ["create", "-q", "-f", "qcow2"]);
            run(line.args(more).arg(&path).arg("1M").current_dir(&mounted.place)).ok();
            path
        };
        let base = create("base.qcow2", &[]);
        // A fresh overlay: an inner device and one more loop are there to wait for.
        let image = create("disk.qcow2", &["-b", "base.qcow2", "-F", "qcow2"]);
        write_image(&base, "qcow2", &["write -P 1 0 1M"]);
        for round in 0..TIMES {
            attach([&image]).detach();
            let written = if round % 2 == 0 { &image } else { &base };
            write_image(written, "qcow2", &["write -P 2 0 4k"]);

            attach([&image]).detach();
            let gone = mounted.umount();
            assert_eq!(gone, Ok(()), "{kind}, round {round}: cannot unmount");
            mounted.mount().unwrap();
        }
    }
}
