#![allow(clippy::cast_possible_truncation)]

use std::io::Write;

use flate2::Compression as Level;
use flate2::write::DeflateEncoder;
use proptest::prelude::*;

use super::*;

const CLUSTER: usize = 4096;

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Level::new(6));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that compress, but not to nothing.
fn text(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * i / 7 % 61) as u8).collect()
}

fn inflate(stream: &[u8]) -> Result<Vec<u8>, InflateFault> {
    let mut cluster = vec![0xaa; CLUSTER];
    Inflater::new().inflate(Compression::Zlib, stream, &mut cluster).map(|()| cluster)
}

#[test]
fn a_cluster_comes_back() {
    assert_eq!(inflate(&deflate(&text(CLUSTER))).unwrap(), text(CLUSTER));
}

#[test]
fn what_follows_the_end_of_a_stream_is_not_looked_at() {
    let mut stream = deflate(&text(CLUSTER));
    stream.extend([0xff; 512]);
    assert_eq!(inflate(&stream).unwrap(), text(CLUSTER));
}

#[test]
fn a_full_cluster_is_accepted_though_the_stream_goes_on() {
    // QEMU sees Z_BUF_ERROR and a full cluster.
    assert_eq!(inflate(&deflate(&text(CLUSTER + 1))).unwrap(), text(CLUSTER + 1)[..CLUSTER]);
    assert_eq!(inflate(&deflate(&vec![7; 64 << 20])).unwrap(), vec![7; CLUSTER]);
}

#[test]
fn a_distance_may_reach_further_back_than_the_window_that_qemu_names() {
    let mut far = vec![0; 32 << 10];
    for (i, byte) in far.iter_mut().enumerate() {
        *byte = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0];
    }
    let bytes = [far.clone(), far].concat();
    let mut cluster = vec![0; bytes.len()];
    Inflater::new().inflate(Compression::Zlib, &deflate(&bytes), &mut cluster).unwrap();
    assert_eq!(cluster, bytes);
}

#[test]
fn less_than_a_cluster_is_refused() {
    assert_eq!(inflate(&deflate(&text(CLUSTER - 1))), Err(InflateFault::TooShort));
    assert_eq!(inflate(&[]), Err(InflateFault::TooShort));
    let stream = deflate(&text(CLUSTER));
    assert_eq!(inflate(&stream[..stream.len() / 2]), Err(InflateFault::TooShort));
}

#[test]
fn zeros_past_the_end_of_the_file_are_no_stream() {
    assert_eq!(inflate(&[0; 512]), Err(InflateFault::Damaged));
}

#[test]
fn a_distance_to_before_the_cluster_is_refused_after_another_cluster_too() {
    let mut inflater = Inflater::new();
    let mut cluster = vec![0; CLUSTER];
    inflater.inflate(Compression::Zlib, &deflate(&text(CLUSTER)), &mut cluster).unwrap();
    // A final block of fixed codes: length 3 (code 257, 0000001), distance 1 (00000).
    let fault = inflater.inflate(Compression::Zlib, &[0x03, 0x02], &mut cluster);
    assert_eq!(fault, Err(InflateFault::Damaged));
}

#[cfg(feature = "device")]
mod zstd {
    use super::*;

    fn compress(bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![0; zstd_safe::compress_bound(bytes.len())];
        let length = zstd_safe::compress(&mut out[..], bytes, 3).unwrap();
        out.truncate(length);
        out
    }

    fn inflate(stream: &[u8]) -> Result<Vec<u8>, InflateFault> {
        let mut cluster = vec![0xaa; CLUSTER];
        Inflater::new().inflate(Compression::Zstd, stream, &mut cluster).map(|()| cluster)
    }

