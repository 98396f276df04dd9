use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;
use crate::overlay::{StoreFile, persistent};
use crate::scratch::OnError;
use crate::source::Source;
use crate::status::FileRole;

struct World {
    directory: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("image"), [7; 4096]).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What the image is now.
    fn header(&self) -> StoreHeader {
        let (disk, chunk) = (Sectors::new(100_000), persistent::DEFAULT_CHUNK);
        let image = Source::open(&self.path("image")).unwrap();
        StoreHeader {
            disk,
            length: persistent::length_for(disk, chunk).unwrap(),
            chunk,
            on_error: OnError::Refuse,
            snapshot: None,
            files: vec![StoreFile::of(&image, 0, FileRole::Image, "raw").unwrap()],
        }
    }

    fn kept(&self) -> Result<Store> {
        Store::kept(&self.path("store"), &self.header(), None)
    }

    /// Makes a store and lets go of it.
    fn made(&self) -> PathBuf {
        self.kept().unwrap().keep();
        self.path("store")
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[track_caller]
    fn assert_refused(&self, wanted: &str) -> Error {
        let before = std::fs::read(self.path("store")).ok();
        let error = self.kept().unwrap_err();
        let said = error.to_string();
        assert!(said.contains(wanted), "{said}");
        assert!(said.starts_with(&self.path("store").display().to_string()), "{said}");
        assert_eq!(std::fs::read(self.path("store")).ok(), before, "it was left alone");
        error
    }
}

fn write_at(path: &Path, offset: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

#[test]
fn a_store_is_made_whole_and_used_again() {
    let world = World::new();
    let path = world.made();
    assert_eq!(world.names(), ["image", "store"]);
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    assert_eq!(metadata.len(), world.header().length.get() + STORE_OFFSET);
    assert!(metadata.blocks() * 512 < 64 << 10, "all but the headers is a hole");
    let file = File::open(&path).unwrap();
    assert_eq!(read_header(&file).unwrap(), world.header());
    assert!(read_persistent(&file).unwrap().valid);
    let again = world.kept().unwrap();
    assert_eq!(again.id, FileId::of_path(&path));
    drop(again);
    assert_eq!(world.names(), ["image", "store"], "what was there before stays");
}

#[test]
fn a_store_that_got_no_use_goes_again() {
    let world = World::new();
    drop(world.kept().unwrap());
    assert_eq!(world.names(), ["image"]);
    // And nobody else's file of that name.
    let store = world.kept().unwrap();
    std::fs::remove_file(world.path("store")).unwrap();
    std::fs::write(world.path("store"), "mine").unwrap();
    drop(store);
    assert_eq!(std::fs::read(world.path("store")).unwrap(), b"mine");
}

#[test]
fn what_is_no_store_is_left_alone() {
    let world = World::new();
    for content in [&b""[..], b"a letter", &[0; 1 << 17]] {
        std::fs::write(world.path("store"), content).unwrap();
        let error = world.assert_refused("no store of imgdm");
        assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)));
    }
    std::fs::remove_file(world.path("store")).unwrap();
    std::fs::create_dir(world.path("store")).unwrap();
    world.assert_refused("a directory");
    std::fs::remove_dir(world.path("store")).unwrap();
    std::os::unix::fs::symlink("/dev/null", world.path("store")).unwrap();
    world.assert_refused("no regular file");
}

#[test]
fn a_damaged_store_and_that_of_another_or_a_changed_image_are_refused() {
    let world = World::new();
    let refused = |damage: &dyn Fn(&Path), wanted: &str| {
        let path = world.made();
        damage(&path);
        let error = world.assert_refused(wanted);
        std::fs::remove_file(path).unwrap();
        error
    };
    refused(&|path| write_at(path, 70, b"!"), "header of the store is damaged");
    refused(&|path| write_at(path, 16, &[2]), "version 2");
    refused(&|path| write_at(path, STORE_OFFSET, b"x"), "dm-snapshot's part has the magic");
    refused(&|path| write_at(path, STORE_OFFSET + 4, &[0]), "given the store up");
    refused(&|path| write_at(path, STORE_OFFSET + 12, &[8]), "chunks of 8 sectors");
    let cut = |length: u64| {
        move |path: &Path| {
            OpenOptions::new().write(true).open(path).unwrap().set_len(length).unwrap()
        }
    };
    refused(&cut(100), "header of the store is damaged");
    refused(&cut(STORE_OFFSET), "magic");
    refused(&cut(STORE_OFFSET + (1 << 20)), "cut off");
    let error = refused(&|_| std::fs::write(world.path("image"), [8; 4096]).unwrap(), "changed");
    assert!(matches!(error.kind(), ErrorKind::InvalidImage(_)), "{error}");
}

/// The pair of this number in the first area of exceptions.
fn pair(number: u64, old: u64, new: u64) -> (u64, [u8; 16]) {
    let chunk = persistent::DEFAULT_CHUNK.to_bytes().unwrap();
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&old.to_le_bytes());
    bytes[8..].copy_from_slice(&new.to_le_bytes());
    (STORE_OFFSET + chunk + number * 16, bytes)
}

