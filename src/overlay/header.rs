//! The header of a store: our own, before dm-snapshot's part.
//!
//! Little-endian, with a checksum, written once when the store is made. What is read is
//! checked as a stranger's would be.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::identity::{Digest, StoreFile, check_files};
use super::persistent::{PersistentHeader, length_for};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::scratch::OnError;
use crate::units::{ByteLen, Sectors};

/// Where dm-snapshot's part starts, in bytes; before it there is room for our header.
pub const STORE_OFFSET: u64 = 1 << 20;

const MAGIC: [u8; 16] = *b"imgdm overlay\r\n\0";
const VERSION: u32 = 1;

/// The options by the numbers that stand for them.
const ON_ERRORS: [OnError; 3] = [OnError::Refuse, OnError::Zero, OnError::ErrorTarget];

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 16],
    version: U32,
    /// Bytes of all of the header: this and what follows.
    length: U32,
    /// Of all of it but this field.
    digest: Digest,
    disk_sectors: U64,
    store_length: U64,
    chunk_sectors: U32,
    on_error: U32,
    has_snapshot: U32,
    files: U32,
}

/// Bytes of the header without what follows: enough to know how long it is.
pub const FIXED_LENGTH: usize = size_of::<RawHeader>();
/// Where the digest lies in it.
const DIGEST: std::ops::Range<usize> = 24..56;

/// A snapshot of the image that a store lies over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreSnapshot {
    /// Its ID.
    pub id: String,
    /// Its name.
    pub name: String,
}

/// What a store says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreHeader {
    /// Size of the disk.
    pub disk: Sectors,
    /// Bytes of dm-snapshot's part when the store was made. It may have grown since.
    pub length: ByteLen,
    /// Size of dm-snapshot's chunks.
    pub chunk: Sectors,
    /// What clusters that can't be read are served as: that is part of the content.
    pub on_error: OnError,
    /// The snapshot of the image that is meant; none for the active layer.
    pub snapshot: Option<StoreSnapshot>,
    /// The files of the chain, the active layer's first.
    pub files: Vec<StoreFile>,
}

