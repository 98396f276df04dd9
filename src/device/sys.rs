//! The system calls that no library wraps: ioctls of device-mapper, loop devices and
//! files, and leases. The only `unsafe` of the crate; all of it is behind safe
//! functions that hold for any argument.
#![allow(unsafe_code)]
#![cfg_attr(not(feature = "device"), allow(dead_code))]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Length of `struct dm_ioctl` (linux/dm-ioctl.h).
pub const DM_HEADER_LENGTH: usize = 312;
/// Where its `data_size` is: the length of the whole buffer.
const DM_DATA_SIZE_AT: usize = 12;

/// Hands `buffer` (a `struct dm_ioctl` and what follows it) to device-mapper; the
/// answer comes back in it. Its `data_size` is set here.
///
/// # Errors
/// What the kernel says; EINVAL for a buffer shorter than the header.
pub fn dm_ioctl(control: BorrowedFd<'_>, command: u8, buffer: &mut [u8]) -> io::Result<()> {
    let size = u32::try_from(buffer.len()).map_err(|_| Errno::EOVERFLOW)?;
    if buffer.len() < DM_HEADER_LENGTH {
        return Err(Errno::EINVAL.into());
    }
    buffer[DM_DATA_SIZE_AT..DM_DATA_SIZE_AT + 4].copy_from_slice(&size.to_ne_bytes());
    let request = nix::request_code_readwrite!(0xfd, command, DM_HEADER_LENGTH);
    // SAFETY: the kernel reads and writes at most `data_size` bytes from the pointer,
    // which is the length of the exclusively borrowed buffer, set just above. Copies to
    // and from user space need no alignment.
    let result = unsafe { libc::ioctl(control.as_raw_fd(), request, buffer.as_mut_ptr()) };
    Errno::result(result)?;
    Ok(())
}

/// The same with a buffer that is a file in memory, of `length` bytes.
///
/// # Errors
/// What the kernel says; EINVAL for a file shorter than that, or than the header.
pub(crate) fn dm_ioctl_in_file(
    control: BorrowedFd<'_>,
    command: u8,
    file: &File,
    length: u64,
) -> io::Result<()> {
    let size = u32::try_from(length).map_err(|_| Errno::EOVERFLOW)?;
    let length = usize::try_from(length).map_err(|_| Errno::EOVERFLOW)?;
    if length < DM_HEADER_LENGTH || file.metadata()?.len() < u64::from(size) {
        return Err(Errno::EINVAL.into());
    }
    file.write_all_at(&size.to_ne_bytes(), DM_DATA_SIZE_AT as u64)?;
    let request = nix::request_code_readwrite!(0xfd, command, DM_HEADER_LENGTH);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // All pages at once, or the kernel meets each by itself.
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
    // SAFETY: a new mapping, of which nobody else knows; it is unmapped below with the same
    // length. It is never read or written from here, so it does not matter whether anybody
    // else writes to the file. Of this process's memory the kernel changes at most `size`
    // bytes from its start on, which are inside of the mapping.
    unsafe {
        let start =
            libc::mmap(std::ptr::null_mut(), length, protection, flags, file.as_raw_fd(), 0);
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let result = Errno::result(libc::ioctl(control.as_raw_fd(), request, start));
        libc::munmap(start, length);
        result?;
    }
    Ok(())
}

/// Where `flags` is in a `struct dm_ioctl`.
const DM_FLAGS_AT: usize = 28;

/// What the process that [`watch`] starts is to do about one device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Remedy {
    /// A header that names the device, and asks for what `command` is to do.
    pub(crate) header: [u8; DM_HEADER_LENGTH],
    /// The command that asks for its status.
    pub(crate) status: u8,
    /// Nothing is done unless this flag of its status is as `is_set` says.
    pub(crate) flag: u32,
    /// See there.
    pub(crate) is_set: bool,
    /// The command that puts it right.
    pub(crate) command: u8,
}

/// A process that puts devices right should this one be killed.
#[derive(Debug)]
pub(crate) struct Watch {
    pid: nix::unistd::Pid,
    socket: UnixStream,
}

