//! Compressed clusters, LUKS headers and the stores of writable devices.

use std::sync::Arc;

use imgdm::crypt::{CryptHeader, Passphrase};
use imgdm::format::ImageFormat;
use imgdm::format::qcow2::{Compression, Qcow2Image};
use imgdm::inflate::Inflater;
use imgdm::overlay::StoreHeader;
use imgdm::overlay::exceptions::ExceptionStore;
use imgdm::overlay::persistent::{HEADER_LENGTH, PersistentHeader};
use imgdm::source::Source;
use imgdm::units::{ByteLen, GuestOffset, HostOffset};

/// A compressed cluster: the first byte's lowest bit is the method, the others the size of the
/// cluster (512 bytes to 2 MiB). The same stream gives the same bytes the second time, by a
/// decoder that has seen others.
pub fn inflate(bytes: &[u8]) {
    let Some((&first, stream)) = bytes.split_first() else { return };
    let method = if first & 1 == 0 { Compression::Zlib } else { Compression::Zstd };
    let mut cluster = vec![0; 512 << (first >> 1 & 15).min(12)];
    let mut inflater = Inflater::new();
    let outcome = inflater.inflate(method, stream, &mut cluster);
    let mut again = vec![0xff; cluster.len()];
    assert_eq!(inflater.inflate(method, stream, &mut again), outcome);
    if outcome.is_ok() {
        assert!(cluster == again, "the same stream gave other bytes");
    }
}

/// A LUKS header with its key slots, as a qcow2 image has it: read, and its slots tried. The
/// numbers of iterations, by which a header can ask for any time there is, are cut down.
pub fn luks(bytes: &[u8]) {
    let mut luks = bytes.to_vec();
    for field in std::iter::once(164).chain((0..8).map(|slot| 208 + 48 * slot + 4)) {
        if let Some([high @ .., low]) = luks.get_mut(field..field + 4) {
            high.fill(0);
            *low &= 3;
        }
    }
    let source = Arc::new(Source::from_bytes("fuzzed", encrypted_qcow2(&luks)));
    let image = Qcow2Image::open(Arc::clone(&source), None, false).expect("the qcow2 is good");
    let Ok(Some(header)) = image.crypt_header() else { return };
    let _ = (header.cipher_spec(), header.key_bytes(), header.encryption());
    if let CryptHeader::Luks(luks) = &header {
        let _ = format!("{:?}", luks.facts());
    }
    let passphrase = Passphrase::new(zeroize::Zeroizing::new(b"fuzz".to_vec()));
    if header.has_key() {
        let _ = header.unlock(&source, &passphrase);
    }
}

/// A qcow2 image of 4 KiB with clusters of 512 bytes, whose LUKS header these bytes are.
fn encrypted_qcow2(luks: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 2048];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &9u32.to_be_bytes());
    put(24, &4096u64.to_be_bytes());
    put(32, &2u32.to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &512u64.to_be_bytes());
    put(48, &1024u64.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(104, &0x0537_be77_u32.to_be_bytes());
    put(108, &16u32.to_be_bytes());
    put(112, &2048u64.to_be_bytes());
    // Room for all key slots: what is behind the end of the input can't be read.
    put(120, &(4u64 << 20).to_be_bytes());
    image.extend(luks);
    image
}

/// The header of a store, with its checksum put right; and dm-snapshot's part of it.
pub fn overlay(bytes: &[u8]) {
    let Some((&size, bytes)) = bytes.split_first() else { return };
    if let Some(header) = bytes.first_chunk::<HEADER_LENGTH>() {
        if let Ok(header) = PersistentHeader::parse(header) {
            let written = header.to_bytes().expect("it was read");
            assert_eq!(PersistentHeader::parse(&written).expect("it was written"), header);
        }
        exceptions(bytes, u64::from(size) << 12);
    }
    let mut store = bytes.to_vec();
    if store.len() < 56 {
        return;
    }
    let length = u32::try_from(store.len()).unwrap_or(u32::MAX);
    store[20..24].copy_from_slice(&length.to_le_bytes());
    let mut hash = blake3::Hasher::new();
    hash.update(&store[..24]).update(&store[56..]);
    store[24..56].copy_from_slice(hash.finalize().as_bytes());
    let Ok(header) = StoreHeader::parse(&store) else { return };
    header.check(&header).expect("a store is of its own disk");
    if let Ok(written) = header.to_bytes() {
        assert_eq!(StoreHeader::parse(&written).expect("it was written"), header);
    }
}

/// The runs of changes lie one after the other, and cover the disk.
fn exceptions(bytes: &[u8], disk: u64) {
    let source = Source::from_bytes("fuzzed", bytes.to_vec());
    let Ok(store) = ExceptionStore::open(&source, HostOffset::ZERO, ByteLen::new(disk)) else {
        return;
    };
    let checked = store.check();
    let Ok(changes) = store.changes() else { return };
    let mut at = GuestOffset::ZERO;
    for run in changes.runs() {
        let Ok(run) = run else { return };
        assert_eq!(run.range.start, at, "a gap or an overlap");
        assert!(!run.range.is_empty(), "an empty run");
        at = run.range.end;
        assert_eq!(changes.at(run.range.start).expect("it was there before"), run);
    }
    assert_eq!(at.get(), disk, "not all of the disk");
    let _ = (checked, changes.count());
}
