//! Having the file system share or copy blocks, without the bytes coming by here.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use nix::libc;
use nix::sys::statfs::fstatfs;

use super::Input;
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;

/// Most bytes that are cloned by one call: signals and progress wait for it.
const AT_ONCE: u64 = 1 << 30;

/// `f_type` of file systems whose servers copy by themselves (linux/magic.h).
const SERVERS: [u32; 4] = [0x6969, 0xff53_4d42, 0xfe53_4d42, 0x517b];

/// System calls that no library wraps: the device side has them.
pub trait HostCalls: Sync + fmt::Debug {
    /// Has `to` share blocks of `from` (FICLONERANGE).
    ///
    /// # Errors
    /// What the ioctl says: EOPNOTSUPP or EXDEV where that can't be.
    fn clone_range(
        &self,
        from: &File,
        from_offset: u64,
        length: u64,
        to: &File,
        to_offset: u64,
    ) -> io::Result<()>;

    /// Has the kernel start writing a range out, and does not wait for it.
    fn start_write_back(&self, file: &File, offset: u64, length: u64);
}

/// Whether blocks are shared (`--reflink`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reflink {
    /// Where the file system can; the rest is copied.
    #[default]
    Auto,
    /// All that is aligned; it is an error where the file system can't.
    Always,
    /// Nothing.
    Never,
}

/// What the file system does for the bytes of a file of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Offload {
    /// It shares blocks of this many bytes.
    Clone {
        /// Offsets and lengths are multiples of it.
        block: u64,
    },
    /// It copies them by itself.
    CopyRange,
}

impl Offload {
    /// What offsets and lengths have to be multiples of.
    pub(super) fn alignment(self) -> u64 {
        match self {
            Self::Clone { block } => block,
            Self::CopyRange => 1,
        }
    }
}

/// What the file system does for each file of an input.
#[derive(Clone, Debug, Default)]
pub struct Offloads {
    files: BTreeMap<u32, Offload>,
    reflink: Reflink,
}

impl Offloads {
    /// Nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// Finds out by trying, on `output`, an empty regular file that stays one.
    ///
    /// # Errors
    /// With [`Reflink::Always`] `CannotCreate`, naming the file whose blocks can't be shared; the
    /// output can't be cut to nothing again.
    pub fn probe(
        input: &dyn Input,
        output: &File,
        reflink: Reflink,
        calls: &dyn HostCalls,
    ) -> Result<Self> {
        let mut files = BTreeMap::new();
        if reflink != Reflink::Never {
            for number in input.file_numbers() {
                let Some(source) = input.file(number) else { continue };
                let Some(from) = source.file() else { continue };
                match probe_clone(source, from, output, calls) {
                    Ok(None) => {}
                    Ok(Some(block)) => {
                        files.insert(number, Offload::Clone { block });
                    }
                    Err(error) if reflink == Reflink::Always => {
                        return Err(no_reflink(source, error));
                    }
                    Err(_) if copies_by_itself(from, output) => {
                        files.insert(number, Offload::CopyRange);
                    }
                    Err(_) => {}
                }
            }
        }
        Ok(Self { files, reflink })
    }

    /// What is done for bytes of that file.
    pub(super) fn of(&self, number: u32) -> Option<Offload> {
        self.files.get(&number).copied()
    }

    /// True where nothing that is aligned may be copied.
    pub(super) fn must_clone(&self) -> bool {
        self.reflink == Reflink::Always
    }
}

/// The block size by which blocks can be shared; `None` where the file has not even one.
fn probe_clone(
    source: &Source,
    from: &File,
    output: &File,
    calls: &dyn HostCalls,
) -> io::Result<Option<u64>> {
    if source.is_block_device() {
        return Err(Errno::EOPNOTSUPP.into());
    }
    let block = fstatfs(output)?.block_size();
    let block = u64::try_from(block).unwrap_or(0);
    if !block.is_power_of_two() {
        return Err(Errno::EOPNOTSUPP.into());
    }
    if source.length().get() < block {
        return Ok(None);
    }
    let cloned = calls.clone_range(from, 0, block, output, 0);
    output.set_len(0)?;
    cloned.map(|()| Some(block))
}

/// Whether the server of a network file system copies the file. Local ones copy more slowly
/// than we do: through the page cache, page by page, on one core.
fn copies_by_itself(from: &File, output: &File) -> bool {
    let device = |file: &File| file.metadata().ok().map(|metadata| metadata.dev());
    let is_server = |file: &File| {
        let kind = fstatfs(file).ok()?.filesystem_type().0;
        u32::try_from(kind).ok().map(|kind| SERVERS.contains(&kind))
    };
    device(from) == device(output) && is_server(output) == Some(true)
}

/// That the blocks of a file can't be shared.
pub(super) fn no_reflink(source: &Source, error: io::Error) -> Error {
    let message = "--reflink=always: its blocks can't be shared with the output: that takes one file system for both, such as XFS or btrfs".to_owned();
    Error::new(ErrorKind::CannotCreate(message)).with_source(error).at_path(source.path())
}

/// How far the file system got.
pub(super) enum Offloaded {
    /// All of it.
    All,
    /// So many bytes; the rest is to be copied, because of this.
    Some(u64, io::Error),
}

/// Shares `length` bytes, all aligned.
///
/// # Errors
/// What is no reason to copy them: the file system is full.
pub(super) fn clone_range(
    calls: &dyn HostCalls,
    from: (&File, u64),
    length: u64,
    to: (&File, u64),
    tick: &dyn Fn(u64) -> Result<()>,
) -> Result<Result<Offloaded, io::Error>> {
    let mut done = 0;
    while done < length {
        let part = (length - done).min(AT_ONCE);
        match calls.clone_range(from.0, from.1 + done, part, to.0, to.1 + done) {
            Ok(()) => {
                done += part;
                tick(part)?;
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR) => tick(0)?,
                Some(libc::ENOSPC | libc::EDQUOT | libc::EIO | libc::EFBIG) => {
                    return Ok(Err(error));
                }
                _ => return Ok(Ok(Offloaded::Some(done, error))),
            },
        }
    }
    Ok(Ok(Offloaded::All))
}

/// Has the file system copy `length` bytes.
///
/// # Errors
/// As [`clone_range`].
pub(super) fn copy_range(
    from: (&File, u64),
    length: u64,
    to: (&File, u64),
    tick: &dyn Fn(u64) -> Result<()>,
) -> Result<Result<Offloaded, io::Error>> {
    let mut done = 0;
    while done < length {
        let part = usize::try_from((length - done).min(AT_ONCE)).unwrap_or(usize::MAX);
        let at = |offset: u64| i64::try_from(offset).map_err(|_| Errno::EOVERFLOW);
        let copied = at(from.1 + done).and_then(|mut read_at| {
            let mut write_at = at(to.1 + done)?;
            copy_file_range(from.0, Some(&mut read_at), to.0, Some(&mut write_at), part)
        });
        match copied {
            // The file ends here: what is behind are zeros.
            Ok(0) => return Ok(Ok(Offloaded::Some(done, Errno::ENODATA.into()))),
            Ok(copied) => {
                done += copied as u64;
                tick(copied as u64)?;
            }
            Err(Errno::EINTR) => tick(0)?,
            Err(errno @ (Errno::ENOSPC | Errno::EDQUOT | Errno::EIO | Errno::EFBIG)) => {
                return Ok(Err(errno.into()));
            }
            Err(errno) => return Ok(Ok(Offloaded::Some(done, errno.into()))),
        }
    }
    Ok(Ok(Offloaded::All))
}
