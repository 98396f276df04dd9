//! Logical volumes on the disk: the same promises again.

use super::above::{attach_above, devices, leaked, names};
use super::*;
use crate::lvm::made::{FIRST, SECOND, group_text, linear_text, logical_text, put_area, put_label};

/// The metadata area, small enough for a disk of 64 sectors.
const AREA: (usize, usize) = (1024, 3072);

/// A disk that is a physical volume, with extents of 8 sectors from sector 8 on.
fn fixture(logical: &[String]) -> Fixture {
    let text = group_text("vg", 1, &[FIRST, SECOND], &logical.concat());
    let text =
        text.replace("pe_start = 2048", "pe_start = 8").replace("pe_count = 512", "pe_count = 7");
    // What no reader needs would not fit.
    let text = text.replace("creation_time = 1700000000\ncreation_host = \"host\"\n", "");
    let mut start = vec![0; 4096];
    put_label(&mut start, FIRST, &[AREA]);
    put_area(&mut start, AREA, 512, &text);
    Fixture::with_start(&start)
}

fn root() -> String {
    logical_text("root", &[&linear_text(0, 1, "pv0", 3), &linear_text(1, 2, "pv0", 0)])
}

fn striped() -> String {
    logical_text(
        "striped",
        &["start_extent = 0\nextent_count = 2\ntype = \"striped\"\nstripe_count = 2\n\
           stripe_size = 4\nstripes = [\"pv0\", 1, \"pv0\", 5]"],
    )
}

fn volumes(names: &[&str]) -> Above {
    let logical_volumes = names.iter().map(|&name| name.to_owned()).collect();
    Above { logical_volumes, ..Above::default() }
}

#[test]
fn logical_volumes_lie_straight_on_the_disk() {
    let (kernel, fixture) = (FakeKernel::new(), fixture(&[root(), striped()]));
    let both = volumes(&["vg/striped", "vg/root", "vg/root"]);
    let attached = attach_above(&fixture, &kernel, &both).unwrap();
    assert_eq!(names(&attached), ["disk-root", "disk-striped"]);
    assert_eq!(attached.above[0].path, PathBuf::from("/dev/mapper/disk-root"));
    assert_eq!(attached.above[0].size, Sectors::new(24));
    let role = DeviceRole::LogicalVolume(name::volume_hash("vg", "root"));
    assert_eq!(attached.above[0].info.uuid, attached.uuid.with_role(role).to_string());
    kernel.with(|state| {
        let lines = |minor| -> Vec<_> {
            state.devices[&minor].live.iter().flatten().map(ToString::to_string).collect()
        };
        assert_eq!(lines(2), ["0 8 linear 253:1 32", "8 16 linear 253:1 8"]);
        assert_eq!(lines(3), ["0 16 striped 2 4 253:1 16 253:1 48"]);
        assert!(state.calls.contains(&"resume disk-root HideContent".to_owned()));
        assert!(state.devices.values().all(|device| device.descriptors == 0));
    });
    // Again: nothing changes.
    let again = attach_above(&fixture, &kernel, &volumes(&["vg/root"])).unwrap();
    assert!(again.already_attached);
    assert_eq!(names(&again), ["disk-root"]);
    assert_eq!(devices(&kernel), ["disk-inner0", "disk", "disk-root", "disk-striped"]);
}

/// All calls of attaching with one.
const CALLS: usize = 29;

#[test]
fn a_failure_at_any_step_leaves_nothing_of_disk_or_volumes() {
    let fixture = fixture(&[root()]);
    let attach = |kernel: &_| attach_above(&fixture, kernel, &volumes(&["vg/root"]));
    assert_eq!(fail_at_each_step(attach), CALLS);
}

#[test]
fn what_cannot_be_attached_is_refused_by_name_and_leaves_nothing() {
    let far = logical_text("far", &[&linear_text(0, 1, "pv1", 0)]);
    let thin = logical_text("thin", &["start_extent = 0\nextent_count = 1\ntype = \"thin\""]);
    let odd = logical_text("odd", &[&linear_text(0, 1, "pv0", 0)]);
    let odd = odd.replace("\nodd {", "\n\"a b\" {");
    let fixture = fixture(&[root(), far, thin, odd]);
    for (names, words) in [
        (&["vg/root", "vg/home"][..], &["no logical volume 'vg/home'", "vg/root, vg/far"][..]),
        (&["other/root"], &["'other/root'"]),
        (&["root"], &["'root' is not of the form VG/LV"]),
        (&["vg/far"], &["vg/far", SECOND, "not on this disk"]),
        (&["vg/thin"], &["vg/thin", "'thin'"]),
        (&["vg/a b"], &["'a b'", "0x20"]),
    ] {
        let kernel = FakeKernel::new();
        let error = attach_above(&fixture, &kernel, &volumes(names)).unwrap_err();
        for word in words {
            assert!(error.to_string().contains(word), "{word}: {error}");
        }
        assert!(is_empty(&kernel), "{kernel:?}");
    }
    let none = Fixture::new();
    let error = attach_above(&none, &FakeKernel::new(), &volumes(&["vg/root"])).unwrap_err();
    assert!(matches!(error.cause.kind(), ErrorKind::NotFound(_)));
    assert!(error.to_string().contains("it has no physical volume of LVM"), "{error}");
}

#[test]
fn damaged_metadata_is_told_with_what_is_built() {
    let (kernel, fixture) = (FakeKernel::new(), fixture(&[root()]));
    let above = leaked(volumes(&["vg/root"]));
    let pending = fixture.build_with(&kernel, |request| request.above = above).unwrap();
    assert_eq!(pending.warnings(), []);
    drop(pending);
    let mut start = vec![0; 4096];
    put_label(&mut start, FIRST, &[(2048, 512), AREA]);
    let text = group_text("vg", 1, &[FIRST], &root());
    let text = text.replace("pe_start = 2048", "pe_start = 8");
    put_area(&mut start, AREA, 1536, &text);
    let fixture = Fixture::with_start(&start);
    let kernel = FakeKernel::new();
    let pending = fixture.build_with(&kernel, |request| request.above = above).unwrap();
    let warnings: Vec<_> = pending.warnings().iter().map(ToString::to_string).collect();
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("metadata area at 0x800"), "{warnings:?}");
    assert_eq!(names(&pending.commit(&Interrupt::never()).unwrap()), ["disk-root"]);
}
