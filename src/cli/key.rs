//! Where the keys of encrypted layers come from: files, descriptors, systemd's
//! credentials, or a person at the terminal. Never the command line or the environment,
//! which others can read.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use imgdm::chain::Chain;
use imgdm::crypt::{CryptHeader, Passphrase, VolumeKey};
use imgdm::device::name::DmName;
use imgdm::device::{Interrupt, sys};
use imgdm::source::Source;
use imgdm::{Error, ErrorKind, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::prctl;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::termios::{
    InputFlags, LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr,
};
use zeroize::Zeroizing;

use super::output::show_path;
use super::workers;

/// The longest key that is read, as in cryptsetup.
const KEY_MAX: usize = 8 << 20;
/// A terminal gives no longer line; what was typed past it is lost.
const LINE_MAX: usize = 4096;
/// How often a person may type the passphrase of a layer that can tell a wrong one.
const TRIES: u32 = 3;
/// How often a wait looks whether a signal came.
const LOOK: Duration = Duration::from_millis(100);
const LOOK_MS: u8 = 100;

/// The arguments that give keys.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct KeyArgs {
    /// File with the key of an encrypted image, or of the layer at that depth of the chain
    /// (0: the image itself). All of it is the key, a newline at its end too; - is the
    /// standard input. Without a key, the passphrase is asked for on the terminal
    #[arg(
        long,
        value_name = "FILE[:LAYER]",
        allow_hyphen_values = true, // For -:1.
        value_parser = OsStringValueParser::new().try_map(|text| parse_key_file(&text))
    )]
    key_file: Vec<KeyPlace>,

    /// Inherited descriptor to read such a key from, to its end
    #[arg(long, value_name = "N[:LAYER]", value_parser = parse_key_fd)]
    key_fd: Vec<KeyPlace>,
}

/// Where a key is to be read from, and for which layer; for all without one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct KeyPlace {
    origin: Origin,
    layer: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    File(PathBuf),
    Descriptor(RawFd),
}

impl Origin {
    /// What an error is about.
    fn path(&self) -> PathBuf {
        match self {
            Self::File(path) => path.clone(),
            Self::Descriptor(0) => "standard input".into(),
            Self::Descriptor(number) => format!("descriptor {number}").into(),
        }
    }
}

/// Splits `WHAT:LAYER`, or gives back all of it.
fn split_layer(text: &[u8]) -> Result<(&[u8], Option<u32>), String> {
    let Some(colon) = text.iter().rposition(|&byte| byte == b':') else { return Ok((text, None)) };
    let (what, digits) = (&text[..colon], &text[colon + 1..]);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Ok((text, None));
    }
    let digits = String::from_utf8_lossy(digits);
    match digits.parse() {
        Ok(layer) => Ok((what, Some(layer))),
        Err(_) => Err(format!("no chain has a layer {digits}")),
    }
}

fn parse_key_file(text: &OsStr) -> Result<KeyPlace, String> {
    let (file, layer) = split_layer(text.as_bytes())?;
    let origin = match file {
        b"" => return Err("the name of the file is missing".to_owned()),
        b"-" => Origin::Descriptor(0),
        file => Origin::File(OsString::from_vec(file.to_vec()).into()),
    };
    Ok(KeyPlace { origin, layer })
}

fn parse_key_fd(text: &str) -> Result<KeyPlace, String> {
    let (number, layer) = split_layer(text.as_bytes())?;
    let number: RawFd = std::str::from_utf8(number)
        .ok()
        .filter(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|number| number.parse().ok())
        .ok_or("not the number of a descriptor")?;
    Ok(KeyPlace { origin: Origin::Descriptor(number), layer })
}

/// A key that was given by an argument. It is read when it is needed, and once: a pipe
/// gives it only once.
struct Given {
    place: KeyPlace,
    descriptor: Option<OwnedFd>,
    key: OnceLock<Arc<Passphrase>>,
}

/// All the places that a layer's key may come from.
pub(crate) struct KeySources {
    given: Vec<Given>,
    credentials: Option<PathBuf>,
    terminal: PathBuf,
}

