//! What detach promises: when it returns, files can be written and file systems
//! unmounted.

use std::fs;
use std::path::Path;

use crate::guest::*;
use crate::world::*;

#[test]
fn writers_and_umount_succeed_at_once() {
    let _world = World::new("udev");
    let place = Path::new("/run/below");
    fs::create_dir_all(place).unwrap();
    let mount = || tool("mount", args![host_disk(), place]);
    mount();
    let image = |name: &str| place.join(name);
    let (base, middle, top) = (image("base.raw"), image("middle.qcow2"), image("top.qcow2"));
    fs::File::create(&base).unwrap().set_len(4 * MIB).unwrap();
    let create = |path: &Path, backing: &Path, format: &str| {
        tool("qemu-img", args!["create", "-q", "-f", "qcow2", "-F", format, "-b", backing, path])
    };
    create(&middle, &base, "raw");
    create(&top, &middle, "qcow2");
    write_image(&middle, "qcow2", &["write -P 7 1M 64k"]);
    let layers = [(&base, "raw"), (&middle, "qcow2"), (&top, "qcow2")];
    for round in 0..50usize {
        let device = attach([&top]);
        device.detach();
        // A layer, all of them in turn; then the file system.
        let (layer, format) = layers[round % 3];
        let ran = qemu_io(layer, format, &["write -P 9 0 512"]);
        assert!(ran.status.success() && ran.stderr.is_empty(), "round {round}: {ran}");
        // And now and then nothing between detach and umount.
        if round % 5 == 4 {
            let device = attach([&top]);
            device.detach();
        }
        let ran = run(&mut command("umount", [place]));
        assert!(ran.status.success(), "round {round}: {ran}");
        mount();
    }
    for (layer, _) in layers {
        fs::remove_file(layer).unwrap();
    }
    tool("umount", [place]);
}
