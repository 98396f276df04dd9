//! What the tests inside the guest share: running programs in bounded time, reading
//! devices past the page cache, and proving that nothing is left.
//!
//! Every test makes a [`Scratch`] first; when that goes out of scope it checks that the
//! test has left nothing, or, where the test failed, takes away what is there so that
//! the next one starts clean.
#![allow(dead_code)] // Each of the test targets uses its part.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A helper that fails is a test that fails.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use imgdm::device::LOOP_SIZE_LIMIT;
use imgdm::device::name::UUID_PREFIX;
use nix::libc;

/// How long one program may run.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How long what the kernel undoes by itself may take.
pub(crate) const SETTLE: Duration = Duration::from_secs(15);
pub(crate) const KIB: u64 = 1024;
pub(crate) const MIB: u64 = 1024 * KIB;

// --- Programs -------------------------------------------------------------------------

/// What a program said and how it ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) what: String,
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn code(&self) -> Option<i32> {
        self.status.code()
    }

    pub(crate) fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// Its standard output; fails unless it succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert!(self.status.success(), "{self}");
        self.stdout
    }

    /// Its standard error; fails unless it ended with that status and printed nothing else.
    #[track_caller]
    pub(crate) fn refused(self, code: i32) -> String {
        assert_eq!(self.code(), Some(code), "{self}");
        assert_eq!(self.stdout, "", "{self}");
        self.stderr
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.what, self.status)?;
        for (name, text) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !text.is_empty() {
                write!(f, "\n{name}: {}", text.trim_end())?;
            }
        }
        Ok(())
    }
}

/// A program that runs beside the test; killed when dropped.
#[derive(Debug)]
pub(crate) struct Running {
    what: String,
    child: Child,
    stdout: mpsc::Receiver<Vec<u8>>,
    stderr: mpsc::Receiver<Vec<u8>>,
}

fn gather(mut from: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut all = Vec::new();
        let _ = from.read_to_end(&mut all);
        let _ = sender.send(all);
    });
    receiver
}

/// Starts a program, its output gathered, its input from us where `stdin` is piped.
#[track_caller]
pub(crate) fn start(command: &mut Command) -> Running {
    let what = format!("{command:?}");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot run {what}: {error}"));
    let stdout = gather(child.stdout.take().unwrap());
    let stderr = gather(child.stderr.take().unwrap());
    Running { what, child, stdout, stderr }
}

impl Running {
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Writes a line to it.
    pub(crate) fn tell(&mut self, line: &str) {
        let stdin = self.child.stdin.as_mut().expect("its standard input is not ours");
        writeln!(stdin, "{line}").unwrap();
        stdin.flush().unwrap();
    }

