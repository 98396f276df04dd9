//! Running other programs within a bounded time, with errors that can be acted on.

use std::fmt::Write as _;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Why a test can't go on, or what differs.
pub(crate) type Outcome<T = ()> = Result<T, String>;

/// Longest that any one program may take.
const LIMIT: Duration = Duration::from_secs(60);

/// What a program left behind.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) command: String,
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Ran {
    /// The exit code; `None` where a signal ended it.
    pub(crate) fn code(&self) -> Option<i32> {
        self.status.code()
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Err, with all it said, unless it exited with 0.
    pub(crate) fn ok(self) -> Outcome<Self> {
        if self.status.success() { Ok(self) } else { Err(self.describe()) }
    }

    /// The command and all it said, for a message.
    pub(crate) fn describe(&self) -> String {
        let mut text = format!("$ {}\n", self.command);
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => writeln!(text, "exit code {code}"),
            (_, signal) => writeln!(text, "ended by signal {}", signal.unwrap_or(0)),
        }
        .unwrap_or_default();
        for (name, content) in [("stdout", &self.text()), ("stderr", &self.stderr)] {
            if !content.is_empty() {
                let cut: String = content.chars().take(4000).collect();
                let _ = writeln!(text, "{name}: {}", cut.trim_end());
            }
        }
        text
    }
}

/// The command as a shell would take it.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line: Vec<String> = words.map(|word| quoted(&word.to_string_lossy())).collect();
    line.join(" ")
}

/// A word quoted for a shell, where it needs that.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_./=:,@+".contains(&b);
    if !word.is_empty() && word.bytes().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Runs a program to its end, which must come within a minute.
///
/// # Errors
/// It could not be started, or had to be killed because it took too long.
pub(crate) fn run(command: &mut Command) -> Outcome<Ran> {
    run_within(command, LIMIT)
}

/// Runs a program to its end, which must come within `limit`.
///
/// # Errors
/// It could not be started, or had to be killed because it took too long.
pub(crate) fn run_within(command: &mut Command, limit: Duration) -> Outcome<Ran> {
    let deadline = Instant::now() + limit;
    let line = shown(command);
    let mut child = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot run '{line}': {error}"))?;
    let (sender, received) = mpsc::channel();
    let streams: [(_, Option<Box<dyn Read + Send>>); 2] = [
        (true, child.stdout.take().map(|s| Box::new(s) as _)),
        (false, child.stderr.take().map(|s| Box::new(s) as _)),
    ];
    for (is_stdout, stream) in streams {
        let sender = sender.clone();
        thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut stream) = stream {
                let _ = stream.read_to_end(&mut bytes);
            }
            let _ = sender.send((is_stdout, bytes));
        });
    }
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let mut in_time = true;
    for _ in 0..2 {
        match received.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((true, bytes)) => stdout = bytes,
            Ok((false, bytes)) => stderr = bytes,
            Err(_) => {
                in_time = false;
                break;
            }
        }
    }
    // Both streams are closed: it is at its end, or hangs with them closed.
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) if in_time => break status,
            Ok(None) if in_time && Instant::now() < deadline => {
                thread::sleep(Duration::from_micros(200));
            }
            Ok(_) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("killed after {limit:?} without an end:\n$ {line}\n"));
            }
            Err(error) => return Err(format!("cannot wait for '{line}': {error}")),
        }
    };
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    Ok(Ran { command: line, status, stdout, stderr })
}
