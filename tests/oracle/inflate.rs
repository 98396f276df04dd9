//! The library's scratch file beside qemu-img: what each compressed cluster inflates to,
//! and which streams are accepted at all.

#![allow(clippy::cast_possible_truncation)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ::imgdm::chain::Chain;
use ::imgdm::format::Format;
use ::imgdm::format::qcow2::SnapshotSelector;
use ::imgdm::open::{OpenPolicy, open_chain};
use ::imgdm::scratch::{
    FillOptions, Filled, OnError, ScratchContent, ScratchJob, ScratchPlace, ScratchWork, fill,
};
use ::imgdm::units::ByteLen;

use crate::check::{convert, snapshots, strings};
use crate::common::chain_work::ChainWork;
use crate::common::images::{MIXED, Recipe, Theme, scratch_dir};
use crate::common::patch::copy;
use crate::common::process::Outcome;
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::imgdm::all_of;
use crate::random::run_theme;

fn open(dir: &Path, image: &str, format: &str, snapshot: Option<&str>) -> Outcome<Chain> {
    let policy = OpenPolicy {
        format: Some(format.parse::<Format>().map_err(|error| error.to_string())?),
        snapshot: snapshot
            .map(|id| SnapshotSelector::Exact { id: Some(id.to_owned()), name: None }),
        probe_backing: true,
        ..OpenPolicy::default()
    };
    let opened =
        open_chain(&dir.join(image), &all_of(dir, &policy)).map_err(|error| error.to_string())?;
    Ok(opened.chain)
}

fn jobs_of(chain: &Chain) -> Outcome<Vec<ScratchJob>> {
    let mut jobs = Vec::new();
    let collected = ChainWork(chain).for_each_window(&mut |window| {
        jobs.extend_from_slice(window);
        Ok(())
    });
    collected.map_err(|error| error.to_string())?;
    Ok(jobs)
}

/// Fills a scratch file of a whole chain.
fn filled(dir: &Path, chain: &Chain, on_error: OnError) -> ::imgdm::Result<(File, Filled)> {
    let file = ScratchPlace::choose(Some(dir))?.create()?;
    let mut options = FillOptions::new(dir, on_error);
    options.shortest_zero_run = ByteLen::new(64 << 10);
    let filled = fill(chain, &ChainWork(chain), &file.writer, &options, &|_| Ok(()))?;
    Ok((file.reader, filled))
}

/// Fails where a piece of the scratch file is unlike the same range of `expected`.
fn same_pieces(jobs: &[ScratchJob], scratch: &File, expected: &Path) -> Outcome {
    let expected = File::open(expected).map_err(|error| error.to_string())?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for job in jobs {
        let length = usize::try_from(job.length).map_err(|error| error.to_string())?;
        for (bytes, file, at) in
            [(&mut ours, scratch, job.at), (&mut theirs, &expected, job.guest.get())]
        {
            bytes.resize(length, 0);
            file.read_exact_at(bytes, at).map_err(|error| format!("{job:?}: {error}"))?;
        }
        if ours != theirs {
            return Err(format!("the piece differs: {job:?}"));
        }
    }
    Ok(())
}

/// Compares the pieces of an image, or of one of its snapshots, with qemu-img's copy; says
/// how many there are.
fn check(dir: &Path, image: &str, format: &str, snapshot: Option<&str>) -> Outcome<usize> {
    let chain = open(dir, image, format, snapshot)?;
    let jobs = jobs_of(&chain)?;
    match snapshot {
        None => convert(dir, format, image, "copy.raw")?,
        Some(id) => {
            // Beside the image, so that its backing file is found.
            let applied = format!("{image}.applied");
            copy(&dir.join(image), &dir.join(&applied))?;
            qemu::img(dir, &["snapshot", "-a", id, &applied])?;
            convert(dir, format, &applied, "copy.raw")?;
        }
    }
    let (scratch, done) =
        filled(dir, &chain, OnError::Refuse).map_err(|error| error.to_string())?;
    same_pieces(&jobs, &scratch, &dir.join("copy.raw"))?;
    let converted = File::open(dir.join("copy.raw")).map_err(|error| error.to_string())?;
    for run in &done.zero_runs {
        let mut bytes = vec![1; usize::try_from(run.length().get()).unwrap_or(0)];
        converted.read_exact_at(&mut bytes, run.start.get()).map_err(|error| error.to_string())?;
        if bytes.iter().any(|&byte| byte != 0) {
            return Err(format!("not all zeros: {run:?}"));
        }
    }
    Ok(jobs.len())
}