impl KeySources {
    /// The places that the arguments name, then systemd's credentials, then the terminal.
    /// To be called before any file is opened: a descriptor's number must not have become
    /// one of ours.
    ///
    /// # Errors
    /// Usage: two keys for one layer; no such descriptor.
    pub(crate) fn new(args: &KeyArgs) -> Result<Self> {
        // The environment names the directory only; the keys are in its files.
        let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        Self::with(args, credentials, "/dev/tty".into())
    }

    fn with(args: &KeyArgs, credentials: Option<PathBuf>, terminal: PathBuf) -> Result<Self> {
        let usage = |message: String| Err(Error::new(ErrorKind::Usage(message)));
        let mut given: Vec<Given> = Vec::new();
        for place in args.key_file.iter().chain(&args.key_fd) {
            if given.iter().any(|other| other.place.layer == place.layer) {
                return usage(match place.layer {
                    Some(layer) => format!("two keys are given for layer {layer}"),
                    None => "two keys are given; say which layer each is for".to_owned(),
                });
            }
            let descriptor = match place.origin {
                Origin::File(_) => None,
                Origin::Descriptor(number) => {
                    if given.iter().any(|other| other.place.origin == place.origin) {
                        let what = place.origin.path();
                        return usage(format!("the {} gives but one key", what.display()));
                    }
                    match sys::duplicate(number) {
                        Ok(descriptor) => Some(descriptor),
                        Err(error) => {
                            let message = format!("descriptor {number} can't be read as a key");
                            let kind = ErrorKind::Usage(message);
                            return Err(Error::new(kind).with_source(error));
                        }
                    }
                }
            };
            given.push(Given { place: place.clone(), descriptor, key: OnceLock::new() });
        }
        Ok(Self { given, credentials, terminal })
    }

    /// True where an argument gives a key.
    pub(crate) fn are_given(&self) -> bool {
        !self.given.is_empty()
    }

    /// Refuses a key for a layer that takes none.
    ///
    /// # Errors
    /// Usage, naming the layer.
    pub(crate) fn check_all_used(&self, encrypted: &[u32]) -> Result<()> {
        for layer in self.given.iter().filter_map(|given| given.place.layer) {
            if !encrypted.contains(&layer) {
                let message =
                    format!("a key is given for layer {layer}, which is not an encrypted one");
                return Err(Error::new(ErrorKind::Usage(message)));
            }
        }
        Ok(())
    }

    /// The volume's key of an encrypted layer: by the key given for that layer, or else the
    /// one given for all, or a credential for `device` (where the image's name makes one) or
    /// for any, or a passphrase typed in.
    ///
    /// # Errors
    /// `WrongKey` where there is none or it is the wrong one; a read failed; `interrupt`
    /// came.
    pub(crate) fn unlock(
        &self,
        device: Option<&DmName>,
        layer: u32,
        header: &CryptHeader,
        source: &Arc<Source>,
        interrupt: &Interrupt<'_>,
    ) -> Result<VolumeKey> {
        keep_out_of_core_dumps()?;
        keep_out_of_swap();
        let lock = Lock { layer, header, source, interrupt };
        if !header.has_key() {
            let message = format!(
                "layer {layer} is encrypted, and no key opens it: all its key slots are erased"
            );
            return Err(lock.wrong_key(message));
        }
        if let Some(given) = self.given_for(layer) {
            return lock.open_with_file(&given.read(interrupt)?, &given.place.origin.path());
        }
        if let Some((path, key)) = self.credential(device, layer, interrupt)? {
            return lock.open_with_file(&key, &path);
        }
        // None in a service, or over ssh without one.
        let options = OFlag::O_NOCTTY.bits();
        let terminal =
            OpenOptions::new().read(true).write(true).custom_flags(options).open(&self.terminal);
        match terminal {
            Ok(terminal) => lock.open_at_terminal(&terminal),
            Err(_) => Err(lock.missing_key()),
        }
    }

