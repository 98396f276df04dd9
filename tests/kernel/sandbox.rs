//! What attach gives up while it reads an image, on a kernel without Landlock, and which files
//! an image may name.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use nix::sys::signal::Signal;

use crate::args;
use crate::guest::*;

/// How many seccomp filters each thread of a process has, the main thread's first.
fn filters(process: u32) -> Vec<u64> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let mut tasks: Vec<u32> =
        tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
    tasks.sort_by_key(|task| (*task != process, *task));
    let of = |task: &u32| {
        let status = fs::read_to_string(format!("/proc/{process}/task/{task}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"));
        line.expect("the guest's kernel has seccomp").trim().parse().unwrap()
    };
    tasks.iter().map(of).collect()
}

#[test]
fn what_inflates_is_shut_and_what_builds_devices_is_not() {
    let scratch = Scratch::new();
    let raw = scratch.create("raw", &[], "disk.raw", "4M");
    write_image(&raw, "raw", &["write -P 5 0 3M"]);
    let image = scratch.path("disk.qcow2");
    qemu_img(args!["convert", "-c", "-f", "raw", "-O", "qcow2", &raw, &image]).ok();
    let mut line = imgdm_command(args!["attach", &image]);
    let attaching = start(line.env("IMGDM_FAULT", "inflate:stop").stdin(Stdio::null()));
    wait_for("it to stop", || attaching.is_stopped());
    let found = filters(attaching.id());
    let [main, workers @ ..] = found.as_slice() else { panic!("no threads") };
    assert_eq!(*main, 0, "{found:?}");
    assert!(!workers.is_empty() && workers.iter().all(|&filters| filters == 3), "{found:?}");
    attaching.signal(Signal::SIGCONT);
    attaching.finish().ok();
    assert_eq!(sha256(Path::new("/dev/mapper/disk")), sha256(&raw));
    imgdm(args!["detach", "disk"]).ok();
}

/// A file that goes with the test.
struct Written(&'static str);

impl Written {
    fn new(path: &'static str, text: String) -> Self {
        fs::write(path, text).unwrap();
        Self(path)
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0);
    }
}

#[test]
fn a_base_elsewhere_is_attached_where_the_policy_or_the_table_or_the_command_says_so() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("golden")).unwrap();
    fs::create_dir(scratch.path("images")).unwrap();
    fs::create_dir(scratch.path("records")).unwrap();
    let golden = scratch.path("golden").to_str().unwrap().to_owned();
    scratch.create("raw", &[], "golden/base.raw", "1M");
    let base = ["-b", "../golden/base.raw", "-F", "raw"];
    let image = scratch.create("qcow2", &base, "images/disk.qcow2", "");
    let said = imgdm(args!["attach", &image]).refused(77);
    assert!(said.contains(&format!("--allow-path={golden} allows it")), "{said}");
    assert_nothing_left();
    attach(args![format!("--allow-path={golden}"), &image]).detach();

    let tab = scratch.path("imgdmtab");
    let shown = image.display();
    fs::write(&tab, format!("closed {shown}\nopen {shown} - allow-path={golden}\n")).unwrap();
    imgdm(args!["attach-tab", "--file", &tab, "closed"]).refused(77);
    imgdm(args!["attach-tab", "--file", &tab, "open"]).ok();
    imgdm(args!["verify", "open"]).ok();
    imgdm(args!["detach", "open"]).ok();

    let policy = Written::new("/etc/imgdm.conf", format!("# golden\nallow-path {golden}\n"));
    attach(args![&image]).detach();
    let evidence = format!("--evidence={}", scratch.path("records/disk.json").display());
    imgdm(args!["attach", &evidence, &image]).refused(77);
    let allowed = format!("--allow-path={golden}");
    attach(args![&evidence, &allowed, &image]).detach();
    drop(policy);

    let _policy = Written::new("/etc/imgdm.conf", "allow golden\n".to_owned());
    let said = imgdm(args!["attach", &image]).refused(78);
    assert!(said.contains("/etc/imgdm.conf: line 1: unknown word 'allow'"), "{said}");
}

#[test]
fn a_block_device_is_named_by_an_image_only_where_it_is_allowed() {
    let scratch = Scratch::new();
    let device = block_device();
    let name = device.to_str().unwrap();
    let image = scratch.create("qcow2", &["-b", name, "-F", "raw"], "disk.qcow2", "");
    let allow = format!("--allow-path={name}");
    let said = imgdm(args!["map", &image]).refused(77);
    assert!(said.contains("block device") && said.contains(&allow), "{said}");
    imgdm(args!["map", &allow, &image]).ok();
    imgdm(args!["map", "--allow-path=/dev", &image]).ok();
}
