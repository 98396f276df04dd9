//! Encrypted layers are decrypted by the kernel to what QEMU reads, and their keys are
//! nowhere but in it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use imgdm::crypt::Passphrase;
use imgdm::open::{OpenPolicy, open_chain};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;

use crate::args;
use crate::guest::*;
use crate::verify::assert_verified;

pub(crate) const PASSPHRASE: &str = "a passphrase with 7 words in it";

/// An image that QEMU opens with a passphrase.
pub(crate) struct Encrypted {
    pub(crate) path: PathBuf,
    format: &'static str,
    passphrase: String,
}

impl Encrypted {
    pub(crate) fn create(
        scratch: &Scratch,
        format: &'static str,
        name: &str,
        options: &str,
        backing: &[&str],
        passphrase: &str,
    ) -> Self {
        let path = scratch.path(name);
        let secret = format!("secret,id=key,data={passphrase}");
        let options = format!("{options},encrypt.key-secret=key");
        let mut line = command("qemu-img", ["create", "-q", "-f", format, "--object", &secret]);
        line.args(["-o", &options]).args(backing).arg(&path).current_dir(scratch.directory());
        if backing.is_empty() {
            line.arg("2M");
        }
        run(&mut line).ok();
        Self { path, format, passphrase: passphrase.to_owned() }
    }

    pub(crate) fn luks(scratch: &Scratch, name: &str, options: &str) -> Self {
        let options = format!("encrypt.format=luks,encrypt.iter-time=10{options}");
        Self::create(scratch, "qcow2", name, &options, &[], PASSPHRASE)
    }

    /// How QEMU is told of the image and its secret.
    fn opts(&self) -> String {
        let path = self.path.display();
        format!("driver={},encrypt.key-secret=key,file.filename={path}", self.format)
    }

    fn secret(&self) -> String {
        format!("secret,id=key,data={}", self.passphrase)
    }

    pub(crate) fn write(&self, commands: &[&str]) {
        let secret = self.secret();
        let mut line = command("qemu-io", ["--object", &secret]);
        for command in commands {
            line.args(["-c", command]);
        }
        let ran = run(line.args(["--image-opts", &self.opts()]));
        assert!(ran.status.success() && !ran.stdout.contains("failed"), "{ran}");
    }

    fn content(&self, scratch: &Scratch) -> Vec<u8> {
        let raw = scratch.path("oracle.raw");
        let (secret, opts) = (self.secret(), self.opts());
        let line = ["convert", "--object", &secret, "--image-opts", "-O", "raw", &opts];
        run(command("qemu-img", line).arg(&raw)).ok();
        let bytes = fs::read(&raw).unwrap();
        fs::remove_file(raw).unwrap();
        bytes
    }

    pub(crate) fn key_file(&self, scratch: &Scratch) -> PathBuf {
        let path = scratch.path("key");
        fs::write(&path, &self.passphrase).unwrap();
        path
    }
}

pub(crate) const PATTERN: &[&str] =
    &["write -P 1 0 5k", "write -P 2 300k 70k", "write -P 3 17k 512", "write -P 4 1900k 100k"];

#[track_caller]
fn assert_decrypted(scratch: &Scratch, image: &Encrypted) {
    let key = image.key_file(scratch);
    let device = attach(args!["--key-file", &key, &image.path]);
    assert_same(&image.path.display().to_string(), &device.bytes(), &image.content(scratch));
    assert_verified(args![&device.name]);
    assert_verified(args!["--content", "--key-file", &key, &device.name]);
    device.detach();
    assert_nothing_left();
}

