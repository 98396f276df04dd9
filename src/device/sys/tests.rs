use super::*;
use std::io::Write;
use std::os::fd::AsFd;

#[test]
fn a_writer_is_found_by_the_lease() {
    let writer = tempfile::NamedTempFile::new().unwrap();
    let reader = File::open(writer.path()).unwrap();
    let answer = writers(&reader);
    if answer == Writers::Unknown {
        return; // No leases on this file system.
    }
    assert_eq!(answer, Writers::Somebody);
    let path = writer.into_temp_path();
    assert_eq!(writers(&reader), Writers::Nobody);
    assert_eq!(writers(&reader), Writers::Nobody, "the lease was given back");
    drop(path);
}

/// The signals that this process ignores, as a mask.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
}

#[test]
fn a_terminals_stops_are_ignored_for_a_time() {
    let stops = [libc::SIGTSTP, libc::SIGTTOU, libc::SIGTTIN];
    let mask = stops.iter().fold(0, |mask, signal| mask | 1 << (signal - 1));
    let before = ignored();
    let held = IgnoredStops::begin().unwrap();
    assert_eq!(ignored(), before | mask);
    drop(held);
    assert_eq!(ignored(), before);
}

#[test]
fn sealed_zeros_cannot_be_written() {
    let mut file = sealed_zeros(1 << 40).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1 << 40);
    assert!(file.write_all(b"x").is_err());
    assert!(file.set_len(0).is_err());
}

#[test]
fn a_short_buffer_never_reaches_the_kernel() {
    let file = File::open("/dev/null").unwrap();
    let error = dm_ioctl(file.as_fd(), 0, &mut [0; 311]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn a_short_file_never_reaches_the_kernel() {
    let (control, file) = (File::open("/dev/null").unwrap(), memory_file("short").unwrap());
    file.set_len(400).unwrap();
    for length in [311, 401, 1 << 32] {
        assert!(dm_ioctl_in_file(control.as_fd(), 0, &file, length).is_err(), "{length}");
    }
    // This much does: it is no device-mapper that answers there.
    let error = dm_ioctl_in_file(control.as_fd(), 0, &file, 400).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    let mut size = [0; 4];
    file.read_exact_at(&mut size, 12).unwrap();
    assert_eq!(u32::from_ne_bytes(size), 400);
}
