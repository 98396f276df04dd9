//! QEMU-compatible locks: open file description locks on single bytes.
//!
//! Byte 100 + i says "I use permission i", byte 200 + i "I do not share permission i"
//! (QEMU: raw_apply_lock_bytes() and raw_check_lock_bytes() in block/file-posix.c). The
//! locks belong to the open file description: given to a loop device they last until
//! that is cleared, with no process of ours left.

use std::fs::File;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;

const USES: i64 = 100;
const DOES_NOT_SHARE: i64 = 200;

/// QEMU's block permissions, by the number that a lock byte carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// Reading data that nobody changes beside.
    ConsistentRead = 0,
    /// Changing what the guest sees.
    Write = 1,
    /// Writing what does not change what the guest sees.
    WriteUnchanged = 2,
    /// Changing the length.
    Resize = 3,
}

const ALL: [Permission; 4] =
    [Permission::ConsistentRead, Permission::Write, Permission::WriteUnchanged, Permission::Resize];

const WRITERS: [Permission; 3] =
    [Permission::Write, Permission::WriteUnchanged, Permission::Resize];

impl Permission {
    /// QEMU's name of it, with spaces.
    pub fn name(self) -> &'static str {
        match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::WriteUnchanged => "write unchanged",
            Self::Resize => "resize",
        }
    }
}

/// With whom an image may be shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// Readers only: a running writer is an error, and none can start while we read.
    #[default]
    Readers,
    /// `-U, --force-share`: writers too; what is read may be torn.
    Writers,
}

/// Whether the locks are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locked {
    /// They are.
    Yes,
    /// The file system has no such locks (ENOLCK, EOPNOTSUPP), as QEMU's `locking=auto`
    /// lets pass.
    NotSupported,
}

/// Takes a reader's locks on the file, then looks whether anybody's locks contradict them.
///
/// # Errors
/// `InUse` where a writer runs or a reader refuses to share; the locks taken here go with
/// the file.
pub fn lock(source: &Source, sharing: Sharing) -> Result<Locked> {
    let Some(file) = source.file() else { return Ok(Locked::NotSupported) };
    let unshared: &[Permission] = match sharing {
        Sharing::Readers => &WRITERS,
        Sharing::Writers => &[],
    };
    for byte in bytes_of_reader(unshared) {
        match set_read_lock(file, byte) {
            Ok(()) => {}
            Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                return Ok(Locked::NotSupported);
            }
            Err(Errno::EACCES | Errno::EAGAIN) => {
                return Err(in_use(source, "another program holds the image exclusively"));
            }
            Err(errno) => {
                return Err(Error::io("cannot lock the file", errno.into()).at_path(source.path()));
            }
        }
    }
    if is_locked(file, DOES_NOT_SHARE + Permission::ConsistentRead as i64) {
        return Err(in_use(source, "another program does not share reading it"));
    }
    for &permission in unshared {
        if is_locked(file, USES + permission as i64) {
            let name = permission.name();
            return Err(in_use(source, &format!("another program has it open for '{name}'")));
        }
    }
    Ok(Locked::Yes)
}

/// Takes a writer's locks on a store that nobody but its device is to read or write, then
/// looks whether anybody's locks contradict them.
///
/// # Errors
/// `InUse`; the locks taken here go with the file.
pub fn lock_writer(file: &File) -> Result<Locked> {
    let in_use = || {
        Error::new(ErrorKind::InUse(
            "the store is in use: it is attached already (see 'imgdm list'), or another program reads or writes it".to_owned(),
        ))
    };
    let uses = ALL.map(|permission| USES + permission as i64);
    let unshared = WRITERS.map(|permission| DOES_NOT_SHARE + permission as i64);
    for byte in uses.into_iter().chain(unshared) {
        match set_read_lock(file, byte) {
            Ok(()) => {}
            Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                return Ok(Locked::NotSupported);
            }
            Err(Errno::EACCES | Errno::EAGAIN) => return Err(in_use()),
            Err(errno) => return Err(Error::io("cannot lock the store", errno.into())),
        }
    }
    let others_unshared = ALL.map(|permission| DOES_NOT_SHARE + permission as i64);
    let others_use = WRITERS.map(|permission| USES + permission as i64);
    match others_unshared.into_iter().chain(others_use).any(|byte| is_locked(file, byte)) {
        true => Err(in_use()),
        false => Ok(Locked::Yes),
    }
}

fn bytes_of_reader(unshared: &[Permission]) -> impl Iterator<Item = i64> {
    let uses = USES + Permission::ConsistentRead as i64;
    std::iter::once(uses).chain(unshared.iter().map(|&p| DOES_NOT_SHARE + p as i64))
}

