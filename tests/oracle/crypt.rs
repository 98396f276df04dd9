//! Encrypted images, LUKS and legacy AES: what the plan, the scratch file and our ciphers
//! make of them, beside what qemu-img reads.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use imgdm::crypt::Passphrase;
use imgdm::error::ErrorKind;
use imgdm::open::{OpenPolicy, open_chain};
use zeroize::Zeroizing;

use crate::common::images::scratch_dir;
use crate::common::patch::{OFFSET_MASK, Patch};
use crate::common::process::{Outcome, Ran, run};
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::device::{self, Reading};
use crate::imgdm::{imgdm, refused};
use crate::luks::{Spec, header, put_aes, put_luks};

const SECRET: &str = "abc";
/// Runs at a time: unlocking and qemu-img both compute.
const WORKERS: usize = 2;

/// The secret of layer N is called sN.
pub(crate) fn secrets(keys: &[&str]) -> Vec<String> {
    let objects = (0..).zip(keys).filter(|(_, key)| !key.is_empty());
    objects
        .flat_map(|(n, key)| ["--object".to_owned(), format!("secret,id=s{n},data={key}")])
        .collect()
}

/// `--image-opts` of a chain: format and file of each layer, topmost first, and a key
/// where there is one.
pub(crate) fn image_opts(layers: &[(&str, &str, &str)]) -> String {
    let mut options = Vec::new();
    let mut prefix = String::new();
    for (n, (format, file, key)) in (0..).zip(layers) {
        options.push(format!("{prefix}driver={format}"));
        options.push(format!("{prefix}file.driver=file,{prefix}file.filename={file}"));
        if !key.is_empty() {
            options.push(format!("{prefix}encrypt.key-secret=s{n}"));
        }
        prefix.push_str("backing.");
    }
    options.join(",")
}

/// Copies the disk of a chain with qemu-img.
fn convert_any(dir: &Path, layers: &[(&str, &str, &str)], copy: &str) -> Outcome<Ran> {
    let keys: Vec<_> = layers.iter().map(|layer| layer.2).collect();
    let mut args = vec!["convert".to_owned()];
    args.extend(secrets(&keys));
    args.extend(["--image-opts".to_owned(), image_opts(layers)]);
    args.extend(["-O", "raw", copy].map(str::to_owned));
    qemu::img_any(dir, &args)
}

fn reading(layers: &[(&str, &str, &str)]) -> Reading {
    let keys = (0..).zip(layers).filter(|(_, layer)| !layer.2.is_empty());
    let keys: BTreeMap<_, _> = keys.map(|(n, layer)| (n, layer.2.as_bytes().to_vec())).collect();
    let mut reading = Reading { keys, ..Reading::default() };
    reading.policy.probe_backing = true;
    reading
}

/// The device of a chain beside qemu-img's copy of it.
fn same_disk(dir: &Path, layers: &[(&str, &str, &str)]) -> Outcome {
    let copy = format!("{}.raw", layers[0].1);
    convert_any(dir, layers, &copy)?.ok()?;
    device::compare(dir, layers[0].1, &reading(layers), &copy).map(drop)
}

/// Writes to the top of a chain with qemu-io.
pub(crate) fn write(dir: &Path, layers: &[(&str, &str, &str)], commands: &[&str]) -> Outcome {
    let keys: Vec<_> = layers.iter().map(|layer| layer.2).collect();
    let mut io = Command::new("qemu-io");
    io.current_dir(dir).args(secrets(&keys)).args(["--image-opts", &image_opts(layers)]);
    for command in commands {
        io.args(["-c", command]);
    }
    let ran = run(&mut io)?.ok()?;
    if ran.text().contains("failed") || !ran.stderr.is_empty() {
        return Err(ran.describe());
    }
    Ok(())
}

