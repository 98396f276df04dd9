//! The LUKS1 header of a qcow2 image (LUKS On-Disk Format Specification 1.2.3; QEMU:
//! crypto/block-luks.c, whose bounds these are).

use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, KnownLayout};
use zeroize::Zeroizing;

use super::cipher::{CipherSpec, Hash, SectorCipher};
use super::{Passphrase, VolumeKey};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::source::Source;
use crate::units::{ByteLen, HostOffset, SECTOR_SIZE};

const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
const SLOTS: usize = 8;
const SLOT_ENABLED: u32 = 0x00ac_71f3;
const SLOT_DISABLED: u32 = 0x0000_dead;
/// QEMU's QCRYPTO_BLOCK_LUKS_STRIPES; the specification knows no other number either.
const STRIPES: u32 = 4000;
/// Sectors of the header itself: key material starts no earlier.
const HEADER_SECTORS: u32 = 8;
const DIGEST_BYTES: usize = 20;
/// Bytes of the first part of the header, which this module reads.
pub(crate) const LUKS_HEADER_BYTES: usize = 592;

#[repr(C)]
#[derive(FromBytes, KnownLayout, Immutable)]
struct RawHeader {
    magic: [u8; 6],
    version: U16,
    cipher_name: [u8; 32],
    cipher_mode: [u8; 32],
    hash_spec: [u8; 32],
    payload_offset: U32,
    key_bytes: U32,
    digest: [u8; DIGEST_BYTES],
    digest_salt: [u8; 32],
    digest_iterations: U32,
    uuid: [u8; 40],
    slots: [RawSlot; SLOTS],
}

#[repr(C)]
#[derive(FromBytes, KnownLayout, Immutable)]
struct RawSlot {
    active: U32,
    iterations: U32,
    salt: [u8; 32],
    key_offset: U32,
    stripes: U32,
}

const _: () = assert!(size_of::<RawHeader>() == LUKS_HEADER_BYTES);

/// A key slot that holds the volume's key under a passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Slot {
    iterations: u32,
    salt: [u8; 32],
    /// Sectors from the start of the LUKS header.
    key_sector: u32,
}

/// What a header says but for its secrets, in the words of QEMU's `qemu-img info`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksFacts {
    /// Cipher and the bits of its key, like `aes-256` (of one of the two keys with XTS).
    pub cipher: String,
    /// Like `xts`.
    pub mode: String,
    /// Like `plain64` or `essiv`.
    pub iv_generator: String,
    /// The hash of ESSIV.
    pub iv_hash: Option<String>,
    /// The hash of key slots and digest.
    pub hash: String,
    /// The volume's UUID as it is stored, whatever that is.
    pub uuid: String,
    /// Where LUKS would have the payload, from the start of its header. In qcow2 the
    /// clusters lie elsewhere.
    pub payload_offset: ByteLen,
    /// Iterations of the volume key's digest.
    pub digest_iterations: u32,
    /// All eight key slots.
    pub slots: Vec<LuksSlotFacts>,
}

/// What a header says of a key slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LuksSlotFacts {
    /// Where the key material lies, from the start of the LUKS header.
    pub key_offset: ByteLen,
    /// Iterations and stripes of an active slot.
    pub active: Option<(u32, u32)>,
}

/// A LUKS1 header all of whose bounds hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksHeader {
    /// Where in the image file it starts.
    offset: HostOffset,
    cipher: CipherSpec,
    /// `cipher-name` and `cipher-mode` with a dash between: dm-crypt's name too.
    cipher_name: String,
    hash: Hash,
    key_bytes: usize,
    digest: [u8; DIGEST_BYTES],
    digest_salt: [u8; 32],
    digest_iterations: u32,
    /// The enabled ones.
    slots: Vec<Slot>,
    facts: LuksFacts,
}

