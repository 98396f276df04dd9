use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use super::*;
use crate::device::detach::{detach, detach_all, find};
use crate::device::fake::FakeKernel;
use crate::device::list::{Attached, list};
use crate::device::name::LoopRole;
use crate::plan::{
    Backing, BackingId, KernelMemory, PlannedTable, Segment, SegmentTarget, TableRole,
};
use crate::table::{TableLine, Target};
use crate::units::Sectors;

mod above;
mod faults;
mod overlay;
mod volumes;

/// A plan over a qcow2 overlay with a data file and a raw base: an inner device that
/// holds the first stretch, and a top one over it, the loops and zeros.
struct Plan {
    backings: Vec<Backing>,
    tables: Vec<PlannedTable>,
    segments: Vec<Vec<Segment>>,
}

impl TableSource for Plan {
    fn size(&self) -> Sectors {
        self.tables.last().unwrap().size
    }

    fn backings(&self) -> &[Backing] {
        &self.backings
    }

    fn tables(&self) -> &[PlannedTable] {
        &self.tables
    }

    fn for_each_segment(
        &self,
        table: TableId,
        each: &mut dyn FnMut(Segment) -> Result<()>,
    ) -> Result<()> {
        self.segments[index_of(table)].iter().try_for_each(|&segment| each(segment))
    }
}

fn linear(start: u64, length: u64, backing: u32, offset: u64) -> Segment {
    let target =
        SegmentTarget::Linear { backing: BackingId(backing), offset: Sectors::new(offset) };
    Segment { start: Sectors::new(start), length: Sectors::new(length), target }
}

fn zero(start: u64, length: u64) -> Segment {
    let (start, length) = (Sectors::new(start), Sectors::new(length));
    Segment { start, length, target: SegmentTarget::Zero }
}

fn plan() -> Plan {
    let table = |role, size, segments| PlannedTable { role, size: Sectors::new(size), segments };
    Plan {
        backings: vec![
            Backing::File { layer: 0, role: FileRole::Image },
            Backing::File { layer: 0, role: FileRole::DataFile },
            Backing::File { layer: 1, role: FileRole::Image },
            Backing::Zero { length: Sectors::new(16) },
            Backing::Table(TableId(0)),
        ],
        tables: vec![table(TableRole::Inner, 9, 2), table(TableRole::Top, 64, 4)],
        segments: vec![
            vec![linear(0, 8, 1, 0), linear(8, 1, 0, 0)],
            vec![linear(0, 8, 4, 0), linear(8, 16, 3, 0), linear(24, 8, 2, 8), zero(32, 32)],
        ],
    }
}