/// Makes an encrypted image with qemu-img.
pub(crate) fn create(
    dir: &Path,
    format: &str,
    file: &str,
    options: &str,
    key: &str,
    size: &str,
) -> Outcome {
    let mut args = vec!["create".to_owned(), "-q".to_owned()];
    args.extend(["-f".to_owned(), format.to_owned()]);
    args.extend(secrets(&[key]));
    args.extend(["-o".to_owned(), format!("encrypt.key-secret=s0,{options}")]);
    args.extend([file.to_owned(), size.to_owned()]);
    qemu::img(dir, &args).map(drop)
}

pub(crate) const LUKS: &str = "encrypt.format=luks,encrypt.iter-time=10";

/// What most tests encrypt with.
fn usual() -> Spec {
    Spec { cipher: "aes", key_bytes: 32, mode: "cbc-essiv:sha256".to_owned(), hash: "sha256" }
}

/// Makes an image by these steps, plain yet.
fn plain(dir: &Path, file: &str, options: &str, size: &str, commands: &[&str]) -> Outcome {
    let format = if options.is_empty() { "qcow" } else { "qcow2" };
    let mut args = vec!["create", "-q", "-f", format];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([file, size]);
    qemu::img(dir, &args)?;
    write(dir, &[(format, file, "")], commands)
}

/// An image with random bytes for ciphertext, half of them past 2 TiB: so the numbers of
/// their sectors do not fit in 32 bits, which is what `plain` and `plain64` differ in.
/// (The clusters are large because QEMU looks at each one's refcount.)
fn ciphertext(dir: &Path, file: &str) -> Outcome {
    const FAR: u64 = (2 << 40) + (1 << 20);
    plain(dir, file, "cluster_size=256k", "264k", &["write 0 264k"])?;
    put_luks(&dir.join(file), &header(&matrix()[0], &[(0, SECRET.as_bytes())], 1))?;
    let image = Patch::open(&dir.join(file))?;
    let entry = image.l2_entry(256 << 10)?;
    image.put_u64(entry, (1 << 63) | FAR)?;
    let mut bytes = [0; 8192];
    Rng::new(5).fill(&mut bytes);
    image.put(image.u64(image.l2_entry(0)?)? & OFFSET_MASK, &bytes)?;
    image.put(FAR, &bytes)?;
    image.set_length(FAR + (256 << 10))
}

const CIPHERS: [(&str, usize); 11] = [
    ("aes", 16),
    ("aes", 24),
    ("aes", 32),
    ("cast5", 16),
    ("serpent", 16),
    ("serpent", 24),
    ("serpent", 32),
    ("twofish", 16),
    ("twofish", 24),
    ("twofish", 32),
    ("sm4", 16),
];
const HASHES: [&str; 8] =
    ["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3"];

/// All that LUKS1's names can say and QEMU knows the words of.
fn matrix() -> Vec<Spec> {
    // The one with the longest key leads, so that the others' headers fit in its place.
    let xts = |hash| Spec { cipher: "aes", key_bytes: 64, mode: "xts-plain64".to_owned(), hash };
    let mut all: Vec<_> = HASHES.into_iter().map(xts).collect();
    for (cipher, bytes) in CIPHERS {
        for chaining in ["ecb", "cbc", "ctr", "xts"] {
            for iv in ["plain", "plain64", "essiv:md5", "essiv:sha256", "essiv:sm3"] {
                // No key of a cipher is as long as that: our own header can't be made.
                let essiv_bytes = match iv {
                    "essiv:md5" => 16,
                    "essiv:sha256" | "essiv:sm3" => 32,
                    _ => bytes,
                };
                let sixteen = matches!(cipher, "cast5" | "sm4");
                let wide = chaining == "xts";
                if (sixteen && essiv_bytes != 16) || (wide && cipher == "cast5") {
                    continue;
                }
                let key_bytes = if wide { 2 * bytes } else { bytes };
                let mode = format!("{chaining}-{iv}");
                all.push(Spec { cipher, key_bytes, mode, hash: "sha256" });
            }
        }
    }
    all
}

