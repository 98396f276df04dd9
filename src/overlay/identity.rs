//! What ties a store to its image, and tells that it is another or has changed.
//!
//! A store is worth as much as the data that were written to it, so it must neither be laid
//! over another disk nor be refused for nothing. Of each file of the chain it knows the
//! length, the time of the last modification, and a hash of bytes from all over the file.
//! Inode number and inode time are left out: a new name, owner or mode, a hard link, a backup
//! or a copy that keeps the times (`cp -p`, `rsync -t`) change those and not the content.
//! Nor is the path compared: it is there for messages. A block device has no time: its size
//! and more bytes of it have to do.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::header::{Reader, push_bytes};
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result, printable};
use crate::source::Source;
use crate::status::FileRole;
use crate::units::HostOffset;

/// Bytes that are hashed from the start: headers, partition tables, most L1 tables.
const HEAD: u64 = 256 << 10;
/// Bytes that are hashed from the end.
const TAIL: u64 = 64 << 10;
/// Bytes of a sample between them.
const SAMPLE: u64 = 4 << 10;
/// How many of those; of a block device, where nothing else tells that it was written.
const FILE_SAMPLES: u64 = 16;
const DEVICE_SAMPLES: u64 = 256;

/// A BLAKE3 hash.
pub(super) type Digest = [u8; 32];

/// What a file of the chain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreFileKind {
    /// A regular file, last modified then: seconds since 1970 and nanoseconds.
    File {
        /// The time.
        modified: (i64, i64),
    },
    /// A block device.
    BlockDevice,
}

/// A file of the chain that a store lies over, as it was when the store was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreFile {
    /// Depth of its layer.
    pub layer: u32,
    /// Which of the layer's files.
    pub role: FileRole,
    /// The layer's format.
    pub format: String,
    /// Where it was, absolute.
    pub path: PathBuf,
    /// What it was.
    pub kind: StoreFileKind,
    /// Its length in bytes.
    pub length: u64,
    /// Hash of bytes from all over it.
    pub(super) samples: Digest,
}

impl StoreFile {
    /// All files of a chain, as they are now.
    ///
    /// # Errors
    /// One of them can't be looked at or read.
    pub fn of_chain(chain: &Chain) -> Result<Vec<Self>> {
        let mut files = Vec::new();
        for (layer, depth) in chain.layers().iter().zip(0u32..) {
            for (role, source) in layer.files() {
                files.push(Self::of(source, depth, role, layer.image.format().name())?);
            }
        }
        Ok(files)
    }

    pub(super) fn of(source: &Source, layer: u32, role: FileRole, format: &str) -> Result<Self> {
        let kind = match source.stamp()? {
            Some(stamp) => StoreFileKind::File { modified: stamp.modified },
            None => StoreFileKind::BlockDevice,
        };
        let path = std::fs::canonicalize(source.path()).unwrap_or_else(|_| source.absolute_path());
        Ok(Self {
            layer,
            role,
            format: format.to_owned(),
            path,
            kind,
            length: source.length().get(),
            samples: samples_of(source, kind)?,
        })
    }

    /// When a regular file was last modified.
    pub(super) fn modified(&self) -> Option<(i64, i64)> {
        match self.kind {
            StoreFileKind::File { modified } => Some(modified),
            StoreFileKind::BlockDevice => None,
        }
    }

    /// In what respect `now`, a file at the same place of a chain, is another; `None` where it
    /// is the same.
    pub fn difference(&self, now: &Self) -> Option<String> {
        use StoreFileKind::{BlockDevice, File};
        if self.format != now.format {
            let (then, now) = (printable(&self.format), printable(&now.format));
            return Some(format!("its format was {then} and is {now}"));
        }
        match (self.kind, now.kind) {
            (File { .. }, BlockDevice) => {
                return Some("it was a file and is a block device".into());
            }
            (BlockDevice, File { .. }) => {
                return Some("it was a block device and is a file".into());
            }
            _ => {}
        }
        if self.length != now.length {
            return Some(format!("it was {} bytes long and is {}", self.length, now.length));
        }
        if self.samples != now.samples {
            return Some("its content is another".to_owned());
        }
        match (self.kind, now.kind) {
            (File { modified: then }, File { modified: now }) if !is_same_time(then, now) => {
                Some("it was written to since (its modification time is another)".to_owned())
            }
            _ => None,
        }
    }

    /// Appends it to a header.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let role = match self.role {
            FileRole::Image => 0u32,
            FileRole::DataFile => 1,
        };
        let (kind, seconds, nanoseconds) = match self.kind {
            StoreFileKind::File { modified: (seconds, nanoseconds) } => {
                (0u32, seconds, nanoseconds)
            }
            StoreFileKind::BlockDevice => (1, 0, 0),
        };
        for number in [self.layer, role, kind] {
            out.extend(number.to_le_bytes());
        }
        out.extend(self.length.to_le_bytes());
        out.extend(seconds.to_le_bytes());
        out.extend(nanoseconds.to_le_bytes());
        out.extend(self.samples);
        push_bytes(out, self.format.as_bytes());
        push_bytes(out, self.path.as_os_str().as_bytes());
    }

    /// Reads what [`write`](Self::write) wrote; `None` where it is not that.
    pub(super) fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let layer = reader.u32()?;
        let role = match reader.u32()? {
            0 => FileRole::Image,
            1 => FileRole::DataFile,
            _ => return None,
        };
        let kind = reader.u32()?;
        let length = reader.u64()?;
        let modified = (reader.u64()?.cast_signed(), reader.u64()?.cast_signed());
        let kind = match kind {
            0 => StoreFileKind::File { modified },
            1 => StoreFileKind::BlockDevice,
            _ => return None,
        };
        let samples = *reader.array()?;
        let format = reader.text()?;
        let path = PathBuf::from(std::ffi::OsString::from_vec(reader.bytes()?.to_vec()));
        Some(Self { layer, role, format, path, kind, length, samples })
    }
}