    /// Whether it is stopped (SIGSTOP).
    pub(crate) fn is_stopped(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        stat.is_ok_and(|stat| {
            stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['T', 't']))
        })
    }

    /// Waits for its end, at most [`PATIENCE`]; its output must end with it.
    #[track_caller]
    pub(crate) fn finish(mut self) -> Ran {
        drop(self.child.stdin.take());
        let end = Instant::now() + PATIENCE;
        let mut pause = Duration::from_millis(1);
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > end {
                let _ = self.child.kill();
                let _ = self.child.wait();
                let said = self.stderr.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
                panic!(
                    "{} did not end within {} s; stderr: {}",
                    self.what,
                    PATIENCE.as_secs(),
                    String::from_utf8_lossy(&said)
                );
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        };
        let text = |receiver: &mpsc::Receiver<Vec<u8>>| {
            let bytes = receiver.recv_timeout(Duration::from_secs(10));
            let bytes = bytes.unwrap_or_else(|_| {
                panic!("{}: somebody holds its output open after its end", self.what)
            });
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (stdout, stderr) = (text(&self.stdout), text(&self.stderr));
        Ran { what: self.what.clone(), status, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Runs a program to its end.
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Ran {
    start(command.stdin(Stdio::null())).finish()
}

/// A program with arguments.
pub(crate) fn command<A: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = A>,
) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// The words of a shell-like line (no quoting), or a list of anything path-like.
#[macro_export]
macro_rules! args {
    ($($word:expr),* $(,)?) => { [$(std::ffi::OsString::from($word)),*] };
}

/// Runs a tool that must succeed; gives its standard output.
#[track_caller]
pub(crate) fn tool<A: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = A>) -> String {
    run(&mut command(name, arguments)).ok()
}

/// A line for the shell (`sh -ec`) that must succeed.
#[track_caller]
pub(crate) fn sh(script: &str) -> String {
    tool("sh", ["-ec", script])
}

/// Where the program under test is.
pub(crate) fn imgdm_path() -> PathBuf {
    std::env::var_os("IMGDM").map_or_else(|| env!("CARGO_BIN_EXE_imgdm").into(), PathBuf::from)
}

/// imgdm with arguments, not yet started.
pub(crate) fn imgdm_command<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Command {
    command(imgdm_path(), arguments)
}

/// Runs imgdm.
#[track_caller]
pub(crate) fn imgdm<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Ran {
    run(&mut imgdm_command(arguments))
}

/// Attaches, which must succeed and print the path of the device and nothing else.
#[track_caller]
pub(crate) fn attach<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Device {
    let mut all = vec![OsString::from("attach")];
    all.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
    let printed = imgdm(all).ok();
    let path = printed.strip_suffix('\n').unwrap_or_else(|| panic!("printed {printed:?}"));
    let name = path.strip_prefix("/dev/mapper/").unwrap_or_else(|| panic!("printed {printed:?}"));
    Device { name: name.to_owned(), path: path.into() }
}

/// An attached image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

impl Device {
    /// Detaches it by its name; nothing may be left when that returns.
    #[track_caller]
    pub(crate) fn detach(&self) {
        assert_eq!(imgdm(["detach", &self.name]).ok(), "");
    }

    /// major:minor of the device.
    pub(crate) fn number(&self) -> String {
        let rdev = fs::metadata(&self.path).unwrap().rdev();
        format!("{}:{}", libc::major(rdev), libc::minor(rdev))
    }

    /// All its bytes, from the kernel below and not from its page cache.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        forget(&self.path);
        fs::read(&self.path)
            .unwrap_or_else(|error| panic!("cannot read {}: {error}", self.path.display()))
    }

    pub(crate) fn sha256(&self) -> String {
        drop_caches();
        sha256(&self.path)
    }
}

pub(crate) fn qemu_img<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Ran {
    run(&mut command("qemu-img", arguments))
}

/// `qemu-io -f FORMAT -c COMMAND... IMAGE`.
pub(crate) fn qemu_io(image: &Path, format: &str, commands: &[&str]) -> Ran {
    let mut line = command("qemu-io", ["-f", format]);
    for each in commands {
        line.args(["-c", each]);
    }
    run(line.arg(image))
}

/// Writes to an image by qemu-io commands, all of which must succeed.
#[track_caller]
pub(crate) fn write_image(image: &Path, format: &str, commands: &[&str]) {
    let ran = qemu_io(image, format, commands);
    let failed = ran.stdout.contains("failed") || !ran.stderr.is_empty();
    assert!(ran.status.success() && !failed, "{ran}");
}

/// Writes over bytes of a file.
pub(crate) fn patch(file: &Path, offset: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(file).unwrap().write_all_at(bytes, offset).unwrap();
}

/// A QEMU that has an image open for writing, as a running machine has.
pub(crate) struct Writer(Running);

impl Writer {
    /// Returns once QEMU holds its locks.
    #[track_caller]
    pub(crate) fn open(image: &Path, format: &str) -> Self {
        let mut line = command("qemu-io", ["-f", format]);
        let mut running = start(line.arg(image).stdin(Stdio::piped()));
        let id = fs::metadata(image).unwrap();
        // Its last step of opening for writing is the lock on byte 201.
        wait_for("qemu-io to lock the image", || {
            running.child.try_wait().unwrap().is_some() || holds_lock(&id, 101)
        });
        assert!(running.child.try_wait().unwrap().is_none(), "{}", running.finish());
        Self(running)
    }

    #[track_caller]
    pub(crate) fn close(mut self) {
        self.0.tell("quit");
        self.0.finish().ok();
    }
}

