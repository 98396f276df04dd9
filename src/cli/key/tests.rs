use std::fs;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use clap::Parser;
use imgdm::open::{OpenPolicy, open_chain};
use nix::pty::openpty;

use super::*;

const CLUSTER: usize = 65536;
/// Of the volume's key that [`luks`] comes to, worked out by OpenSSL and Python's hashlib.
const DIGEST: [u8; 20] = [
    0x86, 0x62, 0x65, 0x09, 0x21, 0x06, 0x18, 0x73, 0xbb, 0x63, 0xfc, 0x25, 0x59, 0xa9, 0xdb, 0xf4,
    0x07, 0x7e, 0x2e, 0xe0,
];

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    keys: KeyArgs,
}

fn parse(arguments: &[&str]) -> Result<KeyArgs, clap::Error> {
    Line::try_parse_from([&["x"], arguments].concat()).map(|line| line.keys)
}

fn sources(arguments: &[&str], credentials: Option<&Path>) -> Result<KeySources> {
    let args = parse(arguments).unwrap();
    KeySources::with(&args, credentials.map(Path::to_owned), "/nowhere/tty".into())
}

fn in_memory() -> Arc<Source> {
    Arc::new(Source::from_bytes("disk.qcow2", Vec::new()))
}

/// What opens a layer of legacy AES, whose key is the passphrase.
fn opens(sources: &KeySources, layer: u32) -> Result<String> {
    let device = DmName::new("disk").unwrap();
    let never = Interrupt::never();
    let key = sources.unlock(Some(&device), layer, &CryptHeader::Aes, &in_memory(), &never)?;
    Ok(String::from_utf8_lossy(key.bytes()).trim_end_matches('\0').to_owned())
}