/// Starts a process that does nothing until this one dies, and then puts devices right, one
/// after the other. It has `control` open and nothing else, so that a lock on it lasts until
/// the work is done. Dropping the watch ends it.
///
/// It closes the gaps in what the kernel undoes by itself: a device can be marked for removal
/// at its last close only while it is open, and opened only once it has a table; and a device
/// that is suspended stays so.
///
/// # Errors
/// What the system says.
pub(crate) fn watch(control: BorrowedFd<'_>, remedies: &[Remedy]) -> io::Result<Watch> {
    let (reader, writer) = UnixStream::pair()?;
    // SAFETY: the child may be a copy of one thread of several, so until it ends it calls
    // nothing but system calls that are safe after fork: no allocation, no lock, no panic,
    // no destructor, on buffers made beforehand.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => {
            drop(reader);
            Ok(Watch { pid: child, socket: writer })
        }
        nix::unistd::ForkResult::Child => {
            let (reader, control) = (reader.as_raw_fd(), control.as_raw_fd());
            // SAFETY: as above; all arguments are plain numbers, or point to a buffer of
            // this frame of the length given. The descriptors that are closed belong to
            // values of the parent, none of which this process uses or drops any more.
            unsafe {
                libc::setsid();
                // Whoever kills all processes of our name is not to kill this one.
                libc::prctl(libc::PR_SET_NAME, c"dm-guard".as_ptr());
                for signal in
                    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGTSTP]
                {
                    libc::signal(signal, libc::SIG_IGN);
                }
                // Out of each other's way first, then to 0 and 1, and all others closed.
                let reader = libc::fcntl(reader, libc::F_DUPFD, 3);
                let control = libc::fcntl(control, libc::F_DUPFD, 3);
                if libc::dup2(reader, 0) != 0 || libc::dup2(control, 1) != 1 {
                    libc::_exit(1);
                }
                if libc::syscall(libc::SYS_close_range, 2, u32::MAX, 0) != 0 {
                    libc::_exit(1);
                }
                let mut byte = 0u8;
                loop {
                    let got = libc::read(0, (&raw mut byte).cast(), 1);
                    if got == 0 {
                        break;
                    }
                    if got > 0 || Errno::last() != Errno::EINTR {
                        libc::_exit(0);
                    }
                }
                let control = BorrowedFd::borrow_raw(1);
                for remedy in remedies {
                    // The dying process may have it open for a moment yet.
                    for _ in 0..300 {
                        // Anew each time: the kernel notes more in it than may be asked by.
                        let mut buffer = remedy.header;
                        if dm_ioctl(control, remedy.status, &mut buffer).is_err() {
                            break;
                        }
                        let flags = buffer.get(DM_FLAGS_AT..DM_FLAGS_AT + 4);
                        let flags = flags.and_then(|f| f.try_into().ok()).map(u32::from_ne_bytes);
                        let is_set = flags.map(|flags| flags & remedy.flag != 0);
                        if is_set != Some(remedy.is_set) {
                            break;
                        }
                        let mut buffer = remedy.header;
                        if dm_ioctl(control, remedy.command, &mut buffer).is_ok() {
                            break;
                        }
                        libc::poll(std::ptr::null_mut(), 0, 10);
                    }
                }
                libc::_exit(0);
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // No SIGPIPE, should it be gone already.
        let flags = nix::sys::socket::MsgFlags::MSG_NOSIGNAL;
        let _ = nix::sys::socket::send(self.socket.as_raw_fd(), b"x", flags);
        while nix::sys::wait::waitpid(self.pid, None) == Err(Errno::EINTR) {}
    }
}

/// The signals by which a terminal stops a process, ignored by all of this one until this is
/// dropped. Not blocked, which holds for one thread only; nor caught: a write to the terminal
/// from the background would begin anew for ever.
#[derive(Debug)]
pub(crate) struct IgnoredStops {
    before: Vec<(Signal, SigAction)>,
}

impl IgnoredStops {
    /// From now on they are ignored.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn begin() -> io::Result<Self> {
        let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
        let mut ignored = Self { before: Vec::new() };
        for signal in [Signal::SIGTSTP, Signal::SIGTTOU, Signal::SIGTTIN] {
            // SAFETY: no handler is installed, so none can do what is not safe in one.
            let before = unsafe { sigaction(signal, &ignore) }?;
            ignored.before.push((signal, before));
        }
        Ok(ignored)
    }
}

impl Drop for IgnoredStops {
    fn drop(&mut self) {
        for (signal, before) in &self.before {
            // SAFETY: this was the action of the signal before; whoever installed it answers
            // for it.
            let _ = unsafe { sigaction(*signal, before) };
        }
    }
}