/// Why QEMU can't open what we can. It aborts where a key slot is no whole number of
/// sectors: keys of 24 bytes.
fn only_ours(spec: &Spec) -> bool {
    spec.key_bytes == 24 || spec.cipher == "sm4"
}

#[test]
fn every_luks_cipher_mode_iv_and_hash_that_qemu_opens_is_read_as_qemu_reads_it() {
    let specs = matrix();
    let next = AtomicUsize::new(0);
    let (opened, failed) = (Mutex::new(BTreeSet::new()), Mutex::new(Vec::new()));
    let worker = || -> Outcome {
        let dir = scratch_dir("crypt")?;
        ciphertext(dir.path(), "x.qcow2")?;
        let layers = [("qcow2", "x.qcow2", SECRET)];
        while let Some((seed, spec)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|n| Some((n, specs.get(n)?)))
        {
            let name = format!("{}-{} {} {}", spec.cipher, spec.mode, spec.key_bytes, spec.hash);
            let header = header(spec, &[(0, SECRET.as_bytes())], seed as u64);
            put_luks(&dir.path().join("x.qcow2"), &header)?;
            let theirs = convert_any(dir.path(), &layers, "copy.raw")?;
            let compared = if theirs.status.success() {
                device::compare(dir.path(), "x.qcow2", &reading(&layers), "copy.raw").map(drop)
            } else if only_ours(spec) {
                continue;
            } else {
                Err(theirs.describe())
            };
            opened.lock().unwrap().insert(name.clone());
            if let Err(error) = compared {
                failed.lock().unwrap().push(format!("{name}: {error}"));
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap().unwrap());
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
    let opened = opened.into_inner().unwrap();
    println!("{} combinations", opened.len());
    assert!(opened.len() >= 120, "{}: {opened:#?}", opened.len());
    for known in [
        "aes-xts-plain64 64 sha256",
        "aes-xts-plain64 64 sha512",
        "aes-xts-plain64 64 ripemd160",
        "aes-cbc-essiv:sha256 32 sha256",
        "aes-cbc-plain 16 sha256",
        "serpent-xts-plain64 64 sha256",
        "twofish-ctr-essiv:sha256 32 sha256",
        "cast5-cbc-plain64 16 sha256",
    ] {
        assert!(opened.contains(known), "{known} is missing");
    }
}

/// The options of `qemu-img create` for a cipher.
fn create_options(cipher: &str, chaining: &str, iv: &str, hash: &str) -> String {
    let (iv, iv_hash) = iv.split_once(':').unwrap_or((iv, ""));
    let iv_hash = if iv_hash.is_empty() {
        String::new()
    } else {
        format!(",encrypt.ivgen-hash-alg={iv_hash}")
    };
    format!(
        "{LUKS},encrypt.cipher-alg={cipher},encrypt.cipher-mode={chaining},\
         encrypt.ivgen-alg={iv}{iv_hash},encrypt.hash-alg={hash}"
    )
}

fn created_is_read(cipher: &str, chaining: &str, iv: &str, hash: &str) -> Outcome {
    let dir = scratch_dir("crypt")?;
    let dir = dir.path();
    let options = create_options(cipher, chaining, iv, hash);
    create(dir, "qcow2", "x.qcow2", &options, SECRET, "1M")?;
    let layers = [("qcow2", "x.qcow2", SECRET)];
    write(dir, &layers, &["write -P 7 0 64k", "write -P 8 100k 33k", "write -P 9 1023k 1k"])?;
    same_disk(dir, &layers)
}

#[test]
fn images_that_qemu_img_encrypts_are_read() {
    for [cipher, chaining, iv, hash] in [
        ["aes-256", "xts", "plain64", "sha256"],
        ["serpent-256", "cbc", "essiv:sha256", "sha512"],
        ["cast5-128", "cbc", "plain64", "sha1"],
    ] {
        created_is_read(cipher, chaining, iv, hash)
            .unwrap_or_else(|error| panic!("{cipher} {chaining} {iv} {hash}: {error}"));
    }
}

#[test]
fn any_key_slot_opens_and_a_wrong_key_is_told_from_all_else() {
    let dir = scratch_dir("crypt").unwrap();
    let dir = dir.path();
    let long = "p".repeat(300);
    let keys: [&[u8]; 4] =
        [b"first", "zweites\u{fc}".as_bytes(), long.as_bytes(), b"\xff\x00\n\x80"];
    let slots: Vec<_> = [0, 3, 6, 7].into_iter().zip(keys).collect();
    plain(dir, "x.qcow2", "cluster_size=4k", "64k", &["write -P 5 4k 20k"]).unwrap();
    put_luks(&dir.join("x.qcow2"), &header(&usual(), &slots, 9)).unwrap();
    for key in &keys[..3] {
        let key = str::from_utf8(key).unwrap();
        same_disk(dir, &[("qcow2", "x.qcow2", key)]).unwrap();
    }
    // QEMU takes no passphrase that is not UTF-8; we do, and the copy is there.
    let mut binary = reading(&[]);
    binary.keys.insert(0, keys[3].to_vec());
    device::compare(dir, "x.qcow2", &binary, "x.qcow2.raw").unwrap();

    let opened = open_chain(&dir.join("x.qcow2"), &OpenPolicy::default()).unwrap();
    let layer = &opened.chain.layers()[0];
    let luks = layer.image.crypt_header().unwrap().unwrap();
    for wrong in [&b"First"[..], b"", b"first\n", b"\xff", &long.as_bytes()[1..]] {
        let key = Passphrase::new(Zeroizing::new(wrong.to_vec()));
        let error = luks.unlock(&layer.source, &key).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::WrongKey(_)), "{error}");
    }
}

