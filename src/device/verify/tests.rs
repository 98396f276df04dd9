//! Images in files, attached by the kernel in memory, and then changed on either side.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flate2::write::DeflateEncoder;

use super::*;
use crate::crypt::{CryptHeader, Passphrase};
use crate::device::attach::{Above, LayerFiles, MemoryLimit, Request, attach};
use crate::device::detach::find;
use crate::device::fake::{FakeDevice, FakeKernel, FakeLoop};
use crate::device::keys::Keys;
use crate::device::name::DmName;
use crate::device::{DeviceNumber, Interrupt, LoopPath, PathState};
use crate::format::qcow2::tests::Builder;
use crate::open::{OpenPolicy, open_chain};
use crate::plan::{MAX_SEGMENTS_PER_TABLE, Plan, PlanOptions, ZeroMode};
use crate::scratch::{FillOptions, OnError, ScratchWork, fill};
use crate::source::FileId;
use crate::table::TableLine;
use crate::units::ByteLen;

mod device;

const CLUSTER: u64 = 65536;
const L2: u64 = 3 * CLUSTER;
/// Of two sectors.
const COMPRESSED: u64 = 1 << 62 | 1 << 54;

/// A directory with images, one of which is attached.
struct World {
    directory: tempfile::TempDir,
    kernel: FakeKernel,
    keys: Keys,
    scratch: Option<File>,
}

/// How [`World::attach`] does it.
#[derive(Clone, Default)]
struct How {
    policy: OpenPolicy,
    options: Options,
    max_segments: Option<u64>,
}

impl How {
    fn zero(zero: ZeroMode) -> Self {
        Self { options: Options { zero, ..Options::default() }, ..Self::default() }
    }

    fn on_error(on_error: OnError) -> Self {
        Self { options: Options { on_error, ..Options::default() }, ..Self::default() }
    }
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { directory, kernel: FakeKernel::new(), keys: Keys::default(), scratch: None }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Attaches an image under the name `disk`.
    fn attach(&mut self, image: &Path, how: &How) {
        let opened = open_chain(image, &how.policy).unwrap();
        let chain = &opened.chain;
        let options = PlanOptions {
            zero: how.options.zero,
            on_error: how.options.on_error,
            max_segments: how.max_segments.unwrap_or(MAX_SEGMENTS_PER_TABLE),
            ..PlanOptions::default()
        };
        let mut plan = Plan::new(chain, options).unwrap();
        plan.check_attachable().unwrap();
        if plan.scratch_bytes() > 0 {
            let path = self.path("scratch");
            let mut open = OpenOptions::new();
            let file = open.read(true).write(true).create(true).truncate(true).open(path).unwrap();
            let fill_options = FillOptions::new(self.directory.path(), how.options.on_error);
            let filled = fill(chain, &plan, &file, &fill_options, &|_| Ok(())).unwrap();
            plan = Plan::with_found(chain, options, &filled.found()).unwrap();
            self.scratch = Some(file);
        }
        let layers: Vec<_> = chain
            .layers()
            .iter()
            .map(|layer| LayerFiles::of(layer, layer.image.format().name()))
            .collect();
        let snapshot = chain.layers()[0].image.snapshot();
        let name = DmName::new("disk").unwrap();
        let above = Above::default();
        let request = Request {
            name: &name,
            layers: &layers,
            snapshot: snapshot.map(|s| (s.id.as_str(), s.name.as_str())),
            tables: &plan,
            store: None,
            scratch: self.scratch.as_ref(),
            keys: &self.keys,
            options: how.options,
            above: &above,
            keep: false,
            memory: MemoryLimit::default(),
            interrupt: Interrupt::never(),
        };
        for (depth, layer) in (0..).zip(chain.layers()) {
            if let Some(header) = layer.image.crypt_header().unwrap() {
                let key = unlock(&header, &layer.source);
                let description = request.uuid().unwrap().key_description(depth);
                self.keys.insert(depth, self.kernel.store_key(&description, &key).unwrap());
            }
        }
        attach(&self.kernel, &request).unwrap();
    }

    /// As attached, without options.
    fn plain(&mut self, image: &Path) {
        self.attach(image, &How::default());
    }