/// The header of an image that "secret" opens where its slot takes one iteration of PBKDF2:
/// AES-128-CBC, salts and all key material zero.
fn luks(directory: &Path, iterations: u32) -> (CryptHeader, Arc<Source>) {
    let mut bytes = vec![0; 12 * CLUSTER];
    let mut put = |at: usize, what: &[u8]| bytes[at..at + what.len()].copy_from_slice(what);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &16u32.to_be_bytes());
    put(24, &(1u64 << 20).to_be_bytes());
    put(32, &2u32.to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &(2 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(104, &0x0537_be77u32.to_be_bytes());
    put(108, &16u32.to_be_bytes());
    put(112, &(4 * CLUSTER as u64).to_be_bytes());
    put(120, &(1008u64 * 512).to_be_bytes());
    let header = 4 * CLUSTER;
    put(header, b"LUKS\xba\xbe\0\x01");
    put(header + 8, b"aes");
    put(header + 40, b"cbc-plain");
    put(header + 72, b"sha256");
    put(header + 104, &1008u32.to_be_bytes());
    put(header + 108, &16u32.to_be_bytes());
    put(header + 112, &DIGEST);
    put(header + 164, &1u32.to_be_bytes());
    for slot in 0..8u32 {
        let at = header + 208 + slot as usize * 48;
        put(at, &if slot == 0 { 0x00ac_71f3u32 } else { 0x0000_dead }.to_be_bytes());
        put(at + 4, &iterations.to_be_bytes());
        put(at + 40, &(8 + slot * 125).to_be_bytes());
        put(at + 44, &4000u32.to_be_bytes());
    }
    let path = directory.join("luks.qcow2");
    fs::write(&path, bytes).unwrap();
    let opened = open_chain(&path, &OpenPolicy::default()).unwrap();
    let layer = &opened.chain.layers()[0];
    (layer.image.crypt_header().unwrap().unwrap(), Arc::clone(&layer.source))
}

#[test]
fn the_layer_is_the_digits_after_the_last_colon() {
    let file = |text: &str| parse_key_file(OsStr::new(text));
    let place = |path: &str, layer| KeyPlace { origin: Origin::File(path.into()), layer };
    let fd = |number, layer| KeyPlace { origin: Origin::Descriptor(number), layer };
    assert_eq!(file("key"), Ok(place("key", None)));
    assert_eq!(file("/a:b/key:12"), Ok(place("/a:b/key", Some(12))));
    assert_eq!(file("key:"), Ok(place("key:", None)));
    assert_eq!(file("key:1x"), Ok(place("key:1x", None)));
    assert_eq!(file("key:+1"), Ok(place("key:+1", None)));
    assert_eq!(file("key:3:0"), Ok(place("key:3", Some(0))));
    assert_eq!(file("-"), Ok(fd(0, None)));
    assert_eq!(file("-:2"), Ok(fd(0, Some(2))));
    assert_eq!(file("./-"), Ok(place("./-", None)));
    for bad in ["", ":1", "key:4294967296"] {
        assert!(file(bad).is_err(), "{bad}");
    }
    let bytes = OsStr::from_bytes(b"\xff:1");
    assert_eq!(
        parse_key_file(bytes).unwrap(),
        KeyPlace { origin: Origin::File(OsStr::from_bytes(b"\xff").into()), layer: Some(1) }
    );

    assert_eq!(parse_key_fd("3"), Ok(fd(3, None)));
    assert_eq!(parse_key_fd("3:1"), Ok(fd(3, Some(1))));
    for bad in ["", ":1", "-1", "+3", "x", "3:", "99999999999"] {
        assert!(parse_key_fd(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_command_line_takes_several() {
    let args = parse(&["--key-file", "-:1", "--key-file", "a", "--key-fd=7:2"]).unwrap();
    assert_eq!((args.key_file.len(), args.key_fd.len()), (2, 1));
    assert_eq!(args.key_file[0].layer, Some(1));
}

#[test]
fn the_layers_own_key_comes_before_that_for_all_before_credentials() {
    let directory = tempfile::tempdir().unwrap();
    let put = |name: &str, key: &str| {
        let path = directory.path().join(name);
        fs::write(&path, key).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let credentials = Some(directory.path());
    let (all, own) = (put("all", "for all"), put("own", "for 1") + ":1");

    assert!(opens(&sources(&[], credentials).unwrap(), 1).is_err());
    put("imgdm.key", "any");
    assert_eq!(opens(&sources(&[], credentials).unwrap(), 1).unwrap(), "any");
    put("imgdm.key.disk", "device");
    assert_eq!(opens(&sources(&[], credentials).unwrap(), 1).unwrap(), "device");
    put("imgdm.key.disk.1", "layer");
    put("imgdm.key.other.1", "other");
    let given = sources(&[], credentials).unwrap();
    assert_eq!((opens(&given, 1).unwrap(), opens(&given, 0).unwrap()).0, "layer");
    assert_eq!(opens(&given, 0).unwrap(), "device");
    let given = sources(&["--key-file", &all], credentials).unwrap();
    assert_eq!(opens(&given, 1).unwrap(), "for all");
    let given = sources(&["--key-file", &all, "--key-file", &own], credentials).unwrap();
    assert_eq!(opens(&given, 1).unwrap(), "for 1");
    assert_eq!(opens(&given, 0).unwrap(), "for all");
}

#[test]
fn a_pipe_gives_its_key_to_every_layer() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(b"from a pipe").unwrap();
    drop(writer);
    let given = sources(&["--key-fd", &reader.as_raw_fd().to_string()], None).unwrap();
    drop(reader);
    assert_eq!(opens(&given, 0).unwrap(), "from a pipe");
    assert_eq!(opens(&given, 1).unwrap(), "from a pipe");
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let refused = |arguments: &[&str]| match sources(arguments, None) {
        Ok(_) => panic!("{arguments:?}"),
        Err(error) => {
            assert!(matches!(error.kind(), ErrorKind::Usage(_)), "{error}");
            error.to_string()
        }
    };
    assert!(refused(&["--key-file", "a", "--key-file", "b"]).contains("which layer"));
    assert!(refused(&["--key-file", "a:1", "--key-fd", "0:1"]).contains("layer 1"));
    assert!(refused(&["--key-file", "-:0", "--key-fd", "0:1"]).contains("standard input"));
    assert!(refused(&["--key-fd", "1000000"]).contains("1000000"));

    let given = sources(&["--key-file", "a:3", "--key-file", "b"], None).unwrap();
    given.check_all_used(&[0, 3]).unwrap();
    let error = given.check_all_used(&[0, 1]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Usage(_)) && error.to_string().contains("layer 3"));
}

#[test]
fn a_missing_key_names_file_and_layer_and_how_to_give_one() {
    let error = opens(&sources(&[], None).unwrap(), 2).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WrongKey(_)));
    for part in ["disk.qcow2: ", "layer 2", "--key-file", "--key-fd", "imgdm.key"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    let error = opens(&sources(&["--key-file", "/nowhere/key"], None).unwrap(), 0).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NotFound(_)), "{error}");
    let error = opens(&sources(&["--key-file", "/dev/null"], None).unwrap(), 0).unwrap_err();
    assert!(error.to_string().contains("/dev/null is empty"), "{error}");
    let error = opens(&sources(&["--key-file", "/dev/zero"], None).unwrap(), 0).unwrap_err();
    assert!(error.to_string().contains("8 MiB"), "{error}");
}

#[test]
fn a_newline_at_the_end_of_a_wrong_key_is_pointed_out() {
    let directory = tempfile::tempdir().unwrap();
    let (header, source) = luks(directory.path(), 1);
    let path = directory.path().join("key");
    let unlock = |key: &str| {
        fs::write(&path, key).unwrap();
        let given = sources(&["--key-file", path.to_str().unwrap()], None).unwrap();
        let device = DmName::new("disk").unwrap();
        given.unlock(Some(&device), 0, &header, &source, &Interrupt::never())
    };
    assert_eq!(unlock("secret").unwrap().bytes().len(), 16);
    let wrong = |key| {
        let error = unlock(key).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::WrongKey(_)), "{error}");
        assert!(error.to_string().contains("luks.qcow2: wrong key"), "{error}");
        error.to_string().contains("newline")
    };
    assert!(wrong("secret\n"));
    assert!(!wrong("another"));
    assert!(!nix::sys::prctl::get_dumpable().unwrap());
}