#[test]
fn luks_reads_as_qemu_reads_it_with_the_ciphers_that_the_kernel_has() {
    let scratch = Scratch::new();
    let ciphers = [
        ("aes-256", "xts", "plain64"),
        ("aes-128", "cbc", "essiv,encrypt.ivgen-hash-alg=sha256"),
        ("aes-192", "xts", "plain"),
        ("aes-256", "cbc", "plain64"),
        ("aes-256", "ctr", "plain64"),
        ("aes-256", "ecb", "plain64"),
        ("aes-128", "xts", "plain64"),
        ("aes-192", "cbc", "plain"),
        ("serpent-256", "xts", "plain64"),
        ("serpent-192", "xts", "plain64"),
        ("serpent-128", "cbc", "plain64"),
        ("twofish-256", "xts", "plain64"),
        ("twofish-192", "xts", "plain64"),
        ("twofish-128", "cbc", "essiv,encrypt.ivgen-hash-alg=sha256"),
        ("cast5-128", "cbc", "plain64"),
        ("sm4", "xts", "plain64"),
    ];
    let (mut same, mut lacking) = (Vec::new(), Vec::new());
    for (index, (cipher, mode, iv)) in ciphers.into_iter().enumerate() {
        let what = format!("{cipher} {mode} {iv}");
        let options = format!(
            "encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg={cipher},encrypt.cipher-mode={mode},encrypt.ivgen-alg={iv},encrypt.key-secret=key"
        );
        let path = scratch.path(&format!("{index}.qcow2"));
        let secret = format!("secret,id=key,data={PASSPHRASE}");
        let line = ["create", "-q", "-f", "qcow2", "--object", &secret, "-o", &options];
        if !run(command("qemu-img", line).arg(&path).arg("2M")).status.success() {
            continue; // QEMU's own library lacks it, or such a pair makes no sense.
        }
        let image = Encrypted { path, format: "qcow2", passphrase: PASSPHRASE.to_owned() };
        image.write(PATTERN);
        let key = image.key_file(&scratch);
        let ran = imgdm(args!["attach", "--key-file", &key, &image.path]);
        if ran.code() == Some(69) {
            assert!(ran.stderr.contains("lacks"), "{ran}");
            lacking.push(what);
            assert_nothing_left();
            continue;
        }
        imgdm(args!["detach", &image.path]).ok();
        assert_decrypted(&scratch, &image);
        same.push(what);
    }
    println!("the same: {same:?}; lacking: {lacking:?}");
    assert!(same.len() >= 3 && same[0].starts_with("aes-256 xts"), "{same:?}, {lacking:?}");
}

#[test]
fn legacy_aes_reads_as_qemu_reads_it() {
    let scratch = Scratch::new();
    for (format, passphrase) in
        [("qcow2", "short"), ("qcow", "short"), ("qcow2", "longer than sixteen bytes")]
    {
        let name = format!("{}.{format}", passphrase.len());
        let options = "encrypt.format=aes";
        let image = Encrypted::create(&scratch, format, &name, options, &[], passphrase);
        image.write(PATTERN);
        assert_decrypted(&scratch, &image);
    }
}

#[test]
fn a_chain_of_differently_encrypted_layers_takes_a_key_for_each() {
    let scratch = Scratch::new();
    let base = scratch.create("qcow2", &[], "base.qcow2", "2M");
    write_image(&base, "qcow2", &["write -P 9 0 1M"]);
    let below = ["-b", "base.qcow2", "-F", "qcow2"];
    let aes = "encrypt.format=aes";
    let middle = Encrypted::create(&scratch, "qcow2", "middle.qcow2", aes, &below, "middle's");
    middle.write(&["write -P 8 64k 192k"]);
    let middle_content = middle.content(&scratch);
    let below = ["-b", "middle.qcow2", "-F", "qcow2"];
    let luks = "encrypt.format=luks,encrypt.iter-time=10";
    let top = Encrypted::create(&scratch, "qcow2", "top.qcow2", luks, &below, "top's");
    let (keys, raw) = (["top's", "middle's"], scratch.path("oracle.raw"));
    // QEMU has to be told of both secrets, and by which layer each is used.
    let opts = format!(
        "driver=qcow2,encrypt.key-secret=k0,file.filename={},backing.encrypt.key-secret=k1",
        top.path.display()
    );
    let objects = ["--object", "secret,id=k0,data=top's", "--object", "secret,id=k1,data=middle's"];
    let mut io = command("qemu-io", objects);
    run(io
        .args(["-c", "write -P 7 128k 64k", "--image-opts", &opts])
        .current_dir(scratch.directory()))
    .ok();
    let mut convert = command("qemu-img", ["convert"]);
    convert.args(objects).args(["--image-opts", "-O", "raw", &opts]).arg(&raw);
    run(convert.current_dir(scratch.directory())).ok();
    let wanted = fs::read(&raw).unwrap();
    assert_ne!(wanted, middle_content);

    for (layer, key) in keys.iter().enumerate() {
        fs::write(scratch.path(&format!("key{layer}")), key).unwrap();
    }
    let argument =
        |layer: usize| format!("{}:{layer}", scratch.path(&format!("key{layer}")).display());
    let device = attach(args!["--key-file", argument(0), "--key-file", argument(1), &top.path]);
    assert_same("the chain", &device.bytes(), &wanted);
    // Attached already: no key is needed to find it.
    assert_eq!(attach([&top.path]), device);
    device.detach();
    assert_nothing_left();
}

