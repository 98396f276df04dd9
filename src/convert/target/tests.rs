//! Outputs on a file system.

use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

fn names(directory: &Path) -> Vec<OsString> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

fn written(path: &Path, force: bool, content: &[u8]) -> Result<Target> {
    let mut target = Target::create(path, force)?;
    target.file.write_all(content).unwrap();
    Ok(target)
}

#[test]
fn a_file_has_its_name_only_once_it_is_finished() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.raw");
    drop(written(&path, false, b"one").unwrap());
    assert_eq!(names(directory.path()), Vec::<OsString>::new());
    let mut target = written(&path, false, b"two").unwrap();
    assert!(!path.exists());
    target.commit(true).unwrap();
    drop(target);
    assert_eq!(fs::read(&path).unwrap(), b"two");
    assert_eq!(names(directory.path()), ["out.raw"]);
}

#[test]
fn a_file_with_a_name_beside_is_renamed_or_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.raw");
    let make = |force| {
        let (beside, file) = with_name_beside(&path, |beside| File::create_new(beside)).unwrap();
        let kind = Kind::Beside { path: path.clone(), beside };
        Target::new(&path, file, kind, force)
    };
    drop(make(false));
    assert_eq!(names(directory.path()), Vec::<OsString>::new());
    make(false).commit(true).unwrap();
    assert_eq!(names(directory.path()), ["out.raw"]);
    let error = make(false).commit(false).unwrap_err();
    assert!(error.to_string().contains("there already; --force"), "{error}");
    make(true).commit(false).unwrap();
    assert_eq!(names(directory.path()), ["out.raw"]);
}

#[test]
fn what_is_there_stays_unless_forced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.raw");
    fs::write(&path, b"old").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let error = Target::create(&path, false).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)), "{error}");
    assert!(error.to_string().contains("--force"), "{error}");
    drop(written(&path, true, b"new").unwrap());
    assert_eq!(fs::read(&path).unwrap(), b"old");
    written(&path, true, b"new").unwrap().commit(true).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(names(directory.path()), ["out.raw"]);
}

#[test]
fn what_came_into_being_meanwhile_stays_too() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.raw");
    let mut target = written(&path, false, b"new").unwrap();
    fs::write(&path, b"another's").unwrap();
    let error = target.commit(true).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)), "{error}");
    drop(target);
    assert_eq!(fs::read(&path).unwrap(), b"another's");
    assert_eq!(names(directory.path()), ["out.raw"]);
}

#[test]
fn links_stay_links() {
    let directory = tempfile::tempdir().unwrap();
    let (link, path) = (directory.path().join("link"), directory.path().join("out.raw"));
    symlink("out.raw", &link).unwrap();
    written(&link, false, b"one").unwrap().commit(false).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"one");
    assert!(Target::create(&link, false).is_err());
    written(&link, true, b"two").unwrap().commit(false).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"two");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    symlink("b", directory.path().join("a")).unwrap();
    symlink("a", directory.path().join("b")).unwrap();
    assert!(Target::create(&directory.path().join("a"), true).is_err());
}

#[test]
fn what_no_image_can_be_made_of_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let places =
        [directory.path(), &fifo, Path::new("/dev/null"), Path::new("/no/such/x"), Path::new("/")];
    for path in places {
        let error = Target::create(path, true).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)), "{error}");
        assert_eq!(error.path(), Some(path));
    }
    assert_eq!(names(directory.path()), ["fifo"]);
}

#[test]
fn the_file_of_a_running_virtual_machine_is_not_replaced() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let reader = Source::open(file.path()).unwrap();
    lock::lock(&reader, lock::Sharing::Readers).unwrap();
    let error = Target::create(file.path(), true).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::InUse(_)), "{error}");
    drop(reader);
    Target::create(file.path(), true).unwrap();
}

#[test]
fn what_a_virtual_machine_opened_meanwhile_is_not_replaced_either() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.raw");
    fs::write(&path, b"old").unwrap();
    let mut target = written(&path, true, b"new").unwrap();
    let reader = Source::open(&path).unwrap();
    lock::lock(&reader, lock::Sharing::Readers).unwrap();
    let error = target.commit(true).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::InUse(_)), "{error}");
    assert_eq!(error.path(), Some(path.as_path()));
    assert_eq!(fs::read(&path).unwrap(), b"old");
    drop(reader);
    target.commit(true).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
}

#[test]
fn a_block_device_is_locked_while_it_is_written() {
    // A regular file opens all the same.
    let device = tempfile::NamedTempFile::new().unwrap();
    let target = Target::open_device(device.path()).unwrap();
    let reader = Source::open(device.path()).unwrap();
    lock::lock(&reader, lock::Sharing::Readers).unwrap_err();
    let error = Target::open_device(device.path()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::InUse(_)), "{error}");
    assert_eq!(error.path(), Some(device.path()));
    drop((target, reader));
    Target::open_device(device.path()).unwrap();
}

#[test]
fn names_that_others_left_beside_are_passed_over() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.raw");
    let mut left = Vec::new();
    let leave = |name: &Path| {
        left.push(name.to_owned());
        File::create_new(name)?;
        if left.len() < 3 { Err(io::ErrorKind::AlreadyExists.into()) } else { Ok(()) }
    };
    let (beside, ()) = with_name_beside(&path, leave).unwrap();
    assert_eq!(left.last(), Some(&beside));
    left.dedup();
    assert_eq!(left.len(), 3);
}

#[test]
fn nobody_reads_a_file_beside_before_its_permissions_are_known() {
    let directory = tempfile::tempdir().unwrap();
    let mode = |file: &File| file.metadata().unwrap().permissions().mode() & 0o777;
    let path = directory.path().join("out.raw");
    let beside = |force| {
        let (file, kind) = make_beside(path.clone()).unwrap();
        assert_eq!(mode(&file), 0o600);
        Target::new(&path, file, kind, force)
    };
    beside(false).commit(false).unwrap();
    let as_usual = File::create(directory.path().join("other")).unwrap();
    assert_eq!(mode(&File::open(&path).unwrap()), mode(&as_usual));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    beside(true).commit(false).unwrap();
    assert_eq!(mode(&File::open(&path).unwrap()), 0o640);
}

#[test]
fn what_the_old_group_might_is_not_given_to_another() {
    for (old, new) in
        [(0o640, 0o600), (0o660, 0o600), (0o644, 0o644), (0o664, 0o644), (0o604, 0o600)]
    {
        assert_eq!(mode_for_others(old), new, "{old:o}");
    }
}

#[test]
fn a_name_that_ends_as_a_directory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["sub/", "sub//", "sub/."] {
        let error = Target::create(&directory.path().join(name), true).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)), "{error}");
        assert!(error.without_path().contains("ends in '/'"), "{}", error.without_path());
    }
}

#[test]
fn a_file_that_is_read_is_known_by_any_name() {
    let directory = tempfile::tempdir().unwrap();
    let (path, other) = (directory.path().join("in"), directory.path().join("other"));
    fs::write(&path, b"x").unwrap();
    fs::hard_link(&path, &other).unwrap();
    let source = Source::open(&path).unwrap();
    let error = refuse_files(&other, [&source]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Usage(_)), "{error}");
    refuse_files(&directory.path().join("new"), [&source]).unwrap();
}
