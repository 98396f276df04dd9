//! A writable device over the disk: the same promises.

use super::above::{leaked, names};
use super::*;
use crate::device::fake::FakeKernel;
use crate::device::overlay::OverlayState;
use crate::device::verify::Verifier;
use crate::device::{Access, LiveLine};

const CHUNK: Sectors = Sectors::new(32);

/// A file to be a store: 2 MiB behind the header.
fn store() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(3 << 20).unwrap();
    file
}

fn attach_over(
    fixture: &Fixture,
    kernel: &FakeKernel,
    store: &tempfile::NamedTempFile,
    change: impl FnOnce(&mut Request<'_>),
) -> Result<Attachment, AttachError> {
    let id = FileId::of_path(store.path());
    fixture.with_request(change, |request| {
        let options = Options { overlay: Overlay::Kept, ..request.options };
        let store = OverlayStore { file: Some(store.as_file()), id, chunk: CHUNK, room: None };
        attach(kernel, &Request { options, store: Some(store), ..*request })
    })
}

#[test]
fn the_disk_lies_inside_and_only_the_top_takes_writes() {
    let (kernel, fixture, store) = (FakeKernel::new(), Fixture::new(), store());
    let attached = attach_over(&fixture, &kernel, &store, |_| {}).unwrap();
    assert_eq!(attached.path, PathBuf::from("/dev/mapper/disk"));
    let calls = kernel.with(|state| state.calls.clone());
    let inner = ["create disk-inner1", "load disk-inner1 1", "open 253:1", "defer disk-inner1"];
    assert!(calls.windows(4).any(|calls| calls == inner), "{calls:#?}");
    let end = calls.iter().position(|call| call == "loop imgdm:store").unwrap();
    assert_eq!(
        calls[end..],
        [
            "loop imgdm:store",
            "create disk",
            "load disk 1",
            "open 253:2",
            "defer disk",
            "load disk 1 writable",
            "resume disk HideContent",
            "cancel disk",
            "publish disk",
        ]
    );
    kernel.with(|state| {
        let table: Vec<_> =
            state.devices[&2].live.iter().flatten().map(ToString::to_string).collect();
        assert_eq!(table, ["0 64 snapshot 253:1 7:4 PO 32"]);
        let writable = |device: &crate::device::fake::FakeDevice| device.writable;
        assert_eq!(state.devices.values().map(writable).collect::<Vec<_>>(), [false, false, true]);
        for each in state.loops.values() {
            let is_store = each.info.role() == Some(LoopRole::Store);
            assert_eq!((each.info.read_only, each.info.offset != 0), (!is_store, is_store));
        }
    });
}

#[test]
fn a_failure_at_any_step_leaves_nothing() {
    let (fixture, store) = (Fixture::new(), store());
    let steps = fail_at_each_step(|kernel| attach_over(&fixture, kernel, &store, |_| {}));
    assert_eq!(steps, 28);
}

#[test]
fn a_kill_at_any_step_leaves_no_loop_and_no_table() {
    let (fixture, store) = (Fixture::new(), store());
    for step in 0..26 {
        let kernel = FakeKernel::new();
        kernel.panic_at(step);
        let attaching = || attach_over(&fixture, &kernel, &store, |_| {}).is_ok();
        catch_unwind(AssertUnwindSafe(attaching)).unwrap_err();
        kernel.with(|state| {
            assert!(state.loops.is_empty(), "step {step}");
            let is_empty = |device: &crate::device::fake::FakeDevice| {
                let zero = |line: &TableLine| line.target == Target::Zero;
                device.live.is_none() && device.inactive.iter().flatten().all(zero)
            };
            assert!(state.devices.values().all(is_empty), "step {step}");
        });
        attach_over(&fixture, &kernel, &store, |_| {}).unwrap();
    }
}

#[test]
fn attaching_again_changes_nothing_and_other_stores_are_refused() {
    let (kernel, fixture, store) = (FakeKernel::new(), Fixture::new(), store());
    let first = attach_over(&fixture, &kernel, &store, |_| {}).unwrap();
    let again = attach_over(&fixture, &kernel, &store, |_| {}).unwrap();
    assert!(again.already_attached);
    assert_eq!(again.uuid, first.uuid);
    let other = self::store();
    let error = attach_over(&fixture, &kernel, &other, |_| {}).unwrap_err().to_string();
    assert!(error.contains("another store (/images/imgdm:store)"), "{error}");
    // A store that is yet to be made is another one, too.
    let error = fixture.with_request(
        |_| {},
        |request| {
            let options = Options { overlay: Overlay::Kept, ..request.options };
            let store = OverlayStore { file: None, id: None, chunk: CHUNK, room: None };
            find_attached(&kernel, &Request { options, store: Some(store), ..*request }).err()
        },
    );
    assert!(error.unwrap().to_string().contains("another store"));
    for overlay in [Overlay::None, Overlay::Transient] {
        let error = fixture.attach_with(&kernel, |r| r.options.overlay = overlay).unwrap_err();
        assert!(error.to_string().contains("with other options"), "{error}");
    }
}

#[test]
fn another_size_of_the_store_is_not_passed_over_where_it_is_attached() {
    let (kernel, fixture, store) = (FakeKernel::new(), Fixture::new(), store());
    attach_over(&fixture, &kernel, &store, |_| {}).unwrap();
    let id = FileId::of_path(store.path());
    let again = |room: Option<u64>| {
        let (file, room) = (Some(store.as_file()), room.map(Sectors::new));
        let over = OverlayStore { file, id, chunk: CHUNK, room };
        fixture.with_request(
            |_| {},
            |request| {
                let options = Options { overlay: Overlay::Kept, ..request.options };
                attach(&kernel, &Request { options, store: Some(over), ..*request })
            },
        )
    };
    again(None).unwrap();
    again(Some(4096)).unwrap();
    let error = again(Some(8192)).unwrap_err();
    assert!(matches!(error.cause.kind(), ErrorKind::CannotCreate(_)), "{error}");
    let said = error.to_string();
    assert!(said.contains("a store of 2097152 bytes, where 4194304 are asked for"), "{said}");
}

#[test]
fn a_store_that_a_device_has_is_refused_whether_it_is_locked_or_not() {
    let (kernel, fixture, store) = (FakeKernel::new(), Fixture::new(), store());
    attach_over(&fixture, &kernel, &store, |_| {}).unwrap();
    let name: &'static DmName = Box::leak(Box::new(DmName::new("other").unwrap()));
    let other = |store| attach_over(&fixture, &kernel, store, |request| request.name = name);
    let error = other(&store).unwrap_err();
    assert!(matches!(error.cause.kind(), ErrorKind::InUse(_)), "{error}");
    assert!(error.leftovers.is_empty(), "{error}");
    assert_eq!(list(&kernel).unwrap().len(), 1);
    other(&self::store()).unwrap();
}

#[test]
fn what_takes_writes_is_not_taken_for_the_disk_of_the_image() {
    let (kernel, fixture, store) = (FakeKernel::new(), Fixture::new(), store());
    attach_over(&fixture, &kernel, &store, |_| {}).unwrap();
    let same_disk = |request: &Request<'_>| {
        let found = find_same_disk(&kernel, request, false).unwrap();
        found.map(|pending| pending.uuid().options)
    };
    let plain = |request: &Request<'_>| same_disk(request);
    assert_eq!(fixture.with_request(|_| {}, plain), None);
    let error = fixture.attach_with(&kernel, |_| {}).unwrap_err().to_string();
    assert!(error.contains("with other options (it takes writes: --overlay)"), "{error}");
    // Beside it there may be one that shows the image, and that is the one.
    let name = DmName::new("image").unwrap();
    let name: &'static DmName = Box::leak(Box::new(name));
    let image = fixture.attach_with(&kernel, |request| request.name = name).unwrap();
    assert_eq!(fixture.with_request(|_| {}, plain), Some(image.uuid.options));
    let over = |request: &Request<'_>| {
        let options = Options { overlay: Overlay::Transient, ..request.options };
        same_disk(&Request { options, ..*request })
    };
    assert_ne!(fixture.with_request(|_| {}, over), Some(image.uuid.options));
}