#[test]
fn compressed_clusters_of_an_encrypted_image_do_not_pass_the_cipher() {
    let scratch = Scratch::new();
    let image = Encrypted::luks(&scratch, "disk.qcow2", "");
    image.write(&["write -P 1 0 64k", "write -c -P 2 64k 64k", "write -P 3 192k 64k"]);
    assert_decrypted(&scratch, &image);
}

#[test]
fn a_wrong_or_missing_key_is_67_and_leaves_nothing() {
    let scratch = Scratch::new();
    let image = Encrypted::luks(&scratch, "disk.qcow2", "");
    image.write(PATTERN);
    let key = scratch.path("wrong");
    fs::write(&key, "wrong\n").unwrap();
    let said = imgdm(args!["attach", "--key-file", &key, &image.path]).refused(67);
    assert!(said.contains("disk.qcow2") && said.contains("newline"), "{said}");
    assert_nothing_left();
    let mut line = imgdm_command(args!["attach", &image.path]);
    // No terminal.
    let said = run(line.stdin(Stdio::null())).refused(67);
    assert!(said.contains("disk.qcow2") && said.contains("--key-file"), "{said}");
    assert_nothing_left();
    let unused = scratch.path("unused");
    fs::write(&unused, "x").unwrap();
    let argument = format!("{}:5", unused.display());
    imgdm(args!["attach", "--key-file", argument, &image.path]).refused(64);
    assert_nothing_left();
}

/// Where in a process's memory these bytes are.
fn found_in_memory(pid: u32, needle: &[u8]) -> Vec<String> {
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut found = Vec::new();
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (range, rights) = (words.next().unwrap(), words.next().unwrap());
        if !rights.starts_with('r') || line.contains("[v") {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        let mut bytes = vec![0; usize::try_from(number(end) - number(start)).unwrap()];
        if memory.read_exact_at(&mut bytes, number(start)).is_ok()
            && memchr::memmem::find(&bytes, needle).is_some()
        {
            found.push(line.to_owned());
        }
    }
    found
}

fn volume_key(image: &Path) -> Vec<u8> {
    let opened = open_chain(image, &OpenPolicy::default()).unwrap();
    let layer = &opened.chain.layers()[0];
    let header = layer.image.crypt_header().unwrap().unwrap();
    let passphrase = Passphrase::new(PASSPHRASE.as_bytes().to_vec().into());
    header.unlock(&layer.source, &passphrase).unwrap().bytes().to_vec()
}

/// Lets the first key slot of a LUKS image take hours to try.
fn make_slow(image: &Path) {
    let bytes = fs::read(image).unwrap();
    let header = memchr::memmem::find(&bytes, b"LUKS\xba\xbe").unwrap();
    patch(image, u64::try_from(header).unwrap() + 208 + 4, &u32::MAX.to_be_bytes());
}

/// Attaching it, in the midst of hashing the passphrase.
#[track_caller]
fn start_unlocking(image: &Path, key_file: &Path) -> Running {
    let mut line = imgdm_command(args!["attach", "--key-file", key_file, image]);
    let running = start(line.stdin(Stdio::null()));
    let tasks = format!("/proc/{}/task", running.id());
    wait_for("it to hash the passphrase", || {
        let tasks = fs::read_dir(&tasks).into_iter().flatten().flatten();
        let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm"));
        tasks.map(name).any(|name| name.is_ok_and(|name| name == "unlock\n"))
    });
    running
}

/// The files that cores are written to while it lives, whoever dumps them.
struct Cores {
    place: PathBuf,
    before: String,
    limits: (u64, u64),
}

const CORE_PATTERN: &str = "/proc/sys/kernel/core_pattern";

impl Cores {
    fn into(place: PathBuf) -> Self {
        fs::create_dir(&place).unwrap();
        let before = fs::read_to_string(CORE_PATTERN).unwrap();
        fs::write(CORE_PATTERN, format!("{}/core.%p", place.display())).unwrap();
        let limits = getrlimit(Resource::RLIMIT_CORE).unwrap();
        setrlimit(Resource::RLIMIT_CORE, RLIM_INFINITY, RLIM_INFINITY).unwrap();
        Self { place, before, limits }
    }

    fn written(&self) -> Vec<PathBuf> {
        fs::read_dir(&self.place).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        let _ = fs::write(CORE_PATTERN, self.before.trim_end());
        let _ = setrlimit(Resource::RLIMIT_CORE, self.limits.0, self.limits.1);
    }
}