#[test]
fn key_slots_that_qemu_img_adds_open_and_those_it_erases_do_not() {
    let dir = scratch_dir("crypt").unwrap();
    let dir = dir.path();
    create(dir, "qcow2", "x.qcow2", LUKS, "first", "1M").unwrap();
    write(dir, &[("qcow2", "x.qcow2", "first")], &["write -P 3 0 100k"]).unwrap();
    let amend = |more: &[&str], options: &str| {
        let mut args = vec!["amend".to_owned()];
        args.extend(more.iter().map(|&option| option.to_owned()));
        args.extend(secrets(&["first", "second"]));
        args.extend(["--image-opts".to_owned(), image_opts(&[("qcow2", "x.qcow2", "first")])]);
        args.extend(["-o".to_owned(), options.to_owned()]);
        qemu::img(dir, &args).unwrap();
    };
    amend(&[], "encrypt.state=active,encrypt.new-secret=s1,encrypt.iter-time=10");
    for key in ["first", "second"] {
        same_disk(dir, &[("qcow2", "x.qcow2", key)]).unwrap();
    }
    amend(&[], "encrypt.state=inactive,encrypt.old-secret=s1");
    same_disk(dir, &[("qcow2", "x.qcow2", "first")]).unwrap();
    let erased = reading(&[("qcow2", "x.qcow2", "second")]);
    let error = device::compare(dir, "x.qcow2", &erased, "x.qcow2.raw").unwrap_err();
    assert!(error.contains("wrong key"), "{error}");

    // The last slot too: no key opens it, so none is asked for or read.
    amend(&["--force"], "encrypt.state=inactive,encrypt.keyslot=0");
    let ran = imgdm(dir, &["attach", "--key-file", "/nowhere/key", "x.qcow2"]).unwrap();
    refused(&ran, &[67], &["x.qcow2", "no key opens it"]).unwrap();
    let ran = imgdm(dir, &["plan", "--output=json", "x.qcow2"]).unwrap().ok().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!(report["attachable"], false, "{report}");
    assert_eq!(report["obstacles"][0]["kind"], "no-key-slot", "{report}");
}