struct Fixture {
    sources: Vec<Source>,
    name: DmName,
    plan: Plan,
    _directory: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Self::with_start(&[])
    }

    /// What the disk starts with: at most 4096 bytes.
    fn with_start(start: &[u8]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let sources = ["a.qcow2", "a.data", "base.raw"].map(|name| {
            let path = directory.path().join(name);
            let mut bytes = [1; 8192];
            if name == "a.data" {
                bytes[..start.len()].copy_from_slice(start);
            }
            std::fs::write(&path, bytes).unwrap();
            Source::open(&path).unwrap()
        });
        let name = DmName::new("disk").unwrap();
        Self { sources: sources.into(), name, plan: plan(), _directory: directory }
    }

    fn layers(&self) -> [LayerFiles<'_>; 2] {
        let [image, data_file, base] = &self.sources[..] else { unreachable!() };
        [
            LayerFiles { format: "qcow2", image, data_file: Some(data_file) },
            LayerFiles { format: "raw", image: base, data_file: None },
        ]
    }

    fn attach_with(
        &self,
        kernel: &FakeKernel,
        change: impl FnOnce(&mut Request<'_>),
    ) -> Result<Attachment, AttachError> {
        self.with_request(change, |request| attach(kernel, request))
    }

    fn build_with<'k>(
        &self,
        kernel: &'k FakeKernel,
        change: impl FnOnce(&mut Request<'_>),
    ) -> Result<Pending<'k, FakeKernel>, AttachError> {
        self.with_request(change, |request| build(kernel, request))
    }

    fn with_request<T>(
        &self,
        change: impl FnOnce(&mut Request<'_>),
        work: impl FnOnce(&Request<'_>) -> T,
    ) -> T {
        let (layers, keys, above) = (self.layers(), Keys::default(), Above::default());
        let mut request = Request {
            name: &self.name,
            layers: &layers,
            snapshot: Some(("1", "before")),
            tables: &self.plan,
            scratch: None,
            store: None,
            keys: &keys,
            options: Options::default(),
            above: &above,
            keep: false,
            memory: MemoryLimit::default(),
            interrupt: Interrupt::never(),
        };
        change(&mut request);
        work(&request)
    }

    fn attach(&self, kernel: &FakeKernel) -> Result<Attachment, AttachError> {
        self.attach_with(kernel, |_| {})
    }
}

fn is_empty(kernel: &FakeKernel) -> bool {
    kernel.with(|state| {
        state.devices.is_empty() && state.loops.is_empty() && state.published.is_empty()
    })
}

#[test]
fn what_takes_too_much_kernel_memory_is_refused_before_anything_is_built() {
    let (kernel, mut fixture) = (FakeKernel::new(), Fixture::new());
    fixture.plan.tables[0].segments = 1 << 20;
    let wanted = KernelMemory::of(&fixture.plan);
    assert!(wanted.kept > 113 << 20 && wanted.loading == 64 << 20, "{wanted:?}");
    let free = |bytes| kernel.change(|state| state.available_memory = Some(bytes));
    let limited = |memory| {
        fixture.with_request(
            |request| request.memory = memory,
            |request| find_attached(&kernel, request).map(|found| found.is_some()),
        )
    };
    free(4 * wanted.peak() - 1);
    for refused in [
        limited(MemoryLimit::Quarter).unwrap_err(),
        limited(MemoryLimit::Bytes(wanted.peak() - 1)).unwrap_err(),
        fixture.attach(&kernel).unwrap_err(),
    ] {
        assert!(matches!(refused.cause.kind(), ErrorKind::CannotCreate(_)), "{refused:?}");
        assert!(refused.to_string().contains("--max-kernel-memory"), "{refused}");
        assert!(is_empty(&kernel));
    }
    let calls = kernel.with(|state| state.calls.clone());
    assert!(calls.iter().all(|call| call == "prepare" || call == "lock"), "{calls:?}");
    for allowed in [MemoryLimit::Bytes(wanted.peak()), MemoryLimit::None] {
        assert!(!limited(allowed).unwrap());
    }
    free(4 * wanted.peak());
    assert!(!limited(MemoryLimit::Quarter).unwrap());
}

#[test]
fn what_is_attached_already_is_not_refused_for_its_memory() {
    let (kernel, fixture) = (FakeKernel::new(), Fixture::new());
    fixture.attach(&kernel).unwrap();
    kernel.change(|state| state.available_memory = Some(0));
    assert!(fixture.attach(&kernel).unwrap().already_attached);
}

#[test]
fn the_steps_come_in_the_order_that_a_kill_can_undo() {
    let (kernel, fixture) = (FakeKernel::new(), Fixture::new());
    let attached = fixture.attach(&kernel).unwrap();
    assert_eq!(attached.path, PathBuf::from("/dev/mapper/disk"));
    assert!(!attached.already_attached);
    let calls = kernel.with(|state| state.calls.clone());
    assert_eq!(
        calls,
        [
            "prepare",
            "lock",
            "loop imgdm:0:image:before",
            "loop imgdm:0:data",
            "loop imgdm:1:image",
            "zeros",
            "loop imgdm:zero",
            "create disk-inner0",
            "load disk-inner0 1",
            "open 253:0",
            "defer disk-inner0",
            "load disk-inner0 2",
            "resume disk-inner0 Hide",
            "create disk",
            "load disk 1",
            "open 253:1",
            "defer disk",
            "load disk 4",
            "resume disk HideContent",
            "cancel disk",
            "publish disk",
        ]
    );
    kernel.with(|state| {
        assert!(state.devices[&0].deferred && !state.devices[&1].deferred);
        assert!(state.devices.values().all(|device| device.descriptors == 0));
        assert!(state.loops.values().all(|each| each.descriptors == 0));
    });
}

/// Fails at each step of attaching in turn, which must leave nothing; gives their number.
#[track_caller]
fn fail_at_each_step(attach: impl Fn(&FakeKernel) -> Result<Attachment, AttachError>) -> usize {
    for step in 0.. {
        let kernel = FakeKernel::new();
        kernel.fail_at(step);
        let Err(error) = attach(&kernel) else { return step };
        assert!(error.cause.to_string().contains("fault injected"), "{error}");
        assert!(error.leftovers.is_empty(), "step {step}: {error}");
        assert!(is_empty(&kernel), "step {step}: {kernel:?}");
    }
    unreachable!()
}

#[test]
fn a_failure_at_any_step_leaves_nothing() {
    let fixture = Fixture::new();
    assert_eq!(fail_at_each_step(|kernel| fixture.attach(kernel)), 21);
}

#[test]
fn a_kill_at_any_step_leaves_no_loop_and_no_table() {
    let fixture = Fixture::new();
    for step in 0..19 {
        let kernel = FakeKernel::new();
        kernel.panic_at(step);
        catch_unwind(AssertUnwindSafe(|| fixture.attach(&kernel).is_ok())).unwrap_err();
        kernel.with(|state| {
            assert!(state.loops.is_empty(), "step {step}");
            for device in state.devices.values() {
                assert!(device.live.is_none(), "step {step}");
                assert!(
                    device.inactive.iter().flatten().all(|line| line.target == Target::Zero),
                    "step {step}"
                );
            }
        });
        // The next run clears away the rest and is not hindered by it.
        fixture.attach(&kernel).unwrap();
    }
}

#[test]
fn an_interruption_at_any_step_leaves_nothing() {
    let fixture = Fixture::new();
    for step in 0..21 {
        let kernel = FakeKernel::new();
        let flag = Arc::new(AtomicUsize::new(0));
        kernel.raise_at(step, &flag);
        let flag: &'static Arc<AtomicUsize> = Box::leak(Box::new(flag));
        let interrupt = Interrupt::new(flag);
        let error = fixture.attach_with(&kernel, |r| r.interrupt = interrupt).unwrap_err();
        assert_eq!(*error.cause.kind(), ErrorKind::Interrupted(15), "step {step}");
        assert!(error.leftovers.is_empty(), "step {step}: {error}");
        assert!(is_empty(&kernel), "step {step}: {kernel:?}");
    }
}

#[test]
fn attaching_again_changes_nothing() {
    let (kernel, fixture) = (FakeKernel::new(), Fixture::new());
    let first = fixture.attach(&kernel).unwrap();
    let again = fixture.attach(&kernel).unwrap();
    assert!(again.already_attached);
    assert_eq!((again.number, &again.uuid), (first.number, &first.uuid));
    assert_eq!(kernel.with(|state| state.loops.len()), 4);
}

#[test]
fn another_live_table_is_not_the_same_attachment() {
    let fixture = Fixture::new();
    type Change = fn(&mut Vec<TableLine>);
    let changes: [Change; 4] = [
        |table| table[2] = "24 8 linear 7:2 9".parse().unwrap(),
        |table| table[1] = "8 16 linear 7:0 0".parse().unwrap(),
        |table| table[3] = "32 32 linear 7:2 0".parse().unwrap(),
        |table| drop(table.pop()),
    ];
    for change in changes {
        let kernel = FakeKernel::new();
        fixture.attach(&kernel).unwrap();
        kernel.change(|state| change(state.devices.get_mut(&1).unwrap().live.as_mut().unwrap()));
        let error = fixture.attach(&kernel).unwrap_err();
        assert!(error.to_string().contains("its live table is not"), "{error}");
    }
}

#[test]
fn a_device_marked_for_removal_is_refused_or_kept() {
    let (kernel, fixture) = (FakeKernel::new(), Fixture::new());
    let attached = fixture.attach(&kernel).unwrap();
    let node = kernel.open(attached.number).unwrap();
    kernel.defer_removal(&attached.uuid.to_string()).unwrap();
    let error = fixture.attach(&kernel).unwrap_err();
    assert!(matches!(error.cause.kind(), ErrorKind::InUse(_)), "{error}");
    assert!(fixture.attach_with(&kernel, |r| r.keep = true).unwrap().already_attached);
    drop(node);
    assert_eq!(list(&kernel).unwrap().len(), 1);
}

#[test]
fn a_taken_name_says_by_what() {
    let fixture = Fixture::new();
    let kernel = FakeKernel::new();
    fixture.attach(&kernel).unwrap();
    let error = fixture.attach_with(&kernel, |r| r.snapshot = None).unwrap_err();
    assert!(error.to_string().contains("an imgdm device of /images/imgdm:0:image"), "{error}");
    let other = |uuid: &str| {
        let kernel = FakeKernel::new();
        kernel.change(|state| {
            let device = crate::device::fake::FakeDevice {
                name: "disk".to_owned(),
                uuid: uuid.to_owned(),
                live: Some(Vec::new()),
                ..Default::default()
            };
            state.devices.insert(9, device);
        });
        fixture.attach(&kernel).unwrap_err().to_string()
    };
    assert!(other("LVM-abc").contains("an LVM logical volume"));
    assert!(other("").contains("a device without a UUID"));
}

#[test]
fn a_segment_past_the_end_of_its_file_is_named() {
    let mut fixture = Fixture::new();
    fixture.plan.segments[1][2] = linear(24, 8, 2, 9);
    let kernel = FakeKernel::new();
    let error = fixture.attach(&kernel).unwrap_err();
    assert!(error.to_string().contains("base.raw: sectors 9+8"), "{error}");
    assert!(is_empty(&kernel));
}

#[test]
fn a_table_with_a_gap_never_reaches_the_kernel() {
    let mut fixture = Fixture::new();
    fixture.plan.segments[0][1] = linear(9, 1, 0, 0);
    let kernel = FakeKernel::new();
    let error = fixture.attach(&kernel).unwrap_err();
    assert!(error.to_string().contains("does not follow"), "{error}");
    assert!(is_empty(&kernel));
}

#[test]
fn what_is_attached_is_listed_and_found() {
    let (kernel, fixture) = (FakeKernel::new(), Fixture::new());
    fixture.attach(&kernel).unwrap();
    let all = list(&kernel).unwrap();
    let [attached] = &all[..] else { panic!("{all:?}") };
    assert_eq!(attached.name, "disk");
    assert_eq!(attached.snapshot.as_deref(), Some("before"));
    assert_eq!(attached.depth, 2);
    assert_eq!(attached.inner.len(), 1);
    let labels: Vec<_> = attached.loops.iter().map(|each| each.info.label.as_str()).collect();
    assert_eq!(labels, ["imgdm:0:image:before", "imgdm:0:data", "imgdm:1:image", "imgdm:zero"]);
    let image = fixture.sources[0].path();
    for argument in ["disk", "/dev/mapper/disk"] {
        assert_eq!(find(&kernel, argument.as_ref(), None).unwrap().name, "disk");
    }
    assert_eq!(find(&kernel, image, fixture.sources[0].id()).unwrap().name, "disk");
    let base = &fixture.sources[2];
    assert!(find(&kernel, base.path(), base.id()).is_err(), "a base is not what is attached");

    let second: &'static DmName = Box::leak(Box::new(DmName::new("second").unwrap()));
    fixture.attach_with(&kernel, |request| request.name = second).unwrap();
    let error = find(&kernel, image, fixture.sources[0].id()).unwrap_err();
    assert!(error.to_string().contains("name one of disk, second"), "{error}");
}

#[test]
fn what_comes_or_goes_while_it_is_looked_for_is_found_or_not_attached() {
    let (kernel, fixture) = (FakeKernel::new(), Fixture::new());
    fixture.attach(&kernel).unwrap();
    let image = fixture.sources[0].path();
    let by_image = (image, fixture.sources[0].id());
    for (argument, id) in [(std::path::Path::new("disk"), None), by_image] {
        kernel.hide_during(0..0);
        let before = kernel.with(|state| state.queries.len());
        find(&kernel, argument, id).unwrap();
        let count = kernel.with(|state| state.queries.len()) - before;
        let (mut found, mut missed) = (0, 0);
        for number in 0..=count {
            for is_going in [false, true] {
                let from = kernel.with(|state| state.queries.len());
                kernel.hide_during(match is_going {
                    false => from..from + number,
                    true => from + number..usize::MAX,
                });
                match find(&kernel, argument, id) {
                    Ok(attached) => {
                        assert_eq!(attached.name, "disk");
                        found += 1;
                    }
                    Err(error) => {
                        assert!(matches!(error.kind(), ErrorKind::NotAttached(_)), "{error}");
                        let said = error.to_string();
                        let is_it = said.contains("nothing is attached under the name 'disk'")
                            || said.contains("this image is not attached");
                        assert!(is_it, "{said}");
                        missed += 1;
                    }
                }
            }
        }
        assert!(found > 1 && missed > 1, "{found} {missed}");
    }
}

#[test]
fn detaching_leaves_nothing_and_busy_devices_name_their_holders() {
    let (kernel, fixture) = (FakeKernel::new(), Fixture::new());
    let attached = fixture.attach(&kernel).unwrap();
    let target = find(&kernel, "disk".as_ref(), None).unwrap();
    let node = kernel.open(attached.number).unwrap();
    let error = detach(&kernel, &target, false, &Interrupt::never()).unwrap_err();
    assert!(error.to_string().contains("in use by process 0"), "{error}");
    detach(&kernel, &target, true, &Interrupt::never()).unwrap();
    assert!(!is_empty(&kernel));
    drop(node);
    kernel.change(|state| state.published.clear());
    assert!(is_empty(&kernel));

    fixture.attach(&kernel).unwrap();
    let target = find(&kernel, "disk".as_ref(), None).unwrap();
    detach(&kernel, &target, false, &Interrupt::never()).unwrap();
    assert!(is_empty(&kernel));
}

#[test]
fn detaching_all_skips_busy_ones_and_what_is_not_ours() {
    let (kernel, fixture) = (FakeKernel::new(), Fixture::new());
    let attached = fixture.attach(&kernel).unwrap();
    let second: &'static DmName = Box::leak(Box::new(DmName::new("second").unwrap()));
    fixture.attach_with(&kernel, |request| request.name = second).unwrap();
    kernel.change(|state| {
        let name = "other".to_owned();
        let live = Some(Vec::new());
        let device = crate::device::fake::FakeDevice { name, live, ..Default::default() };
        state.devices.insert(99, device);
    });
    let node = kernel.open(attached.number).unwrap();
    let never = Interrupt::never();
    let one = |target: &Attached| detach(&kernel, target, false, &never);
    let results = detach_all(&kernel, false, &never, one).unwrap();
    let went: Vec<_> = results.iter().map(|(name, r)| (name.as_str(), r.is_ok())).collect();
    assert_eq!(went, [("second", true), ("disk", false)]);
    drop(node);
    assert!(kernel.with(|state| state.devices.contains_key(&99)));
}

#[test]
fn a_sector_is_followed_down_to_its_loop_device() {
    use crate::device::locate::{ServedEnd, locate};
    let fixture = Fixture::new();
    let kernel = FakeKernel::new();
    fixture.attach(&kernel).unwrap();
    let attached = find(&kernel, std::path::Path::new("disk"), None).unwrap();
    let way = |sector| {
        let located = locate(&kernel, &attached, sector).unwrap();
        let devices: Vec<_> =
            located.devices.iter().map(|d| (d.sector, d.line.start, d.line.kind.clone())).collect();
        let end = match located.end {
            ServedEnd::Loop { info, sector, .. } => Some((info.role().unwrap(), sector)),
            ServedEnd::Target => None,
            ServedEnd::BlockDevice { .. } => panic!("{located:?}"),
        };
        (devices, end)
    };
    let linear = |sector, start| (sector, start, "linear".to_owned());
    let file = |layer, role| LoopRole::File { layer, role, snapshot: None };
    // Through the inner device to the data file; to the base; to zeros of either kind.
    let data = Some((file(0, FileRole::DataFile), 5));
    assert_eq!(way(5), (vec![linear(5, 0), linear(5, 0)], data));
    assert_eq!(way(31), (vec![linear(31, 24)], Some((file(1, FileRole::Image), 15))));
    assert_eq!(way(10), (vec![linear(10, 8)], Some((LoopRole::Zero, 2))));
    assert_eq!(way(63), (vec![(63, 32, "zero".to_owned())], None));
    let error = locate(&kernel, &attached, 64).unwrap_err();
    assert!(error.to_string().contains("no line for sector 64"), "{error}");
}