    fn attached(&self) -> Attached {
        self.kernel.change(|state| {
            for each in state.loops.values_mut() {
                each.info.path = Some(path_of(each));
            }
        });
        find(&self.kernel, "disk".as_ref(), None).unwrap()
    }

    fn verify_with(&self, content: bool, image: Option<&Path>) -> Verification {
        let attached = self.attached();
        let verifier = Verifier::open(&self.kernel, attached, image).unwrap();
        let mut ciphers = Ciphers::new();
        for (depth, layer) in (0..).zip(verifier.chain().into_iter().flat_map(Chain::layers)) {
            if let Some(header) = layer.image.crypt_header().unwrap() {
                ciphers.insert(depth, &header, &unlock(&header, &layer.source)).unwrap();
            }
        }
        verifier.run(content.then_some(&ciphers), &|_| Ok(())).unwrap()
    }

    fn verify(&self) -> Verification {
        self.verify_with(false, None)
    }

    /// The same without and with reading all of the device.
    #[track_caller]
    fn assert_same(&self) {
        for content in [false, true] {
            let verified = self.verify_with(content, None);
            assert!(verified.is_same(), "content {content}: {verified:#?}");
            assert_eq!(verified.notices(), [""; 0]);
        }
    }

    /// Exactly this is found: kind, first guest offset, ranges and bytes.
    #[track_caller]
    fn assert_finds(&self, wanted: &[(FindingKind, u64, u64, u64)]) -> Verification {
        let verified = self.verify();
        let found: Vec<_> = verified
            .findings()
            .iter()
            .map(|f| (f.kind, f.first.map_or(0, |r| r.start.get()), f.ranges, f.bytes.get()))
            .collect();
        assert_eq!(found, wanted, "{verified:#?}");
        verified
    }

    /// The live table of the top device, to be changed.
    fn change_table(&self, change: impl FnOnce(&mut Vec<TableLine>)) {
        self.kernel.change(|state| {
            let top = state.devices.values_mut().find(|device| device.name == "disk").unwrap();
            change(top.live.as_mut().unwrap());
        });
    }
}

/// As Linux tells it of a loop device.
fn path_of(each: &FakeLoop) -> LoopPath {
    use std::os::fd::AsRawFd;
    let link = format!("/proc/self/fd/{}", each.file.as_raw_fd());
    let path = fs::read_link(link).unwrap();
    let state = match FileId::of_path(&path) {
        Some(id) if id == each.info.file => PathState::Same,
        Some(_) => PathState::Other,
        None => PathState::Deleted,
    };
    let text = path.to_string_lossy();
    LoopPath { path: text.strip_suffix(" (deleted)").unwrap_or(&text).into(), state }
}

fn unlock(header: &CryptHeader, source: &crate::source::Source) -> crate::crypt::VolumeKey {
    header.unlock(source, &Passphrase::new(b"secret".to_vec().into())).unwrap()
}

fn put(path: &Path, at: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

/// A 4 MiB image of 16 clusters, of which 4 to 8 hold the bytes 4 to 8.
fn builder() -> Builder {
    let mut builder = Builder::new(16);
    for cluster in 4..9u8 {
        let bytes = vec![cluster; 65536];
        builder.put(u64::from(cluster) * CLUSTER, &bytes);
    }
    builder
}

/// Data, zeros, and clusters out of order.
fn image(world: &World) -> PathBuf {
    let mut builder = builder();
    builder.l2(0, 4 * CLUSTER).l2(1, 5 * CLUSTER).l2(3, 8 * CLUSTER).l2(4, 7 * CLUSTER);
    builder.l2(10, 1).l2(20, 6 * CLUSTER);
    world.write("disk.qcow2", &builder.bytes)
}

fn backing(builder: &mut Builder, name: &str) {
    builder.put(104, &0xe279_2acau32.to_be_bytes()).put(108, &3u32.to_be_bytes());
    builder.put(112, b"raw");
    builder.u64(8, 128).u32(16, u32::try_from(name.len()).unwrap()).put(128, name.as_bytes());
}

/// An overlay over a sparse raw file that is shorter and ends inside a sector.
fn overlay(world: &World, name: &str) -> PathBuf {
    let base = world.path("base.raw");
    let file = File::create(&base).unwrap();
    file.write_all_at(&[0xb5; 256 << 10], 512 << 10).unwrap();
    file.write_all_at(&[0xb6; 1000], (3 << 20) + 4096).unwrap();
    let mut builder = builder();
    backing(&mut builder, name);
    builder.l2(9, 4 * CLUSTER).l2(30, 1);
    world.write("disk.qcow2", &builder.bytes)
}

fn deflated(byte: u8) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&vec![byte; 65536]).unwrap();
    encoder.finish().unwrap()
}