#[test]
fn a_signal_ends_the_wait_for_a_key() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let flag = AtomicUsize::new(15);
    let error = read_key(reader.as_fd(), &Interrupt::new(&flag)).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Interrupted(15));

    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = read_file(&fifo, &Interrupt::new(&flag)).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Interrupted(15));
}

#[test]
fn a_fifo_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let key = std::thread::scope(|scope| {
        let read = scope.spawn(|| read_file(&fifo, &Interrupt::never()));
        std::thread::sleep(LOOK * 2);
        fs::write(&fifo, "late").unwrap();
        read.join().unwrap()
    });
    assert_eq!(key.unwrap().bytes(), b"late");
}

/// A terminal, and who sits at it.
struct Pty {
    person: File,
    terminal: File,
}

impl Pty {
    fn new() -> Self {
        let pty = openpty(None, None).unwrap();
        Self { person: pty.master.into(), terminal: pty.slave.into() }
    }

    fn path(&self) -> PathBuf {
        nix::unistd::ttyname(&self.terminal).unwrap()
    }

    fn attributes(&self) -> nix::libc::termios {
        tcgetattr(&self.terminal).unwrap().into()
    }

    /// Types once `prompt` is shown; gives back what was shown until then.
    fn answer(&self, prompt: &str, text: &[u8]) -> String {
        let shown = self.wait_for(prompt);
        (&self.person).write_all(text).unwrap();
        shown
    }

