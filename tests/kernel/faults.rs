//! Killed, stopped or failed between any two steps, attach leaves nothing.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::libc;
use nix::sys::signal::Signal;

use crate::args;
use crate::guest::*;

/// imgdm attach of an image, with these options, with a fault.
pub(crate) fn faulty(options: &[&str], image: &Path, fault: &str) -> Command {
    let words = options.iter().map(OsString::from).chain([image.into()]);
    let mut line = imgdm_command(std::iter::once("attach".into()).chain(words));
    line.env("IMGDM_FAULT", fault).stdin(Stdio::null());
    line
}

/// The steps of attaching an image, in order.
pub(crate) fn steps(options: &[&str], image: &Path) -> Vec<String> {
    let ran = run(&mut faulty(options, image, "list"));
    assert!(ran.status.success(), "{ran}");
    let numbered = ran.stderr.lines().filter_map(|line| line.split_once(' '));
    let steps: Vec<_> = numbered
        .filter(|(number, _)| number.parse::<u32>().is_ok())
        .map(|(_, name)| name.to_owned())
        .collect();
    imgdm(args!["detach", image]).ok();
    steps
}

/// An image whose attachment is one table.
fn simple(scratch: &Scratch) -> PathBuf {
    let image = scratch.create("qcow2", &[], "simple.qcow2", "1M");
    write_image(&image, "qcow2", &["write -P 1 0 512k"]);
    image
}

/// A fresh overlay of it, whose attachment is an inner device and the top one.
fn stacked(scratch: &Scratch) -> PathBuf {
    scratch.create("qcow2", &["-b", "simple.qcow2", "-F", "qcow2"], "stacked.qcow2", "")
}

/// After these the image is attached for good.
fn is_committed(step: &str) -> bool {
    ["commit", "publish"].contains(&step)
}

#[test]
fn the_steps_are_those_between_which_the_tests_kill() {
    let scratch = Scratch::new();
    let one = steps(&[], &simple(&scratch));
    let device = |name: &str| {
        ["create", "load-zero", "open", "mark", "load", "resume"]
            .map(|step| format!("{name}.{step}"))
    };
    for step in device("top").iter().map(String::as_str).chain(["loop0", "commit"]) {
        assert!(one.iter().any(|known| known == step), "no step {step}: {one:?}");
    }
    let two = steps(&[], &stacked(&scratch));
    for step in device("inner0").into_iter().chain(device("top")) {
        assert!(two.contains(&step), "no step {step}: {two:?}");
    }
}

#[test]
fn killed_at_any_step_attach_leaves_nothing_without_a_further_run() {
    let scratch = Scratch::new();
    let simple = simple(&scratch);
    for image in [&simple, &stacked(&scratch)] {
        for step in steps(&[], image) {
            let ran = run(&mut faulty(&[], image, &format!("{step}:kill")));
            assert_eq!(ran.signal(), Some(libc::SIGKILL), "{step}: {ran}");
            if is_committed(&step) {
                // Whole, without a word on standard output. Attaching again finds it.
                assert_eq!(ran.stdout, "", "{step}");
                let again = attach([image]);
                assert_eq!(listed().len(), 1, "{step}");
                again.detach();
                assert_nothing_left();
            } else if !within(SETTLE, || left(Some(scratch.directory())).is_empty()) {
                panic!("killed after {step}: {:#?}", left(Some(scratch.directory())));
            }
        }
    }
    // And none of it stands in the way of another run.
    attach([&simple]).detach();
}

#[test]
fn killed_at_any_step_attach_does_not_disturb_another_that_waits() {
    let scratch = Scratch::new();
    let _ = simple(&scratch);
    let image = stacked(&scratch);
    let other = scratch.create("qcow2", &[], "other.qcow2", "1M");
    write_image(&other, "qcow2", &["write -P 2 0 1M"]);
    for step in steps(&[], &image) {
        let first = start(&mut faulty(&[], &image, &format!("{step}:stop")));
        wait_for("the first to stop", || first.is_stopped());
        let second = start(imgdm_command(args!["attach", &other]).stdin(Stdio::null()));
        // Long enough that it meets the lock or the first one's devices.
        std::thread::sleep(std::time::Duration::from_millis(60));
        first.signal(Signal::SIGKILL);
        assert_eq!(first.finish().signal(), Some(libc::SIGKILL), "{step}");
        assert_eq!(second.finish().ok(), "/dev/mapper/other\n", "{step}");
        let ours = || our_devices().into_iter().filter(|name| name != "other").count();
        if is_committed(&step) {
            imgdm(["detach", "stacked"]).ok();
        }
        wait_for(&format!("what was killed after {step} to go"), || ours() == 0);
        assert!(
            Device { name: "other".into(), path: "/dev/mapper/other".into() }
                .bytes()
                .iter()
                .all(|&byte| byte == 2)
        );
        imgdm(["detach", "other"]).ok();
        assert_nothing_left_soon();
    }
}

#[test]
fn stopped_by_sigterm_or_sigint_at_any_step_attach_rolls_back_and_dies_by_it() {
    let scratch = Scratch::new();
    let _ = simple(&scratch);
    let image = stacked(&scratch);
    for (at, step) in steps(&[], &image).iter().enumerate() {
        let (ran, wanted) = if at % 3 == 2 {
            let attaching = start(&mut faulty(&[], &image, &format!("{step}:stop")));
            wait_for("it to stop", || attaching.is_stopped());
            attaching.signal(Signal::SIGINT);
            attaching.signal(Signal::SIGCONT);
            (attaching.finish(), libc::SIGINT)
        } else {
            (run(&mut faulty(&[], &image, &format!("{step}:term"))), libc::SIGTERM)
        };
        assert_eq!(ran.signal(), Some(wanted), "{step}: {ran}");
        assert_eq!(ran.stdout, "", "{step}");
        assert_nothing_left();
    }
}

#[test]
fn failing_at_any_step_attach_says_why_and_leaves_nothing() {
    let scratch = Scratch::new();
    let _ = simple(&scratch);
    let image = stacked(&scratch);
    for step in steps(&[], &image) {
        let ran = run(&mut faulty(&[], &image, &format!("{step}:fail")));
        let said = ran.refused(1);
        assert!(said.contains("fault injected") && !said.contains("left behind"), "{step}: {said}");
        assert_nothing_left();
    }
}

#[test]
fn two_attaches_of_one_image_at_once_both_succeed() {
    let scratch = Scratch::new();
    let image = simple(&scratch);
    for _ in 0..5 {
        let both =
            [(); 2].map(|()| start(imgdm_command(args!["attach", &image]).stdin(Stdio::null())));
        for one in both {
            assert_eq!(one.finish().ok(), "/dev/mapper/simple\n");
        }
        imgdm(["detach", "simple"]).ok();
        assert_nothing_left();
    }
}
