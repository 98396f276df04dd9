#![allow(clippy::cast_possible_truncation)]

use std::os::unix::fs::{FileExt, PermissionsExt};

use super::super::fill::tests::{CLUSTER, Windows, chain_over, cluster_of, streams_of, whole};
use super::super::{FailedCluster, FillOptions, OnError, fill};
use super::*;
use crate::units::{GuestOffset, HostOffset};

/// A directory with an image of a few clusters in it, and one for what is kept.
struct World {
    dir: tempfile::TempDir,
    work: Windows,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut clusters = vec![cluster_of(0); 40];
        clusters[3] = cluster_of(7);
        clusters[39] = cluster_of(9);
        let (file, places) = streams_of(&clusters);
        std::fs::write(dir.path().join("disk.qcow2"), file).unwrap();
        let jobs = (0..).zip(&places).map(|(index, &place)| whole(place, index)).collect();
        Self { dir, work: Windows(vec![jobs]) }
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("disk.qcow2")
    }

    fn directory(&self) -> PathBuf {
        self.dir.path().join("kept")
    }

    fn chain(&self) -> Chain {
        chain_over(Source::open(&self.image()).unwrap())
    }

    fn cache_of(&self, chain: &Chain) -> Cache {
        let shortest = FillOptions::SHORTEST_ZERO_RUN;
        match Cache::of(Some(&self.directory()), chain, &self.work, shortest).unwrap() {
            Cacheable::Yes(cache) => cache,
            Cacheable::No(why) => panic!("{why}"),
        }
    }

    fn cache(&self) -> Cache {
        self.cache_of(&self.chain())
    }

    fn filled(&self, chain: &Chain, builder: &CacheBuilder) -> Filled {
        let options = FillOptions::new(self.directory(), OnError::Refuse);
        fill(chain, &self.work, builder.file(), &options, &|_| Ok(())).unwrap()
    }

    /// Inflates and keeps.
    fn keep(&self) -> (Cache, Filled) {
        let chain = self.chain();
        let cache = self.cache_of(&chain);
        let builder = cache.build().unwrap();
        let filled = self.filled(&chain, &builder);
        let kept = builder.keep(&cache, &chain, &filled).unwrap();
        assert!(kept.not_kept.is_none(), "{:?}", kept.not_kept);
        check(&kept.file);
        (cache, filled)
    }

    fn names(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.directory()).unwrap();
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn check(file: &File) {
    let mut byte = [0];
    for (index, expected) in [(0, 0), (3, 7), (38, 0), (39, 9)] {
        file.read_exact_at(&mut byte, index * CLUSTER + 5).unwrap();
        assert_eq!(byte[0], expected, "cluster {index}");
    }
    file.write_all_at(&[1], 0).unwrap_err();
}

#[test]
fn a_kept_file_is_used_again() {
    let world = World::new();
    assert!(world.cache().lookup().is_none());
    let (cache, filled) = world.keep();
    assert_eq!(filled.zero_runs.len(), 1);
    let hit = world.cache().lookup().unwrap();
    check(&hit.file);
    assert_eq!(hit.filled, filled);

    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&world.directory()), mode(&cache.path())), (0o700, 0o600));
    assert_eq!(world.names().len(), 1);
    assert!(world.names()[0].starts_with("disk-"));
}

#[test]
fn the_time_is_taken_when_all_data_has_been_read() {
    let world = World::new();
    let chain = world.chain();
    let cache = world.cache_of(&chain);
    let builder = cache.build().unwrap();
    let filled = world.filled(&chain, &builder);
    let length = || builder.file().metadata().unwrap().len();
    assert_eq!(length(), 40 * CLUSTER);
    let mut length_then = 0;
    let clock = || {
        length_then = length();
        SystemTime::now()
    };
    builder.finish(&cache, &chain, &filled, clock).unwrap();
    // The checksums of the data were there, however long they took.
    assert_eq!(length_then, length());
    assert!(length_then > 40 * CLUSTER);
    assert!(world.cache().lookup().is_some());
}

#[test]
fn a_changed_image_makes_it_stale_and_takes_its_place() {
    let world = World::new();
    world.keep();
    let image = File::options().write(true).open(world.image()).unwrap();
    let before = image.metadata().unwrap().modified().unwrap();
    image.write_all_at(&[0xee], 0).unwrap();
    // Even where somebody sets its time back.
    image.set_modified(before).unwrap();
    assert!(world.cache().lookup().is_none());
    world.keep();
    assert!(world.cache().lookup().is_some());
    assert_eq!(world.names().len(), 1);
}

