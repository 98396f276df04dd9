//! Tests on a real kernel with device-mapper, as root: run by `tests/kernel/run`, which
//! boots a guest for them.

mod guest;

use guest::*;

#[test]
fn the_guest_has_device_mapper_and_nothing_of_ours() {
    assert_eq!(std::env::var("IMGDM_GUEST").as_deref(), Ok("plain"), "run tests/kernel/run");
    let scratch = Scratch::new();
    let image = scratch.create("qcow2", &[], "disk.qcow2", "4M");
    write_image(&image, "qcow2", &["write -P 3 64k 64k"]);
    let wanted = qemu_content(&scratch, &image, &[]);
    let device = attach([&image]);
    assert_same("the device", &device.bytes(), &wanted);
    assert_random_reads(&device.path, &wanted, 1);
    assert_no_process(scratch.directory());
    device.detach();
}
