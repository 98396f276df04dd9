//! Devices on top: the same promises as for what is below.

use super::*;
use crate::device::fake::FakeDevice;

/// A master boot record with partitions of these first sectors and lengths.
fn mbr(partitions: &[(u32, u32)]) -> [u8; 512] {
    let mut sector = [0; 512];
    for (index, (start, length)) in partitions.iter().enumerate() {
        let entry = &mut sector[446 + 16 * index..][..16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..].copy_from_slice(&length.to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

fn fixture() -> Fixture {
    Fixture::with_start(&mbr(&[(8, 16), (24, 8)]))
}

fn all() -> Above {
    Above { partitions: Partitions::All, ..Above::default() }
}

fn only(numbers: &[u32]) -> Above {
    Above { partitions: Partitions::Only(numbers.iter().copied().collect()), ..Above::default() }
}

/// What `change` would do, for requests that outlive the closure they are changed in.
pub(super) fn leaked(above: Above) -> &'static Above {
    Box::leak(Box::new(above))
}

pub(super) fn attach_above(
    fixture: &Fixture,
    kernel: &FakeKernel,
    above: &Above,
) -> Result<Attachment, AttachError> {
    let above = leaked(above.clone());
    fixture.attach_with(kernel, |request| request.above = above)
}

pub(super) fn names(attachment: &Attachment) -> Vec<&str> {
    attachment.above.iter().map(|above| above.info.name.as_str()).collect()
}

/// Names of all devices.
pub(super) fn devices(kernel: &FakeKernel) -> Vec<String> {
    kernel.with(|state| state.devices.values().map(|device| device.name.clone()).collect())
}

/// Runs `work` and gives what it changed, in the kernel's words.
fn calls(kernel: &FakeKernel, work: impl FnOnce()) -> Vec<String> {
    let before = kernel.with(|state| state.calls.len());
    work();
    kernel.with(|state| state.calls[before..].to_vec())
}

#[test]
fn partitions_are_built_as_the_disk_is_and_committed_after_it() {
    let (kernel, fixture) = (FakeKernel::new(), fixture());
    let attached = attach_above(&fixture, &kernel, &all()).unwrap();
    assert_eq!(names(&attached), ["disk1", "disk2"]);
    assert_eq!(attached.above[1].path, PathBuf::from("/dev/mapper/disk2"));
    assert_eq!(attached.above[1].size, Sectors::new(8));
    assert_eq!(attached.above[1].info.uuid, format!("part2-{}", attached.uuid));
    let calls = kernel.with(|state| state.calls.clone());
    let after = calls.iter().position(|call| call == "resume disk HideContent").unwrap() + 1;
    assert_eq!(
        calls[after..],
        [
            "create disk1",
            "load disk1 1",
            "open 253:2",
            "defer disk1",
            "load disk1 1",
            "resume disk1 HideContent",
            "create disk2",
            "load disk2 1",
            "open 253:3",
            "defer disk2",
            "load disk2 1",
            "resume disk2 HideContent",
            "cancel disk",
            "cancel disk1",
            "cancel disk2",
            "publish disk",
            "publish disk1",
            "publish disk2",
        ]
    );
    kernel.with(|state| {
        let marked: Vec<_> = state.devices.values().map(|device| device.deferred).collect();
        assert_eq!(marked, [true, false, false, false]);
        assert!(state.devices.values().all(|device| device.descriptors == 0));
        let lines: Vec<_> =
            state.devices[&3].live.iter().flatten().map(ToString::to_string).collect();
        assert_eq!(lines, ["0 8 linear 253:1 24"]);
    });
}

/// All calls of attaching with partitions.
const CALLS: usize = 37;
/// The first of them after the disk's mark is taken away.
const COMMITTED: usize = 32;

#[test]
fn a_failure_at_any_step_leaves_nothing_of_disk_or_partitions() {
    let fixture = fixture();
    let attach = |kernel: &_| attach_above(&fixture, kernel, &all());
    assert_eq!(fail_at_each_step(attach), CALLS);
}

#[test]
fn an_interruption_at_any_step_leaves_nothing_of_disk_or_partitions() {
    let (fixture, above) = (fixture(), leaked(all()));
    for step in 0..CALLS {
        let kernel = FakeKernel::new();
        let flag = Arc::new(AtomicUsize::new(0));
        kernel.raise_at(step, &flag);
        let flag: &'static Arc<AtomicUsize> = Box::leak(Box::new(flag));
        let result = fixture.attach_with(&kernel, |request| {
            request.above = above;
            request.interrupt = Interrupt::new(flag);
        });
        let error = result.unwrap_err();
        assert_eq!(*error.cause.kind(), ErrorKind::Interrupted(15), "step {step}");
        assert!(is_empty(&kernel), "step {step}: {kernel:?}");
    }
}

#[test]
fn a_kill_at_any_step_leaves_nothing_or_what_attaching_again_completes() {
    let fixture = fixture();
    for step in 0..CALLS {
        let kernel = FakeKernel::new();
        kernel.panic_at(step);
        let kill = || attach_above(&fixture, &kernel, &all()).is_ok();
        catch_unwind(AssertUnwindSafe(kill)).unwrap_err();
        kernel.with(|state| {
            let live = state.devices.values().filter(|device| device.live.is_some());
            let live: Vec<_> = live.map(|device| device.name.as_str()).collect();
            match step {
                0..COMMITTED => assert!(live.is_empty() && state.loops.is_empty(), "step {step}"),
                // Whole, with those partitions whose mark was taken away.
                _ => assert!(live.starts_with(&["disk-inner0", "disk"]), "step {step}: {live:?}"),
            }
        });
        let again = attach_above(&fixture, &kernel, &all()).unwrap();
        assert_eq!(again.already_attached, step >= COMMITTED, "step {step}");
        assert_eq!(names(&again), ["disk1", "disk2"], "step {step}");
        assert_eq!(devices(&kernel).len(), 4, "step {step}");
    }
}

#[test]
fn partitions_are_added_to_what_is_attached_and_a_failure_leaves_that_as_it_was() {
    let fixture = fixture();
    for step in 0.. {
        let kernel = FakeKernel::new();
        fixture.attach(&kernel).unwrap();
        attach_above(&fixture, &kernel, &only(&[2])).unwrap();
        let before = (devices(&kernel), kernel.with(|state| state.published.clone()));
        kernel.fail_at(kernel.with(|state| state.calls.len()) + step);
        let Err(error) = attach_above(&fixture, &kernel, &all()) else {
            assert!(step > 10, "each call failed once");
            break;
        };
        assert!(error.leftovers.is_empty(), "step {step}: {error}");
        let published: std::collections::BTreeSet<_> =
            kernel.with(|state| state.published.iter().cloned().collect());
        assert_eq!(devices(&kernel), before.0, "step {step}");
        assert_eq!(published, before.1.into_iter().collect(), "step {step}");
        assert!(kernel.with(|state| !state.devices[&1].deferred && !state.devices[&2].deferred));
    }
}

#[test]
fn attaching_again_with_partitions_changes_nothing() {
    let (kernel, fixture) = (FakeKernel::new(), fixture());
    let first = attach_above(&fixture, &kernel, &all()).unwrap();
    let changed = calls(&kernel, || {
        for above in [&all(), &only(&[1, 2])] {
            let again = attach_above(&fixture, &kernel, above).unwrap();
            assert_eq!(again.above, first.above);
        }
        assert_eq!(fixture.attach(&kernel).unwrap().above, []);
    });
    let changes = ["create", "load", "defer", "cancel", "resume", "loop", "remove"];
    let changed = changed.iter().find(|call| changes.iter().any(|change| call.starts_with(change)));
    assert_eq!(changed, None);
}

#[test]
fn a_partition_that_is_not_there_is_an_error_that_says_which_are() {
    let refused = |fixture: &Fixture, above: &Above| {
        let kernel = FakeKernel::new();
        let error = attach_above(fixture, &kernel, above).unwrap_err();
        assert!(is_empty(&kernel), "{kernel:?}");
        // And what was attached without stays.
        fixture.attach(&kernel).unwrap();
        attach_above(fixture, &kernel, above).unwrap_err();
        assert_eq!(devices(&kernel), ["disk-inner0", "disk"]);
        error.cause
    };
    let error = refused(&fixture(), &only(&[1, 3]));
    assert!(matches!(error.kind(), ErrorKind::PartitionNotFound(_)));
    assert_eq!(error.to_string(), "there is no partition 3: the dos table has partitions 1 and 2");

    let none = Fixture::new();
    let error = refused(&none, &only(&[1]));
    assert_eq!(error.to_string(), "there is no partition table on the disk");

    // One that overlaps another, and one that ends past the disk.
    let damaged = Fixture::with_start(&mbr(&[(8, 16), (16, 16), (60, 9)]));
    for (number, why) in [(2, "overlaps partition 1"), (3, "past the end of the disk")] {
        let error = refused(&damaged, &only(&[number]));
        assert!(matches!(error.kind(), ErrorKind::InvalidImage(_)));
        assert!(error.to_string().contains(why), "{error}");
    }
}

#[test]
fn what_cannot_be_had_of_all_partitions_is_passed_over_and_told() {
    let warnings = |fixture: &Fixture| {
        let (kernel, above) = (FakeKernel::new(), leaked(all()));
        let pending = fixture.build_with(&kernel, |request| request.above = above).unwrap();
        let warnings: Vec<_> = pending.warnings().iter().map(ToString::to_string).collect();
        let attachment = pending.commit(&Interrupt::never()).unwrap();
        (names(&attachment).join(" "), warnings)
    };
    let damaged = Fixture::with_start(&mbr(&[(8, 16), (16, 16), (60, 9), (60, 4)]));
    let (built, told) = warnings(&damaged);
    assert_eq!(built, "disk1 disk4");
    assert_eq!(
        told,
        [
            "partition 2 is passed over: it overlaps partition 1",
            "partition 3 is passed over: it reaches past the end of the disk"
        ]
    );
    let (built, told) = warnings(&Fixture::new());
    assert_eq!(
        (built.as_str(), told),
        ("", vec!["there is no partition table on the disk".to_owned()])
    );
    let (_, told) = warnings(&Fixture::with_start(&mbr(&[])));
    assert_eq!(told, ["the partition table (dos) has no partition"]);
}

#[test]
fn a_taken_name_or_uuid_of_a_partition_is_refused_and_says_by_what() {
    let fixture = fixture();
    let refused = |kernel: &FakeKernel| {
        let before = devices(kernel);
        let error = attach_above(&fixture, kernel, &all()).unwrap_err();
        assert!(matches!(error.cause.kind(), ErrorKind::CannotCreate(_)), "{error}");
        assert_eq!(devices(kernel), before);
        error.to_string()
    };
    // Of another attachment.
    let kernel = FakeKernel::new();
    let other: &'static DmName = Box::leak(Box::new(DmName::new("disk2").unwrap()));
    fixture.attach_with(&kernel, |request| request.name = other).unwrap();
    let said = refused(&kernel);
    assert!(said.contains("'disk2' is taken by an imgdm device of /images/"), "{said}");

    // And the other way round: a partition has the name.
    let kernel = FakeKernel::new();
    attach_above(&fixture, &kernel, &all()).unwrap();
    let error = fixture.attach_with(&kernel, |request| request.name = other).unwrap_err();
    assert!(error.to_string().contains("taken by partition 2 of 'disk'"), "{error}");

    // Somebody's partition of ours, elsewhere.
    let kernel = FakeKernel::new();
    let attached = fixture.attach(&kernel).unwrap();
    kernel.change(|state| {
        let live = Some(vec!["0 8 linear 253:1 0".parse().unwrap()]);
        let (name, uuid) = ("mine".to_owned(), format!("part1-{}", attached.uuid));
        state.devices.insert(9, FakeDevice { name, uuid, live, ..FakeDevice::default() })
    });
    let said = refused(&kernel);
    assert!(said.contains("'mine' is there already"), "{said}");
}

#[test]
fn left_to_those_who_have_it_open_it_goes_with_the_last() {
    let (kernel, fixture, above) = (FakeKernel::new(), fixture(), leaked(only(&[1])));
    let mut pending = fixture.build_with(&kernel, |request| request.above = above).unwrap();
    let paths = pending.publish(&Interrupt::never()).unwrap();
    assert_eq!(paths, [PathBuf::from("/dev/mapper/disk"), "/dev/mapper/disk1".into()]);
    let node = kernel.open(super::super::DeviceNumber { major: 253, minor: 2 }).unwrap();
    pending.leave_to_openers();
    assert_eq!(devices(&kernel), ["disk-inner0", "disk", "disk1"]);
    assert!(kernel.with(|state| state.devices.values().all(|device| device.deferred)));
    // Another can be added to it meanwhile, which then goes with its own last user.
    let above = leaked(only(&[2]));
    let second = fixture.build_with(&kernel, |request| request.above = above).unwrap();
    assert!(second.already_attached());
    drop(second);
    assert_eq!(devices(&kernel), ["disk-inner0", "disk", "disk1"]);
    // To make it stay takes a word.
    let error = attach_above(&fixture, &kernel, above).unwrap_err();
    assert!(matches!(error.cause.kind(), ErrorKind::InUse(_)), "{error}");
    assert_eq!(devices(&kernel), ["disk-inner0", "disk", "disk1"]);
    drop(node);
    kernel.change(|state| state.published.clear());
    assert!(is_empty(&kernel));
}

#[test]
fn a_disk_that_is_attached_is_found_by_its_files_and_stays_as_it_is() {
    let (kernel, fixture, above) = (FakeKernel::new(), fixture(), leaked(only(&[1])));
    let other: &'static DmName = Box::leak(Box::new(DmName::new("other").unwrap()));
    let direct = Options { direct_io: DirectIo::Off, ..Options::default() };
    let attached = fixture
        .attach_with(&kernel, |request| (request.name, request.options) = (other, direct))
        .unwrap();
    let found = |only_its_name| {
        let change = |request: &mut Request<'_>| request.above = above;
        fixture.with_request(change, |request| find_same_disk(&kernel, request, only_its_name))
    };
    assert!(found(true).unwrap().is_none());
    let pending = found(false).unwrap().unwrap();
    assert_eq!((pending.number(), pending.already_attached()), (attached.number, true));
    assert_eq!(devices(&kernel), ["other-inner0", "other", "other1"]);
    pending.leave_to_openers();
    // Nobody has opened the partition.
    assert_eq!(devices(&kernel), ["other-inner0", "other"]);
    assert!(!kernel.with(|state| state.devices[&attached.number.minor].deferred));
    // What the files give now is another disk.
    let minor = attached.number.minor;
    kernel
        .change(|state| drop(state.devices.get_mut(&minor).unwrap().live.as_mut().unwrap().pop()));
    let error = found(false).map(drop).unwrap_err();
    assert!(error.to_string().contains("'other' is attached from the same files"), "{error}");
}

#[test]
fn what_is_not_committed_can_be_taken_back_with_a_cause() {
    let (kernel, fixture, above) = (FakeKernel::new(), fixture(), leaked(all()));
    let mut pending = fixture.build_with(&kernel, |request| request.above = above).unwrap();
    pending.publish(&Interrupt::never()).unwrap();
    let cause = Error::new(ErrorKind::Io("no file system".to_owned()));
    let error = pending.undo(cause);
    assert_eq!(error.to_string(), "no file system");
    assert!(is_empty(&kernel));
}

#[test]
fn detaching_takes_partitions_first_and_names_who_is_on_one() {
    let (kernel, fixture) = (FakeKernel::new(), fixture());
    let attached = attach_above(&fixture, &kernel, &all()).unwrap();
    let target = find(&kernel, "disk".as_ref(), None).unwrap();
    assert_eq!(target.above, attached.above);
    let node = kernel.open(attached.above[0].info.number).unwrap();
    let before = devices(&kernel);
    let error = detach(&kernel, &target, false, &Interrupt::never()).unwrap_err();
    assert_eq!(error.to_string(), "'disk' is in use by process 0 (partition 'disk1')");
    assert_eq!(devices(&kernel), before);
    drop(node);
    let changed = calls(&kernel, || detach(&kernel, &target, false, &Interrupt::never()).unwrap());
    assert_eq!(changed, ["lock", "remove disk2", "remove disk1", "remove disk"]);
    assert!(is_empty(&kernel));

    attach_above(&fixture, &kernel, &all()).unwrap();
    let never = Interrupt::never();
    let one = |target: &Attached| detach(&kernel, target, false, &never);
    let all_of_it = detach_all(&kernel, false, &never, one).unwrap();
    assert!(matches!(&all_of_it[..], [(name, Ok(()))] if name == "disk"), "{all_of_it:?}");
    assert!(is_empty(&kernel));
}

#[test]
fn a_partition_is_no_attachment_of_its_own() {
    let (kernel, fixture) = (FakeKernel::new(), fixture());
    let attached = attach_above(&fixture, &kernel, &all()).unwrap();
    let number = attached.above[0].info.number;
    let id = crate::source::FileId { device: number.to_dev(), inode: 0 };
    for (argument, id) in
        [("disk1", None), ("/dev/mapper/disk1", Some(id)), ("/dev/dm-2", Some(id))]
    {
        let error = find(&kernel, argument.as_ref(), id).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Usage(_)), "{error}");
        assert!(error.to_string().contains("'disk1' is partition 1 of 'disk'"), "{error}");
    }
    assert_eq!(list(&kernel).unwrap().len(), 1);
}