    fn given_for(&self, layer: u32) -> Option<&Given> {
        let of = |layer| self.given.iter().find(|given| given.place.layer == layer);
        of(Some(layer)).or_else(|| of(None))
    }

    fn credential(
        &self,
        device: Option<&DmName>,
        layer: u32,
        interrupt: &Interrupt<'_>,
    ) -> Result<Option<(PathBuf, Arc<Passphrase>)>> {
        let Some(directory) = &self.credentials else { return Ok(None) };
        let of_device = device
            .map(|device| [format!("imgdm.key.{device}.{layer}"), format!("imgdm.key.{device}")]);
        for name in of_device.into_iter().flatten().chain(["imgdm.key".to_owned()]) {
            let path = directory.join(name);
            match read_file(&path, interrupt) {
                Ok(key) => return Ok(Some((path, Arc::new(key)))),
                Err(error) if matches!(error.kind(), ErrorKind::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

/// Depths of the layers that are encrypted, be it in a way that can't be read.
pub(crate) fn encrypted_layers(chain: &Chain) -> Vec<u32> {
    let layers = (0u32..).zip(chain.layers());
    let encrypted = layers.filter(|(_, layer)| !matches!(layer.image.crypt_header(), Ok(None)));
    encrypted.map(|(depth, _)| depth).collect()
}

impl Given {
    fn read(&self, interrupt: &Interrupt<'_>) -> Result<Arc<Passphrase>> {
        if let Some(key) = self.key.get() {
            return Ok(Arc::clone(key));
        }
        let key = match (&self.place.origin, &self.descriptor) {
            (Origin::File(path), _) => read_file(path, interrupt)?,
            (origin, Some(descriptor)) => {
                read_key(descriptor.as_fd(), interrupt).map_err(|e| e.at_path(origin.path()))?
            }
            (origin, None) => return Err(no_key_read(Errno::EBADF).at_path(origin.path())),
        };
        Ok(Arc::clone(self.key.get_or_init(|| Arc::new(key))))
    }
}

fn no_key_read(errno: Errno) -> Error {
    Error::io("cannot read the key", errno.into())
}

fn read_file(path: &Path, interrupt: &Interrupt<'_>) -> Result<Passphrase> {
    // A FIFO that nobody writes to yet must not keep open() waiting, deaf to signals.
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(|error| Error::io("cannot open the key file", error).at_path(path))?;
    read_key(file.as_fd(), interrupt).map_err(|error| error.at_path(path))
}

/// Reads all of it, as it is.
fn read_key(from: BorrowedFd<'_>, interrupt: &Interrupt<'_>) -> Result<Passphrase> {
    // As large as it can become: a buffer that grows leaves copies behind.
    let mut key = Zeroizing::new(vec![0; KEY_MAX + 1]);
    let mut length = 0;
    while length < key.len() {
        match read_when_ready(from, &mut key[length..], interrupt, no_key_read)? {
            0 => break,
            count => length += count,
        }
    }
    if length > KEY_MAX {
        let message = format!("this is no key: it is longer than {} MiB", KEY_MAX >> 20);
        return Err(Error::new(ErrorKind::WrongKey(message)));
    }
    key.truncate(length);
    Ok(Passphrase::new(key))
}

/// Reads once there is something to read, or the end; a signal ends the wait.
fn read_when_ready(
    from: BorrowedFd<'_>,
    buffer: &mut [u8],
    interrupt: &Interrupt<'_>,
    failed: impl Fn(Errno) -> Error,
) -> Result<usize> {
    loop {
        interrupt.check()?;
        match poll(&mut [PollFd::new(from, PollFlags::POLLIN)], PollTimeout::from(LOOK_MS)) {
            Ok(0) | Err(Errno::EINTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(failed(error)),
        }
        match nix::unistd::read(from, buffer) {
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(error) => return Err(failed(error)),
            Ok(count) => return Ok(count),
        }
    }
}

/// Neither a crash nor a debugger of the same user is to get at the keys.
fn keep_out_of_core_dumps() -> Result<()> {
    // The limit alone is not enough: a program that cores are piped to gets them anyway.
    setrlimit(Resource::RLIMIT_CORE, 0, 0)
        .and_then(|()| prctl::set_dumpable(false))
        .map_err(|errno| Error::io("cannot keep the keys out of core dumps", errno.into()))
}

/// Locks all memory from here on, where that is permitted: keys are not only in buffers of
/// ours, but for moments also where they are hashed and made into tables of ciphers.
fn keep_out_of_swap() {
    let unlimited = RLIM_INFINITY;
    // Under a limit, memory that is asked for later might be refused.
    if setrlimit(Resource::RLIMIT_MEMLOCK, unlimited, unlimited).is_ok() {
        // MCL_ONFAULT: only what is used. It is not among the flags that nix names.
        let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
        if let Err(errno) = mlockall(MlockAllFlags::from_bits_retain(flags)) {
            log::debug!("the memory is not locked: {errno}");
        }
    }
}

/// An encrypted layer that is to be opened.
struct Lock<'a> {
    layer: u32,
    header: &'a CryptHeader,
    source: &'a Arc<Source>,
    interrupt: &'a Interrupt<'a>,
}

impl Lock<'_> {
    fn wrong_key(&self, message: String) -> Error {
        Error::new(ErrorKind::WrongKey(message)).at_path(self.source.path())
    }

    fn missing_key(&self) -> Error {
        self.wrong_key(format!(
            "layer {} is encrypted, and its key is missing: give it by --key-file FILE[:LAYER], --key-fd N[:LAYER] or the systemd credential imgdm.key, or at a terminal",
            self.layer
        ))
    }

    /// Legacy AES takes any key, and with a wrong one the device is garbage.
    fn takes_any_key(&self) -> bool {
        matches!(self.header, CryptHeader::Aes)
    }

    /// A key slot may ask for hours of hashing, by an image that means harm: the waiting is
    /// done here, where signals come, and the work on a thread that ends with the process.
    fn open(&self, key: &Arc<Passphrase>) -> Result<VolumeKey> {
        let (header, source) = (self.header.clone(), Arc::clone(self.source));
        let key = Arc::clone(key);
        let (sender, receiver) = channel();
        std::thread::Builder::new()
            .name("unlock".to_owned())
            .spawn(move || {
                workers::start();
                let opened = header.unlock(&source, &key);
                drop(key);
                // Nobody waits any more once a signal came.
                let _ = sender.send(opened);
            })
            .map_err(|error| Error::io("cannot start a thread", error))?;
        loop {
            self.interrupt.check()?;
            match receiver.recv_timeout(LOOK) {
                Ok(opened) => return opened,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let message = "the thread that unlocks it has failed".to_owned();
                    return Err(Error::new(ErrorKind::Io(message)).at_path(self.source.path()));
                }
            }
        }
    }

    /// By the contents of a file or its like, where a newline at the end is easily one too
    /// many.
    fn open_with_file(&self, key: &Arc<Passphrase>, origin: &Path) -> Result<VolumeKey> {
        let newline = key.bytes().ends_with(b"\n");
        let hint = || {
            let origin = show_path(origin);
            format!("the key from {origin} ends in a newline, which counts as a part of it")
        };
        if self.takes_any_key() {
            if key.bytes().is_empty() {
                return Err(self.wrong_key(format!("the key from {} is empty", show_path(origin))));
            }
            if newline {
                let path = show_path(self.source.path());
                log::warn!("{path}: {}; with this encryption a wrong key can't be told", hint());
            }
        }
        self.open(key).map_err(|error| match error.kind() {
            ErrorKind::WrongKey(message) if newline => {
                let message = format!("{message} ({})", hint());
                error.with_kind(ErrorKind::WrongKey(message))
            }
            _ => error,
        })
    }

    /// By what a person types.
    fn open_at_terminal(&self, terminal: &File) -> Result<VolumeKey> {
        let path = show_path(self.source.path());
        let prompt = format!("Passphrase of {path} (layer {}): ", self.layer);
        let mut tries = if self.takes_any_key() { 1 } else { TRIES };
        loop {
            tries -= 1;
            let typed = ask(terminal, &prompt, self.interrupt)?
                .filter(|typed| !(self.takes_any_key() && typed.bytes().is_empty()));
            let Some(typed) = typed else { return Err(self.missing_key()) };
            match self.open(&Arc::new(typed)) {
                Err(error) if tries > 0 && matches!(error.kind(), ErrorKind::WrongKey(_)) => {
                    say(terminal, "No key slot opens with this passphrase.\n");
                }
                outcome => return outcome,
            }
        }
    }
}

/// A terminal that shows nothing is no reason to stop.
fn say(mut terminal: &File, text: &str) {
    let _ = terminal.write_all(text.as_bytes());
}

/// Asks for a line and shows nothing of it; none where the input ended at once.
fn ask(terminal: &File, prompt: &str, interrupt: &Interrupt<'_>) -> Result<Option<Passphrase>> {
    let hidden = HiddenInput::start(terminal).map_err(not_asked)?;
    // After that: who waits for the prompt may type at once, and is not shown.
    say(terminal, prompt);
    let line = read_line(terminal.as_fd(), interrupt);
    drop(hidden);
    // The line's end was not shown either.
    say(terminal, "\n");
    line
}

fn not_asked(errno: Errno) -> Error {
    Error::io("cannot ask for the passphrase on the terminal", errno.into())
}

fn read_line(terminal: BorrowedFd<'_>, interrupt: &Interrupt<'_>) -> Result<Option<Passphrase>> {
    let mut line = Zeroizing::new(vec![0; LINE_MAX]);
    let mut length = 0;
    let ended = loop {
        match read_when_ready(terminal, &mut line[length..], interrupt, not_asked)? {
            // Twice in the middle of a line, Ctrl-D ends it.
            0 if length == 0 => return Ok(None),
            0 => break true,
            count => length += count,
        }
        if line[..length].ends_with(b"\n") {
            length -= 1;
            break true;
        }
        if length == line.len() {
            break false;
        }
    };
    // The terminal drops what does not fit in its buffer but keeps the line's end.
    if !ended || length >= LINE_MAX - 1 {
        let message = "what was typed is longer than a terminal's line; use --key-file".to_owned();
        return Err(Error::new(ErrorKind::WrongKey(message)));
    }
    line.truncate(length);
    Ok(Some(Passphrase::new(line)))
}

/// While it lives, the terminal does not show what is typed.
struct HiddenInput<'a> {
    terminal: &'a File,
    before: Termios,
}

impl<'a> HiddenInput<'a> {
    fn start(terminal: &'a File) -> nix::Result<Self> {
        let before = tcgetattr(terminal)?;
        let mut hidden = before.clone();
        hidden.input_flags |= InputFlags::ICRNL;
        hidden.local_flags |= LocalFlags::ICANON | LocalFlags::ISIG;
        hidden.local_flags &= !(LocalFlags::ECHO | LocalFlags::ECHONL);
        // Both would leave the terminal as it is now: Ctrl-Z for a shell, Ctrl-\ for good.
        for character in [SpecialCharacterIndices::VSUSP, SpecialCharacterIndices::VQUIT] {
            hidden.control_chars[character as usize] = libc::_POSIX_VDISABLE;
        }
        // From here on it is put back, though setting it may fail half-way.
        let guard = Self { terminal, before };
        set(terminal, &hidden)?;
        Ok(guard)
    }
}

impl Drop for HiddenInput<'_> {
    fn drop(&mut self) {
        let _ = set(self.terminal, &self.before);
    }
}

/// Half a passphrase that was typed before a signal came is thrown away: the shell would
/// show it as the start of its next line.
fn set(terminal: &File, attributes: &Termios) -> nix::Result<()> {
    loop {
        match tcsetattr(terminal, SetArg::TCSAFLUSH, attributes) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests;