/// Compressed clusters, of bytes 1, 2 and 0, among others.
fn compressed(world: &World) -> PathBuf {
    let mut builder = builder();
    builder.l2(0, 4 * CLUSTER).l2(5, 5 * CLUSTER);
    for (guest, byte) in [(1, 1), (2, 2), (7, 0)] {
        let at = 10 * CLUSTER + guest * 4096;
        builder.put(at, &deflated(byte)).l2(guest, COMPRESSED | at);
    }
    world.write("disk.qcow2", &builder.bytes)
}

#[test]
fn what_was_attached_just_now_is_the_same() {
    for zero in [ZeroMode::Auto, ZeroMode::Dm, ZeroMode::Loop] {
        for make in [image as fn(&World) -> PathBuf, |w| overlay(w, "base.raw"), compressed] {
            for max_segments in [None, Some(8)] {
                let mut world = World::new();
                let image = make(&world);
                let how = How { max_segments, ..How::zero(zero) };
                world.attach(&image, &how);
                world.assert_same();
                // By the path of the image, too.
                assert!(world.verify_with(false, Some(&image)).is_same());
            }
        }
    }
}

#[test]
fn one_changed_l2_entry_is_found_where_it_is() {
    let mut world = World::new();
    let image = image(&world);
    world.plain(&image);
    put(&image, L2 + 4 * 8, &(5 * CLUSTER).to_be_bytes());
    let verified = world.assert_finds(&[(FindingKind::Mapping, 4 * CLUSTER, 1, CLUSTER)]);
    let [finding] = verified.findings() else { unreachable!() };
    assert_eq!(finding.path.as_ref(), Some(&image));
    assert!(finding.live.as_ref().unwrap().ends_with("disk.qcow2 at 0x70000"), "{finding:?}");
    assert!(finding.fresh.as_ref().unwrap().ends_with("disk.qcow2 at 0x50000"), "{finding:?}");
    // One of neighbours, and one more.
    put(&image, L2, &(6 * CLUSTER).to_be_bytes());
    put(&image, L2 + 5 * 8, &(6 * CLUSTER).to_be_bytes());
    let verified = world.assert_finds(&[
        (FindingKind::Mapping, 0, 2, 2 * CLUSTER),
        (FindingKind::Content, 5 * CLUSTER, 1, CLUSTER),
    ]);
    // What were zeros is data: found by its bytes.
    let content = &verified.findings()[1];
    assert!(content.message.contains("reads 0x00 and should read 0x06"), "{content:?}");
    assert!(content.live.as_ref().unwrap().contains("zeros"), "{content:?}");
}

#[test]
fn an_entry_that_cannot_be_is_found_and_what_comes_behind_is_compared() {
    let mut world = World::new();
    let image = image(&world);
    world.plain(&image);
    put(&image, L2 + 8, &(5 * CLUSTER + 512).to_be_bytes());
    put(&image, L2 + 20 * 8, &(5 * CLUSTER).to_be_bytes());
    let verified = world.assert_finds(&[
        (FindingKind::Image, CLUSTER, 1, CLUSTER),
        (FindingKind::Mapping, 20 * CLUSTER, 1, CLUSTER),
    ]);
    assert!(verified.findings()[0].message.contains("0x30008"), "{verified:?}");
    // The whole table: every cluster of it.
    put(&image, 2 * CLUSTER, &(3 * CLUSTER + 512).to_be_bytes());
    assert_eq!(world.verify().findings()[0].kind, FindingKind::Image);
}