/// What stands before a field's NUL.
fn c_bytes(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// A NUL-terminated field.
fn text(field: &[u8], name: &str, at: u64) -> Result<String> {
    let bytes = c_bytes(field);
    if bytes.len() == field.len() {
        return Err(Error::invalid(format!("the LUKS {name} has no end")).at_offset(at));
    }
    Ok(printable(&String::from_utf8_lossy(bytes)))
}

fn sectors(count: u32) -> ByteLen {
    ByteLen::new(u64::from(count) * SECTOR_SIZE)
}

/// The part of the facts that the names of cipher and hash give.
fn cipher_facts(name: &str, mode: &str, hash: &str, key_bits: usize) -> LuksFacts {
    let (mode, iv) = mode.split_once('-').unwrap_or((mode, ""));
    let (iv_generator, iv_hash) = match iv.split_once(':') {
        Some((generator, hash)) => (generator, Some(hash.to_owned())),
        None => (iv, None),
    };
    LuksFacts {
        // QEMU has no number in the name of the one cipher that has one key length only.
        cipher: if name == "sm4" { name.to_owned() } else { format!("{name}-{key_bits}") },
        mode: mode.to_owned(),
        iv_generator: iv_generator.to_owned(),
        iv_hash,
        hash: hash.to_owned(),
        uuid: String::new(),
        payload_offset: ByteLen::ZERO,
        digest_iterations: 0,
        slots: Vec::new(),
    }
}

impl LuksHeader {
    /// Reads a header from the bytes at `offset` of an image, whose extension gives it
    /// `length` bytes, key material included.
    ///
    /// # Errors
    /// `InvalidImage` with the field's offset where a bound of QEMU's
    /// qcrypto_block_luks_check_header() does not hold; `Unsupported` for a version, cipher,
    /// mode or hash that is not known.
    pub(crate) fn parse(bytes: &[u8], offset: HostOffset, length: u64) -> Result<Self> {
        let at = |field: u64| offset.get().saturating_add(field);
        let invalid = |field: u64, what: String| {
            Err(Error::invalid(format!("the LUKS header is not valid: {what}"))
                .at_offset(at(field)))
        };
        let Ok((raw, _)) = RawHeader::ref_from_prefix(bytes) else {
            return invalid(0, format!("it ends after {} bytes", bytes.len()));
        };
        if raw.magic != MAGIC {
            return invalid(0, "its magic bytes are missing".to_owned());
        }
        if raw.version.get() != 1 {
            let message = format!("LUKS version {} is not version 1", raw.version.get());
            return Err(Error::new(ErrorKind::Unsupported(message)).at_offset(at(6)));
        }
        let name = text(&raw.cipher_name, "cipher name", at(8))?;
        let mode = text(&raw.cipher_mode, "cipher mode", at(40))?;
        let hash_name = text(&raw.hash_spec, "hash", at(72))?;
        let cipher_name = format!("{name}-{mode}");
        let unsupported = |field, what: String| {
            Err(Error::new(ErrorKind::Unsupported(what)).at_offset(at(field)))
        };
        let Some(cipher) = CipherSpec::parse(&name, &mode) else {
            return unsupported(8, format!("the LUKS cipher '{cipher_name}' is not known"));
        };
        let Some(hash) = Hash::parse(&hash_name) else {
            return unsupported(72, format!("the LUKS hash '{hash_name}' is not known"));
        };
        let key_bytes = usize::try_from(raw.key_bytes.get()).unwrap_or(usize::MAX);
        if !cipher.takes_key(key_bytes) {
            return invalid(108, format!("'{cipher_name}' has no key of {key_bytes} bytes"));
        }
        if raw.payload_offset.get() < HEADER_SECTORS {
            return invalid(104, "the payload overlaps the header".to_owned());
        }
        if raw.digest_iterations.get() == 0 {
            return invalid(164, "the volume key's digest has 0 iterations".to_owned());
        }
        let material_sectors = (key_bytes as u64 * u64::from(STRIPES)).div_ceil(SECTOR_SIZE);
        let end = u64::from(raw.payload_offset.get()).min(length.div_ceil(SECTOR_SIZE));
        let mut slots = Vec::new();
        let mut facts = LuksFacts {
            payload_offset: sectors(raw.payload_offset.get()),
            digest_iterations: raw.digest_iterations.get(),
            uuid: String::from_utf8_lossy(c_bytes(&raw.uuid)).into_owned(),
            ..cipher_facts(&name, &mode, &hash_name, cipher.key_bits(key_bytes))
        };
        let mut taken: Vec<u64> = Vec::new();
        for (raw, index) in raw.slots.iter().zip(0u64..) {
            let field = 208 + index * 48;
            let start = u64::from(raw.key_offset.get());
            if raw.stripes.get() != STRIPES {
                let stripes = raw.stripes.get();
                return invalid(field + 44, format!("key slot {index} has {stripes} stripes"));
            }
            if start < u64::from(HEADER_SECTORS) {
                return invalid(field + 40, format!("key slot {index} overlaps the header"));
            }
            if start + material_sectors > end {
                return invalid(
                    field + 40,
                    format!("key slot {index} reaches past the header area"),
                );
            }
            if taken.iter().any(|&other| start.abs_diff(other) < material_sectors) {
                return invalid(field + 40, format!("key slot {index} overlaps another"));
            }
            taken.push(start);
            facts.slots.push(LuksSlotFacts {
                key_offset: sectors(raw.key_offset.get()),
                active: (raw.active.get() == SLOT_ENABLED)
                    .then_some((raw.iterations.get(), raw.stripes.get())),
            });
            match raw.active.get() {
                SLOT_DISABLED => {}
                SLOT_ENABLED if raw.iterations.get() == 0 => {
                    return invalid(field + 4, format!("key slot {index} has 0 iterations"));
                }
                SLOT_ENABLED => slots.push(Slot {
                    iterations: raw.iterations.get(),
                    salt: raw.salt,
                    key_sector: raw.key_offset.get(),
                }),
                other => {
                    return invalid(field, format!("key slot {index} is in the state {other:#x}"));
                }
            }
        }
        Ok(Self {
            offset,
            cipher,
            cipher_name,
            hash,
            key_bytes,
            digest: raw.digest,
            digest_salt: raw.digest_salt,
            digest_iterations: raw.digest_iterations.get(),
            slots,
            facts,
        })
    }

    /// What the header says, but for its secrets.
    pub fn facts(&self) -> &LuksFacts {
        &self.facts
    }

    /// The cipher as dm-crypt's table names it.
    pub fn cipher_spec(&self) -> String {
        self.cipher_name.clone()
    }

    /// `key-bytes`: length of the volume's key.
    pub fn key_bytes(&self) -> usize {
        self.key_bytes
    }

    /// Whether any key slot is enabled.
    pub(super) fn has_key(&self) -> bool {
        !self.slots.is_empty()
    }

    pub(super) fn cipher(&self) -> CipherSpec {
        self.cipher
    }

    /// Tries the passphrase on each slot.
    ///
    /// # Errors
    /// As [`CryptHeader::unlock`](super::CryptHeader::unlock).
    pub(super) fn unlock(&self, source: &Source, passphrase: &Passphrase) -> Result<VolumeKey> {
        for slot in &self.slots {
            if let Some(key) = self.open_slot(slot, source, passphrase)? {
                return Ok(key);
            }
        }
        let message = if self.slots.is_empty() {
            "the image has no key slot left that could be opened".to_owned()
        } else {
            "wrong key: no key slot of the image opens with it".to_owned()
        };
        Err(Error::new(ErrorKind::WrongKey(message)).at_path(source.path()))
    }

    fn open_slot(
        &self,
        slot: &Slot,
        source: &Source,
        passphrase: &Passphrase,
    ) -> Result<Option<VolumeKey>> {
        let mut slot_key = Zeroizing::new(vec![0; self.key_bytes]);
        self.hash.pbkdf2(passphrase.bytes(), &slot.salt, slot.iterations, &mut slot_key);

        let stripes = usize::try_from(STRIPES).unwrap_or(0);
        let mut material = Zeroizing::new(vec![0; self.key_bytes * stripes]);
        let start = ByteLen::new(u64::from(slot.key_sector) * SECTOR_SIZE);
        source.read_exact(self.offset.saturating_add(start), &mut material, "a LUKS key slot")?;
        SectorCipher::with_key(self.cipher, &slot_key)?.decrypt(0, &mut material);

        let candidate = merge(self.hash, &material, self.key_bytes);
        let mut digest = [0; DIGEST_BYTES];
        self.hash.pbkdf2(&candidate, &self.digest_salt, self.digest_iterations, &mut digest);
        Ok((digest == self.digest).then(|| VolumeKey(candidate)))
    }
}

/// Puts a key together from its stripes (`AFmerge` of the specification): all but the last
/// are folded, each diffused by the hash.
fn merge(hash: Hash, stripes: &[u8], key_bytes: usize) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0u8; key_bytes]);
    let mut stripes = stripes.chunks_exact(key_bytes).peekable();
    while let Some(stripe) = stripes.next() {
        for (byte, with) in key.iter_mut().zip(stripe) {
            *byte ^= with;
        }
        if stripes.peek().is_some() {
            for (block, number) in key.chunks_mut(hash.digest_bytes()).zip(0u32..) {
                let digest = hash.digest(&[&number.to_be_bytes(), block]);
                let length = block.len();
                block.copy_from_slice(&digest[..length]);
            }
        }
    }
    key
}
