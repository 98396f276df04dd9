//! What the benchmarks put into compressed images.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::ensure;

/// Bytes of a cluster.
pub(crate) const CLUSTER: usize = 64 << 10;

/// Writes a file of the files under /usr one after the other, cut into clusters, without
/// those that don't compress.
pub(crate) fn make_content(path: &Path, length: u64) -> anyhow::Result<()> {
    let mut out = File::create(path)?;
    let mut written = 0;
    let mut cluster = Vec::with_capacity(CLUSTER);
    let mut files = Vec::new();
    list_files(Path::new("/usr"), &mut files);
    files.sort();
    ensure!(!files.is_empty(), "there is nothing under /usr");
    while written < length {
        let before = written;
        for name in &files {
            let Ok(file) = File::open(name) else { continue };
            loop {
                let room = (CLUSTER - cluster.len()) as u64;
                match (&file).take(room).read_to_end(&mut cluster) {
                    Ok(n) if n > 0 => {}
                    _ => break,
                }
                if cluster.len() < CLUSTER {
                    continue;
                }
                if written < length && compresses(&cluster)? {
                    out.write_all(&cluster)?;
                    written += CLUSTER as u64;
                }
                cluster.clear();
            }
        }
        ensure!(written > before, "nothing under /usr compresses");
    }
    Ok(())
}

/// Compresses by so much that qemu-img stores it compressed.
fn compresses(cluster: &[u8]) -> anyhow::Result<bool> {
    let level = flate2::Compression::fast();
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), level);
    encoder.write_all(cluster)?;
    Ok(encoder.finish()?.len() < CLUSTER * 9 / 10)
}

fn list_files(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => list_files(&entry.path(), files),
            Ok(kind) if kind.is_file() => files.push(entry.path()),
            _ => {}
        }
    }
}