#[test]
fn a_changed_table_is_found() {
    type Change = fn(&mut Vec<TableLine>);
    // 0: 256 linear onto clusters 4 and 5; then zeros, cluster 8, cluster 7, zeros, 6, zeros.
    let changes: [(Change, u64); 6] = [
        (|table| table[0] = "0 256 linear 7:0 520".parse().unwrap(), 0),
        (
            |table| {
                let (a, b) = (table[2].target.clone(), table[3].target.clone());
                (table[2].target, table[3].target) = (b, a);
            },
            3 * CLUSTER,
        ),
        (|table| table[2].target = "0 1 zero".parse::<TableLine>().unwrap().target, 3 * CLUSTER),
        (|table| table[4].target = "0 1 error".parse::<TableLine>().unwrap().target, 5 * CLUSTER),
        (|table| drop(table.pop()), 21 * CLUSTER),
        (
            |table| table[5].target = "0 1 linear 8:0 0".parse::<TableLine>().unwrap().target,
            20 * CLUSTER,
        ),
    ];
    for (change, at) in changes {
        let mut world = World::new();
        let image = image(&world);
        world.attach(&image, &How::zero(ZeroMode::Dm));
        world.change_table(change);
        let verified = world.verify();
        let first = verified.findings().iter().find_map(|finding| finding.first);
        assert_eq!(first.map(|range| range.start.get()), Some(at), "{verified:#?}");
    }
    let mut world = World::new();
    let image = image(&world);
    world.attach(&image, &How::zero(ZeroMode::Dm));
    world.change_table(|table| drop(table.pop()));
    let kinds: Vec<_> = world.verify().findings().iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, [FindingKind::Size, FindingKind::Mapping]);
}

#[test]
fn zeros_are_alike_whoever_gives_them() {
    for zero in [ZeroMode::Auto, ZeroMode::Dm, ZeroMode::Loop] {
        let mut world = World::new();
        let image = overlay(&world, "base.raw");
        world.attach(&image, &How::zero(zero));
        let base = world.path("base.raw");
        // A hole becomes data of zeros, data that are zeros become a zero cluster.
        put(&base, 1 << 20, &[0; 128 << 10]);
        put(&image, L2 + 17 * 8, &1u64.to_be_bytes());
        put(&image, L2 + 30 * 8, &0u64.to_be_bytes());
        world.assert_same();
    }
    // Data whose bytes are zeros, mapped as they are, and then a hole.
    let mut world = World::new();
    let base = world.write("base.raw", &vec![0; 1 << 20]);
    let how = How {
        policy: OpenPolicy { format: Some(Format::Raw), ..OpenPolicy::default() },
        ..How::default()
    };
    world.attach(&base, &how);
    let file = OpenOptions::new().write(true).open(&base).unwrap();
    file.set_len(0).unwrap();
    file.set_len(1 << 20).unwrap();
    world.assert_same();
    // Data again, and then other bytes than the zeros that a table with dm-zero gives.
    let mut world = World::new();
    let image = overlay(&world, "base.raw");
    world.attach(&image, &How::zero(ZeroMode::Dm));
    put(&world.path("base.raw"), (1 << 20) + 65536 + 700, &[1]);
    let found = world.verify();
    let [finding] = found.findings() else { panic!("{found:#?}") };
    assert_eq!(finding.kind, FindingKind::Content);
    assert_eq!(finding.first.unwrap().start.get(), (1 << 20) + 65536 + 512);
}

#[test]
fn a_scratch_file_is_compared_with_what_the_clusters_inflate_to() {
    let mut world = World::new();
    let image = compressed(&world);
    world.plain(&image);
    world.assert_same();
    let scratch = world.path("scratch");
    put(&scratch, 2 * CLUSTER + 1000, &[9]);
    let verified = world.assert_finds(&[(FindingKind::Content, 2 * CLUSTER + 512, 1, 512)]);
    let finding = &verified.findings()[0];
    assert!(
        finding.message.contains("at 0x203e8 it reads 0x09 and should read 0x02"),
        "{finding:?}"
    );
    assert!(finding.live.as_ref().unwrap().starts_with("the scratch file at 0x20200"));
    assert!(finding.fresh.as_ref().unwrap().starts_with("the compressed cluster of"));
    put(&scratch, 2 * CLUSTER + 1000, &[2]);
    world.assert_same();
    // One entry leads to another stream, and one to the stream of zeros.
    put(&image, L2 + 2 * 8, &(COMPRESSED | (10 * CLUSTER + 4096)).to_be_bytes());
    world.assert_finds(&[(FindingKind::Content, 2 * CLUSTER, 1, CLUSTER)]);
    put(&image, L2 + 8, &(COMPRESSED | (10 * CLUSTER + 7 * 4096)).to_be_bytes());
    world.assert_finds(&[(FindingKind::Content, CLUSTER, 1, 2 * CLUSTER)]);
    // A cluster that does not inflate any more.
    put(&image, L2 + 8, &(COMPRESSED | (10 * CLUSTER + 4096)).to_be_bytes());
    put(&image, 10 * CLUSTER + 4096, &[0xff; 64]);
    let verified = world.verify();
    assert!(
        verified.findings().iter().any(|f| f.message.contains("does not inflate")),
        "{verified:#?}"
    );
}