#[test]
fn a_stale_file_makes_room_for_the_new_one_and_a_good_one_stays_until_then() {
    let world = World::new();
    let (cache, _) = world.keep();
    drop(cache.build().unwrap());
    assert!(world.cache().lookup().is_some());
    assert_eq!(world.names().len(), 1);

    let image = File::options().write(true).open(world.image()).unwrap();
    image.write_all_at(&[0xee], 0).unwrap();
    let cache = world.cache();
    assert!(cache.lookup().is_none());
    // Two clusters and the trailer.
    let taken = cache.bytes_of_stale_file();
    assert!((2 * CLUSTER..1 << 20).contains(&taken), "{taken}");
    let link = world.dir.path().join("link");
    std::fs::hard_link(cache.path(), &link).unwrap();
    assert_eq!(cache.bytes_of_stale_file(), 0, "removing it frees nothing");
    std::fs::remove_file(link).unwrap();

    let builder = cache.build().unwrap();
    assert_eq!(world.names(), [""; 0]);
    assert_eq!(cache.bytes_of_stale_file(), 0);
    drop(builder);
    world.keep();
    assert!(world.cache().lookup().is_some());
}

#[test]
fn other_jobs_make_it_stale() {
    let mut world = World::new();
    world.keep();
    world.work.0[0].swap(3, 4);
    assert!(world.cache().lookup().is_none());
    world.work.0[0].swap(3, 4);
    assert!(world.cache().lookup().is_some());
    let jobs = world.work.0.remove(0);
    world.work.0.extend(jobs.chunks(3).map(<[_]>::to_vec));
    assert!(world.cache().lookup().is_some(), "windows are no matter");
}

#[test]
fn a_damaged_file_is_not_used() {
    type Damage = (&'static str, fn(&File));
    let damages: [Damage; 6] = [
        ("cut off", |file| file.set_len(file.metadata().unwrap().len() - 1).unwrap()),
        ("cut off to nothing", |file| file.set_len(0).unwrap()),
        ("longer", |file| file.set_len(file.metadata().unwrap().len() + 1).unwrap()),
        ("a changed byte of the data", |file| file.write_all_at(&[1], 3 * CLUSTER).unwrap()),
        ("a changed byte of a hole", |file| file.write_all_at(&[1], 5 * CLUSTER).unwrap()),
        ("a changed byte of the trailer", |file| {
            file.write_all_at(&[1], 40 * CLUSTER + 60).unwrap();
        }),
    ];
    let world = World::new();
    for (name, damage) in damages {
        let (cache, _) = world.keep();
        let file = File::options().write(true).open(cache.path()).unwrap();
        damage(&file);
        assert!(world.cache().lookup().is_none(), "{name}");
    }
}

#[test]
fn others_files_are_not_used() {
    let world = World::new();
    let (cache, _) = world.keep();
    let path = cache.path();
    let mode = |mode| std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    mode(0o620);
    assert!(world.cache().lookup().is_none());
    mode(0o600);
    assert!(world.cache().lookup().is_some());
    if geteuid().is_root() {
        std::os::unix::fs::chown(&path, Some(1), None).unwrap();
        assert!(world.cache().lookup().is_none());
        std::os::unix::fs::chown(&path, Some(0), None).unwrap();
    }
    let elsewhere = world.dir.path().join("elsewhere");
    std::fs::rename(&path, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
    assert!(world.cache().lookup().is_none());
    std::fs::remove_file(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(world.cache().lookup().is_none());
    world.keep();
    assert!(world.cache().lookup().is_some());
}

#[test]
fn what_is_not_finished_leaves_nothing() {
    let world = World::new();
    let chain = world.chain();
    let cache = world.cache_of(&chain);
    let builder = cache.build().unwrap();
    let filled = world.filled(&chain, &builder);
    assert_eq!(world.names(), [""; 0]);

    // With a cluster that failed it is used, but not kept.
    let failed = FailedCluster {
        guest: chain.whole(),
        layer: 0,
        path: Path::new("x").into(),
        host: HostOffset::ZERO,
        length: ByteLen::ZERO,
        why: super::super::FailedWhy::Read(5),
    };
    let filled = Filled { failed: vec![failed], ..filled };
    let kept = builder.keep(&cache, &chain, &filled).unwrap();
    assert!(kept.not_kept.is_some());
    check(&kept.file);
    assert_eq!(world.names(), [""; 0]);
}

#[test]
fn an_image_that_changes_meanwhile_is_not_kept() {
    let world = World::new();
    let chain = world.chain();
    let cache = world.cache_of(&chain);
    let builder = cache.build().unwrap();
    let filled = world.filled(&chain, &builder);
    File::options().write(true).open(world.image()).unwrap().write_all_at(&[1], 0).unwrap();
    let kept = builder.keep(&cache, &chain, &filled).unwrap();
    assert!(matches!(kept.not_kept.unwrap().kind(), ErrorKind::InUse(_)));
    assert_eq!(world.names(), [""; 0]);
}

#[test]
fn a_file_with_a_temporary_name_is_renamed_and_leftovers_are_removed() {
    let world = World::new();
    let chain = world.chain();
    let cache = world.cache_of(&chain);
    std::fs::create_dir(world.directory()).unwrap();
    std::fs::write(world.directory().join(".imgdm-1-0"), "left by a process that is gone").unwrap();
    let place = ScratchPlace::in_directory(&world.directory());
    let (writer, path) = create_named(place.directory()).unwrap();
    let lock = Flock::lock(writer.try_clone().unwrap(), FlockArg::LockExclusiveNonblock);
    let builder = CacheBuilder { place, writer, temporary: Some((path, lock.unwrap())) };
    let filled = world.filled(&chain, &builder);
    // Another one comes while this one is at work.
    drop(cache.build().unwrap());
    assert_eq!(world.names().len(), 1);
    let kept = builder.keep(&cache, &chain, &filled).unwrap();
    assert!(kept.not_kept.is_none(), "{:?}", kept.not_kept);
    check(&kept.file);
    assert!(world.cache().lookup().is_some());
    assert_eq!(world.names().len(), 1);
}

#[test]
fn builders_that_race_leave_one_whole_file() {
    let world = World::new();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    let chain = world.chain();
                    let cache = world.cache_of(&chain);
                    let builder = cache.build().unwrap();
                    let filled = world.filled(&chain, &builder);
                    check(&builder.keep(&cache, &chain, &filled).unwrap().file);
                }
            });
        }
    });
    assert_eq!(world.names().len(), 1);
    check(&world.cache().lookup().unwrap().file);
}