impl StoreHeader {
    /// As it is written at the start of a store.
    ///
    /// # Errors
    /// It does not fit: a chain with very many or very long names.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let too_long = || {
            Error::new(ErrorKind::NotRepresentable(format!(
                "the names of the chain's {} files don't fit in the store's header",
                self.files.len()
            )))
        };
        let on_error = (0u32..).zip(ON_ERRORS).find(|(_, each)| *each == self.on_error);
        let mut raw = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            length: U32::ZERO,
            digest: Digest::default(),
            disk_sectors: self.disk.get().into(),
            store_length: self.length.get().into(),
            chunk_sectors: u32::try_from(self.chunk.get()).map_err(|_| too_long())?.into(),
            on_error: on_error.map_or(0, |(number, _)| number).into(),
            has_snapshot: u32::from(self.snapshot.is_some()).into(),
            files: u32::try_from(self.files.len()).map_err(|_| too_long())?.into(),
        };
        let mut rest = Vec::new();
        if let Some(snapshot) = &self.snapshot {
            push_bytes(&mut rest, snapshot.id.as_bytes());
            push_bytes(&mut rest, snapshot.name.as_bytes());
        }
        self.files.iter().for_each(|file| file.write(&mut rest));
        let length = FIXED_LENGTH.saturating_add(rest.len());
        if length as u64 > STORE_OFFSET {
            return Err(too_long());
        }
        raw.length = u32::try_from(length).map_err(|_| too_long())?.into();
        let mut bytes = raw.as_bytes().to_vec();
        bytes.extend(rest);
        let digest = digest(&bytes);
        bytes[DIGEST].copy_from_slice(&digest);
        Ok(bytes)
    }

    /// How long the header is whose first bytes these are.
    ///
    /// # Errors
    /// `CannotCreate` where it is no store at all; `InvalidImage` or `Unsupported` where it is
    /// a damaged one or one of another version.
    pub fn length_of(first: &[u8; FIXED_LENGTH]) -> Result<usize> {
        let raw = RawHeader::ref_from_bytes(first).map_err(|_| not_a_store())?;
        if raw.magic != MAGIC {
            return Err(not_a_store());
        }
        if raw.version.get() != VERSION {
            return Err(Error::new(ErrorKind::Unsupported(format!(
                "it is a store of version {}, and this imgdm knows {VERSION}",
                raw.version.get()
            ))));
        }
        let length = raw.length.get();
        match usize::try_from(length) {
            Ok(bytes) if bytes >= FIXED_LENGTH && u64::from(length) <= STORE_OFFSET => Ok(bytes),
            _ => Err(damaged()),
        }
    }

    /// Reads a whole header, as long as [`length_of`](Self::length_of) says.
    ///
    /// # Errors
    /// As that.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let first = bytes.first_chunk().ok_or_else(not_a_store)?;
        if Self::length_of(first)? != bytes.len() {
            return Err(damaged());
        }
        let raw = RawHeader::ref_from_bytes(first).map_err(|_| not_a_store())?;
        if raw.digest != digest(bytes) {
            return Err(damaged());
        }
        let mut reader = Reader(bytes.get(FIXED_LENGTH..).unwrap_or(&[]));
        let mut read = || -> Option<Self> {
            let snapshot = match raw.has_snapshot.get() {
                0 => None,
                _ => Some(StoreSnapshot { id: reader.text()?, name: reader.text()? }),
            };
            let mut files = Vec::new();
            for _ in 0..raw.files.get() {
                files.push(StoreFile::read(&mut reader)?);
            }
            let on_error = *ON_ERRORS.get(usize::try_from(raw.on_error.get()).ok()?)?;
            let header = Self {
                disk: Sectors::new(raw.disk_sectors.get()),
                length: ByteLen::new(raw.store_length.get()),
                chunk: Sectors::new(u64::from(raw.chunk_sectors.get())),
                on_error,
                snapshot,
                files,
            };
            (reader.0.is_empty() && length_for(header.disk, header.chunk).is_some())
                .then_some(header)
        };
        read().ok_or_else(damaged)
    }

    /// Checks that it is the store of this disk, as the image is `now`.
    ///
    /// # Errors
    /// `InvalidImage`, with what is another, and of which file.
    pub fn check(&self, now: &Self) -> Result<()> {
        check_files(&self.files, &now.files)?;
        let refuse = |what: String| Err(Error::invalid(what));
        if self.snapshot != now.snapshot {
            let name = |snapshot: &Option<StoreSnapshot>| match snapshot {
                None => "the active layer".to_owned(),
                Some(snapshot) => {
                    let (name, id) = (printable(&snapshot.name), printable(&snapshot.id));
                    format!("the snapshot '{name}' (ID {id})")
                }
            };
            let (then, now) = (name(&self.snapshot), name(&now.snapshot));
            return refuse(format!("it is a store of {then} of the image, and not of {now}"));
        }
        if self.on_error != now.on_error {
            let name = |on_error| match on_error {
                OnError::Refuse => "refuse",
                OnError::Zero => "zero",
                OnError::ErrorTarget => "error-target",
            };
            let (then, now) = (name(self.on_error), name(now.on_error));
            return refuse(format!("it was made with --on-error={then}, and not {now}"));
        }
        if self.disk != now.disk {
            let (then, now) = (self.disk, now.disk);
            return refuse(format!("the disk had {then} sectors when it was made, and has {now}"));
        }
        Ok(())
    }

    /// Checks dm-snapshot's part against it, which is so long now.
    ///
    /// # Errors
    /// `InvalidImage`: the store is cut off, damaged, or the kernel gave it up.
    pub fn check_persistent(&self, header: &PersistentHeader, length: ByteLen) -> Result<()> {
        if length < self.length {
            return Err(Error::invalid(format!(
                "the store is cut off: dm-snapshot's part has {} bytes of {}",
                length.get(),
                self.length.get()
            )));
        }
        if header.chunk != self.chunk {
            return Err(Error::invalid(format!(
                "dm-snapshot's part has chunks of {} sectors and not {}: it is damaged",
                header.chunk, self.chunk
            )));
        }
        if !header.valid {
            return Err(Error::invalid(
                "the kernel has given the store up (it was full, or could not be written): what was changed is lost; remove the file, the image is unhurt",
            ));
        }
        Ok(())
    }
}

fn not_a_store() -> Error {
    Error::new(ErrorKind::CannotCreate(
        "there is a file that is no store of imgdm: it is left alone; choose another".to_owned(),
    ))
}

fn damaged() -> Error {
    Error::invalid("the header of the store is damaged")
}

/// Hash of a header but for its own field.
fn digest(bytes: &[u8]) -> Digest {
    let mut hash = blake3::Hasher::new();
    for part in [bytes.get(..DIGEST.start), bytes.get(DIGEST.end..)] {
        hash.update(part.unwrap_or(&[]));
    }
    *hash.finalize().as_bytes()
}

/// Appends bytes with their length before them.
pub(super) fn push_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u64).to_le_bytes());
    out.extend(bytes);
}

