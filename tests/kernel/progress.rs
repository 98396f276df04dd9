//! What is shown of how far inflating is: on a terminal only, and not where that is not
//! wanted.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::process::Stdio;
use std::sync::mpsc;

use nix::pty::{Winsize, openpty};

use crate::args;
use crate::compressed::{into, long};
use crate::guest::*;

/// Runs imgdm with its standard error on a terminal: all that the terminal was given. It
/// has to succeed.
#[track_caller]
fn shown_on_a_terminal(arguments: Vec<OsString>) -> String {
    let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&size, None).unwrap();
    let mut line = imgdm_command(arguments);
    line.env("TERM", "xterm").stdin(Stdio::null()).stdout(Stdio::null()).stderr(pty.slave);
    let mut child = line.spawn().unwrap();
    // Ours: so that the terminal ends with the last who has it open.
    drop(line);
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let (mut master, mut shown) = (File::from(pty.master), Vec::new());
        // EIO is the end.
        let _ = master.read_to_end(&mut shown);
        let _ = sender.send(shown);
    });
    let shown = receiver.recv_timeout(PATIENCE).expect("somebody holds the terminal open");
    assert!(child.wait().unwrap().success(), "{}", String::from_utf8_lossy(&shown));
    String::from_utf8(shown).unwrap()
}

#[test]
fn inflating_shows_a_bar_on_a_terminal_and_takes_it_away_and_else_shows_nothing() {
    let scratch = Scratch::new();
    let place = Tmpfs::over(scratch.path("place"), 128 * MIB);
    let image = long(&scratch);
    let attaching = |more: &[&str]| {
        let mut line: Vec<_> = args!["attach"].into();
        line.extend(more.iter().map(OsString::from));
        line.extend(into(&place.place, &image));
        line
    };
    let shown = shown_on_a_terminal(attaching(&[]));
    // After the first of two batches, and with what there is to do in all.
    for part in ["inflating", "64.00 MiB/100.00 MiB", "\u{2588}"] {
        assert!(shown.contains(part), "no {part:?} in {shown:?}");
    }
    let (_, after) = shown.rsplit_once("MiB").unwrap();
    assert!(after.contains("\r\u{1b}[2K"), "the line is not cleared: {shown:?}");
    assert!(!shown.contains('\n'), "a bar leaves nothing: {shown:?}");
    imgdm(args!["detach", &image]).ok();

    assert_eq!(shown_on_a_terminal(attaching(&["--quiet"])), "");
    imgdm(args!["detach", &image]).ok();
    let ran = imgdm(attaching(&[]));
    assert_eq!(ran.stderr, "", "a pipe is no terminal");
    ran.ok();
    imgdm(args!["detach", &image]).ok();
    assert_nothing_left();
}