#[test]
fn an_image_that_does_not_tell_of_changes_cannot_be_kept() {
    let world = World::new();
    let memory = chain_over(Source::from_bytes("x", std::fs::read(world.image()).unwrap()));
    let cacheable = Cache::of(None, &memory, &world.work, ByteLen::new(1 << 20)).unwrap();
    assert!(matches!(cacheable, Cacheable::No(_)));
    // Where it has no piece of the scratch file, that is no matter.
    let cacheable = Cache::of(None, &memory, &Windows(Vec::new()), ByteLen::new(1 << 20));
    assert!(matches!(cacheable.unwrap(), Cacheable::Yes(_)));
}

#[test]
fn no_two_lists_of_jobs_have_the_same_hash() {
    let (_, places) = streams_of(&vec![cluster_of(7); 3]);
    let jobs: Vec<_> = (0..).zip(&places).map(|(index, &place)| whole(place, index)).collect();
    let hash_of = |jobs: &[ScratchJob]| {
        let mut hasher = JobHasher::new(blake3::Hasher::new());
        jobs.iter().for_each(|job| hasher.add(job));
        hasher.finish().finalize()
    };
    // What makes it another job, in each field.
    let changes: [fn(&mut ScratchJob); 11] = [
        |job| job.at += 512,
        |job| job.length += 512,
        |job| job.guest = GuestOffset::new(job.guest.get() + 512),
        |job| job.layer += 1,
        |job| {
            let ScratchContent::Inflate { host, .. } = &mut job.what else { return };
            *host = HostOffset::new(host.get() + 1);
        },
        |job| {
            let ScratchContent::Inflate { host, .. } = &mut job.what else { return };
            *host = HostOffset::new(u64::MAX);
        },
        |job| {
            let ScratchContent::Inflate { stream_length, .. } = &mut job.what else { return };
            *stream_length = ByteLen::new(stream_length.get() + 1);
        },
        |job| {
            let ScratchContent::Inflate { cluster, .. } = &mut job.what else { return };
            *cluster = GuestOffset::new(cluster.get() + 512);
        },
        |job| {
            let (role, host) = (FileRole::Image, HostOffset::ZERO);
            job.what = ScratchContent::Copy { role, host, bytes: 512 };
        },
        |job| {
            let (role, host) = (FileRole::DataFile, HostOffset::ZERO);
            job.what = ScratchContent::Copy { role, host, bytes: 512 };
        },
        |job| {
            let (role, host) = (FileRole::Image, HostOffset::ZERO);
            job.what = ScratchContent::Copy { role, host, bytes: 513 };
        },
    ];
    let mut hashes = vec![hash_of(&jobs), hash_of(&jobs[..2]), hash_of(&[])];
    for index in 0..jobs.len() {
        for change in changes {
            let mut changed = jobs.clone();
            change(&mut changed[index]);
            hashes.push(hash_of(&changed));
        }
    }
    // And where there are too many for the buffer.
    let many: Vec<_> = (0..4000).map(|index| whole(places[0], index)).collect();
    hashes.extend([hash_of(&many), hash_of(&many[..3999])]);
    for (at, hash) in hashes.iter().enumerate() {
        assert!(!hashes[..at].contains(hash), "{at}");
    }
    assert_eq!(hash_of(&many), hash_of(&many.clone()));
}