/// What is left to be read of a header.
pub(super) struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    pub(super) fn array<const N: usize>(&mut self) -> Option<&'b [u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(first)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().copied().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().copied().map(u64::from_le_bytes)
    }

    pub(super) fn bytes(&mut self) -> Option<&'b [u8]> {
        let length = usize::try_from(self.u64()?).ok()?;
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes)
    }

    pub(super) fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?.to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::super::identity::StoreFileKind;
    use super::*;
    use crate::status::FileRole;

    fn header() -> StoreHeader {
        let file = |layer, role, kind, path: &str| StoreFile {
            layer,
            role,
            format: "qcow2".to_owned(),
            path: PathBuf::from(path),
            kind,
            length: 1 << 20,
            samples: [3; 32],
        };
        let modified = (-5, 7);
        StoreHeader {
            disk: Sectors::new(2048),
            length: ByteLen::new(1 << 20),
            chunk: Sectors::new(32),
            on_error: OnError::Zero,
            snapshot: Some(StoreSnapshot { id: "1".to_owned(), name: "before".to_owned() }),
            files: vec![
                file(0, FileRole::Image, StoreFileKind::File { modified }, "/a/disk.qcow2"),
                file(0, FileRole::DataFile, StoreFileKind::BlockDevice, "/dev/vg/lv"),
            ],
        }
    }

    #[test]
    fn a_header_reads_back_and_is_the_store_of_its_disk() {
        for header in [header(), StoreHeader { snapshot: None, ..header() }] {
            let bytes = header.to_bytes().unwrap();
            assert_eq!(StoreHeader::length_of(bytes.first_chunk().unwrap()).unwrap(), bytes.len());
            assert_eq!(StoreHeader::parse(&bytes).unwrap(), header);
            header.check(&header).unwrap();
        }
    }

    #[test]
    fn every_damaged_byte_is_seen() {
        let good = header().to_bytes().unwrap();
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0x10;
            assert!(StoreHeader::parse(&bytes).is_err(), "{at}");
        }
        assert!(StoreHeader::parse(&good[..good.len() - 1]).is_err());
        assert!(StoreHeader::parse(&[]).is_err());
    }

    #[test]
    fn another_file_and_another_version_are_told_apart() {
        let mut bytes = header().to_bytes().unwrap();
        bytes[16] = 2;
        let error = StoreHeader::parse(&bytes).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Unsupported(_)), "{error}");
        assert!(error.to_string().contains("version 2"), "{error}");
        let error = StoreHeader::parse(&[0; 4096]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)), "{error}");
    }

    #[test]
    fn what_is_another_is_said() {
        let then = header();
        let said = |change: &dyn Fn(&mut StoreHeader)| {
            let mut now = header();
            change(&mut now);
            then.check(&now).unwrap_err().to_string()
        };
        type Case<'c> = (&'c dyn Fn(&mut StoreHeader), &'c str);
        let cases: [Case<'_>; 7] = [
            (
                &|h| h.snapshot = None,
                "the snapshot 'before' (ID 1) of the image, and not of the active",
            ),
            (&|h| h.on_error = OnError::Refuse, "--on-error=zero, and not refuse"),
            (&|h| h.disk = Sectors::new(4096), "2048 sectors when it was made, and has 4096"),
            (&|h| h.files[0].length = 7, "changed since: /a/disk.qcow2: it was 1048576 bytes"),
            (&|h| h.files[1].samples = [4; 32], "/dev/vg/lv: its content is another"),
            (&|h| drop(h.files.pop()), "another image: of /a/disk.qcow2, whose chain had 2 files"),
            (
                &|h| {
                    h.files[0].path = "/b".into();
                    h.files[0].length = 7;
                },
                "another image: of /a/disk.qcow2 and not /b",
            ),
        ];
        for (change, wanted) in cases {
            let said = said(change);
            assert!(said.contains(wanted), "{said}");
        }
        // Where the image lies now is no matter.
        let mut moved = header();
        moved.files[0].path = "/elsewhere".into();
        then.check(&moved).unwrap();
    }

    #[test]
    fn a_store_that_is_cut_off_or_given_up_is_refused() {
        let header = header();
        let persistent = PersistentHeader { chunk: header.chunk, valid: true };
        header.check_persistent(&persistent, header.length).unwrap();
        header.check_persistent(&persistent, ByteLen::new(1 << 30)).unwrap();
        for (persistent, length, wanted) in [
            (persistent, ByteLen::new(5), "cut off"),
            (PersistentHeader { valid: false, ..persistent }, header.length, "given the store up"),
            (PersistentHeader { chunk: Sectors::new(8), ..persistent }, header.length, "damaged"),
        ] {
            let error = header.check_persistent(&persistent, length).unwrap_err();
            assert!(error.to_string().contains(wanted), "{error}");
        }
    }

    #[test]
    fn names_that_do_not_fit_are_said() {
        let mut header = header();
        header.files[0].path = "/x".repeat(1 << 19).into();
        assert!(header.to_bytes().unwrap_err().to_string().contains("don't fit"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(rest in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = header().to_bytes().unwrap();
            bytes.truncate(FIXED_LENGTH);
            bytes.extend(rest);
            let length = u32::try_from(bytes.len()).unwrap();
            bytes[20..24].copy_from_slice(&length.to_le_bytes());
            let digest = digest(&bytes);
            bytes[DIGEST].copy_from_slice(&digest);
            let _ = StoreHeader::parse(&bytes);
        }
    }
}
