//! The JSON of `imgdm info`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use imgdm::crypt::LuksFacts;
use imgdm::device::holders::{Holder, holders};
use imgdm::device::{DeviceNumber, sys};
use imgdm::format::qcow2::bitmap::BitmapDirectoryEntry;
use imgdm::format::qcow2::{Compression, Snapshot};
use imgdm::info::{EncryptionFacts, FileFacts, ImageInfo, InfoNotice, Qcow2Facts};
use imgdm::lock::{Claim, OthersLock};
use serde::Serialize;

use crate::cli::facts::Fact;
use crate::cli::output::JsonPath;
use crate::cli::snapshots::JsonSnapshot;

/// A node of QEMU's block graph (BlockNodeInfo), its keys in QEMU's order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Info {
    pub(super) children: Vec<Child>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    snapshots: Vec<JsonSnapshot>,
    /// The same, for people.
    #[serde(skip)]
    pub(super) snapshot_table: Vec<Snapshot>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) backing_filename_format: Option<String>,
    pub(super) virtual_size: u64,
    pub(super) filename: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cluster_size: Option<u64>,
    pub(super) format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) actual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) format_specific: Option<FormatSpecific>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) full_backing_filename: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) encrypted: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) backing_filename: Option<String>,
    pub(super) dirty_flag: bool,
    /// What qemu-img does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) imgdm: Option<Ours>,
}

/// A node below another.
#[derive(Debug, Serialize)]
pub(super) struct Child {
    pub(super) name: &'static str,
    pub(super) info: Info,
}

/// What only one format has.
#[derive(Debug, Serialize)]
pub(super) struct FormatSpecific {
    #[serde(rename = "type")]
    kind: &'static str,
    pub(super) data: Fact,
}

/// What qemu-img does not say.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Ours {
    pub(super) image: File,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) data_file: Option<File>,
    /// `full-backing-filename`, whatever its bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    backing: Option<JsonPath>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cow: Option<Cow>,
    pub(super) notices: Vec<Notice>,
}

/// A file of the image.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct File {
    #[serde(flatten)]
    pub(super) path: JsonPath,
    /// Bytes, not rounded to sectors.
    pub(super) length: u64,
    /// Of the file system that holds it, or of the block device that it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) device: Option<String>,
    /// None of a block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) inode: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) mtime_sec: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) mtime_nsec: Option<i64>,
    /// The QEMU locks of others.
    pub(super) locks: Vec<Lock>,
}

/// A byte that others hold a lock on.
#[derive(Debug, Serialize)]
pub(super) struct Lock {
    pub(super) byte: u64,
    /// As QEMU's QAPI names it.
    permission: String,
    claim: &'static str,
    /// For people.
    #[serde(skip)]
    pub(super) shown: String,
    pub(super) holders: Vec<JsonHolder>,
}

/// Who holds it, or may.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum JsonHolder {
    Process { pid: u32, command: String },
    Loop { device: String },
}

/// What only cow has.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Cow {
    pub(super) layout: String,
    /// Of the backing file when the image was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) backing_mtime_sec: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) backing_size: Option<u64>,
}

#[derive(Debug, Serialize)]
pub(super) struct Notice {
    pub(super) kind: &'static str,
    pub(super) message: String,
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl From<&ImageInfo> for Info {
    fn from(info: &ImageInfo) -> Self {
        let source = &info.file.source;
        let backing = info.backing.as_ref();
        Self {
            children: vec![Child { name: "file", info: protocol_node(&info.file) }],
            snapshots: info.snapshots.iter().map(JsonSnapshot::from).collect(),
            snapshot_table: info.snapshots.clone(),
            backing_filename_format: backing.and_then(|backing| backing.format.clone()),
            virtual_size: info.virtual_size.get(),
            filename: lossy(source.path().as_os_str().as_bytes()),
            cluster_size: info.cluster_size,
            format: info.format.name(),
            actual_size: source.allocated().map(|length| length.get()),
            format_specific: info
                .qcow2
                .as_ref()
                .map(|facts| FormatSpecific { kind: "qcow2", data: qcow2_data(facts) }),
            full_backing_filename: backing.map(|backing| lossy(&backing.full_name)),
            encrypted: info.encrypted,
            backing_filename: backing.map(|backing| lossy(&backing.name)),
            dirty_flag: info.dirty,
            imgdm: Some(ours(info)),
        }
    }
}

/// The node of QEMU's protocol driver below the format's.
fn protocol_node(file: &FileFacts) -> Info {
    let source = &file.source;
    let hint = source.file().and_then(sys::extent_size_hint);
    let data = hint.map(|size| ("extent-size-hint", u64::from(size).into()));
    Info {
        children: Vec::new(),
        snapshots: Vec::new(),
        snapshot_table: Vec::new(),
        backing_filename_format: None,
        virtual_size: file.length_in_sectors().unwrap_or(source.length()).get(),
        filename: lossy(source.path().as_os_str().as_bytes()),
        cluster_size: None,
        format: if source.is_block_device() { "host_device" } else { "file" },
        actual_size: source.allocated().map(|length| length.get()),
        format_specific: Some(FormatSpecific {
            kind: "file",
            data: Fact::Dict(data.into_iter().collect()),
        }),
        full_backing_filename: None,
        encrypted: false,
        backing_filename: None,
        dirty_flag: false,
        imgdm: None,
    }
}

/// ImageInfoSpecificQCow2.
fn qcow2_data(facts: &Qcow2Facts) -> Fact {
    let header = &facts.header;
    let v3 = header.version >= 3;
    let compression = match header.compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    };
    let mut data: Vec<(&'static str, Fact)> = vec![
        ("compat", if v3 { "1.1" } else { "0.10" }.into()),
        ("compression-type", compression.into()),
    ];
    if v3 {
        data.push(("lazy-refcounts", header.has_lazy_refcounts().into()));
        if !facts.bitmaps.is_empty() {
            data.push(("bitmaps", Fact::List(facts.bitmaps.iter().map(bitmap).collect())));
        }
    }
    data.push(("refcount-bits", (1u64 << header.refcount_order).into()));
    if let Some(name) = facts.data_file.as_ref().filter(|_| v3) {
        data.push(("data-file", Fact::Text(lossy(name))));
    }
    match &facts.encryption {
        None => {}
        Some(EncryptionFacts::Aes) => {
            data.push(("encrypt", Fact::Dict(vec![("format", "aes".into())])));
        }
        Some(EncryptionFacts::Luks(luks)) => data.push(("encrypt", luks_data(luks))),
    }
    if v3 {
        if header.has_data_file() {
            data.push(("data-file-raw", header.has_raw_data_file().into()));
        }
        data.push(("corrupt", header.is_marked_corrupt().into()));
        data.push(("extended-l2", header.has_extended_l2().into()));
    }
    Fact::Dict(data)
}