/// All bytes that [`lock`] may lock.
pub(crate) fn readers_bytes() -> impl Iterator<Item = u64> {
    bytes_of_reader(&WRITERS).map(i64::unsigned_abs)
}

/// What a lock byte says of a permission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Its holder uses the permission.
    Uses,
    /// Its holder does not share the permission.
    DoesNotShare,
}

/// A byte that somebody else holds a lock on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OthersLock {
    /// Which permission.
    pub permission: Permission,
    /// What of it.
    pub claim: Claim,
}

impl OthersLock {
    /// The lock's offset in the file.
    pub fn byte(self) -> u64 {
        let first = match self.claim {
            Claim::Uses => USES,
            Claim::DoesNotShare => DOES_NOT_SHARE,
        };
        (first + self.permission as i64).unsigned_abs()
    }
}

/// The QEMU locks that others hold on the file at this moment. Who they are, the kernel
/// does not say.
pub fn others(source: &Source) -> Vec<OthersLock> {
    let Some(file) = source.file() else { return Vec::new() };
    let locks = [Claim::Uses, Claim::DoesNotShare]
        .into_iter()
        .flat_map(|claim| ALL.map(|permission| OthersLock { permission, claim }));
    locks.filter(|lock| is_locked(file, lock.byte().cast_signed())).collect()
}

fn in_use(source: &Source, how: &str) -> Error {
    Error::new(ErrorKind::InUse(format!(
        "the image is in use: {how} (a running virtual machine?); stop it, or see who with 'imgdm info -U'"
    )))
    .at_path(source.path())
}

fn byte_lock(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock {
        l_type: libc::c_short::try_from(kind).unwrap_or_default(),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn set_read_lock(file: &File, byte: i64) -> nix::Result<()> {
    let lock = byte_lock(libc::F_RDLCK, byte);
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)).map(drop)
}

/// Whether somebody else holds a lock on that byte. An error counts as no: QEMU too goes
/// on where it can't ask.
fn is_locked(file: &File, byte: i64) -> bool {
    let mut lock = byte_lock(libc::F_WRLCK, byte);
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock)).is_ok()
        && libc::c_int::from(lock.l_type) != libc::F_UNLCK
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu_like_writer(path: &std::path::Path) -> File {
        let file = File::open(path).unwrap();
        for byte in [100, 101, 103, 201, 203] {
            set_read_lock(&file, byte).unwrap();
        }
        file
    }

    #[test]
    fn a_writer_keeps_us_out_and_goes_unnoticed_when_shared() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let writer = qemu_like_writer(file.path());
        let source = Source::open(file.path()).unwrap();
        let error = lock(&source, Sharing::Readers).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InUse(_)));
        assert!(error.to_string().contains("'write'"), "{error}");
        let source = Source::open(file.path()).unwrap();
        assert_eq!(lock(&source, Sharing::Writers).unwrap(), Locked::Yes);
        drop(writer);
        let source = Source::open(file.path()).unwrap();
        assert_eq!(lock(&source, Sharing::Readers).unwrap(), Locked::Yes);
    }

    #[test]
    fn a_store_is_locked_once_and_against_readers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first = File::open(file.path()).unwrap();
        assert_eq!(lock_writer(&first).unwrap(), Locked::Yes);
        let second = File::open(file.path()).unwrap();
        let error = lock_writer(&second).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InUse(_)), "{error}");
        drop(second);
        let reader = Source::open(file.path()).unwrap();
        lock(&reader, Sharing::Readers).unwrap_err();
        lock(&reader, Sharing::Writers).unwrap();
        drop((first, reader));
        let reader = Source::open(file.path()).unwrap();
        lock(&reader, Sharing::Readers).unwrap();
        lock_writer(&File::open(file.path()).unwrap()).unwrap_err();
    }

    #[test]
    fn two_readers_share_and_a_writer_would_see_them() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let a = Source::open(file.path()).unwrap();
        let b = Source::open(file.path()).unwrap();
        assert_eq!(lock(&a, Sharing::Readers).unwrap(), Locked::Yes);
        assert_eq!(lock(&b, Sharing::Readers).unwrap(), Locked::Yes);
        let writer = File::open(file.path()).unwrap();
        assert!(is_locked(&writer, DOES_NOT_SHARE + Permission::Write as i64));
        // Each sees the other's locks, and not its own.
        let bytes: Vec<_> = others(&a).into_iter().map(OthersLock::byte).collect();
        assert_eq!(bytes, [100, 201, 202, 203]);
        drop(b);
        assert_eq!(others(&a), []);
    }
}