/// Makes an image of content.raw.
fn compress(dir: &Path, format: &str, options: &str, image: &str) -> Outcome {
    let mut args = vec!["convert", "-c", "-f", "raw", "-O", format];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend(["content.raw", image]);
    let ran = qemu::img_any(dir, &args)?;
    // QEMU 10 exits with 1 after it has made a whole qcow, and says nothing.
    if format == "qcow" && ran.stderr.is_empty() { Ok(()) } else { ran.ok().map(drop) }
}

/// Content of which some compresses well, some badly, some not, and some is zeros.
fn content(length: usize, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        let mut piece = vec![0; usize::try_from(rng.range(1, 40_000)).unwrap_or(1)];
        match rng.below(5) {
            0 => {}
            1 => rng.fill(&mut piece),
            2 => piece.fill(rng.below(256) as u8),
            3 => piece.iter_mut().for_each(|byte| *byte = b"etaoin shr"[rng.below(10) as usize]),
            _ => {
                let line = format!("{:x} and so on\n", rng.next());
                piece.iter_mut().zip(line.bytes().cycle()).for_each(|(byte, c)| *byte = c);
            }
        }
        bytes.extend(piece);
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn every_cluster_size_and_method() {
    let dir = scratch_dir("inflate").unwrap();
    let mut rng = Rng::new(1);
    // The last cluster is cut off by the end of the disk.
    fs::write(dir.path().join("content.raw"), content((8 << 20) - 1536, &mut rng)).unwrap();
    let run = |options: &str, format: &'static str| {
        compress(dir.path(), format, options, "x.img").unwrap();
        let count = check(dir.path(), "x.img", format, None);
        assert!(count.clone().unwrap() > 2, "{options}: {count:?}");
    };
    for method in ["zlib", "zstd"] {
        for bits in 9..=21 {
            run(&format!("cluster_size={},compression_type={method}", 1 << bits), "qcow2");
        }
        for bits in [14, 16, 21] {
            let size = 1 << bits;
            let options = format!("extended_l2=on,cluster_size={size},compression_type={method}");
            run(&options, "qcow2");
        }
    }
    run("compat=0.10", "qcow2");
    run("", "qcow");
}

#[test]
fn compressed_over_compressed_over_raw() {
    let dir = scratch_dir("inflate").unwrap();
    let mut rng = Rng::new(2);
    let size = 4 << 20;
    fs::write(dir.path().join("base.raw"), content(size, &mut rng)).unwrap();
    let text = size.to_string();
    let layers = [
        ("low.qcow2", "2M", "zlib", "base.raw", "raw"),
        ("top.qcow2", "8k", "zstd", "low.qcow2", "qcow2"),
    ];
    for (file, cluster, method, below, below_format) in layers {
        let options = format!("cluster_size={cluster},compression_type={method}");
        let args = ["create", "-q", "-f", "qcow2", "-o", &options, "-b", below, "-F", below_format];
        qemu::img(dir.path(), &[&args[..], &[file, &text]].concat()).unwrap();
    }
    let write = |file: &str, commands: &[&str]| {
        qemu::io(dir.path(), "qcow2", file, &strings(commands)).unwrap();
    };
    write("low.qcow2", &["write -c -P 5 0 2M"]);
    // Parts of the large cluster are left, with clusters of the layer above in between.
    write("top.qcow2", &["write -c -P 6 8k 8k", "write -P 7 40k 512", "write -c -P 8 3M 64k"]);
    write("top.qcow2", &["write -z 1M 16k", "write -c -P 9 1200k 8k"]);
    assert!(check(dir.path(), "top.qcow2", "qcow2", None).unwrap() > 5);
    assert_eq!(check(dir.path(), "low.qcow2", "qcow2", None).unwrap(), 1);
}

#[test]
fn snapshots_of_compressed() {
    let dir = scratch_dir("inflate").unwrap();
    let mut rng = Rng::new(3);
    fs::write(dir.path().join("content.raw"), content(4 << 20, &mut rng)).unwrap();
    for method in ["zlib", "zstd"] {
        let option = format!("compression_type={method}");
        let args = ["convert", "-c", "-O", "qcow2", "-o", &option, "content.raw", "x.qcow2"];
        qemu::img(dir.path(), &args).unwrap();
        qemu::img(dir.path(), &["snapshot", "-c", "before", "x.qcow2"]).unwrap();
        let commands = ["write -P 1 0 1M", "discard 1M 64k", "write -z 2M 512k"];
        qemu::io(dir.path(), "qcow2", "x.qcow2", &strings(&commands)).unwrap();
        let now = check(dir.path(), "x.qcow2", "qcow2", None).unwrap();
        let before = check(dir.path(), "x.qcow2", "qcow2", Some("1")).unwrap();
        assert!(now > 5 && before > now, "{now} and {before} pieces");
    }
}