/// Whether anybody holds an open file description lock on that byte of a file.
pub(crate) fn holds_lock(file: &fs::Metadata, byte: u64) -> bool {
    locks().iter().any(|lock| {
        // 1: OFDLCK ADVISORY  READ -1 00:1a:25 100 101
        let fields: Vec<_> = lock.split_whitespace().collect();
        let inode = fields.get(5).and_then(|id| id.rsplit(':').next()?.parse::<u64>().ok());
        let number = |at: usize| fields.get(at).and_then(|text| text.parse::<u64>().ok());
        inode == Some(file.ino())
            && number(6).is_some_and(|first| first <= byte)
            && number(7).is_none_or(|last| byte <= last)
    })
}

/// The open file description locks of the whole guest: only QEMU and imgdm take any.
pub(crate) fn locks() -> Vec<String> {
    let all = fs::read_to_string("/proc/locks").unwrap();
    all.lines().filter(|line| line.contains("OFDLCK")).map(str::to_owned).collect()
}

// --- Contents -------------------------------------------------------------------------

/// Drops the page cache of one file or device. Cheaper than [`drop_caches`], after which
/// the guest reads every program anew from its host.
pub(crate) fn forget(path: &Path) {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    let file =
        File::open(path).unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()));
    file.sync_all().unwrap();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// Drops the clean page cache, after writing out the dirty one.
pub(crate) fn drop_caches() {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").expect("cannot drop the page cache");
}

/// By the tool: this one is built without optimization.
#[track_caller]
pub(crate) fn sha256(path: &Path) -> String {
    let printed = tool("sha256sum", [path]);
    printed.trim_start_matches('\\').split(' ').next().unwrap().to_owned()
}

/// What QEMU reads in the image. `options` as `-l NAME`, `-U`, `--image-opts`.
#[track_caller]
pub(crate) fn qemu_content(scratch: &Scratch, image: &Path, options: &[&str]) -> Vec<u8> {
    let raw = scratch.path("oracle.raw");
    let mut line = command("qemu-img", ["convert", "-O", "raw"]);
    run(line.args(options).arg(image).arg(&raw)).ok();
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    bytes
}

/// Fails with the first place where the two differ.
#[track_caller]
pub(crate) fn assert_same(what: &str, got: &[u8], wanted: &[u8]) {
    if got == wanted {
        return;
    }
    let at = got.iter().zip(wanted).position(|(a, b)| a != b);
    let at = at.unwrap_or_else(|| got.len().min(wanted.len()));
    let differing = got.iter().zip(wanted).filter(|(a, b)| a != b).count();
    panic!(
        "{what}: {} bytes instead of {}, {differing} differ, the first at {at:#x}: {:02x?} instead of {:02x?}",
        got.len(),
        wanted.len(),
        got.get(at),
        wanted.get(at)
    );
}

/// Reads around the page cache; offset and length by 512 bytes.
pub(crate) fn read_direct(path: &Path, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let mut buffer = vec![0u8; length + 4096];
    let start = buffer.as_ptr().align_offset(4096);
    file.read_exact_at(&mut buffer[start..start + length], offset)?;
    buffer.copy_within(start..start + length, 0);
    buffer.truncate(length);
    Ok(buffer)
}

/// Reads of random places and lengths, through the page cache and around it, compared
/// with the whole content.
#[track_caller]
pub(crate) fn assert_random_reads(path: &Path, wanted: &[u8], seed: u64) {
    let file = File::open(path).unwrap();
    let mut random = Random(seed);
    forget(path);
    for round in 0..40 {
        let direct = round % 2 == 0;
        let unit = if direct { 512 } else { 1 };
        let units = wanted.len() as u64 / unit;
        let start = random.below(units) * unit;
        let most = (wanted.len() as u64 - start).min(48 * KIB);
        let length = usize::try_from((random.below(most) / unit * unit).max(unit)).unwrap();
        let from = usize::try_from(start).unwrap();
        let bytes = if direct {
            read_direct(path, start, length).unwrap()
        } else {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, start).unwrap();
            bytes
        };
        let what = format!("{} at {start}+{length} (direct: {direct})", path.display());
        assert_same(&what, &bytes, &wanted[from..from + length]);
    }
}

/// A small generator (xorshift): the same numbers in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit.max(1)
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.below(256).to_le_bytes()[0]).collect()
    }
}

// --- Waiting --------------------------------------------------------------------------

