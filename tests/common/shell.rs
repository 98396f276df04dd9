//! A person at a real shell: types a line, with tabs, at a terminal.
#![allow(dead_code)] // Each tier uses its part.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A helper that fails is a test that fails.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

const PROMPT: &str = "ready-to-type> ";
const RAN: &str = "the-line-has-run";
/// How long a shell may take to start, and to complete and run a line.
const PATIENCE: Duration = Duration::from_secs(60);

/// The shells that imgdm has completions for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl Shell {
    pub(crate) const ALL: [Self; 3] = [Self::Bash, Self::Zsh, Self::Fish];

    fn name(self) -> &'static str {
        match self {
            Self::Bash => "bash",
            Self::Zsh => "zsh",
            Self::Fish => "fish",
        }
    }

    /// What `imgdm` completes to: the arguments with which each of the lines, typed in
    /// `directory` one after the other, runs a program of that name.
    #[track_caller]
    pub(crate) fn arguments_of(
        self,
        imgdm: &Path,
        directory: &Path,
        lines: &[&str],
    ) -> Vec<Vec<String>> {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        let script = Command::new(imgdm).args(["completions", self.name()]).output().unwrap();
        assert!(script.status.success() && script.stderr.is_empty(), "{script:?}");
        fs::write(at("_imgdm"), script.stdout).unwrap();

        // Stands in for imgdm: each argument in a line of its own.
        let got = at("got");
        let stand_in =
            format!("#!/bin/sh\nprintf '%s\\n' \"$@\" >'{}'\necho {RAN}\n", got.display());
        fs::create_dir(at("bin")).unwrap();
        fs::write(at("bin/imgdm"), stand_in).unwrap();
        fs::set_permissions(at("bin/imgdm"), fs::Permissions::from_mode(0o755)).unwrap();
        let path = std::env::var("PATH").unwrap_or_default();

        let here = home.path().display();
        let (start, rc, line) = match self {
            Self::Bash => (
                format!(". '{here}/_imgdm'\nPS1='{PROMPT}'\n"),
                "rc",
                format!("exec bash --noprofile --rcfile '{here}/rc' -i"),
            ),
            Self::Zsh => (
                format!(
                    "fpath=('{here}' $fpath)\nautoload -Uz compinit\ncompinit -u -D\nPROMPT='{PROMPT}'\n"
                ),
                ".zshrc",
                "exec zsh -d -i".to_owned(),
            ),
            Self::Fish => (
                format!("source '{here}/_imgdm'\nfunction fish_prompt; printf '{PROMPT}'; end\n"),
                "rc",
                format!("exec fish --no-config --init-command \"source '{here}/rc'\""),
            ),
        };
        fs::write(at(rc), start).unwrap();
        // A terminal of its own.
        let mut terminal = Command::new("script")
            .args(["-q", "-e", "-f", "-c", &line, "/dev/null"])
            .current_dir(directory)
            .env_clear()
            .env("PATH", format!("{here}/bin:{path}"))
            .env("HOME", home.path())
            .env("ZDOTDIR", home.path())
            .env("SHELL", "/bin/sh")
            .env("TERM", "xterm")
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut output = terminal.stdout.take().unwrap();
        let (sender, shown) = mpsc::channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut bytes) {
                if sender.send(bytes[..length].to_vec()).is_err() {
                    break;
                }
            }
        });

        let mut keyboard = terminal.stdin.take().unwrap();
        let mut screen = String::new();
        // The screen up to the text, which is taken off it; fails where that does not come.
        let mut wait_for = |text: &str, typed: &str| {
            let end = Instant::now() + PATIENCE;
            loop {
                if let Some((_, rest)) = screen.split_once(text) {
                    screen = rest.to_owned();
                    return;
                }
                if let Ok(bytes) = shown.recv_timeout(Duration::from_millis(100)) {
                    screen.push_str(&String::from_utf8_lossy(&bytes));
                }
                assert!(Instant::now() < end, "{self:?}, {typed:?}: the screen shows {screen:?}");
            }
        };
        let arguments = lines.iter().map(|&typed| {
            wait_for(PROMPT, typed);
            write!(keyboard, "{typed}\r").unwrap();
            keyboard.flush().unwrap();
            wait_for(RAN, typed);
            fs::read_to_string(&got).unwrap().lines().map(str::to_owned).collect()
        });
        let arguments = arguments.collect();
        drop(keyboard);
        let _ = terminal.kill();
        terminal.wait().unwrap();
        arguments
    }
}