/// Chains drawn at random.
#[test]
fn chains_with_compressed_clusters() {
    let theme = Theme {
        depth: (1, 4),
        raw_base: 30,
        qcow: 15,
        compressed: 90,
        snapshot: 40,
        // With smaller clusters QEMU 10 itself damages images in which it writes
        // compressed clusters between snapshots, and marks them corrupt.
        cluster_bits: (13, 21),
        // QEMU applies no snapshot to an image that has bitmaps.
        bitmap: 0,
        ..MIXED
    };
    run_theme("chains_with_compressed_clusters", 40, &theme, |dir, recipe: &Recipe, _| {
        let top = recipe.top();
        check(dir, &top.file, top.format, None)?;
        if top.snapshots.is_empty() {
            return Ok(());
        }
        let ids = snapshots(dir, &top.file)?;
        ids.iter().try_for_each(|(id, _)| check(dir, &top.file, top.format, Some(id)).map(drop))
    });
}

/// What qemu-img makes of a damaged image: its copy, with zeros for what it can't read,
/// and the sectors that these are.
fn salvage(dir: &Path, format: &str, image: &str) -> Outcome<BTreeSet<u64>> {
    let args = ["convert", "--salvage", "-f", format, "-O", "raw", image, "copy.raw"];
    let ran = qemu::img_any(dir, &args)?.ok()?;
    let said = ran.stderr;
    let mut failed = BTreeSet::new();
    for line in said.lines() {
        let offset = line
            .split_once("error while reading offset ")
            .and_then(|(_, rest)| rest.split(':').next()?.parse().ok());
        failed.insert(offset.ok_or(format!("qemu-img says '{line}'"))?);
    }
    Ok(failed)
}

/// Compares an image with damaged streams: the same clusters have to fail, and the others
/// to read the same. Says how many fail and how many do not.
fn check_damaged(dir: &Path, format: &str, image: &str) -> Outcome<(usize, usize)> {
    let theirs = salvage(dir, format, image)?;
    let chain = open(dir, image, format, None)?;
    let jobs = jobs_of(&chain)?;
    let (scratch, done) = filled(dir, &chain, OnError::Zero).map_err(|error| error.to_string())?;
    let sectors = |start: u64, end: u64| (start..end).step_by(512);
    let ours: BTreeSet<u64> = done
        .failed
        .iter()
        .flat_map(|failed| sectors(failed.guest.start.get(), failed.guest.end.get()))
        .collect();
    if let Some(sector) = ours.symmetric_difference(&theirs).next() {
        let job = jobs.iter().find(|job| (job.guest.get()..).contains(sector));
        let job = jobs.iter().rev().find(|job| job.guest.get() <= *sector).or(job);
        let why =
            done.failed.iter().find(|f| (f.guest.start.get()..f.guest.end.get()).contains(sector));
        return Err(format!(
            "only {} fails at {sector:#x}: {job:?}: {why:?}",
            if ours.contains(sector) { "imgdm" } else { "qemu-img" }
        ));
    }
    same_pieces(&jobs, &scratch, &dir.join("copy.raw"))?;
    let refused = filled(dir, &chain, OnError::Refuse);
    if refused.is_ok() != ours.is_empty() {
        return Err("a damaged image is not refused".to_owned());
    }
    Ok((done.failed.len(), jobs.len() - done.failed.len()))
}

/// Makes an image of `clusters` compressed clusters of 4 KiB; half of each does not
/// compress, so that its stream has room.
fn roomy_image(dir: &Path, format: &str, options: &str, clusters: u64) -> Outcome<Vec<ScratchJob>> {
    let mut rng = Rng::new(4);
    let mut bytes = Vec::new();
    for _ in 0..clusters {
        let mut cluster = [0; 4096];
        rng.fill(&mut cluster[..2500]);
        bytes.extend(cluster);
    }
    fs::write(dir.join("content.raw"), bytes).map_err(|error| error.to_string())?;
    compress(dir, format, options, "good.img")?;
    let jobs = jobs_of(&open(dir, "good.img", format, None)?)?;
    if (jobs.len() as u64) < clusters / 2 || jobs.iter().any(|job| job.length > 4096) {
        return Err(format!("{} clusters are compressed", jobs.len()));
    }
    Ok(jobs)
}

fn stream_of(job: &ScratchJob) -> (u64, u64) {
    match job.what {
        ScratchContent::Inflate { host, stream_length, .. } => (host.get(), stream_length.get()),
        ScratchContent::Copy { host, bytes, .. } => (host.get(), bytes),
    }
}