    fn wait_for(&self, text: &str) -> String {
        let (mut shown, start) = (Vec::new(), Instant::now());
        loop {
            assert!(start.elapsed() < Duration::from_secs(30), "{shown:?}");
            let mut byte = [0];
            let mut wait = [PollFd::new(self.person.as_fd(), PollFlags::POLLIN)];
            if poll(&mut wait, PollTimeout::from(LOOK_MS)).unwrap() > 0 {
                let count = nix::unistd::read(&self.person, &mut byte).unwrap();
                shown.extend(&byte[..count]);
            }
            if shown.ends_with(text.as_bytes()) {
                return String::from_utf8(shown).unwrap();
            }
        }
    }
}

/// Asks while `person` does what it does.
fn asked(
    pty: &Pty,
    interrupt: &Interrupt<'_>,
    person: impl FnOnce(),
) -> Result<Option<Passphrase>> {
    let before = pty.attributes();
    let typed = std::thread::scope(|scope| {
        let asking = scope.spawn(|| ask(&pty.terminal, "Key? ", interrupt));
        person();
        asking.join().unwrap()
    });
    assert!(pty.attributes() == before, "the terminal is not as it was");
    assert!(before.c_lflag & nix::libc::ECHO != 0);
    typed
}

#[test]
fn what_is_typed_is_returned_and_not_shown() {
    let pty = Pty::new();
    let typed = asked(&pty, &Interrupt::never(), || {
        pty.wait_for("Key? ");
        let now = pty.attributes();
        assert_eq!(now.c_lflag & (nix::libc::ECHO | nix::libc::ECHONL), 0);
        assert_eq!(now.c_cc[nix::libc::VSUSP], 0);
        assert_eq!(now.c_cc[nix::libc::VQUIT], 0);
        (&pty.person).write_all(b"sesame x\x7f\x7f\n").unwrap();
        assert_eq!(pty.wait_for("\n"), "\r\n");
    });
    assert_eq!(typed.unwrap().unwrap().bytes(), b"sesame");
}

#[test]
fn an_empty_line_is_a_passphrase_and_the_end_of_input_is_none() {
    let pty = Pty::new();
    let typed = asked(&pty, &Interrupt::never(), || drop(pty.answer("Key? ", b"\n")));
    assert_eq!(typed.unwrap().unwrap().bytes(), b"");
    let typed = asked(&pty, &Interrupt::never(), || drop(pty.answer("Key? ", b"\x04")));
    assert!(typed.unwrap().is_none());
    let typed = asked(&pty, &Interrupt::never(), || drop(pty.answer("Key? ", b"half\x04\x04")));
    assert_eq!(typed.unwrap().unwrap().bytes(), b"half");
}

#[test]
fn a_signal_restores_the_terminal_and_drops_what_was_half_typed() {
    let pty = Pty::new();
    let flag = AtomicUsize::new(0);
    let typed = asked(&pty, &Interrupt::new(&flag), || {
        pty.answer("Key? ", b"half a passphrase");
        std::thread::sleep(LOOK * 2);
        flag.store(2, Ordering::Relaxed);
    });
    assert_eq!(typed.unwrap_err().kind(), &ErrorKind::Interrupted(2));
    // The shell that reads on is not given it.
    (&pty.person).write_all(b"ls\n").unwrap();
    let mut line = [0; 64];
    let length = nix::unistd::read(&pty.terminal, &mut line).unwrap();
    assert_eq!(&line[..length], b"ls\n");
}

#[test]
fn a_line_that_the_terminal_cuts_off_is_no_passphrase() {
    let pty = Pty::new();
    let typed = asked(&pty, &Interrupt::never(), || {
        pty.wait_for("Key? ");
        // In pieces, as the kernel's buffer takes them.
        for piece in [[b'x'; 1000]; 5] {
            (&pty.person).write_all(&piece).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }
        (&pty.person).write_all(b"\n").unwrap();
    });
    let error = typed.unwrap_err();
    assert!(error.to_string().contains("longer than a terminal's line"), "{error}");
}