    /// A frame of raw blocks with a window of 2^`window_log` bytes and no content size.
    fn frame_of_raw_blocks(window_log: u8, blocks: &[(bool, &[u8])]) -> Vec<u8> {
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, (window_log - 10) << 3];
        for (last, bytes) in blocks {
            let header = u32::try_from(bytes.len()).unwrap() << 3 | u32::from(*last);
            frame.extend(&header.to_le_bytes()[..3]);
            frame.extend(*bytes);
        }
        frame
    }

    #[test]
    fn a_cluster_comes_back_whatever_follows_the_frame() {
        let mut stream = compress(&text(CLUSTER));
        assert_eq!(inflate(&stream).unwrap(), text(CLUSTER));
        stream.extend([0xff; 512]);
        assert_eq!(inflate(&stream).unwrap(), text(CLUSTER));
    }

    #[test]
    fn several_frames_make_a_cluster() {
        let bytes = text(CLUSTER);
        let stream = [compress(&bytes[..1000]), compress(&[]), compress(&bytes[1000..])].concat();
        assert_eq!(inflate(&stream).unwrap(), bytes);
    }

    #[test]
    fn a_frame_must_end_where_the_cluster_is_full() {
        assert!(inflate(&compress(&text(CLUSTER + 1))).is_err());
        assert!(inflate(&compress(&vec![7; 64 << 20])).is_err());
        let (half, rest) = (&[1; CLUSTER / 2][..], &[2; CLUSTER / 2][..]);
        let open = frame_of_raw_blocks(12, &[(false, half), (false, rest)]);
        assert_eq!(inflate(&open), Err(InflateFault::TooLong));
        let closed = frame_of_raw_blocks(12, &[(false, half), (false, rest), (true, &[])]);
        assert_eq!(inflate(&closed).unwrap(), [half, rest].concat());
    }

    #[test]
    fn less_than_a_cluster_is_refused() {
        assert_eq!(inflate(&compress(&text(CLUSTER - 1))), Err(InflateFault::TooShort));
        assert_eq!(inflate(&[]), Err(InflateFault::TooShort));
        let stream = compress(&text(CLUSTER));
        assert_eq!(inflate(&stream[..stream.len() - 1]), Err(InflateFault::TooShort));
    }

    #[test]
    fn a_huge_window_is_accepted_up_to_qemus_limit_and_takes_no_memory() {
        let bytes = text(CLUSTER);
        let mut inflater = Inflater::new();
        let mut cluster = vec![0; CLUSTER];
        let frame = frame_of_raw_blocks(27, &[(true, &bytes)]);
        inflater.inflate(Compression::Zstd, &frame, &mut cluster).unwrap();
        assert_eq!(cluster, bytes);
        assert!(inflater.zstd.as_ref().unwrap().size() < 1 << 20);
        let frame = frame_of_raw_blocks(28, &[(true, &bytes)]);
        let fault = inflater.inflate(Compression::Zstd, &frame, &mut cluster);
        assert_eq!(fault, Err(InflateFault::Damaged));
        // And the decoder works on.
        inflater.inflate(Compression::Zstd, &compress(&bytes), &mut cluster).unwrap();
    }

    proptest! {
        #[test]
        fn no_stream_makes_it_panic(
            stream in prop::collection::vec(any::<u8>(), 0..2000),
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let _ = inflate(&stream);
            let _ = inflate(&[&[0x28, 0xb5, 0x2f, 0xfd], &stream[..]].concat());
            let mut damaged = compress(&text(CLUSTER));
            for (at, byte) in flips {
                let at = at.index(damaged.len());
                damaged[at] ^= byte;
            }
            let _ = inflate(&damaged);
        }
    }
}

#[cfg(not(feature = "device"))]
#[test]
fn without_zstd_that_is_said() {
    let fault = Inflater::new().inflate(Compression::Zstd, &[], &mut [0; CLUSTER]);
    assert_eq!(fault, Err(InflateFault::NoZstd));
}

proptest! {
    #[test]
    fn what_was_deflated_comes_back(
        bytes in prop::collection::vec(0u8..4, CLUSTER),
        more in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        prop_assert_eq!(inflate(&[deflate(&bytes), more].concat()).unwrap(), bytes);
    }

    #[test]
    fn no_stream_makes_it_panic(stream in prop::collection::vec(any::<u8>(), 0..2000)) {
        let _ = inflate(&stream);
    }
}