#[test]
fn encrypted_images_of_every_shape_are_read() {
    let writes =
        ["write -P 1 0 9k", "write -P 2 70k 130k", "write -z 96k 8k", "write -P 3 511k 1k"];
    let compressed = [
        "write -c -P 4 0 64k",
        "write -P 5 64k 64k",
        "write -c -P 6 128k 64k",
        "write -z 192k 64k",
    ];
    let shapes: &[(&str, &[&str])] = &[
        ("cluster_size=512", &writes),
        ("cluster_size=64k", &writes),
        ("cluster_size=2M", &writes),
        ("cluster_size=16k,extended_l2=on", &writes),
        ("cluster_size=128k,extended_l2=on", &writes),
        ("cluster_size=4k,preallocation=metadata", &writes),
        ("cluster_size=4k,data_file=@.data", &writes),
        ("cluster_size=4k,data_file=@.data,data_file_raw=on", &writes),
        ("cluster_size=64k", &compressed),
        ("cluster_size=64k,compression_type=zstd", &compressed),
        ("compat=0.10,cluster_size=4k", &writes),
        ("compat=0.10,cluster_size=64k", &compressed),
        ("", &writes),
        ("", &["write -c -P 4 0 4k", "write -P 5 4k 4k", "write -c -P 6 12k 4k"]),
    ];
    let luks = header(&usual(), &[(0, SECRET.as_bytes())], 3);
    for (n, (options, commands)) in shapes.iter().enumerate() {
        for method in ["luks", "aes"] {
            let dir = scratch_dir("crypt").unwrap();
            let dir = dir.path();
            let file = format!("{method}{n}");
            plain(dir, &file, &options.replace('@', &file), "512k", commands).unwrap();
            if method == "aes" {
                put_aes(&dir.join(&file)).unwrap();
            } else if options.is_empty() || options.contains("0.10") {
                // Before version 3 there was no LUKS, and there are no feature names.
                continue;
            } else {
                put_luks(&dir.join(&file), &luks).unwrap();
            }
            let format = if options.is_empty() { "qcow" } else { "qcow2" };
            same_disk(dir, &[(format, &file, SECRET)])
                .unwrap_or_else(|error| panic!("{method} {options} {commands:?}: {error}"));
        }
    }
}

#[test]
fn images_that_qemu_encrypts_with_legacy_aes_are_read() {
    for format in ["qcow2", "qcow"] {
        let dir = scratch_dir("crypt").unwrap();
        let dir = dir.path();
        for key in ["k", "sixteen bytes !!", "more than sixteen bytes"] {
            create(dir, format, "x", "encrypt.format=aes", key, "1M").unwrap();
            let layers = [(format, "x", key)];
            write(dir, &layers, &["write -P 7 0 64k", "write -P 8 99k 3k"]).unwrap();
            same_disk(dir, &layers).unwrap_or_else(|error| panic!("{format} {key}: {error}"));
        }
    }
}

#[test]
fn snapshots_of_encrypted_images_are_read() {
    for method in ["luks", "aes"] {
        let dir = scratch_dir("crypt").unwrap();
        let dir = dir.path();
        plain(dir, "x", "cluster_size=4k", "128k", &["write -P 1 0 60k"]).unwrap();
        qemu::img(dir, &["snapshot", "-c", "one", "x"]).unwrap();
        write(dir, &[("qcow2", "x", "")], &["write -P 2 8k 40k"]).unwrap();
        if method == "luks" {
            let luks = header(&usual(), &[(0, SECRET.as_bytes())], 4);
            put_luks(&dir.join("x"), &luks).unwrap();
        } else {
            put_aes(&dir.join("x")).unwrap();
        }
        let layers = [("qcow2", "x", SECRET)];
        same_disk(dir, &layers).unwrap();
        let mut args = vec!["convert".to_owned()];
        args.extend(secrets(&[SECRET]));
        args.extend(["-l", "snapshot.name=one", "--image-opts"].map(str::to_owned));
        args.extend([image_opts(&layers), "-O".into(), "raw".into(), "one.raw".into()]);
        qemu::img(dir, &args).unwrap();
        let mut reading = reading(&layers);
        reading.policy.snapshot = Some("one".parse().unwrap());
        device::compare(dir, "x", &reading, "one.raw").unwrap();
    }
}

