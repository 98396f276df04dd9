//! Exit statuses (those of sysexits.h, where one fits) and the error's last words.

use std::io;

use imgdm::{Error, ErrorKind};

/// Bad arguments.
pub(crate) const USAGE: u8 = 64;
const FAILED: u8 = 1;
const IMAGE_INVALID: u8 = 65;
const NOT_FOUND: u8 = 66;
const WRONG_KEY: u8 = 67;
const KERNEL_LACKS: u8 = 69;
const CANNOT_CREATE: u8 = 73;
const IN_USE: u8 = 75;
const NOT_REPRESENTABLE: u8 = 76;
const PERMISSION: u8 = 77;
const INVALID_TAB: u8 = 78;

/// The exit status for an error; 0 for a broken pipe, which is no error of ours.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    if is_broken_pipe(error) {
        return 0;
    }
    let Some(error) = error.chain().find_map(ours) else { return FAILED };
    match error.kind() {
        ErrorKind::InvalidImage(_) | ErrorKind::Unsupported(_) => IMAGE_INVALID,
        ErrorKind::NotFound(_)
        | ErrorKind::SnapshotNotFound(_)
        | ErrorKind::PartitionNotFound(_)
        | ErrorKind::NotAttached(_) => NOT_FOUND,
        ErrorKind::PermissionDenied(_) => PERMISSION,
        ErrorKind::InUse(_) => IN_USE,
        ErrorKind::NotRepresentable(_) => NOT_REPRESENTABLE,
        ErrorKind::Usage(_) => USAGE,
        ErrorKind::CannotCreate(_) => CANNOT_CREATE,
        ErrorKind::KernelLacks(_) => KERNEL_LACKS,
        ErrorKind::WrongKey(_) => WRONG_KEY,
        ErrorKind::InvalidTab(_) => INVALID_TAB,
        _ => FAILED,
    }
}

/// The library's error in a cause, where it is one.
pub(crate) fn ours<'e>(cause: &'e (dyn std::error::Error + 'static)) -> Option<&'e Error> {
    #[cfg(feature = "device")]
    if let Some(attach) = cause.downcast_ref::<imgdm::device::attach::AttachError>() {
        return Some(&attach.cause);
    }
    cause.downcast_ref::<Error>()
}

/// The signal that stopped the work, where one did.
#[cfg(feature = "device")]
pub(crate) fn interrupted_by(error: &anyhow::Error) -> Option<i32> {
    match error.chain().find_map(ours)?.kind() {
        ErrorKind::Interrupted(signal) => Some(*signal),
        _ => None,
    }
}

pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// The whole chain of causes in one line.
pub(crate) fn message(error: &anyhow::Error) -> String {
    format!("{error:#}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_status() {
        let code = |kind| exit_code(&anyhow::Error::new(Error::new(kind)).context("while testing"));
        assert_eq!(code(ErrorKind::InvalidImage(String::new())), 65);
        assert_eq!(code(ErrorKind::NotFound(String::new())), 66);
        assert_eq!(code(ErrorKind::PartitionNotFound(String::new())), 66);
        assert_eq!(code(ErrorKind::KernelLacks(String::new())), 69);
        assert_eq!(code(ErrorKind::WrongKey(String::new())), 67);
        assert_eq!(code(ErrorKind::InUse(String::new())), 75);
        assert_eq!(code(ErrorKind::PermissionDenied(String::new())), 77);
        assert_eq!(code(ErrorKind::InvalidTab(String::new())), 78);
        assert_eq!(code(ErrorKind::Io(String::new())), 1);
    }

    #[test]
    fn a_broken_pipe_is_no_error() {
        let error = anyhow::Error::new(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(exit_code(&error), 0);
    }
}