#[test]
fn the_files_of_images_that_are_gone_are_removed_and_no_others() {
    let world = World::new();
    world.keep();
    let kept = world.names();
    let other = World::new();
    let elsewhere = other.dir.path().join("other.qcow2");
    std::fs::rename(other.image(), &elsewhere).unwrap();
    let keep_other = || {
        let chain = chain_over(Source::open(&elsewhere).unwrap());
        let shortest = FillOptions::SHORTEST_ZERO_RUN;
        let cache = Cache::of(Some(&world.directory()), &chain, &other.work, shortest).unwrap();
        let Cacheable::Yes(cache) = cache else { panic!("{cache:?}") };
        let builder = cache.build().unwrap();
        let options = FillOptions::new(world.directory(), OnError::Refuse);
        let filled = fill(&chain, &other.work, builder.file(), &options, &|_| Ok(())).unwrap();
        assert!(builder.keep(&cache, &chain, &filled).unwrap().not_kept.is_none());
    };
    keep_other();
    assert_eq!(world.names().len(), 2);
    for name in ["x.scratch", "notes"] {
        std::fs::write(world.directory().join(name), "not ours to judge").unwrap();
    }
    std::fs::remove_file(world.image()).unwrap();
    keep_other();
    let mut names = world.names();
    names.sort();
    assert_eq!(names.len(), 3, "{names:?}");
    assert!(names[0] == "notes" && names[1].starts_with("other-") && names[2] == "x.scratch");
    assert!(!names.contains(&kept[0]));
}

#[test]
fn a_directory_of_others_is_refused_and_a_link_to_one_of_ours_is_not() {
    let world = World::new();
    let mode = |mode| {
        let mode = PermissionsExt::from_mode(mode);
        std::fs::set_permissions(world.directory(), mode).unwrap();
    };
    let refused = |words: &str| {
        let cache = world.cache();
        for error in [cache.build().unwrap_err(), cache.check_place(1, 512).unwrap_err()] {
            assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)));
            assert_eq!(error.path(), Some(world.directory().as_path()));
            assert!(error.to_string().contains(words), "{error}");
        }
    };
    std::fs::create_dir(world.directory()).unwrap();
    mode(0o777);
    refused("mode is 777");
    mode(0o770);
    refused("others can write");
    mode(0o1777);
    world.cache().build().unwrap();
    mode(0o755);
    if geteuid().is_root() {
        std::os::unix::fs::chown(world.directory(), Some(1), None).unwrap();
        refused("belongs to user 1");
        std::os::unix::fs::chown(world.directory(), Some(0), None).unwrap();
    }
    let target = world.dir.path().join("target");
    std::fs::rename(world.directory(), &target).unwrap();
    std::os::unix::fs::symlink(&target, world.directory()).unwrap();
    world.keep();
    assert!(world.cache().lookup().is_some());
    // A link to nothing can't be made a directory of.
    std::fs::remove_dir_all(target).unwrap();
    world.cache().build().unwrap_err();
    world.cache().check_place(1, 512).unwrap_err();
}

#[test]
fn a_place_is_checked_without_leaving_anything() {
    let world = World::new();
    let place = world.cache().check_place(1, 512).unwrap();
    assert_eq!(place.directory(), world.dir.path());
    assert!(!world.directory().exists());
    std::fs::create_dir(world.directory()).unwrap();
    world.cache().check_place(1, 512).unwrap();
    assert_eq!(world.names(), [""; 0]);
    let error = world.cache().check_place(u64::MAX, 512).unwrap_err();
    assert!(error.to_string().contains("are free"), "{error}");
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let world = World::new();
    let cache = world.cache();
    std::fs::write(world.directory(), "a file").unwrap();
    let error = cache.build().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)));
    assert!(error.to_string().starts_with(&world.directory().display().to_string()), "{error}");
}