#[test]
fn a_chain_mixes_ciphers_each_layer_with_its_own_key() {
    let dir = scratch_dir("crypt").unwrap();
    let dir = dir.path();
    // From the top: what each is, and what it writes.
    let stack = [
        ("luks", "qcow2", "write -P 1 3k 50k"),
        ("plain", "qcow2", "write -P 2 40k 50k"),
        ("aes", "qcow2", "write -P 3 100k 200k"),
        ("luks", "qcow2", "write -P 4 150k 300k"),
        ("aes", "qcow", "write -P 5 0 480k"),
    ];
    let names: Vec<String> = (0..stack.len()).map(|n| format!("l{n}")).collect();
    let mut below: Option<(&str, &str)> = None;
    for (n, (_, format, command)) in stack.iter().enumerate().rev() {
        let mut args = vec!["create", "-q", "-f", format, "-u"];
        if let Some((name, format)) = below {
            args.extend(["-b", name, "-F", format]);
        }
        args.extend([names[n].as_str(), "480k"]);
        qemu::img(dir, &args).unwrap();
        below = Some((&names[n], format));
        // By itself: what lies below is ciphertext, not to be copied up.
        let image = format!("driver={format},file.filename={},backing=", names[n]);
        let mut io = Command::new("qemu-io");
        io.current_dir(dir).args(["--image-opts", &image, "-c", command]);
        run(&mut io).unwrap().ok().unwrap();
    }
    let mut layers = Vec::new();
    for (n, (method, format, _)) in stack.iter().enumerate() {
        let key = ["top", "", "third key", "fourth", "bottom"][n];
        match *method {
            "luks" => {
                let spec = if n == 0 { usual() } else { matrix().remove(0) };
                let luks = header(&spec, &[(n, key.as_bytes())], n as u64);
                put_luks(&dir.join(&names[n]), &luks).unwrap();
            }
            "aes" => put_aes(&dir.join(&names[n])).unwrap(),
            _ => {}
        }
        layers.push((*format, names[n].as_str(), key));
    }
    same_disk(dir, &layers).unwrap();
    // One layer's key is not another's.
    let mut wrong = reading(&layers);
    wrong.keys.insert(3, b"top".to_vec());
    let error = device::compare(dir, "l0", &wrong, "l0.raw").unwrap_err();
    assert!(error.contains("wrong key") && error.contains("l3"), "{error}");
}

/// An encrypted image whose last cluster in the file is guest cluster 1, and where it
/// starts.
fn with_last_cluster(dir: &Path, method: &str, options: &str, cluster: u64) -> u64 {
    let commands = [format!("write -P 1 0 {}", 3 * cluster)];
    plain(dir, "x", options, &(3 * cluster).to_string(), &[&commands[0]]).unwrap();
    let path = dir.join("x");
    if method == "luks" {
        put_luks(&path, &header(&usual(), &[(0, SECRET.as_bytes())], 8)).unwrap();
    } else {
        put_aes(&path).unwrap();
    }
    let image = Patch::open(&path).unwrap();
    let last = image.length().unwrap().next_multiple_of(cluster);
    let mut bytes = vec![0; usize::try_from(cluster).unwrap()];
    Rng::new(cluster).fill(&mut bytes);
    image.put(last, &bytes).unwrap();
    image.put_u64(image.l2_entry(cluster).unwrap(), (1 << 63) | last).unwrap();
    last
}