#[test]
fn a_device_that_is_not_over_the_disk_and_a_store_is_not_the_same_attachment() {
    let (fixture, store) = (Fixture::new(), store());
    for line in [
        "0 64 snapshot 253:0 7:4 P 32",
        "0 64 snapshot 253:1 7:3 P 32",
        "0 63 snapshot 253:1 7:4 P 32",
        "0 64 linear 253:1 0",
    ] {
        let kernel = FakeKernel::new();
        attach_over(&fixture, &kernel, &store, |_| {}).unwrap();
        kernel.change(|state| {
            state.devices.get_mut(&2).unwrap().live = Some(vec![line.parse().unwrap()]);
        });
        attach_over(&fixture, &kernel, &store, |_| {}).unwrap_err();
    }
    let kernel = FakeKernel::new();
    attach_over(&fixture, &kernel, &store, |_| {}).unwrap();
    kernel.change(|state| state.devices.get_mut(&2).unwrap().writable = false);
    let error = attach_over(&fixture, &kernel, &store, |_| {}).unwrap_err();
    assert!(error.to_string().contains("its live table is not"), "{error}");
}

#[test]
fn a_store_that_an_earlier_imgdm_attached_is_the_same_attachment() {
    let (kernel, fixture, store) = (FakeKernel::new(), Fixture::new(), store());
    let first = attach_over(&fixture, &kernel, &store, |_| {}).unwrap();
    kernel.change(|state| {
        let line = "0 64 snapshot 253:1 7:4 P 32".parse().unwrap();
        state.devices.get_mut(&2).unwrap().live = Some(vec![line]);
    });
    let again = attach_over(&fixture, &kernel, &store, |_| {}).unwrap();
    assert!(again.already_attached);
    assert_eq!(again.uuid, first.uuid);
    assert!(find(&kernel, "disk".as_ref(), None).unwrap().overlay.is_some());
}