#[test]
fn damage_that_attach_was_told_to_pass_over_is_the_same() {
    for on_error in [OnError::Zero, OnError::ErrorTarget] {
        let mut world = World::new();
        let image = compressed(&world);
        put(&image, 10 * CLUSTER + 4096, &[0xff; 64]);
        // Wholly past the end of the file.
        put(&image, L2 + 9 * 8, &(1u64 << 30).to_be_bytes());
        world.attach(&image, &How::on_error(on_error));
        world.assert_same();
        // Mended: what fails or is zero now needn't be.
        put(&image, 10 * CLUSTER + 4096, &deflated(1));
        put(&image, L2 + 9 * 8, &(8 * CLUSTER).to_be_bytes());
        let verified = world.verify();
        let first: Vec<_> =
            verified.findings().iter().map(|f| f.first.unwrap().start.get()).collect();
        assert!(first.contains(&CLUSTER), "{verified:#?}");
        let all: u64 = verified.findings().iter().map(|f| f.bytes.get()).sum();
        assert_eq!(all, 2 * CLUSTER, "{on_error:?}: {verified:#?}");
    }
}

#[test]
fn a_file_that_was_cut_off_is_found() {
    let mut world = World::new();
    let image = image(&world);
    world.plain(&image);
    OpenOptions::new().write(true).open(&image).unwrap().set_len(7 * CLUSTER + 100).unwrap();
    let verified = world.verify();
    let past: Vec<_> = verified
        .findings()
        .iter()
        .filter(|f| f.kind == FindingKind::PastFileEnd)
        .map(|f| (f.first.unwrap().start.get(), f.ranges, f.bytes.get()))
        .collect();
    // Cluster 8 is gone, of cluster 7 all but the start.
    assert_eq!(past, [(3 * CLUSTER, 1, 2 * CLUSTER)], "{verified:#?}");
}

#[test]
fn another_file_at_the_path_is_found_and_the_held_one_is_verified() {
    let mut world = World::new();
    let image = overlay(&world, "base.raw");
    world.plain(&image);
    let base = world.path("base.raw");
    fs::rename(&base, world.path("old.raw")).unwrap();
    // The kernel follows the file by its new name; that the overlay does not know.
    let verified = world.verify();
    let [finding] = verified.findings() else { panic!("{verified:#?}") };
    assert_eq!(finding.kind, FindingKind::Image);
    assert!(finding.message.contains("base.raw") && finding.message.contains("backing file"));
    fs::copy(world.path("old.raw"), &base).unwrap();
    let verified = world.verify();
    let [finding] = verified.findings() else { panic!("{verified:#?}") };
    assert_eq!((finding.kind, finding.path.as_ref()), (FindingKind::File, Some(&base)));
    // Replaced as editors and copies do it.
    fs::rename(&base, world.path("old.raw")).unwrap();
    let verified = world.verify();
    let kinds: Vec<_> = verified.findings().iter().map(|f| (f.kind, f.path.clone())).collect();
    assert_eq!(kinds, [(FindingKind::File, Some(world.path("old.raw")))], "{verified:#?}");
    assert!(verified.findings()[0].message.contains("still holds it"), "{verified:#?}");
    // What is held is compared all the same.
    world.change_table(|table| {
        let last = table.iter_mut().rfind(|line| line.target.device().is_some()).unwrap();
        last.target = "0 1 zero".parse::<TableLine>().unwrap().target;
    });
    let verified = world.verify();
    assert!(verified.findings().iter().any(|f| f.first.is_some()), "{verified:#?}");
    assert!(!verified.findings().iter().any(|f| f.kind == FindingKind::Image), "{verified:#?}");
}

