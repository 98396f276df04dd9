//! Which system calls a thread that reads images makes.
//!
//! Three filters, since one has but two answers. A call that only an attack makes ends the
//! process. One that opens a file is refused as Landlock refuses it, also where there is no
//! Landlock. All else that is not known to be needed does not exist (ENOSYS): that is what a C
//! library or a standard library newer than this list takes for an old kernel, and goes by an
//! older call.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Is,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

type Rules = BTreeMap<libc::c_long, Vec<SeccompRule>>;

/// On open files.
const FILES: &[libc::c_long] = &[
    libc::SYS_close,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readahead,
    libc::SYS_readv,
    libc::SYS_sync_file_range,
    libc::SYS_write,
    libc::SYS_writev,
    // Of a path, too, which tells no more than that it is there.
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getcwd,
];

/// Memory, threads, time, signals, and what the process is.
const ITSELF: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getegid,
    libc::SYS_getcpu,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mremap,
    libc::SYS_munlock,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// What opens a file, or changes one by its path. Refused, not ended: who asks how many
/// processors it may use looks into /proc first.
const OPENING: &[libc::c_long] = &[
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_linkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlinkat,
    libc::SYS_symlinkat,
    libc::SYS_truncate,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];

/// What nothing here ever does, and an attack would do next.
const ATTACKS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_add_key,
    libc::SYS_bind,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_connect,
    libc::SYS_delete_module,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_io_uring_setup,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_listen,
    libc::SYS_mount,
    libc::SYS_move_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setns,
    libc::SYS_setuid,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];

/// Those of a machine that has older ones, too.
#[cfg(target_arch = "x86_64")]
mod older {
    use nix::libc;

    pub(super) const FILES: &[libc::c_long] = &[libc::SYS_dup2, libc::SYS_poll];
    pub(super) const ITSELF: &[libc::c_long] = &[libc::SYS_arch_prctl, libc::SYS_time];
    pub(super) const OPENING: &[libc::c_long] = &[
        libc::SYS_access,
        libc::SYS_chmod,
        libc::SYS_chown,
        libc::SYS_creat,
        libc::SYS_link,
        libc::SYS_mkdir,
        libc::SYS_mknod,
        libc::SYS_open,
        libc::SYS_readlink,
        libc::SYS_rename,
        libc::SYS_rmdir,
        libc::SYS_symlink,
        libc::SYS_unlink,
    ];
    pub(super) const ATTACKS: &[libc::c_long] = &[
        libc::SYS_accept,
        libc::SYS_fork,
        libc::SYS_ioperm,
        libc::SYS_iopl,
        libc::SYS_kexec_file_load,
        libc::SYS_vfork,
    ];
}

#[cfg(not(target_arch = "x86_64"))]
mod older {
    use nix::libc;

    pub(super) const FILES: &[libc::c_long] = &[];
    pub(super) const ITSELF: &[libc::c_long] = &[];
    pub(super) const OPENING: &[libc::c_long] = &[];
    pub(super) const ATTACKS: &[libc::c_long] = &[libc::SYS_accept];
}

/// The ioctls that reading makes: extents, lengths and clones of files, the terminal's width.
const IOCTLS: [u64; 9] = [
    0xc020_660b, // FS_IOC_FIEMAP
    0x8008_1272, // BLKGETSIZE64
    0x1268,      // BLKSSZGET
    0x127b,      // BLKPBSZGET
    0x4004_9409, // FICLONE
    0x4020_940d, // FICLONERANGE
    0x5401,      // TCGETS
    0x802c_542a, // TCGETS2, of newer C libraries
    0x5413,      // TIOCGWINSZ
];

/// prctl(2): the thread's name, and the name that the C library gives to memory.
const PRCTLS: [u64; 3] = [15, 16, 0x5356_4d41];

fn where_argument(
    number: u8,
    length: Length,
    is: Is,
    value: u64,
) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(number, length, is, value)?])
}

fn each(calls: &[&[libc::c_long]]) -> Rules {
    calls.concat().into_iter().map(|call| (call, Vec::new())).collect()
}

/// What is let through: all that stays, and what another filter answers.
fn known() -> Result<Rules, BackendError> {
    let mut rules = each(&[
        FILES,
        ITSELF,
        OPENING,
        ATTACKS,
        older::FILES,
        older::ITSELF,
        older::OPENING,
        older::ATTACKS,
    ]);
    let one_of = |number, values: &[u64]| -> Result<Vec<SeccompRule>, BackendError> {
        values.iter().map(|&value| where_argument(number, Length::Dword, Is::Eq, value)).collect()
    };
    rules.insert(libc::SYS_ioctl, one_of(1, &IOCTLS)?);
    rules.insert(libc::SYS_prctl, one_of(0, &PRCTLS)?);
    // No memory becomes code.
    let exec = libc::PROT_EXEC.unsigned_abs().into();
    let no_code = || where_argument(2, Length::Dword, Is::MaskedEq(exec), 0);
    rules.insert(libc::SYS_mmap, vec![no_code()?]);
    rules.insert(libc::SYS_mprotect, vec![no_code()?]);
    // A thread, but no process; of clone3 that can't be told, so it does not exist.
    let thread = libc::CLONE_THREAD.unsigned_abs().into();
    let is_thread = where_argument(0, Length::Dword, Is::MaskedEq(thread), thread)?;
    rules.insert(libc::SYS_clone, vec![is_thread]);
    // Signals to itself: how an abort ends, and a signal that was caught.
    let own = std::process::id().into();
    for call in [libc::SYS_kill, libc::SYS_tgkill] {
        rules.insert(call, vec![where_argument(0, Length::Dword, Is::Eq, own)?]);
    }
    // Its limits can be asked for, and not set.
    rules.insert(libc::SYS_prlimit64, vec![where_argument(2, Length::Qword, Is::Eq, 0)?]);
    Ok(rules)
}

/// The filters, in the order in which they are to be applied: the last forbids to apply more.
///
/// # Errors
/// There are none for this kind of machine.
pub(super) fn filters() -> Result<Vec<BpfProgram>, BackendError> {
    let machine: TargetArch = std::env::consts::ARCH.try_into()?;
    let filter = |rules: Rules, other: SeccompAction, these: SeccompAction| {
        SeccompFilter::new(rules, other, these, machine)?.try_into()
    };
    let errno = |errno: libc::c_int| SeccompAction::Errno(errno.unsigned_abs());
    let attacks = each(&[ATTACKS, older::ATTACKS]);
    let opening = each(&[OPENING, older::OPENING]);
    Ok(vec![
        filter(attacks, SeccompAction::Allow, SeccompAction::KillProcess)?,
        filter(opening, SeccompAction::Allow, errno(libc::EACCES))?,
        filter(known()?, errno(libc::ENOSYS), SeccompAction::Allow)?,
    ])
}
