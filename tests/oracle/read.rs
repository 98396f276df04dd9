//! The library's own reading of a chain, in user space, beside qemu-img's copy.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use imgdm::chain::Chain;
use imgdm::crypt::Passphrase;
use imgdm::error::ErrorKind;
use imgdm::open::{OpenPolicy, open_chain};
use imgdm::read::{ChainReader, Ciphers, Content};
use imgdm::units::{GuestOffset, GuestRange};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use zeroize::Zeroizing;

use crate::check::{convert, strings};
use crate::common::images::scratch_dir;
use crate::common::patch::Patch;
use crate::common::process::Outcome;
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::imgdm::all_of;

/// Unlocks the layers whose ciphertext is to be seen, by their passphrases.
///
/// # Errors
/// A wrong key, or a damaged header.
pub(crate) fn unlock(chain: &Chain, keys: &BTreeMap<u32, Vec<u8>>) -> imgdm::Result<Ciphers> {
    let mut ciphers = Ciphers::new();
    for depth in chain.keys_needed(chain.whole())? {
        let layer = &chain.layers()[depth as usize];
        let header = layer.image.crypt_header()?.expect("an encrypted layer has a header");
        let key = Passphrase::new(Zeroizing::new(keys.get(&depth).cloned().unwrap_or_default()));
        ciphers.insert(depth, &header, &header.unlock(&layer.source, &key)?)?;
    }
    Ok(ciphers)
}

/// Bytes that are compared at a time.
const PIECE: u64 = 1 << 20;

/// A raw copy, with zeros past its end.
struct Copy(File);

impl Copy {
    /// The first piece from `start` to `end` that is not all zeros. Holes are passed over:
    /// some copies have TiBs of them.
    fn first_not_zero(&self, start: u64, end: u64) -> Outcome<Option<u64>> {
        let mut piece = vec![0; usize::try_from(PIECE).unwrap()];
        let zeros = piece.clone();
        let mut at = start;
        while at < end {
            match lseek(&self.0, i64::try_from(at).unwrap(), Whence::SeekData) {
                Ok(data) => at = data.unsigned_abs(),
                Err(Errno::ENXIO) => break,
                Err(errno) => return Err(errno.to_string()),
            }
            let length = usize::try_from(end.saturating_sub(at).min(PIECE)).unwrap();
            self.read(at, &mut piece[..length])?;
            if piece[..length] != zeros[..length] {
                return Ok(Some(at));
            }
            at += PIECE;
        }
        Ok(None)
    }

    fn read(&self, start: u64, buffer: &mut [u8]) -> Outcome {
        let mut done = 0;
        while done < buffer.len() {
            match self.0.read_at(&mut buffer[done..], start + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(error) => return Err(error.to_string()),
            }
        }
        buffer[done..].fill(0);
        Ok(())
    }
}

/// Compares what is read of a chain with a raw copy: a sweep over all of it, reads in
/// order, and reads anywhere.
///
/// # Errors
/// They differ, or a read fails.
pub(crate) fn compare(chain: &Chain, ciphers: &Ciphers, copy: &Path, rng: &mut Rng) -> Outcome {
    let fail = |error: imgdm::Error| format!("reading: {error}");
    let copy = Copy(File::open(copy).map_err(|error| error.to_string())?);
    let size = chain.virtual_size().get();
    let copied = copy.0.metadata().map_err(|error| error.to_string())?.len();
    if size != copied.next_multiple_of(512) {
        return Err(format!("the chain has {size} bytes, the copy {copied}"));
    }
    let start = if rng.percent(50) { 0 } else { rng.below(size.max(1)) };
    let range = GuestRange::new(GuestOffset::new(start), chain.whole().end);
    let (mut at, mut theirs, mut wrong) = (start, Vec::new(), None);
    let swept = chain.for_each_chunk(ciphers, range, |part, content| {
        assert_eq!(part.start.get(), at, "stretches follow on each other");
        at = part.end.get();
        let start = part.start.get();
        let same = match content {
            Content::Bytes(bytes) => {
                theirs.resize(bytes.len(), 0);
                copy.read(start, &mut theirs).map(|()| (bytes != theirs).then_some(start))
            }
            Content::Zeros => copy.first_not_zero(start, at),
        };
        match same {
            Ok(None) => {}
            Ok(Some(at)) => {
                wrong.get_or_insert(format!("the sweep differs from {at:#x} on"));
            }
            Err(error) => {
                wrong.get_or_insert(error);
            }
        }
        Ok(())
    });
    swept.map_err(fail)?;
    if let Some(wrong) = wrong {
        return Err(wrong);
    }
    if at != size.max(start) {
        return Err(format!("the sweep ends at {at:#x} of {size:#x}"));
    }
    let mut reader = ChainReader::new(chain, ciphers);
    let (mut ours, mut theirs, mut next) = (Vec::new(), Vec::new(), 0);
    for _ in 0..40 {
        let start = if rng.percent(50) { next } else { rng.below(size + 1) };
        let most = *rng.pick(&[16, 4096, 4096, 100_000, 3 << 20]);
        next = size.min(start + rng.below(most));
        let length = usize::try_from(next - start).unwrap();
        ours.resize(length, 0xaa);
        theirs.resize(length, 0);
        reader.read_at(GuestOffset::new(start), &mut ours).map_err(fail)?;
        copy.read(start, &mut theirs)?;
        if ours != theirs {
            return Err(format!("a read of {length} bytes at {start:#x} differs"));
        }
    }
    Ok(())
}

/// Compares an image that is not encrypted with a raw copy.
///
/// # Errors
/// They differ, or a read fails.
pub(crate) fn compare_image(
    dir: &Path,
    image: &str,
    policy: &OpenPolicy,
    copy: &str,
    rng: &mut Rng,
) -> Outcome {
    let opened =
        open_chain(&dir.join(image), &all_of(dir, policy)).map_err(|error| error.to_string())?;
    compare(&opened.chain, &Ciphers::new(), &dir.join(copy), rng)
}