/// Whether two times are one: copies and file systems may keep whole seconds only.
fn is_same_time(a: (i64, i64), b: (i64, i64)) -> bool {
    a.0 == b.0 && (a.1 == b.1 || a.1 == 0 || b.1 == 0)
}

/// Where bytes of a file of this length are looked at, in order: offsets and lengths.
fn sample_places(length: u64, samples: u64) -> Vec<(u64, u64)> {
    let head = length.min(HEAD);
    let mut places = vec![(0, head)];
    let tail = length.saturating_sub(TAIL).max(head);
    let between = tail - head;
    // As many as fit side by side, at whole multiples of their length.
    let count = samples.min(between / SAMPLE);
    for index in 0..count {
        let at = u128::from(between) * u128::from(index) / u128::from(count);
        let at = u64::try_from(at).unwrap_or(0) / SAMPLE * SAMPLE;
        places.push((head + at, SAMPLE.min(tail - head - at)));
    }
    places.push((tail, length - tail));
    places
}

fn samples_of(source: &Source, kind: StoreFileKind) -> Result<Digest> {
    let samples = match kind {
        StoreFileKind::File { .. } => FILE_SAMPLES,
        StoreFileKind::BlockDevice => DEVICE_SAMPLES,
    };
    let mut hash = blake3::Hasher::new();
    let mut buffer = Vec::new();
    for (at, length) in sample_places(source.length().get(), samples) {
        buffer.resize(usize::try_from(length).unwrap_or(0), 0);
        source.read_with_zeros(HostOffset::new(at), &mut buffer)?;
        hash.update(&buffer);
    }
    Ok(*hash.finalize().as_bytes())
}

/// Compares the files of a chain with those that a store was made over.
///
/// # Errors
/// `InvalidImage`, naming the first file that is another, and how.
pub(super) fn check_files(then: &[StoreFile], now: &[StoreFile]) -> Result<()> {
    if then.len() != now.len()
        || then.iter().zip(now).any(|(a, b)| (a.layer, a.role) != (b.layer, b.role))
    {
        let first = then.first().map_or(Path::new(""), |file| &file.path);
        return Err(Error::new(ErrorKind::InvalidImage(format!(
            "it is the store of another image: of {}, whose chain had {} files and not {}",
            printable(&first.to_string_lossy()),
            then.len(),
            now.len()
        ))));
    }
    for (then, now) in then.iter().zip(now) {
        let Some(how) = then.difference(now) else { continue };
        let (was, is) = (then.path.to_string_lossy(), now.path.to_string_lossy());
        let what = if was == is {
            format!("it is the store of an image that was changed since: {}: {how}", printable(&is))
        } else {
            format!(
                "it is the store of another image: of {} and not {}: {how}",
                printable(&was),
                printable(&is)
            )
        };
        return Err(Error::new(ErrorKind::InvalidImage(what)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_lie_in_the_file_and_in_order() {
        for length in
            [0, 1, 511, HEAD, HEAD + 1, HEAD + TAIL, HEAD + TAIL + 5000, 10 << 20, 1 << 62]
        {
            for samples in [FILE_SAMPLES, DEVICE_SAMPLES] {
                let places = sample_places(length, samples);
                let mut end = 0;
                for (at, bytes) in places {
                    assert!(at >= end, "{length}");
                    end = at + bytes;
                }
                assert_eq!(end, length);
            }
        }
        assert_eq!(sample_places(1 << 40, FILE_SAMPLES).len(), 18);
    }

    #[test]
    fn a_copy_that_keeps_its_time_is_the_same_and_a_write_makes_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.raw");
        std::fs::write(&path, vec![7; 3 << 20]).unwrap();
        let look = |path: &Path| {
            StoreFile::of(&Source::open(path).unwrap(), 0, FileRole::Image, "raw").unwrap()
        };
        let then = look(&path);
        assert_eq!(then.difference(&look(&path)), None);
        // Mode and names are not content.
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o400);
        std::fs::set_permissions(&path, permissions).unwrap();
        let copy = dir.path().join("b.raw");
        std::fs::copy(&path, &copy).unwrap();
        let copied = std::fs::File::open(&copy).unwrap();
        let time = std::fs::metadata(&path).unwrap().modified().unwrap();
        copied.set_modified(time).unwrap();
        assert_eq!(then.difference(&look(&copy)), None);
        // To whole seconds, as some copies are.
        let whole = time.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        copied.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(whole)).unwrap();
        assert_eq!(then.difference(&look(&copy)), None);
        copied
            .set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(whole + 1))
            .unwrap();
        let said = then.difference(&look(&copy)).unwrap();
        assert!(said.contains("written to since"), "{said}");
        std::fs::write(&copy, vec![7; 3 << 19]).unwrap();
        assert!(then.difference(&look(&copy)).unwrap().contains("bytes long"));
        std::fs::write(&copy, vec![8; 3 << 20]).unwrap();
        assert!(then.difference(&look(&copy)).unwrap().contains("content is another"));
    }
}