fn bitmap(bitmap: &BitmapDirectoryEntry) -> Fact {
    let flags = [("in-use", bitmap.in_use), ("auto", bitmap.auto)];
    let set = flags.into_iter().filter(|(_, set)| *set).map(|(name, _)| name.into());
    Fact::Dict(vec![
        ("flags", Fact::List(set.collect())),
        ("name", Fact::Text(lossy(&bitmap.name))),
        ("granularity", bitmap.granularity().into()),
    ])
}

/// QCryptoBlockInfoLUKS.
fn luks_data(luks: &LuksFacts) -> Fact {
    let slot = |slot: &imgdm::crypt::LuksSlotFacts| {
        let key_offset = ("key-offset", slot.key_offset.get().into());
        Fact::Dict(match slot.active {
            None => vec![("active", false.into()), key_offset],
            Some((iterations, stripes)) => vec![
                ("active", true.into()),
                ("iters", u64::from(iterations).into()),
                key_offset,
                ("stripes", u64::from(stripes).into()),
            ],
        })
    };
    let iv_hash = luks.iv_hash.as_deref().map(|hash| ("ivgen-hash-alg", hash.into()));
    let mut data: Vec<(&'static str, Fact)> = vec![
        ("ivgen-alg", luks.iv_generator.as_str().into()),
        ("detached-header", false.into()),
        ("hash-alg", luks.hash.as_str().into()),
        ("cipher-alg", luks.cipher.as_str().into()),
        ("uuid", luks.uuid.as_str().into()),
    ];
    data.extend(iv_hash);
    data.extend([
        ("format", "luks".into()),
        ("cipher-mode", luks.mode.as_str().into()),
        ("slots", Fact::List(luks.slots.iter().map(slot).collect())),
        ("payload-offset", luks.payload_offset.get().into()),
        ("master-key-iters", u64::from(luks.digest_iterations).into()),
    ]);
    Fact::Dict(data)
}

fn ours(info: &ImageInfo) -> Ours {
    let backing = info.backing.as_ref();
    let recorded = backing.and_then(|backing| backing.recorded);
    Ours {
        image: file(&info.file),
        data_file: info.data_file.as_ref().map(file),
        backing: backing.map(|backing| Path::new(OsStr::from_bytes(&backing.full_name)).into()),
        cow: info.cow_layout.map(|layout| Cow {
            layout: layout.to_string(),
            backing_mtime_sec: recorded.map(|recorded| recorded.modified),
            backing_size: recorded.and_then(|recorded| recorded.size).map(|size| size.get()),
        }),
        notices: info.notices.iter().map(notice).collect(),
    }
}

fn notice(notice: &InfoNotice) -> Notice {
    Notice { kind: notice.name(), message: notice.to_string() }
}

fn file(file: &FileFacts) -> File {
    let source = &file.source;
    let id = source.id();
    let modified = source.stamp().ok().flatten().map(|stamp| stamp.modified);
    // A search through all processes: only where there is something to find.
    let holders = match id {
        Some(id) if !file.locks.is_empty() => holders(id),
        _ => Vec::new(),
    };
    File {
        path: source.absolute_path().as_path().into(),
        length: source.length().get(),
        device: id.map(|id| DeviceNumber::from_dev(id.device).to_string()),
        inode: id.filter(|_| !source.is_block_device()).map(|id| id.inode),
        mtime_sec: modified.map(|(seconds, _)| seconds),
        mtime_nsec: modified.map(|(_, nanoseconds)| nanoseconds),
        locks: file.locks.iter().map(|&lock| json_lock(lock, &holders)).collect(),
    }
}

fn json_lock(lock: OthersLock, holders: &[Holder]) -> Lock {
    let (claim, words) = match lock.claim {
        Claim::Uses => ("uses", "uses"),
        Claim::DoesNotShare => ("does-not-share", "does not share"),
    };
    let permission = lock.permission.name();
    let holds = |holder: &&Holder| holder.may_hold(lock.byte());
    let named = holders.iter().filter(holds).map(|holder| match holder {
        Holder::Process { pid, command, .. } => {
            JsonHolder::Process { pid: *pid, command: command.clone() }
        }
        Holder::Loop(path) => JsonHolder::Loop { device: path.to_string_lossy().into_owned() },
    });
    Lock {
        byte: lock.byte(),
        permission: permission.replace(' ', "-"),
        claim,
        shown: format!("{words} '{permission}'"),
        holders: named.collect(),
    }
}