/// Whether it comes true within that time.
pub(crate) fn within(time: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + time;
    loop {
        if done() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Waits for it, at most [`SETTLE`].
#[track_caller]
pub(crate) fn wait_for(what: &str, done: impl FnMut() -> bool) {
    assert!(within(SETTLE, done), "waited {} s for {what}", SETTLE.as_secs());
}

// --- What is there --------------------------------------------------------------------

/// Name and UUID of every device-mapper device, loaded or not.
pub(crate) fn dm_devices() -> Vec<(String, String)> {
    let line = ["info", "-c", "--noheadings", "--separator", "\t", "-o", "name,uuid"];
    let printed = tool("dmsetup", line);
    // "No devices found" has no separator.
    let devices = printed.lines().filter_map(|line| line.split_once('\t'));
    devices.map(|(name, uuid)| (name.to_owned(), uuid.to_owned())).collect()
}

/// Those of imgdm.
pub(crate) fn our_devices() -> Vec<String> {
    let ours = dm_devices().into_iter().filter(|(_, uuid)| uuid.contains(UUID_PREFIX));
    ours.map(|(name, _)| name).collect()
}

/// Loops that are bound: number, file, and whether they are imgdm's.
pub(crate) fn loops() -> Vec<(String, String, bool)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block").unwrap().flatten() {
        let attribute = |name: &str| fs::read_to_string(entry.path().join("loop").join(name));
        let Ok(file) = attribute("backing_file") else { continue };
        let limit = attribute("sizelimit").unwrap_or_default();
        let name = entry.file_name().to_string_lossy().into_owned();
        let ours = limit.trim() == LOOP_SIZE_LIMIT.to_string();
        found.push((name, file.trim_end_matches('\n').to_owned(), ours));
    }
    found
}

/// The numbers of all processes but this one.
pub(crate) fn processes() -> Vec<u32> {
    let numbers = fs::read_dir("/proc").unwrap().flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter(|&pid| pid != std::process::id()).collect()
}

/// Processes that are imgdm, or that have a device-mapper or loop device or a file under
/// `held` open, in words.
pub(crate) fn our_processes(held: Option<&Path>) -> Vec<String> {
    let imgdm = fs::canonicalize(imgdm_path()).unwrap();
    let mut found = Vec::new();
    for pid in processes() {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let comm = comm.trim_end();
        if fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| {
            Path::new(exe.to_string_lossy().trim_end_matches(" (deleted)")) == imgdm
        }) {
            found.push(format!("{pid} ({comm}) is imgdm"));
        }
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        for entry in open {
            let Ok(path) = fs::read_link(entry.path()) else { continue };
            let block = fs::metadata(entry.path()).is_ok_and(|m| m.file_type().is_block_device());
            if block || held.is_some_and(|held| path.starts_with(held)) {
                found.push(format!("{pid} ({comm}) has {} open", path.display()));
            }
        }
    }
    found
}

/// All that is left of imgdm in this system, in words; `held` is a directory of images.
pub(crate) fn left(held: Option<&Path>) -> Vec<String> {
    let mut left = Vec::new();
    left.extend(our_devices().into_iter().map(|name| format!("the device {name}")));
    for (name, file, ours) in loops() {
        if ours || held.is_some_and(|held| Path::new(&file).starts_with(held)) {
            left.push(format!("{name} over {file}"));
        }
    }
    left.extend(locks().into_iter().map(|lock| format!("the lock {lock}")));
    left.extend(our_processes(held).into_iter().map(|process| format!("process {process}")));
    for entry in fs::read_dir("/dev/mapper").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name != "control" && !is_live_device(&entry.path()) {
            left.push(format!("the node /dev/mapper/{name}"));
        }
    }
    left
}