#[test]
fn an_encrypted_file_may_end_anywhere_inside_its_last_cluster() {
    for (method, cluster, options) in [
        ("luks", 512, "cluster_size=512"),
        ("luks", 4096, "cluster_size=4096"),
        ("luks", 65536, "cluster_size=65536"),
        ("aes", 512, "cluster_size=512"),
        ("aes", 4096, "cluster_size=4096"),
        ("aes", 65536, "cluster_size=65536"),
    ] {
        let dir = scratch_dir("crypt").unwrap();
        let dir = dir.path();
        let last = with_last_cluster(dir, method, options, cluster);
        let lengths = [1, 15, 16, 17, 100, 511, 512, 513, 1000, 2048, 4000, 4095, 4096, 65000];
        for length in lengths.into_iter().filter(|length| *length <= cluster).rev() {
            Patch::open(&dir.join("x")).unwrap().set_length(last + length).unwrap();
            same_disk(dir, &[("qcow2", "x", SECRET)])
                .unwrap_or_else(|error| panic!("{method} {options} {length}: {error}"));
        }
    }
}

#[test]
fn two_guest_clusters_may_share_the_last_host_cluster() {
    for method in ["luks", "aes"] {
        let dir = scratch_dir("crypt").unwrap();
        let dir = dir.path();
        let last = with_last_cluster(dir, method, "cluster_size=4096", 4096);
        let image = Patch::open(&dir.join("x")).unwrap();
        image.put_u64(image.l2_entry(8192).unwrap(), last).unwrap();
        for length in [4096, 1234, 7] {
            image.set_length(last + length).unwrap();
            same_disk(dir, &[("qcow2", "x", SECRET)])
                .unwrap_or_else(|error| panic!("{method} {length}: {error}"));
        }
    }
}

#[test]
fn a_qcow_cluster_may_lie_on_any_sector_with_aes_and_without() {
    for method in ["plain", "aes"] {
        let dir = scratch_dir("crypt").unwrap();
        let dir = dir.path();
        plain(dir, "x", "", "64k", &["write -P 1 0 32k"]).unwrap();
        let path = dir.join("x");
        if method == "aes" {
            put_aes(&path).unwrap();
        }
        let image = Patch::open(&path).unwrap();
        let table = image.u64(image.u64(40).unwrap()).unwrap();
        let first = image.u64(table).unwrap();
        let mut bytes = vec![0; 32 << 10];
        Rng::new(6).fill(&mut bytes);
        image.put(first, &bytes).unwrap();
        let length = image.length().unwrap();
        for (entry, shift) in [(0, 512), (1, 1024), (3, 3584), (5, 2048)] {
            let old = image.u64(table + entry * 8).unwrap();
            image.put_u64(table + entry * 8, old + shift).unwrap();
        }
        let key = if method == "aes" { SECRET } else { "" };
        let layers = [("qcow", "x", key)];
        for cut in [0, 1, 300, 513, 4000] {
            image.set_length(length - cut).unwrap();
            same_disk(dir, &layers).unwrap_or_else(|error| panic!("{method} {cut}: {error}"));
        }
    }
}

/// Runs of sectors that differ in two copies: start and length.
fn differing(a: &[u8], b: &[u8]) -> Vec<(u64, u64)> {
    let mut rows: Vec<(u64, u64)> = Vec::new();
    for (start, (a, b)) in (0..).step_by(512).zip(a.chunks(512).zip(b.chunks(512))) {
        match rows.last_mut() {
            _ if a == b => {}
            Some((from, length)) if *from + *length == start => *length += 512,
            _ => rows.push((start, 512)),
        }
    }
    rows
}

