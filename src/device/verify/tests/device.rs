//! What is found of the device itself: its flags, its keys, what it reads.

use super::*;

#[test]
fn what_could_be_written_to_or_starts_elsewhere_is_found() {
    let mut world = World::new();
    let image = image(&world);
    world.plain(&image);
    world.kernel.change(|state| {
        state.devices.values_mut().for_each(|device| device.writable = true);
    });
    assert_eq!(world.verify().findings()[0].kind, FindingKind::Writable);
    world.kernel.change(|state| {
        state.devices.values_mut().for_each(|device| device.writable = false);
        state.loops.values_mut().for_each(|each| each.info.read_only = false);
    });
    assert_eq!(world.verify().findings()[0].kind, FindingKind::Writable);
    world.kernel.change(|state| {
        state.loops.values_mut().for_each(|each| {
            each.info.read_only = true;
            each.info.offset = 512;
        });
    });
    assert_eq!(world.verify().findings()[0].kind, FindingKind::LoopOffset);
}

#[test]
fn a_device_that_goes_soon_is_the_same_with_a_notice() {
    let mut world = World::new();
    let image = image(&world);
    world.plain(&image);
    let attached = world.attached();
    let _node = world.kernel.open(attached.number).unwrap();
    world.kernel.defer_removal(&attached.uuid.to_string()).unwrap();
    let verified = world.verify();
    assert!(verified.is_same());
    assert!(verified.notices()[0].contains("marked for removal"), "{verified:?}");
}

/// An image under legacy AES.
fn encrypted(world: &World) -> PathBuf {
    let mut builder = builder();
    builder.u32(32, 1).l2(0, 4 * CLUSTER).l2(1, 6 * CLUSTER).l2(5, 5 * CLUSTER).l2(9, 1);
    world.write("disk.qcow2", &builder.bytes)
}

#[test]
fn a_crypt_target_is_verified_without_its_key() {
    let mut world = World::new();
    let image = encrypted(&world);
    world.plain(&image);
    assert!(world.verify().is_same(), "{:#?}", world.verify());
    put(&image, L2 + 8, &(7 * CLUSTER).to_be_bytes());
    let verified = world.assert_finds(&[(FindingKind::Mapping, CLUSTER, 1, CLUSTER)]);
    assert!(verified.findings()[0].live.as_ref().unwrap().contains("aes-cbc-plain64"));
    put(&image, L2 + 8, &(6 * CLUSTER).to_be_bytes());

    type Change = fn(&str) -> String;
    let changes: [Change; 3] = [
        |line| line.replace("aes-cbc-plain64", "aes-cbc-null"),
        |line| line.replace(":0 0 ", ":1 0 "),
        |line| line.replace("imgdm:", "other:"),
    ];
    for change in changes {
        let mut before = None;
        world.kernel.change(|state| {
            let is_crypt = |device: &&mut FakeDevice| {
                device.live.as_ref().unwrap()[0].target.kind() == "crypt"
            };
            let device = state.devices.values_mut().find(is_crypt).unwrap();
            let line = &mut device.live.as_mut().unwrap()[0];
            before = Some(line.clone());
            let changed = change(&line.to_string());
            assert_ne!(changed, line.to_string());
            *line = changed.parse().unwrap();
        });
        let verified = world.verify();
        let [finding] = verified.findings() else { panic!("{verified:#?}") };
        assert_eq!((finding.kind, finding.bytes.get()), (FindingKind::Mapping, 3 * CLUSTER));
        world.kernel.change(|state| {
            for device in state.devices.values_mut() {
                if device.live.as_ref().unwrap()[0].target.kind() == "crypt" {
                    device.live.as_mut().unwrap()[0] = before.clone().unwrap();
                }
            }
        });
    }
}

#[test]
fn a_device_that_does_not_read_what_its_table_says_is_found_by_reading_it() {
    let mut world = World::new();
    let image = image(&world);
    world.plain(&image);
    // A loop device that reads another file than it says.
    let other = world.write("other", &builder().bytes);
    put(&other, 6 * CLUSTER + 5, &[0xee]);
    world.kernel.change(|state| {
        let image = state.loops.values_mut().find(|each| each.info.label.contains("image"));
        image.unwrap().file = std::sync::Arc::new(File::open(&other).unwrap());
    });
    let attached = world.attached();
    let verify = |content: Option<&Ciphers>| {
        let verifier = Verifier::open(&world.kernel, attached.clone(), Some(&image)).unwrap();
        verifier.run(content, &|_| Ok(())).unwrap()
    };
    let all = |v: &Verification| {
        v.findings().iter().filter(|f| f.first.is_some()).cloned().collect::<Vec<_>>()
    };
    assert!(all(&verify(None)).is_empty());
    let verified = verify(Some(&Ciphers::new()));
    let [finding] = &all(&verified)[..] else { panic!("{verified:#?}") };
    assert_eq!(finding.kind, FindingKind::Content);
    assert!(
        finding.message.contains("at 0x140005 it reads 0xee and should read 0x06"),
        "{finding:?}"
    );
    assert!(finding.fresh.as_ref().unwrap().ends_with("disk.qcow2 at 0x60000"), "{finding:?}");
    assert!(verified.bytes_read > ByteLen::new(5 * CLUSTER), "{verified:?}");

    // And one that can't be read to the end.
    OpenOptions::new().write(true).open(&other).unwrap().set_len(8 * CLUSTER).unwrap();
    let verified = verify(Some(&Ciphers::new()));
    let unreadable = all(&verified).into_iter().find(|f| f.kind == FindingKind::Unreadable);
    assert_eq!(unreadable.unwrap().first.unwrap().start.get(), 3 * CLUSTER, "{verified:#?}");
}

#[test]
fn an_interruption_stops_the_work() {
    let mut world = World::new();
    let image = image(&world);
    world.plain(&image);
    let attached = world.attached();
    let verifier = Verifier::open(&world.kernel, attached, None).unwrap();
    let stop = |_| Err(Error::new(ErrorKind::Interrupted(15)));
    let error = verifier.run(None, &stop).unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Interrupted(15));
}

#[test]
fn options_of_a_later_imgdm_are_refused() {
    let mut world = World::new();
    let image = image(&world);
    world.plain(&image);
    let mut attached = world.attached();
    attached.uuid.options |= 1 << 30;
    let refused = Verifier::open(&world.kernel, attached, None).err().unwrap();
    assert!(matches!(refused.kind(), ErrorKind::Unsupported(_)), "{refused}");
    assert_eq!(DeviceNumber { major: 253, minor: 0 }.to_string(), "253:0");
}