const FORMATS: [(&str, &str); 3] = [
    ("qcow2", "cluster_size=4k"),
    ("qcow2", "cluster_size=4k,compression_type=zstd"),
    // Its clusters are 4 KiB long.
    ("qcow", ""),
];

#[test]
fn damaged_streams_fail_where_they_do_in_qemu() {
    for (index, (format, options)) in (0..).zip(FORMATS) {
        let dir = scratch_dir("inflate").unwrap();
        let dir = dir.path();
        let jobs = roomy_image(dir, format, options, 128).unwrap();
        let mut rng = Rng::for_case(5, "damaged streams", index);
        let (mut failing, mut reading) = (0, 0);
        for round in 0..6 {
            copy(&dir.join("good.img"), &dir.join("bad.img")).unwrap();
            let image = File::options().write(true).open(dir.join("bad.img")).unwrap();
            for job in &jobs {
                let (host, length) = stream_of(job);
                // Headers are at the start, where a flipped bit does most.
                let near = if rng.percent(50) { 24 } else { length };
                let most = if rng.percent(20) { 40 } else { 2 };
                let mut bytes = vec![0; rng.range(1, most) as usize];
                rng.fill(&mut bytes);
                image.write_all_at(&bytes, host + rng.below(near)).unwrap();
            }
            if round == 5 {
                let (host, length) = stream_of(&jobs[jobs.len() - 9]);
                image.set_len(host + length / 2).unwrap();
            }
            let outcome = check_damaged(dir, format, "bad.img");
            let (failed, read) = outcome.unwrap_or_else(|error| {
                panic!("{format} {options}, round {round}: {error}");
            });
            failing += failed;
            reading += read;
        }
        assert!(failing > 50 && reading > 50, "{format} {options}: {failing} and {reading}");
    }
}

fn deflated(bytes: &[u8], level: u32) -> Vec<u8> {
    let level = flate2::Compression::new(level);
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), level);
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8], checksum: bool) -> Vec<u8> {
    let mut context = zstd_safe::CCtx::create();
    context.set_parameter(zstd_safe::CParameter::ChecksumFlag(checksum)).unwrap();
    let mut out = vec![0; zstd_safe::compress_bound(bytes.len())];
    let length = context.compress2(&mut out[..], bytes).unwrap();
    out.truncate(length);
    out
}

/// A frame of raw blocks with this window descriptor and no content size.
fn raw_frame(window: u8, blocks: &[(bool, &[u8])]) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, window];
    for (last, bytes) in blocks {
        let header = u32::try_from(bytes.len()).unwrap() << 3 | u32::from(*last);
        frame.extend(&header.to_le_bytes()[..3]);
        frame.extend(*bytes);
    }
    frame
}

