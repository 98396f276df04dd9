//! Killed between any two steps, imgdm leaves nothing, with udev looking on and another
//! imgdm at work.

use std::path::Path;

use nix::libc;
use nix::sys::signal::Signal;

use crate::guest::*;
use crate::world::*;

/// The steps of an attach of `image`, as IMGDM_FAULT=list tells them, up to the commit.
#[track_caller]
fn steps(image: &Path) -> Vec<String> {
    let ran = run(imgdm_command(args!["attach", image]).env("IMGDM_FAULT", "list"));
    assert!(ran.status.success(), "{ran}");
    assert_eq!(imgdm(args!["detach", image]).ok(), "");
    let steps = ran.stderr.lines().filter_map(|line| Some(line.split_once(' ')?.1.to_owned()));
    let steps: Vec<_> = steps.take_while(|step| step != "commit").collect();
    for wanted in ["inner0", "top"] {
        for step in ["create", "load-zero", "open", "mark", "load", "resume"] {
            let step = format!("{wanted}.{step}");
            assert!(steps.contains(&step), "no step {step}: {steps:?}");
        }
    }
    steps
}

/// What is left of the killed one, asked of the kernel alone.
fn remains(of: &str, killed: u32) -> Vec<String> {
    let mut left: Vec<_> = our_devices().into_iter().filter(|name| name.starts_with(of)).collect();
    left.extend(loops().into_iter().filter(|l| l.1.contains(of)).map(|l| format!("{l:?}")));
    left.extend(mapper().into_iter().filter(|name| name.starts_with(of)));
    // It, and the process that watches over it.
    left.extend(our_processes(None).into_iter().filter(|p| p.contains("is imgdm")));
    left.retain(|what| !what.starts_with(&format!("{killed} ")));
    left
}

/// Two chains that share no file.
fn images(world: &World) -> [std::path::PathBuf; 2] {
    ["victim", "other"].map(|name| {
        let base = raw(world, &format!("{name}-base.raw"), 4);
        write_image(&base, "raw", &["write -P 1 0 4M"]);
        overlay(world, &format!("{name}.qcow2"), &base)
    })
}

#[test]
fn a_killed_attach_leaves_nothing_without_a_further_run() {
    let world = World::new("udev");
    let [victim, _] = images(&world);
    for step in steps(&victim) {
        let fault = format!("{step}:kill");
        let running = start(imgdm_command(args!["attach", &victim]).env("IMGDM_FAULT", fault));
        let id = running.id();
        let ran = running.finish();
        assert_eq!(ran.signal(), Some(libc::SIGKILL), "{step}: {ran}");
        let gone = within(SETTLE, || remains("victim", id).is_empty());
        assert!(gone, "killed after {step}, left: {:#?}", remains("victim", id));
        settle();
        assert!(remains("victim", id).is_empty(), "killed after {step}, then udev: stale links");
    }
}

#[test]
fn another_attach_succeeds_while_one_is_killed() {
    let world = World::new("udev");
    let [victim, other] = images(&world);
    for step in steps(&victim) {
        let fault = format!("{step}:stop");
        let stopped = start(imgdm_command(args!["attach", &victim]).env("IMGDM_FAULT", fault));
        wait_for("the fault", || stopped.is_stopped());
        let beside = start(&mut imgdm_command(args!["attach", &other]));
        // It is let to wait for the first one's lock, as near as can be seen from here.
        std::thread::sleep(std::time::Duration::from_millis(100));
        stopped.signal(Signal::SIGKILL);
        let id = stopped.id();
        let ran = stopped.finish();
        assert_eq!(ran.signal(), Some(libc::SIGKILL), "{step}: {ran}");
        let ran = beside.finish();
        assert!(ran.status.success() && ran.stdout == "/dev/mapper/other\n", "{step}: {ran}");
        let gone = within(SETTLE, || remains("victim", id).is_empty());
        assert!(gone, "killed after {step}, left: {:#?}", remains("victim", id));
        let other = Device { name: "other".to_owned(), path: "/dev/mapper/other".into() };
        assert_eq!(other.bytes(), vec![1; 4 << 20], "{step}");
        other.detach();
    }
}

#[test]
fn an_attach_that_is_asked_to_stop_leaves_nothing() {
    let world = World::new("udev");
    let [victim, _] = images(&world);
    for step in ["inner0.load", "top.mark", "top.resume", "commit", "publish"] {
        let fault = format!("{step}:term");
        let ran = run(imgdm_command(args!["attach", &victim]).env("IMGDM_FAULT", fault));
        if step == "publish" && ran.status.success() {
            // The signal is noted by a thread: here it can come too late.
            assert_eq!(imgdm(["detach", "victim"]).ok(), "");
        } else {
            assert_eq!(ran.signal(), Some(libc::SIGTERM), "{step}: {ran}");
        }
        assert!(remains("victim", 0).is_empty(), "{step}: {:#?}", remains("victim", 0));
    }
}