#[test]
fn exceptions_that_the_kernel_would_fall_over_are_refused() {
    let world = World::new();
    let refused = |pairs: &[(u64, u64)], wanted: &str| {
        let path = world.made();
        for (number, &(old, new)) in (0..).zip(pairs) {
            let (at, bytes) = pair(number, old, new);
            write_at(&path, at, &bytes);
        }
        let error = world.assert_refused(wanted);
        assert!(matches!(error.kind(), ErrorKind::InvalidImage(_)), "{error}");
        std::fs::remove_file(path).unwrap();
    };
    refused(&[(1, 0xff << 56 | 6), (0, 5)], "past its end");
    refused(&[(1, 6), (0, 1)], "for exceptions");
    refused(&[(1, 6), (1 << 40, 5)], "the disk has 3125");
    refused(&[(1, 6), (0, 6)], "named twice");
    // And what is as it should be is taken.
    let path = world.made();
    let (at, bytes) = pair(0, 7, 2);
    write_at(&path, at, &bytes);
    world.kept().unwrap();
}

#[test]
fn a_store_that_has_grown_and_was_cut_back_is_refused_where_something_is_lost() {
    let world = World::new();
    let path = world.made();
    let length = world.header().length.get();
    drop(Store::kept(&path, &world.header(), Some(ByteLen::new(length + (1 << 20)))).unwrap());
    let chunk = persistent::DEFAULT_CHUNK.to_bytes().unwrap();
    let (at, bytes) = pair(0, 7, length.div_ceil(chunk));
    write_at(&path, at, &bytes);
    drop(world.kept().unwrap());
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(STORE_OFFSET + length).unwrap();
    world.assert_refused("past its end");
}

#[test]
fn a_store_is_in_use_as_long_as_it_is_open() {
    let world = World::new();
    let mut first = world.kept().unwrap();
    first.keep();
    let error = world.assert_refused("in use");
    assert!(matches!(error.kind(), ErrorKind::InUse(_)));
    drop(first);
    drop(world.kept().unwrap());
}

#[test]
fn a_store_that_somebody_else_was_faster_to_make_is_theirs() {
    let world = World::new();
    let path = world.path("store");
    assert!(make(&path, &world.header()).unwrap());
    assert!(!make(&path, &world.header()).unwrap());
}

#[test]
fn a_store_whose_name_went_before_it_was_locked_is_not_taken() {
    let world = World::new();
    let path = world.made();
    let taken = |change: &dyn Fn()| {
        let found = read(&path).unwrap().unwrap();
        change();
        found.taken(&path, &world.header(), None).unwrap()
    };
    assert!(taken(&|| ()).is_some());
    let aside = world.path("aside");
    assert!(taken(&|| std::fs::rename(&path, &aside).unwrap()).is_none());
    std::fs::rename(&aside, &path).unwrap();
    let replace = || {
        std::fs::remove_file(&path).unwrap();
        world.made();
    };
    assert!(taken(&replace).is_none());
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("nothing", &path).unwrap();
    let error = world.kept().unwrap_err().to_string();
    assert!(error.contains("a symbolic link to what is not there"), "{error}");
}

#[test]
fn a_store_that_is_held_has_its_name_whoever_makes_and_removes_it_meanwhile() {
    let world = World::new();
    let header = world.header();
    let path = world.path("store");
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..30 {
                    match Store::kept(&path, &header, None) {
                        Ok(store) => assert_eq!(FileId::of_path(&path), store.id),
                        Err(error) => {
                            assert!(matches!(error.kind(), ErrorKind::InUse(_)), "{error}");
                        }
                    }
                }
            });
        }
    });
}

#[test]
fn where_there_are_no_locks_that_is_said() {
    let world = World::new();
    let mut store = world.kept().unwrap();
    assert_eq!(store.warning(), None);
    store.is_locked = false;
    assert!(store.warning().unwrap().contains("no locks"));
}

#[test]
fn a_store_can_be_made_larger_and_not_smaller() {
    let world = World::new();
    let path = world.made();
    let length = world.header().length;
    let with = |size: u64| Store::kept(&path, &world.header(), Some(ByteLen::new(size)));
    let error = with(length.get() - 512).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Usage(_)), "{error}");
    drop(with(length.get()).unwrap());
    drop(with(length.get() + 4096).unwrap());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), length.get() + 4096 + STORE_OFFSET);
    drop(world.kept().unwrap());
}

#[test]
fn a_place_where_none_can_be_made_is_named_with_the_reason() {
    let world = World::new();
    let at = |path: &Path| Store::kept(path, &world.header(), None).unwrap_err();
    let error = at(&world.path("missing/store"));
    assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)), "{error}");
    assert!(error.to_string().contains("no such directory"), "{error}");
    let error = at(Path::new("/proc/store"));
    assert!(matches!(error.kind(), ErrorKind::CannotCreate(_) | ErrorKind::NotFound(_)), "{error}");
    let at_length = |length| {
        let header = StoreHeader { length: ByteLen::new(length), ..world.header() };
        Store::kept(&world.path("store"), &header, None)
    };
    let error = at_length(i64::MAX.unsigned_abs()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)), "{error}");
    assert!(error.to_string().contains("longer than any file"), "{error}");
    assert_eq!(world.names(), ["image"]);
}

#[test]
fn a_transient_store_has_no_name() {
    let world = World::new();
    let place = ScratchPlace::choose(Some(world.directory.path())).unwrap();
    let store = Store::transient(&place, &world.header()).unwrap();
    assert_eq!(world.names(), ["image"]);
    assert_eq!(read_header(&store.file).unwrap(), world.header());
    assert_eq!(store.file.metadata().unwrap().nlink(), 0);
    store.file.write_all_at(b"x", STORE_OFFSET + 5000).unwrap();
}