/// Whether a node leads to a device-mapper device that exists under that name.
fn is_live_device(node: &Path) -> bool {
    let Ok(metadata) = fs::metadata(node) else { return false };
    let number = format!("{}:{}", libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    let name = fs::read_to_string(format!("/sys/dev/block/{number}/dm/name"));
    name.is_ok_and(|name| node.file_name() == Some(OsStr::new(name.trim_end())))
}

/// Fails where anything of imgdm is there now.
#[track_caller]
pub(crate) fn assert_nothing_left() {
    let left = left(None);
    assert!(left.is_empty(), "left behind: {left:#?}");
}

/// Waits until nothing of imgdm is there, at most [`SETTLE`].
#[track_caller]
pub(crate) fn assert_nothing_left_soon() {
    if !within(SETTLE, || left(None).is_empty()) {
        panic!("left behind after {} s: {:#?}", SETTLE.as_secs(), left(None));
    }
}

/// Fails where a process of ours runs or anybody holds a file of that directory.
#[track_caller]
pub(crate) fn assert_no_process(held: &Path) {
    let found = our_processes(Some(held));
    assert!(found.is_empty(), "{found:#?}");
}

// --- Places ---------------------------------------------------------------------------

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A directory of a test's own. When it goes, nothing of imgdm may be left.
#[derive(Debug)]
pub(crate) struct Scratch {
    directory: PathBuf,
}

impl Scratch {
    /// On tmpfs.
    #[track_caller]
    pub(crate) fn new() -> Self {
        Self::under(Path::new("/tmp"))
    }

    /// On the ext4 disk (IMGDM_TEST_DISK), where O_DIRECT works.
    #[track_caller]
    pub(crate) fn on_disk() -> Self {
        Self::under(disk())
    }

    #[track_caller]
    pub(crate) fn under(place: &Path) -> Self {
        assert_nothing_left();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = place.join(format!("scratch{number}"));
        fs::create_dir_all(&directory).unwrap();
        Self { directory }
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// `qemu-img create -f FORMAT [OPTION...] NAME SIZE`; gives its path.
    #[track_caller]
    pub(crate) fn create(&self, format: &str, options: &[&str], name: &str, size: &str) -> PathBuf {
        let path = self.path(name);
        let mut line = command("qemu-img", ["create", "-q", "-f", format]);
        // Relative names of backing and data files are looked for beside the image.
        line.args(options).arg(&path).current_dir(&self.directory);
        if !size.is_empty() {
            line.arg(size);
        }
        run(&mut line).ok();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if thread::panicking() {
            // So that the next test does not fail for this one's sake.
            clean_up();
        } else {
            let left = left(Some(&self.directory));
            if !left.is_empty() {
                clean_up();
                panic!("left behind: {left:#?}");
            }
        }
        let removed = fs::remove_dir_all(&self.directory);
        if !thread::panicking() {
            removed.unwrap();
        }
    }
}

/// Takes away all that a failed test may have left. This is the guest: nobody else's
/// devices are here.
fn clean_up() {
    let mut notes = String::new();
    for pid in processes() {
        let imgdm = fs::canonicalize(imgdm_path()).unwrap();
        if fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == imgdm) {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for mount in mounts.lines().filter(|line| line.starts_with("/dev/dm-")) {
        if let Some(place) = mount.split(' ').nth(1) {
            let place = place.replace("\\040", " ");
            let _ = nix::mount::umount2(place.as_str(), nix::mount::MntFlags::MNT_DETACH);
        }
    }
    for _ in 0..4 {
        for (name, _) in dm_devices() {
            let ran = run(&mut command("dmsetup", ["remove", "--force", "--noudevsync", &name]));
            if !ran.status.success() {
                let _ = writeln!(notes, "{ran}");
            }
        }
    }
    for (name, _, ours) in loops() {
        if ours {
            let _ = run(&mut command("losetup", ["-d", &format!("/dev/{name}")]));
        }
    }
    for entry in fs::read_dir("/dev/mapper").into_iter().flatten().flatten() {
        if entry.file_name() != "control" && !is_live_device(&entry.path()) {
            let _ = fs::remove_file(entry.path());
        }
    }
    if !within(SETTLE, || left(None).is_empty()) {
        eprintln!("cannot clean up: {:#?}\n{notes}", left(None));
    }
}

/// The mount point of the ext4 disk, made when it is first asked for.
pub(crate) fn disk() -> &'static Path {
    static DISK: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    DISK.get_or_init(|| {
        let device = std::env::var("IMGDM_TEST_DISK").expect("IMGDM_TEST_DISK names no disk");
        let place = PathBuf::from("/run/imgdm-test-disk");
        fs::create_dir_all(&place).unwrap();
        tool("mkfs.ext4", ["-q", "-F", "-E", "nodiscard,lazy_itable_init=1", &device]);
        tool("mount", [OsString::from(device), place.clone().into()]);
        place
    })
}

/// A block device that a test may write over (IMGDM_TEST_BLOCK).
pub(crate) fn block_device() -> PathBuf {
    std::env::var_os("IMGDM_TEST_BLOCK").expect("IMGDM_TEST_BLOCK names no block device").into()
}

/// A file system made by `mkfs.KIND` in a file, on a loop of its own, and mounted.
#[derive(Debug)]
pub(crate) struct Mounted {
    pub(crate) place: PathBuf,
    /// The loop device, which stays bound while the file system is not mounted.
    pub(crate) source: PathBuf,
    kind: String,
    file: PathBuf,
}

impl Mounted {
    /// `size` bytes, sparse, under `place`.
    #[track_caller]
    pub(crate) fn make(kind: &str, place: &Path, size: u64) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let file = place.join(format!("{kind}{number}.fs"));
        File::create(&file).unwrap().set_len(size).unwrap();
        let force = if kind == "ext4" { "-F" } else { "-f" };
        tool(&format!("mkfs.{kind}"), args!["-q", force, &file]);
        let source = tool("losetup", args!["--show", "-f", &file]).trim().into();
        let place = PathBuf::from(format!("/run/mounted{number}"));
        fs::create_dir_all(&place).unwrap();
        let mounted = Self { place, source, kind: kind.to_owned(), file };
        mounted.mount().unwrap();
        mounted
    }

    /// By the system call: no program's start gives anybody time.
    pub(crate) fn mount(&self) -> nix::Result<()> {
        let (source, kind) = (Some(&self.source), Some(self.kind.as_str()));
        let options: Option<&str> = None;
        nix::mount::mount(source, &self.place, kind, nix::mount::MsFlags::empty(), options)
    }

    /// The same way.
    pub(crate) fn umount(&self) -> nix::Result<()> {
        nix::mount::umount(&self.place)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Later than any test's assertion: what holds it is told by those.
        let _ = nix::mount::umount2(&self.place, nix::mount::MntFlags::MNT_DETACH);
        let _ = run(&mut command("losetup", [OsStr::new("-d"), self.source.as_os_str()]));
        let _ = fs::remove_file(&self.file);
    }
}

/// A tmpfs of its own: whatever lies there is a test's, so that its free space is known.
#[derive(Debug)]
pub(crate) struct Tmpfs {
    pub(crate) place: PathBuf,
}

impl Tmpfs {
    /// Mounts one of `size` bytes over `place`, which is made where it is missing.
    #[track_caller]
    pub(crate) fn over(place: impl Into<PathBuf>, size: u64) -> Self {
        Self::with(place.into(), size, nix::mount::MsFlags::empty())
    }

    /// The same, read-only.
    #[track_caller]
    pub(crate) fn read_only(place: impl Into<PathBuf>) -> Self {
        Self::with(place.into(), MIB, nix::mount::MsFlags::MS_RDONLY)
    }

    #[track_caller]
    fn with(place: PathBuf, size: u64, flags: nix::mount::MsFlags) -> Self {
        fs::create_dir_all(&place).unwrap();
        let options = format!("size={size}");
        let kind = Some("tmpfs");
        nix::mount::mount(kind, &place, kind, flags, Some(options.as_str())).unwrap();
        Self { place }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let gone = nix::mount::umount(&self.place);
        if gone.is_err() {
            let _ = nix::mount::umount2(&self.place, nix::mount::MntFlags::MNT_DETACH);
        }
        // Nobody may hold anything there any more.
        if !thread::panicking() {
            gone.unwrap();
        }
    }
}

/// The free bytes of the file system at `place`, all that is pending written out.
pub(crate) fn free_bytes(place: &Path) -> u64 {
    nix::unistd::sync();
    let found = nix::sys::statvfs::statvfs(place).unwrap();
    found.blocks_free() * found.fragment_size()
}

/// What `imgdm list --output=json` prints.
#[track_caller]
pub(crate) fn listed() -> Vec<serde_json::Value> {
    let printed = imgdm(["list", "--output=json"]).ok();
    serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"))
}