#[test]
fn an_unlinked_image_is_found_and_verified_by_its_loop_device() {
    let mut world = World::new();
    let image = image(&world);
    world.plain(&image);
    fs::remove_file(&image).unwrap();
    let verified = world.verify();
    let [finding] = verified.findings() else { panic!("{verified:#?}") };
    assert_eq!((finding.kind, finding.path.as_ref()), (FindingKind::File, Some(&image)));
    world.kernel.change(|state| {
        let file = state.loops.values().next().unwrap().file.try_clone().unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        put(Path::new(&path), L2, &(6 * CLUSTER).to_be_bytes());
    });
    world.assert_finds(&[(FindingKind::File, 0, 0, 0), (FindingKind::Mapping, 0, 1, CLUSTER)]);
}

#[test]
fn an_overlay_that_names_another_backing_file_is_found() {
    let mut world = World::new();
    let image = overlay(&world, "base.raw");
    fs::copy(world.path("base.raw"), world.path("twin.raw")).unwrap();
    world.plain(&image);
    world.assert_same();
    put(&image, 128, b"twin");
    let verified = world.verify();
    let [finding] = verified.findings() else { panic!("{verified:#?}") };
    assert_eq!(
        (finding.kind, finding.path.clone()),
        (FindingKind::File, Some(world.path("twin.raw")))
    );
    // No backing file at all: other layers.
    put(&image, 8, &[0; 12]);
    let verified = world.verify();
    assert_eq!(verified.findings()[0].kind, FindingKind::Layers, "{verified:#?}");
}

#[test]
fn an_image_attached_by_a_symbolic_link_is_the_same_though_nobody_recorded_the_link() {
    let mut world = World::new();
    let image = overlay(&world, "base.raw");
    fs::create_dir(world.path("elsewhere")).unwrap();
    fs::rename(&image, world.path("elsewhere/real.qcow2")).unwrap();
    std::os::unix::fs::symlink("elsewhere/real.qcow2", &image).unwrap();
    world.plain(&image);
    world.assert_same();
    assert!(world.verify_with(true, Some(&image)).is_same());
}

#[test]
fn what_the_uuid_does_not_record_is_found_out() {
    // A raw disk that looks like a qcow2 image.
    let mut world = World::new();
    let image = image(&world);
    let policy = OpenPolicy { format: Some(Format::Raw), ..OpenPolicy::default() };
    world.attach(&image, &How { policy, ..How::default() });
    world.assert_same();
    // An external data file that was given by hand.
    let mut world = World::new();
    let mut builder = builder();
    builder.u64(72, 4).l2(0, 0).l2(1, CLUSTER);
    let image = world.write("disk.qcow2", &builder.bytes);
    let data_file = world.write("data", &vec![7; 4 << 20]);
    let policy = OpenPolicy { data_file: Some(data_file), ..OpenPolicy::default() };
    world.attach(&image, &How { policy, ..How::default() });
    world.assert_same();
}

#[test]
fn another_size_of_the_disk_is_found() {
    let mut world = World::new();
    let image = image(&world);
    world.plain(&image);
    put(&image, 24, &(3u64 << 20).to_be_bytes());
    let verified = world.assert_finds(&[(FindingKind::Size, 0, 0, 0)]);
    assert!(verified.findings()[0].message.contains("4194304"), "{verified:?}");
}

#[test]
fn an_image_that_is_none_any_more_is_found() {
    let mut world = World::new();
    let image = image(&world);
    world.plain(&image);
    put(&image, 0, b"XXXX");
    // As raw it can be opened: but that is not what is attached.
    let verified = world.verify();
    assert_eq!(verified.findings()[0].kind, FindingKind::Layers, "{verified:#?}");
    put(&image, 0, b"QFI\xfb\0\0\0\x09");
    let verified = world.verify();
    assert_eq!(verified.findings()[0].kind, FindingKind::Image, "{verified:#?}");
    assert!(verified.findings()[0].message.contains("disk.qcow2"), "{verified:#?}");
}