#[test]
fn contents_of_encrypted_layers_are_compared_with_their_keys() {
    for method in ["luks", "aes"] {
        let dir = scratch_dir("crypt").unwrap();
        let dir = dir.path();
        // The base and the overlay have each a key of their own; the overlay's snapshot has
        // a cluster in the clear, which it compressed.
        let keys = [("x", "overlay's"), ("base", "base's")];
        plain(dir, "base", "cluster_size=16k", "512k", &["write -P 1 0 400k"]).unwrap();
        let backing = ["-b", "base", "-F", "qcow2", "x", "512k"];
        let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=16k"];
        qemu::img(dir, &[&create[..], &backing].concat()).unwrap();
        let clear = [("qcow2", "x", ""), ("qcow2", "base", "")];
        write(dir, &clear, &["write -P 2 16k 96k", "write -c -P 3 160k 16k"]).unwrap();
        qemu::img(dir, &["snapshot", "-c", "one", "x"]).unwrap();
        write(dir, &clear, &["write -P 4 32k 32k", "write -P 5 160k 20k", "write -z 240k 16k"])
            .unwrap();
        for (file, key) in keys {
            if method == "aes" {
                put_aes(&dir.join(file)).unwrap();
            } else {
                put_luks(&dir.join(file), &header(&usual(), &[(0, key.as_bytes())], 6)).unwrap();
            }
            std::fs::write(dir.join(format!("{file}.key")), key).unwrap();
        }
        let layers = [("qcow2", "x", keys[0].1), ("qcow2", "base", keys[1].1)];
        let copy = |layers: &[(&str, &str, &str)], snapshot: &[&str]| {
            let mut args = vec!["convert".to_owned()];
            args.extend(secrets(&layers.iter().map(|layer| layer.2).collect::<Vec<_>>()));
            args.extend(snapshot.iter().map(|&arg| arg.to_owned()));
            args.extend(["--image-opts".to_owned(), image_opts(layers)]);
            args.extend(["-O", "raw", "copy.raw"].map(str::to_owned));
            qemu::img(dir, &args).unwrap();
            std::fs::read(dir.join("copy.raw")).unwrap()
        };
        let (now, base) = (copy(&layers, &[]), copy(&layers[1..], &[]));
        let before = copy(&layers, &["-l", "snapshot.name=one"]);
        let given = ["--key-file", "x.key:0", "--key-file", "base.key:1"];
        let rows = |more: &[&str]| -> Vec<(u64, u64)> {
            let line = [&["diff", "--content", "--output=json"], &given[..], more].concat();
            let ran = imgdm(dir, &line).unwrap().ok().unwrap();
            let rows: Vec<serde_json::Value> = serde_json::from_slice(&ran.stdout).unwrap();
            let field = |row: &serde_json::Value, name: &str| row[name].as_u64().unwrap();
            let mut joined: Vec<(u64, u64)> = Vec::new();
            for row in &rows {
                let (start, length) = (field(row, "start"), field(row, "length"));
                match joined.last_mut() {
                    Some((from, so_far)) if *from + *so_far == start => *so_far += length,
                    _ => joined.push((start, length)),
                }
            }
            joined
        };
        assert_eq!(rows(&["-l", "one", "x"]), differing(&before, &now), "{method}");
        assert_eq!(rows(&["x"]), differing(&base, &now), "{method}");
        assert!(differing(&before, &now).len() >= 3 && differing(&base, &now).len() >= 3);
        // By mapping it takes no key.
        imgdm(dir, &["diff", "x"]).unwrap().ok().unwrap();
        let missing = ["diff", "--content", "--key-file", "x.key:0", "x"];
        // Without a terminal nobody can be asked.
        let mut alone = Command::new("setsid");
        alone.current_dir(dir).arg("-w").arg(crate::imgdm::PROGRAM).args(missing);
        let ran = run(&mut alone).unwrap();
        crate::imgdm::refused(&ran, &[67], &["layer 1", "missing", "base"]).unwrap();
        let needless = ["diff", "--content", "--key-file", "x.key:7", "x"];
        let ran = imgdm(dir, &needless).unwrap();
        crate::imgdm::refused(&ran, &[64], &["layer 7"]).unwrap();
    }
}