#[test]
fn while_it_unlocks_a_process_dumps_no_core_and_its_memory_is_locked() {
    let scratch = Scratch::new();
    let image = Encrypted::luks(&scratch, "disk.qcow2", "");
    image.write(PATTERN);
    let key_file = image.key_file(&scratch);
    let plain = scratch.create("qcow2", &[], "plain.qcow2", "1M");
    write_image(&plain, "qcow2", &["write -P 1 0 64k"]);
    let cores = Cores::into(scratch.path("cores"));

    // Without a key it does dump one, so that none is no accident.
    let mut line = imgdm_command(args!["attach", &plain]);
    let running = start(line.env("IMGDM_FAULT", "loop0:stop").stdin(Stdio::null()));
    wait_for("imgdm to stop", || running.is_stopped());
    running.signal(Signal::SIGABRT);
    running.signal(Signal::SIGCONT);
    assert_eq!(running.finish().signal(), Some(Signal::SIGABRT as i32));
    let written = cores.written();
    assert_eq!(written.len(), 1, "{written:?}");
    let core = fs::read(&written[0]).unwrap();
    assert!(memchr::memmem::find(&core, b"plain.qcow2").is_some());
    fs::remove_file(&written[0]).unwrap();
    assert_nothing_left_soon();

    make_slow(&image.path);
    for signal in [Signal::SIGABRT, Signal::SIGQUIT] {
        let running = start_unlocking(&image.path, &key_file);
        let pid = running.id();
        // Here it has the passphrase, which a core would show.
        assert!(!found_in_memory(pid, PASSPHRASE.as_bytes()).is_empty());
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
        let locked: u64 = locked.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(locked > 1000, "{locked} kB are locked");
        running.signal(signal);
        assert_eq!(running.finish().signal(), Some(signal as i32));
        assert_eq!(cores.written(), Vec::<PathBuf>::new(), "{signal}");
        assert_nothing_left_soon();
    }
}

#[test]
fn a_signal_in_the_middle_of_unlocking_leaves_nothing() {
    let scratch = Scratch::new();
    let image = Encrypted::luks(&scratch, "disk.qcow2", "");
    image.write(PATTERN);
    let key_file = image.key_file(&scratch);
    make_slow(&image.path);
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let running = start_unlocking(&image.path, &key_file);
        running.signal(signal);
        let ran = running.finish();
        assert_eq!((ran.signal(), ran.stdout.as_str()), (Some(signal as i32), ""), "{ran}");
        assert_nothing_left();
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn once_the_kernel_has_the_key_it_is_nowhere_else() {
    let scratch = Scratch::new();
    let image = Encrypted::luks(&scratch, "disk.qcow2", "");
    image.write(PATTERN);
    let key_file = image.key_file(&scratch);
    let key = volume_key(&image.path);
    assert_eq!(key.len(), 64);
    for step in ["inner0.create", "commit"] {
        let mut line = imgdm_command(args!["attach", "--key-file", &key_file, &image.path]);
        let running = start(line.env("IMGDM_FAULT", format!("{step}:stop")).stdin(Stdio::null()));
        wait_for("imgdm to stop", || running.is_stopped());
        let pid = running.id();
        // The search itself works.
        assert!(!found_in_memory(pid, b"key-file").is_empty());
        for (what, needle) in [
            ("the passphrase", PASSPHRASE.as_bytes()),
            ("the volume's key", &key),
            ("half of the volume's key", &key[..32]),
            ("the other half", &key[32..]),
            ("the volume's key in hex", hex(&key).as_bytes()),
        ] {
            let found = found_in_memory(pid, needle);
            assert!(found.is_empty(), "at {step}, {what} is in {found:#?}");
        }
        assert_eq!(fs::metadata(format!("/proc/{pid}/mem")).unwrap().len(), 0);
        running.signal(Signal::SIGCONT);
        let ran = running.finish();
        assert!(ran.status.success(), "{ran}");
        let tables = tool("dmsetup", ["table", "--showkeys"]);
        let log = tool("dmesg", ["-x"]);
        let keys = fs::read_to_string("/proc/keys").unwrap_or_default();
        assert!(tables.contains(" crypt ") && tables.contains(":64:logon:imgdm:"), "{tables}");
        assert!(!keys.contains("imgdm"), "{keys}");
        for text in [&tables, &log, &ran.stdout, &ran.stderr] {
            assert!(!text.contains(&hex(&key)) && !text.contains(PASSPHRASE), "{text}");
        }
        imgdm(args!["detach", &image.path]).ok();
        assert_nothing_left();
    }
}