/// Streams that somebody thought of, for clusters of 4 KiB; at most 2560 bytes each.
fn odd_streams(zstd_image: bool) -> Vec<Vec<u8>> {
    let text: Vec<u8> = (0..8192u32).map(|i| (i * i / 7 % 61) as u8).collect();
    let full = &text[..4096];
    let far: Vec<u8> = {
        // Its second half is 2 KiB from before: within QEMU's window of 4 KiB.
        let mut half = vec![0; 2048];
        Rng::new(6).fill(&mut half);
        [half.clone(), half].concat()
    };
    if !zstd_image {
        let stored = |last: u8, length: u16, bytes: &[u8]| {
            [&[last][..], &length.to_le_bytes(), &(!length).to_le_bytes(), bytes].concat()
        };
        // Without its last bits, a stream ends in the middle of a block.
        let whole = deflated(full, 6);
        let mut streams = vec![
            whole.clone(),
            [&whole[..], &[0xff; 200]].concat(),
            deflated(&text, 6),
            deflated(&text[..4095], 6),
            deflated(&text[..4097], 6),
            deflated(&far, 9),
            deflated(&vec![0; 1 << 20], 9),
            deflated(&[], 6),
            [stored(0, 0, &[]), whole.clone()].concat(),
            // Nothing but empty blocks; a reserved block type; no block at all.
            [0, 0, 0, 0xff, 0xff].repeat(400),
            vec![0x07; 20],
            Vec::new(),
            // Stored blocks whose lengths do not agree.
            [&[1, 0, 1, 0, 1][..], &[0; 256]].concat(),
        ];
        // A full cluster, and then something that is none: the end of the block, a block
        // that starts, a distance too far.
        let half = [stored(0, 2048, &full[..2048]), deflated(&vec![9; 2048], 6)].concat();
        for after in [&[0xff; 8][..], &[0x06; 8], &[0; 8], &[1, 0, 0, 0xff, 0xff], &[3, 2, 0]] {
            for cut in [0, 1, 2, 3] {
                let mut open = half.clone();
                open.truncate(half.len() - cut);
                streams.push([&open[..], after].concat());
            }
        }
        // The last block is not marked as such; more blocks follow.
        let mut open = half.clone();
        open[2053] &= !1;
        for after in [&[][..], &[0x06; 8], &[0x01, 0, 0, 0xff, 0xff], &[0x01, 0, 0, 0, 0], &[3, 2]]
        {
            streams.push([&open[..], after].concat());
        }
        return streams;
    }
    let (half, rest) = full.split_at(2048);
    let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0][..], b"skip"].concat();
    let small = |byte| vec![byte; 2048];
    let rle = |last: u32, length: u32, byte: u8| {
        [&(length << 3 | 1 << 1 | last).to_le_bytes()[..3], &[byte]].concat()
    };
    let header = |window: u8| vec![0x28, 0xb5, 0x2f, 0xfd, 0, window];
    let mut streams = vec![
        zstd(full, false),
        zstd(full, true),
        [&zstd(full, true)[..], &[0xff; 100]].concat(),
        zstd(&text, false),
        zstd(&text[..4095], false),
        zstd(&text[..4097], false),
        zstd(&vec![0; 1 << 20], false),
        zstd(&far, false),
        [zstd(half, true), zstd(rest, false)].concat(),
        [zstd(half, true), skipped.clone(), zstd(rest, false)].concat(),
        [skipped.clone(), zstd(full, false), skipped.clone()].concat(),
        [zstd(&[], true), zstd(full, false)].concat(),
        [zstd(half, false), zstd(&text[2048..4097], false)].concat(),
        [zstd(half, false), vec![0; 500]].concat(),
        zstd(&[], false).repeat(100),
        skipped.repeat(100),
        Vec::new(),
        raw_frame(0x10, &[(false, &small(1)), (true, &[])]),
        [header(0x10), rle(0, 4096, 7), rle(1, 0, 0)].concat(),
        [header(0x10), rle(1, 4096, 7)].concat(),
        [header(0x10), rle(0, 4096, 7)].concat(),
        [header(0x10), rle(0, 4096, 7), rle(1, 1, 0)].concat(),
        [header(0x10), rle(0, 2048, 7), rle(0, 2048, 8), rle(0, 0, 0), rle(1, 0, 8)].concat(),
        [header(0x10), rle(0, 4096, 7), vec![0, 0, 0], vec![1, 0, 0]].concat(),
        // A block longer than its window, and a reserved block type.
        [header(0x00), rle(1, 4096, 7)].concat(),
        [header(0x10), vec![7, 0, 0]].concat(),
    ];
    for window in [0x00, 0x08, 0x0f, 0x10, 0x58, 0x80, 0x87, 0x88, 0x89, 0x90, 0xf8, 0xff] {
        streams.push([header(window), rle(1, 4096, 7)].concat());
    }
    let mut wrong_sum = zstd(full, true);
    *wrong_sum.last_mut().unwrap() ^= 1;
    streams.push(wrong_sum.clone());
    wrong_sum.pop();
    streams.push(wrong_sum);
    streams
}

#[test]
fn odd_streams_are_taken_as_qemu_takes_them() {
    for (format, options) in FORMATS {
        let dir = scratch_dir("inflate").unwrap();
        let dir = dir.path();
        let streams = odd_streams(options.contains("zstd"));
        let jobs = roomy_image(dir, format, options, 512).unwrap();
        assert!(jobs.len() >= 4 * streams.len());
        let image = File::options().write(true).open(dir.join("good.img")).unwrap();
        // The sectors of a stream's end are those of the next one's start, which gives way.
        for (index, pair) in jobs.chunks(2).enumerate() {
            let (host, length) = stream_of(&pair[0]);
            // Once with what was there behind it, and once with zeros.
            let mut bytes = streams[index / 2 % streams.len()].clone();
            assert!(bytes.len() as u64 <= length, "stream {} is too long", index / 2);
            if index % 2 == 1 {
                bytes.resize(length as usize, 0);
            }
            image.write_all_at(&bytes, host).unwrap();
        }
        let outcome = check_damaged(dir, format, "good.img");
        let (failed, read) = outcome.unwrap_or_else(|error| {
            panic!("{format} {options}: {error}");
        });
        assert!(failed > 10 && read > 10, "{format} {options}: {failed} and {read}");
    }
}