#[test]
fn partitions_of_a_writable_device_take_writes() {
    let mut start = [0; 512];
    start[446 + 4] = 0x83;
    start[446 + 8..446 + 12].copy_from_slice(&8u32.to_le_bytes());
    start[446 + 12..446 + 16].copy_from_slice(&16u32.to_le_bytes());
    start[510..].copy_from_slice(&[0x55, 0xaa]);
    let (kernel, fixture, store) = (FakeKernel::new(), Fixture::with_start(&start), store());
    let above = leaked(Above { partitions: Partitions::All, ..Above::default() });
    let attached = attach_over(&fixture, &kernel, &store, |r| r.above = above).unwrap();
    assert_eq!(names(&attached), ["disk1"]);
    assert_eq!(attached.above[0].info.access(), Access::Writable);
    // And are known again.
    attach_over(&fixture, &kernel, &store, |r| r.above = above).unwrap();
    kernel.change(|state| {
        let partition = state.devices.values_mut().find(|device| device.name == "disk1");
        partition.unwrap().writable = false;
    });
    let error = attach_over(&fixture, &kernel, &store, |r| r.above = above).unwrap_err();
    assert!(error.to_string().contains("not with the writable table"), "{error}");
}

#[test]
fn what_is_listed_says_where_writes_go_and_detaching_syncs_the_store() {
    let (kernel, fixture, store) = (FakeKernel::new(), Fixture::new(), store());
    attach_over(&fixture, &kernel, &store, |_| {}).unwrap();
    let say = |parameters: &str| {
        kernel.change(|state| {
            let (kind, parameters) = ("snapshot".to_owned(), parameters.to_owned());
            let line = LiveLine { start: 0, length: 64, kind, parameters };
            state.devices.get_mut(&2).unwrap().status = vec![line];
        });
        find(&kernel, "disk".as_ref(), None).unwrap()
    };
    let attached = say("Invalid");
    assert_eq!(attached.overlay.unwrap().state, OverlayState::Invalid);
    assert_eq!(say("Overflow").overlay.unwrap().state, OverlayState::Full);
    let attached = say("96/4096 64");
    let overlay = attached.overlay.clone().unwrap();
    let (used, total, metadata) = (Sectors::new(96), Sectors::new(4096), Sectors::new(64));
    assert_eq!(overlay.state, OverlayState::Usable { used, total, metadata });
    assert!(overlay.is_kept);
    assert_eq!(overlay.path.unwrap().path, PathBuf::from("/images/imgdm:store"));
    let by_store = find(&kernel, store.path(), FileId::of_path(store.path())).unwrap();
    assert_eq!(by_store.name, "disk");
    let disk = attached.disk();
    assert_eq!(disk.0.minor, 1);
    assert!(disk.1.contains("inner1"), "{}", disk.1);
    detach(&kernel, &attached, false, &Interrupt::never()).unwrap();
    let calls = kernel.with(|state| state.calls.clone());
    assert_eq!(calls.iter().filter(|call| *call == "sync imgdm:store").count(), 1, "{calls:?}");
    assert!(is_empty(&kernel));
}