#[test]
fn a_wrong_passphrase_may_be_typed_three_times() {
    let directory = tempfile::tempdir().unwrap();
    let (header, source) = luks(directory.path(), 1);
    let unlock = |answers: &[&[u8]]| {
        let pty = Pty::new();
        let given = KeySources::with(&KeyArgs::default(), None, pty.path()).unwrap();
        let device = DmName::new("disk").unwrap();
        std::thread::scope(|scope| {
            let asking = scope
                .spawn(|| given.unlock(Some(&device), 1, &header, &source, &Interrupt::never()));
            for answer in answers {
                let shown = pty.answer("(layer 1): ", answer);
                assert!(shown.contains("luks.qcow2"), "{shown}");
            }
            asking.join().unwrap()
        })
    };
    assert!(unlock(&[b"secret\n"]).is_ok());
    assert!(unlock(&[b"no\n", b"\n", b"secret\n"]).is_ok());
    let error = unlock(&[b"a\n", b"b\n", b"c\n"]).unwrap_err();
    assert!(error.to_string().contains("wrong key"), "{error}");
    let error = unlock(&[b"a\n", b"\x04"]).unwrap_err();
    assert!(error.to_string().contains("missing"), "{error}");
}

#[test]
fn where_no_key_slot_is_left_nobody_is_asked() {
    let directory = tempfile::tempdir().unwrap();
    let (_, source) = luks(directory.path(), 1);
    let image = File::options().write(true).open(source.path()).unwrap();
    let state = (4 * CLUSTER + 208) as u64;
    std::os::unix::fs::FileExt::write_all_at(&image, &0x0000_deadu32.to_be_bytes(), state).unwrap();
    let opened = open_chain(source.path(), &OpenPolicy::default()).unwrap();
    let layer = &opened.chain.layers()[0];
    let header = layer.image.crypt_header().unwrap().unwrap();
    let pty = Pty::new();
    let given = KeySources::with(&KeyArgs::default(), None, pty.path()).unwrap();
    let device = DmName::new("disk").unwrap();
    let never = Interrupt::never();
    let error = given.unlock(Some(&device), 1, &header, &layer.source, &never).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WrongKey(_)));
    assert!(error.to_string().contains("layer 1 is encrypted, and no key opens it"), "{error}");
    let mut shown = [PollFd::new(pty.person.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut shown, PollTimeout::ZERO).unwrap(), 0);
}

#[test]
fn legacy_aes_asks_once_and_an_empty_line_is_no_key() {
    let ask = |answer: &[u8]| {
        let pty = Pty::new();
        let given = KeySources::with(&KeyArgs::default(), None, pty.path()).unwrap();
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| opens(&given, 0));
            pty.answer("disk.qcow2 (layer 0): ", answer);
            asking.join().unwrap()
        })
    };
    assert_eq!(ask(b"anything\n").unwrap(), "anything");
    assert!(ask(b"\n").unwrap_err().to_string().contains("missing"));
}

#[test]
fn a_signal_ends_an_unlocking_that_takes_hours() {
    let directory = tempfile::tempdir().unwrap();
    let (header, source) = luks(directory.path(), u32::MAX);
    let path = directory.path().join("key");
    fs::write(&path, "secret").unwrap();
    let given = sources(&["--key-file", path.to_str().unwrap()], None).unwrap();
    let device = DmName::new("disk").unwrap();
    let (flag, start) = (AtomicUsize::new(0), Instant::now());
    let interrupt = Interrupt::new(&flag);
    let unlocked = std::thread::scope(|scope| {
        let unlock = || given.unlock(Some(&device), 0, &header, &source, &interrupt);
        let unlocking = scope.spawn(unlock);
        std::thread::sleep(LOOK * 2);
        flag.store(2, Ordering::Relaxed);
        unlocking.join().unwrap()
    });
    assert_eq!(unlocked.unwrap_err().kind(), &ErrorKind::Interrupted(2));
    assert!(start.elapsed() < Duration::from_secs(20));
}