/// Clusters past the end of a file that was cut off read as zeros, as in QEMU.
#[test]
fn what_a_cut_off_file_does_not_hold_reads_as_zeros() {
    let dir = scratch_dir("read").unwrap();
    let dir = dir.path();
    let mut rng = Rng::new(11);
    for (format, options) in [("qcow2", "cluster_size=4k"), ("qcow2", "cluster_size=64k")] {
        qemu::img(dir, &["create", "-q", "-f", format, "-o", options, "x", "1M"]).unwrap();
        qemu::io(dir, format, "x", &strings(&["write -P 7 0 1M"])).unwrap();
        let image = Patch::open(&dir.join("x")).unwrap();
        let length = image.length().unwrap();
        for cut in [1, 511, 512, 5000, 70_000, 300_001] {
            image.set_length(length - cut).unwrap();
            convert(dir, format, "x", "copy.raw").unwrap();
            let outcome = compare_image(dir, "x", &OpenPolicy::default(), "copy.raw", &mut rng);
            outcome.unwrap_or_else(|error| panic!("{options}, cut by {cut}: {error}"));
        }
    }
}

/// A sweep takes no time for what no file holds, however large.
#[test]
fn a_sweep_hands_out_zeros_without_making_them() {
    let dir = scratch_dir("read").unwrap();
    let dir = dir.path();
    qemu::img(dir, &["create", "-q", "-f", "qcow2", "x.qcow2", "16T"]).unwrap();
    qemu::io(dir, "qcow2", "x.qcow2", &strings(&["write -P 5 7T 100k"])).unwrap();
    let opened = open_chain(&dir.join("x.qcow2"), &OpenPolicy::default()).unwrap();
    let chain = &opened.chain;
    let (mut zeros, mut bytes) = (0, Vec::new());
    let swept = chain.for_each_chunk(&Ciphers::new(), chain.whole(), |range, content| {
        match content {
            Content::Zeros => zeros += range.length().get(),
            Content::Bytes(chunk) => bytes.extend_from_slice(chunk),
        }
        Ok(())
    });
    swept.unwrap();
    assert_eq!(zeros + bytes.len() as u64, 16 << 40);
    assert!(bytes[..100 << 10].iter().all(|&byte| byte == 5) && bytes.len() < 200 << 10);
}

#[test]
fn a_damaged_stream_is_an_error_with_its_place_and_the_rest_is_read() {
    for (method, format) in [("zlib", "qcow2"), ("zstd", "qcow2"), ("", "qcow")] {
        let dir = scratch_dir("read").unwrap();
        let dir = dir.path();
        let mut rng = Rng::new(12);
        let mut content = vec![0; 1 << 20];
        for piece in content.chunks_mut(4096) {
            rng.fill(&mut piece[..2000]);
        }
        fs::write(dir.join("content.raw"), &content).unwrap();
        let mut args = strings(&["convert", "-c", "-f", "raw", "-O", format]);
        if !method.is_empty() {
            args.extend(["-o".to_owned(), format!("compression_type={method}")]);
        }
        args.extend(strings(&["content.raw", "x"]));
        // QEMU 10 exits with 1 after it has made a whole qcow.
        qemu::img_any(dir, &args).unwrap();
        let map = imgdm_map(dir, "x");
        let row = &map[map.len() / 2];
        let number = |name: &str| row[name].as_u64().unwrap();
        let (start, host) = (number("start"), number("compressed-offset"));
        Patch::open(&dir.join("x")).unwrap().put(host, &[0xff; 64]).unwrap();

        let opened = open_chain(&dir.join("x"), &OpenPolicy::default()).unwrap();
        let (chain, ciphers) = (&opened.chain, Ciphers::new());
        let mut before = Vec::new();
        let error = chain
            .for_each_chunk(&ciphers, chain.whole(), |range, content| {
                assert_eq!(range.start.get(), before.len() as u64);
                match content {
                    Content::Bytes(bytes) => before.extend_from_slice(bytes),
                    Content::Zeros => panic!("it has no zeros"),
                }
                Ok(())
            })
            .unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidImage(_)), "{error}");
        assert_eq!(error.path(), Some(dir.join("x").as_path()));
        assert_eq!(error.offset(), Some(host));
        let said = error.to_string();
        assert!(said.contains(&format!("guest offset {start:#x}")), "{said}");
        assert!(said.contains("does not inflate"), "{said}");
        assert_eq!(before, content[..before.len()]);
        // Reads that do not touch it go on.
        let mut reader = ChainReader::new(chain, &ciphers);
        let mut bytes = vec![0; usize::try_from(start).unwrap()];
        reader.read_at(GuestOffset::ZERO, &mut bytes).unwrap();
        assert_eq!(bytes, content[..bytes.len()]);
        for offset in [start, start + 1, start + 511] {
            reader.read_at(GuestOffset::new(offset), &mut [0; 100]).unwrap_err();
        }
        let after = start + number("length");
        let mut bytes = vec![0; content.len() - usize::try_from(after).unwrap()];
        reader.read_at(GuestOffset::new(after), &mut bytes).unwrap();
        assert_eq!(bytes, content[usize::try_from(after).unwrap()..]);
    }
}

/// The rows of `imgdm map --output=json-full`.
fn imgdm_map(dir: &Path, image: &str) -> Vec<serde_json::Value> {
    let ran = crate::imgdm::imgdm(dir, &["map", "--output=json-full", image]).unwrap();
    serde_json::from_slice(&ran.ok().unwrap().stdout).unwrap()
}