#[test]
fn what_attach_without_options_makes_takes_no_writes() {
    let (fixture, store) = (Fixture::new(), store());
    let image = &fixture.sources[0];
    let find = |kernel: &FakeKernel| {
        crate::device::detach::find_by_default_name(kernel, image.path(), image.id())
    };
    let name: &'static DmName = Box::leak(Box::new(DmName::new("a").unwrap()));
    let plain = |request: &mut Request<'_>| (request.name, request.snapshot) = (name, None);
    let kernel = FakeKernel::new();
    fixture.attach_with(&kernel, plain).unwrap();
    assert_eq!(find(&kernel).unwrap().name, "a");
    let kernel = FakeKernel::new();
    attach_over(&fixture, &kernel, &store, plain).unwrap();
    let error = find(&kernel).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NotAttached(_)), "{error}");
}

#[test]
fn a_device_that_goes_while_it_is_looked_at_is_no_error() {
    let (kernel, fixture, store) = (FakeKernel::new(), Fixture::new(), store());
    let attachment = attach_over(&fixture, &kernel, &store, |_| {}).unwrap();
    let all = kernel.devices().unwrap();
    let device = all.iter().find(|device| device.name == "disk").unwrap().clone();
    kernel.change(|state| drop(state.devices.remove(&attachment.number.minor)));
    let seen = crate::device::list::attached(&kernel, device, attachment.uuid, &all).unwrap();
    assert_eq!(seen.overlay, None);
}

#[test]
fn a_way_through_a_writable_device_goes_on_in_the_disk() {
    let (kernel, fixture, store) = (FakeKernel::new(), Fixture::new(), store());
    attach_over(&fixture, &kernel, &store, |_| {}).unwrap();
    let attached = find(&kernel, "disk".as_ref(), None).unwrap();
    let located = crate::device::locate::locate(&kernel, &attached, 25).unwrap();
    let kinds: Vec<_> = located.devices.iter().map(|each| each.line.kind.as_str()).collect();
    assert_eq!(kinds, ["snapshot", "linear"]);
    let verifier = Verifier::open(&kernel, attached, None);
    // The images of this test are none; but what is writable on purpose is no finding.
    let verifier = verifier.unwrap();
    let said: Vec<_> = verifier.found().findings().iter().map(|f| f.message.clone()).collect();
    assert!(!said.iter().any(|said| said.contains("read-only")), "{said:?}");
    assert!(verifier.found().notices()[0].contains("takes writes"));
}