/// `struct loop_info64` (linux/loop.h).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoopInfo64 {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) rdevice: u64,
    pub(crate) offset: u64,
    pub(crate) size_limit: u64,
    pub(crate) number: u32,
    pub(crate) encrypt_type: u32,
    pub(crate) encrypt_key_size: u32,
    pub(crate) flags: u32,
    pub(crate) file_name: [u8; 64],
    pub(crate) crypt_name: [u8; 64],
    pub(crate) encrypt_key: [u8; 32],
    pub(crate) init: [u64; 2],
}

impl LoopInfo64 {
    pub(crate) const ZERO: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config` (linux/loop.h).
#[repr(C)]
#[derive(Debug)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304);

/// LO_FLAGS_READ_ONLY.
pub(crate) const LOOP_READ_ONLY: u32 = 1;
/// LO_FLAGS_AUTOCLEAR.
pub(crate) const LOOP_AUTOCLEAR: u32 = 4;
/// LO_FLAGS_DIRECT_IO.
pub(crate) const LOOP_DIRECT_IO: u32 = 16;

const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;

/// The number of a free loop device, made where there is none (LOOP_CTL_GET_FREE).
/// Another process can take it before it is configured.
///
/// # Errors
/// What the kernel says.
pub(crate) fn loop_get_free(control: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: this command takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    let number = Errno::result(number)?;
    u32::try_from(number).map_err(|_| Errno::EOVERFLOW.into())
}

/// Binds `file` to a loop device in one step (LOOP_CONFIGURE, Linux 5.8).
///
/// # Errors
/// What the kernel says: EBUSY where another process was faster.
pub(crate) fn loop_configure(
    device: BorrowedFd<'_>,
    file: BorrowedFd<'_>,
    block_size: u32,
    info: LoopInfo64,
) -> io::Result<()> {
    let fd = u32::try_from(file.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    let config = LoopConfig { fd, block_size, info, reserved: [0; 8] };
    // SAFETY: the kernel reads one loop_config from the pointer and writes nothing.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    Errno::result(result)?;
    Ok(())
}

/// What a loop device is bound to (LOOP_GET_STATUS64).
///
/// # Errors
/// What the kernel says: ENXIO where it is bound to nothing.
pub(crate) fn loop_status(device: BorrowedFd<'_>) -> io::Result<LoopInfo64> {
    let mut info = LoopInfo64::ZERO;
    // SAFETY: the kernel writes one loop_info64, all of whose bit patterns are valid.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) };
    Errno::result(result)?;
    Ok(info)
}

const BLKGETSIZE64: libc::c_ulong = nix::request_code_read!(0x12, 114, size_of::<libc::size_t>());
const BLKSSZGET: libc::c_ulong = 0x1268;

/// Size of a block device in bytes (BLKGETSIZE64).
///
/// # Errors
/// What the kernel says: ENOTTY for a file that is no block device.
pub(crate) fn block_device_size(device: BorrowedFd<'_>) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: the kernel writes 64 bits, whatever the request's name says of size_t.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
    Errno::result(result)?;
    Ok(size)
}

/// Logical block size of a block device in bytes (BLKSSZGET).
///
/// # Errors
/// What the kernel says.
pub(crate) fn logical_block_size(device: BorrowedFd<'_>) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: the kernel writes one int.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKSSZGET, &raw mut size) };
    Errno::result(result)?;
    u32::try_from(size).map_err(|_| Errno::EINVAL.into())
}

/// `struct file_clone_range` (linux/fs.h).
#[repr(C)]
struct FileCloneRange {
    from: i64,
    from_offset: u64,
    length: u64,
    to_offset: u64,
}

const FICLONERANGE: libc::c_ulong = nix::request_code_write!(0x94, 13, 32);

/// Has `to` share the blocks of a range of `from`; what it had there is gone.
///
/// # Errors
/// What the kernel says: EOPNOTSUPP where the file system has no shared blocks, EXDEV where
/// the files are in two, EINVAL where offsets or length are no multiples of a block.
pub(crate) fn clone_range(
    from: &File,
    from_offset: u64,
    length: u64,
    to: &File,
    to_offset: u64,
) -> io::Result<()> {
    let from = i64::from(from.as_raw_fd());
    let range = FileCloneRange { from, from_offset, length, to_offset };
    // SAFETY: the kernel reads one `struct file_clone_range`.
    let result = unsafe { libc::ioctl(to.as_raw_fd(), FICLONERANGE, &raw const range) };
    Errno::result(result)?;
    Ok(())
}

/// Has the kernel start writing out what is dirty in a range of a file. It is a hint.
pub(crate) fn start_write_back(file: &File, offset: u64, length: u64) {
    if let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) {
        // SAFETY: plain numbers.
        unsafe {
            libc::sync_file_range(file.as_raw_fd(), offset, length, libc::SYNC_FILE_RANGE_WRITE);
        }
    }
}

/// `struct fsxattr` (linux/fs.h).
#[repr(C)]
#[derive(Default)]
struct FsXattr {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    copied_extent_size: u32,
    pad: [u8; 8],
}

/// `_IOR('X', 31, struct fsxattr)`.
const FS_IOC_FSGETXATTR: libc::c_ulong = 0x801c_581f;

/// The extent size hint of a file in bytes (XFS); `None` where it has none, or the file
/// system can't say.
pub fn extent_size_hint(file: &File) -> Option<u32> {
    let mut attributes = FsXattr::default();
    let request = FS_IOC_FSGETXATTR;
    // SAFETY: the kernel writes one `struct fsxattr`, which any bytes are.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut attributes) };
    Errno::result(result).ok()?;
    Some(attributes.extent_size).filter(|&size| size != 0)
}

/// An extent of a file (`struct fiemap_extent`, linux/fiemap.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FiemapExtent {
    pub(crate) logical: u64,
    pub(crate) physical: u64,
    pub(crate) length: u64,
    pub(crate) reserved64: [u64; 2],
    pub(crate) flags: u32,
    pub(crate) reserved: [u32; 3],
}

/// Extents that one FIEMAP call asks for.
const FIEMAP_EXTENTS: usize = 256;

/// `struct fiemap` with room for its extents: to be kept and used again.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct FiemapBuffer {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FiemapExtent; FIEMAP_EXTENTS],
}

const _: () = assert!(size_of::<FiemapBuffer>() == 32 + 56 * FIEMAP_EXTENTS);

const FS_IOC_FIEMAP: libc::c_ulong = nix::request_code_readwrite!(b'f', 11, 32);
/// Write dirty pages out first: without it, data over preallocated space that is not
/// yet on disk is called unwritten.
const FIEMAP_FLAG_SYNC: u32 = 1;

impl FiemapBuffer {
    /// An empty one.
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self {
            start: 0,
            length: 0,
            flags: 0,
            mapped_extents: 0,
            extent_count: 0,
            reserved: 0,
            extents: [FiemapExtent::default(); FIEMAP_EXTENTS],
        })
    }

    /// The first extents that meet `start .. start + length`, in order: at most as many
    /// as there is room for.
    ///
    /// # Errors
    /// What the kernel says: EOPNOTSUPP where the file system has no FIEMAP.
    pub(crate) fn ask(
        &mut self,
        file: &File,
        start: u64,
        length: u64,
    ) -> io::Result<&[FiemapExtent]> {
        self.start = start;
        self.length = length;
        self.flags = FIEMAP_FLAG_SYNC;
        self.mapped_extents = 0;
        self.extent_count = u32::try_from(FIEMAP_EXTENTS).unwrap_or(0);
        // SAFETY: the kernel writes the header and at most `extent_count` extents,
        // which is what the struct holds; any bit pattern is valid for them.
        let result =
            unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, std::ptr::from_mut(self)) };
        Errno::result(result)?;
        let mapped = usize::try_from(self.mapped_extents).unwrap_or(0).min(FIEMAP_EXTENTS);
        Ok(&self.extents[..mapped])
    }
}

/// KEY_SPEC_PROCESS_KEYRING: this process's own keyring, which goes with it.
const PROCESS_KEYRING: libc::c_long = -2;
const KEYCTL_REVOKE: libc::c_long = 3;
const KEYCTL_SEARCH: libc::c_long = 10;
const KEYCTL_UNLINK: libc::c_long = 9;
/// A key that only the kernel can read.
const LOGON: &std::ffi::CStr = c"logon";

fn c_string(text: &str) -> io::Result<std::ffi::CString> {
    std::ffi::CString::new(text).map_err(|_| Errno::EINVAL.into())
}

/// Puts a key in this process's keyring, where dm-crypt finds it by its description.
///
/// # Errors
/// What the kernel says: ENOSYS without keyrings.
pub(crate) fn add_logon_key(description: &str, key: &[u8]) -> io::Result<()> {
    let description = c_string(description)?;
    // SAFETY: two C strings and a buffer of the length given, none kept by the kernel.
    let result = unsafe {
        libc::syscall(
            libc::SYS_add_key,
            LOGON.as_ptr(),
            description.as_ptr(),
            key.as_ptr(),
            key.len(),
            PROCESS_KEYRING,
        )
    };
    Errno::result(result)?;
    Ok(())
}

/// Takes a key out of this process's keyring; the kernel wipes it.
pub(crate) fn forget_logon_key(description: &str) {
    let Ok(description) = c_string(description) else { return };
    // SAFETY: two C strings, not kept; the other commands take plain numbers.
    unsafe {
        let key = libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_SEARCH,
            PROCESS_KEYRING,
            LOGON.as_ptr(),
            description.as_ptr(),
            0,
        );
        if key >= 0 {
            libc::syscall(libc::SYS_keyctl, KEYCTL_REVOKE, key);
            libc::syscall(libc::SYS_keyctl, KEYCTL_UNLINK, key, PROCESS_KEYRING);
        }
    }
}

/// Who has a file open for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writers {
    /// Nobody, at the moment of asking.
    Nobody,
    /// Somebody.
    Somebody,
    /// The file system (or our privilege) does not let us know.
    Unknown,
}

/// Which signal tells of a lease that is to be given up (asm-generic/fcntl.h).
const F_SETSIG: libc::c_int = 10;

/// Whether anybody has `file` open for writing, whatever locks they take or do not:
/// a read lease is given only where nobody has. It is taken and given back at once.
pub fn writers(file: &File) -> Writers {
    let fd = file.as_raw_fd();
    // SAFETY: fcntl with these commands takes an int and touches no memory of ours.
    let set = |command: libc::c_int, value: libc::c_int| unsafe {
        Errno::result(libc::fcntl(fd, command, value))
    };
    // Should somebody open the file for writing in the instant between, the kernel
    // tells the lease's holder by SIGIO, which would end us: SIGURG is ignored.
    if set(F_SETSIG, libc::SIGURG).is_err() {
        return Writers::Unknown;
    }
    let answer = match set(libc::F_SETLEASE, libc::F_RDLCK) {
        Ok(_) => Writers::Nobody,
        Err(Errno::EAGAIN) => Writers::Somebody,
        Err(_) => Writers::Unknown,
    };
    let released = answer != Writers::Nobody || set(libc::F_SETLEASE, libc::F_UNLCK).is_ok();
    let _ = set(F_SETSIG, 0);
    if released { answer } else { Writers::Unknown }
}

/// An empty file in memory.
///
/// # Errors
/// What the kernel says.
pub(crate) fn memory_file(name: &str) -> io::Result<File> {
    const MFD_NOEXEC_SEAL: libc::c_uint = 8; // Linux 6.3
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let no_exec = flags | MFdFlags::from_bits_retain(MFD_NOEXEC_SEAL);
    let fd = match memfd_create(name, no_exec) {
        Err(Errno::EINVAL) => memfd_create(name, flags),
        other => other,
    }?;
    Ok(fd.into())
}

/// A file of zeros in memory that nobody can change any more, `length` bytes long. It
/// takes no memory but for the pages that are read.
///
/// # Errors
/// What the kernel says.
pub(crate) fn sealed_zeros(length: u64) -> io::Result<File> {
    let file = memory_file("imgdm-zero")?;
    file.set_len(length)?;
    fcntl(
        &file,
        FcntlArg::F_ADD_SEALS(
            SealFlag::F_SEAL_SHRINK
                | SealFlag::F_SEAL_GROW
                | SealFlag::F_SEAL_WRITE
                | SealFlag::F_SEAL_SEAL,
        ),
    )?;
    Ok(file)
}

/// Lets this process have as many descriptors open as it may: a chain of 1024 images
/// needs two each.
pub fn raise_open_files_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// A descriptor of our own for one that this process was started with, by its number.
///
/// # Errors
/// EBADF where there is none of that number.
pub fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: any number may be asked about, and none but a new descriptor comes of it.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    let copy = Errno::result(copy)?;
    // SAFETY: it was just made, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

#[cfg(test)]
mod tests;
