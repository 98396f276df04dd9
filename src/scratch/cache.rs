//! Scratch files that are kept, so that another attachment of the same images inflates
//! nothing.
//!
//! A kept file is made without a name and gets one when it is complete: whenever the
//! process ends, there is a whole file or none. It is used again only where all of this
//! holds: its trailer says the same identity (the image files' inodes, lengths and times,
//! and every piece that is planned), it is as long as it was, nobody wrote to it since,
//! and it is ours alone to write. Anything else is as if it were not there.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg};
use nix::libc;
use nix::unistd::{geteuid, linkat};

use super::origin::Origin;
use super::place::{create_named, descriptor_path, open_unnamed};
use super::sweep::sweep;
use super::trailer::{Digest, Trailer};
use super::{Filled, ScratchContent, ScratchJob, ScratchPlace, ScratchWork};
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result, printable};
use crate::source::{FileStamp, Source};
use crate::status::FileRole;
use crate::units::ByteLen;

/// Where kept files lie, unless told otherwise.
const DEFAULT_DIRECTORY: &str = "/var/cache/imgdm";

/// What the name of a kept file ends in.
pub(super) const SUFFIX: &str = ".scratch";

/// Between the time a kept file is given and the last change of its inode, in seconds:
/// what writing the header and giving it its name may take. A later change is somebody
/// else's.
const NAMING_SECONDS: i64 = 60;

/// The coarsest clock that a kernel stamps files with, and that of file systems which
/// keep whole seconds only.
const CLOCK_TICK: Duration = Duration::from_millis(20);
const COARSE_TICK: Duration = Duration::from_secs(2);

/// Unit of `st_blocks`, in bytes (stat(3type)), whatever the file system's own.
const BLOCK: u64 = 512;

/// Attempts to replace a kept file while others do the same.
const NAMING_ATTEMPTS: usize = 8;

/// Whether a scratch file can be kept.
#[derive(Debug)]
pub enum Cacheable {
    /// It can.
    Yes(Cache),
    /// It can't, for this reason: a change of the images would go unnoticed.
    No(String),
}

/// The place of one kept scratch file.
#[derive(Debug)]
pub struct Cache {
    directory: PathBuf,
    file_name: String,
    scratch_length: u64,
    /// Hash of the jobs and of all they are done with.
    jobs: Digest,
    /// The files that jobs read, with their places in the chain.
    read: Vec<(u32, FileRole)>,
    identity: Digest,
}

/// A kept scratch file that can be used.
#[derive(Debug)]
pub struct CacheHit {
    /// Open for reading only. Its data are at its start; it is longer than they are.
    pub file: File,
    /// What filling it came to; nothing failed.
    pub filled: Filled,
}

/// A scratch file that is going to be kept.
#[derive(Debug)]
pub struct CacheBuilder {
    place: ScratchPlace,
    writer: File,
    /// Its name for the time being, where the file system has no files without one. It is
    /// locked as long as we are there.
    temporary: Option<(PathBuf, Flock<File>)>,
}

/// What became of a [`CacheBuilder`]'s file.
#[derive(Debug)]
pub struct Kept {
    /// Open for reading only; to be used whether or not it is kept.
    pub file: File,
    /// Why it is not kept.
    pub not_kept: Option<Error>,
}

impl Cache {
    /// Finds out what identifies the scratch file of `work`: one pass over its jobs.
    /// `shortest_zero_run` is what it is filled with. The directory is /var/cache/imgdm
    /// where none is asked for; it need not be there.
    ///
    /// # Errors
    /// What resolving the images says; a file can't be looked at.
    pub fn of(
        directory: Option<&Path>,
        chain: &Chain,
        work: &dyn ScratchWork,
        shortest_zero_run: ByteLen,
    ) -> Result<Cacheable> {
        let directory = directory.unwrap_or(Path::new(DEFAULT_DIRECTORY));
        let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
        let mut hash = blake3::Hasher::new();
        hash.update(env!("CARGO_PKG_VERSION").as_bytes());
        let scratch_length = work.scratch_length();
        for number in [scratch_length, shortest_zero_run.get(), chain.virtual_size().get()] {
            hash.update(&number.to_le_bytes());
        }
        let mut read = Vec::new();
        let mut jobs = JobHasher::new(hash);
        work.for_each_job(&mut |job| {
            let file = (job.layer, role_of(job));
            if read.last() != Some(&file) && !read.contains(&file) {
                read.push(file);
            }
            jobs.add(job);
        })?;
        let mut hash = jobs.finish();
        read.sort_unstable();
        for &(layer, role) in &read {
            let Some(source) = source_of(chain, layer, role) else { continue };
            if source.stamp()?.is_none() {
                return Ok(Cacheable::No(format!(
                    "{} is a block device, which does not tell when it was changed",
                    printable(&source.path().to_string_lossy())
                )));
            }
            let image = &chain.layers()[layer as usize].image;
            let method = image.compression().map_or(0, |method| 1 + method as u64);
            hash.update(&image.cluster_size().to_le_bytes());
            hash.update(&method.to_le_bytes());
        }
        let mut cache = Self {
            directory,
            file_name: file_name(chain),
            scratch_length,
            jobs: *hash.finalize().as_bytes(),
            read,
            identity: Digest::default(),
        };
        cache.identity = cache.current_identity(chain)?;
        cache.wait_for_the_clock(chain)?;
        Ok(Cacheable::Yes(cache))
    }

    /// The path of the kept file.
    pub fn path(&self) -> PathBuf {
        self.directory.join(&self.file_name)
    }

    /// The directory, an absolute path.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Jobs, and the files as they are now.
    fn current_identity(&self, chain: &Chain) -> Result<Digest> {
        let mut hash = blake3::Hasher::new();
        hash.update(&self.jobs);
        for (layer, role, stamp) in self.stamps(chain)? {
            hash.update(&layer.to_le_bytes());
            hash.update(&[role as u8]);
            hash.update(&stamp.inode.to_le_bytes());
            hash.update(&stamp.length.to_le_bytes());
            for (seconds, nanoseconds) in [stamp.modified, stamp.changed] {
                hash.update(&seconds.to_le_bytes());
                hash.update(&nanoseconds.to_le_bytes());
            }
        }
        Ok(*hash.finalize().as_bytes())
    }

    fn stamps(&self, chain: &Chain) -> Result<Vec<(u32, FileRole, FileStamp)>> {
        let mut stamps = Vec::new();
        for &(layer, role) in &self.read {
            let stamp = source_of(chain, layer, role).map(Source::stamp).transpose()?.flatten();
            stamps.extend(stamp.map(|stamp| (layer, role, stamp)));
        }
        Ok(stamps)
    }

    /// Waits until a change of the files is sure to give them other times than they have.
    fn wait_for_the_clock(&self, chain: &Chain) -> Result<()> {
        for (_, _, stamp) in self.stamps(chain)? {
            wait_for_the_clock(stamp.changed);
        }
        Ok(())
    }

    /// The kept file, where there is one that can be used. Of its data a few samples are
    /// read.
    pub fn lookup(&self) -> Option<CacheHit> {
        match self.try_lookup() {
            Ok(hit) => hit,
            Err(error) => {
                log::debug!("{}: not used: {error}", self.path().display());
                None
            }
        }
    }

    fn try_lookup(&self) -> io::Result<Option<CacheHit>> {
        let (file, metadata) = open_ours(&self.path())?;
        let Some(trailer) = Trailer::read(&file, metadata.len(), self.scratch_length)? else {
            return Err(io::Error::other("it is damaged, or of another layout of the images"));
        };
        if trailer.identity != self.identity {
            return Err(io::Error::other("an image has changed"));
        }
        let untouched = (metadata.mtime(), metadata.mtime_nsec()) == (trailer.modified, 0)
            && metadata
                .ctime()
                .checked_sub(trailer.modified)
                .is_some_and(|age| (-NAMING_SECONDS..=NAMING_SECONDS).contains(&age));
        if !untouched {
            return Err(io::Error::other("it was changed after it was made"));
        }
        let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if !trailer.samples_match(&file, u64::from(seed.subsec_nanos()))? {
            return Err(io::Error::other("its data is damaged"));
        }
        let Some(zero_runs) = trailer.read_zero_runs(&file)? else {
            return Err(io::Error::other("its list of zeros is damaged"));
        };
        Ok(Some(CacheHit { file, filled: Filled { zero_runs, failed: Vec::new() } }))
    }

    /// Bytes that the file of that name takes, and that are free when it is removed.
    /// Where it is held open, as by a device, they are not: that can't be seen here.
    fn bytes_of_stale_file(&self) -> u64 {
        match self.path().symlink_metadata() {
            Ok(found) if found.is_file() && found.nlink() == 1 => {
                found.blocks().saturating_mul(BLOCK)
            }
            _ => 0,
        }
    }

    /// Where a new file would lie that takes `bytes` bytes and is `length` long: the
    /// directory or, where it is yet to be made, the one that it would be made in. A kept
    /// file that a new one takes the place of counts as free. Leaves nothing behind.
    ///
    /// # Errors
    /// What [`build`](Self::build) and [`CacheBuilder::check_room`] would say.
    pub fn check_place(&self, bytes: u64, length: u64) -> Result<ScratchPlace> {
        let there = self.directory.ancestors().find(|path| path.symlink_metadata().is_ok());
        let there = there.unwrap_or(&self.directory);
        if there == self.directory {
            check_owner(there)?;
        }
        let place = ScratchPlace::in_directory(there);
        let soon = self.bytes_of_stale_file();
        place.check_room_with(bytes, Trailer::longest_file(length), soon)?;
        Ok(place)
    }

    /// Starts a new file, whatever is there. The directory is made (0700). What earlier
    /// processes left there, the files of images that are gone, and the file of that name
    /// where it can't be used, are removed: the new one needs their room.
    ///
    /// # Errors
    /// `CannotCreate`, naming the directory: no file can be made in it, or others can write
    /// there.
    pub fn build(&self) -> Result<CacheBuilder> {
        let failed = |error: io::Error| {
            let message = format!("no file can be kept in this directory: {error}");
            Error::new(ErrorKind::CannotCreate(message)).at_path(&self.directory)
        };
        if self.directory.symlink_metadata().is_ok() {
            check_owner(&self.directory)?;
        }
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.directory);
        made.map_err(failed)?;
        check_owner(&self.directory)?;
        sweep(&self.directory);
        // Somebody else may have made a good one meanwhile; it stays until ours is whole.
        if self.lookup().is_none() {
            // Where it can't be removed, giving the new file its name says why.
            let _ = std::fs::remove_file(self.path());
        }
        self.start_file().map_err(failed)
    }

    fn start_file(&self) -> io::Result<CacheBuilder> {
        let place = ScratchPlace::in_directory(&self.directory);
        if let Ok(writer) = open_unnamed(&self.directory)
            && File::open(descriptor_path(&writer)).is_ok()
        {
            return Ok(CacheBuilder { place, writer, temporary: None });
        }
        let (writer, path) = create_named(&self.directory)?;
        let lock = Flock::lock(writer.try_clone()?, FlockArg::LockExclusiveNonblock);
        let lock = lock.map_err(|(_, errno)| io::Error::from(errno))?;
        Ok(CacheBuilder { place, writer, temporary: Some((path, lock)) })
    }
}

impl CacheBuilder {
    /// The file, to be filled.
    pub fn file(&self) -> &File {
        &self.writer
    }

    /// Checks that it can be filled with `bytes` and be `length` bytes long.
    ///
    /// # Errors
    /// As [`ScratchPlace::check_room`].
    pub fn check_room(&self, bytes: u64, length: u64) -> Result<()> {
        self.place.check_room(bytes, Trailer::longest_file(length))
    }

    /// Gives the filled file its name, where nothing in it failed and no image changed
    /// meanwhile. A file that can't be kept can be used all the same.
    ///
    /// # Errors
    /// The file can't be opened for reading.
    pub fn keep(self, cache: &Cache, chain: &Chain, filled: &Filled) -> Result<Kept> {
        let path = match &self.temporary {
            Some((path, _)) => path.clone(),
            None => descriptor_path(&self.writer),
        };
        let file = File::open(path).map_err(|error| {
            let message = "the filled file can't be opened for reading".to_owned();
            Error::new(ErrorKind::CannotCreate(message)).with_source(error).at_path(cache.path())
        })?;
        let kept = if filled.failed.is_empty() {
            self.try_keep(cache, chain, filled)
        } else {
            let message = "a file that lacks clusters is not kept".to_owned();
            Err(Error::new(ErrorKind::CannotCreate(message)))
        };
        if let (Err(_), Some((path, _))) = (&kept, &self.temporary) {
            // What remains is removed by the next one who comes.
            let _ = std::fs::remove_file(path);
        }
        Ok(Kept { file, not_kept: kept.err().map(|error| error.at_path(cache.path())) })
    }

    fn try_keep(&self, cache: &Cache, chain: &Chain, filled: &Filled) -> Result<()> {
        if cache.current_identity(chain)? != cache.identity {
            return Err(Error::new(ErrorKind::InUse(
                "an image was changed while it was read".to_owned(),
            )));
        }
        self.finish(cache, chain, filled, SystemTime::now).map_err(|error| {
            let message = "the filled file can't be kept".to_owned();
            Error::new(ErrorKind::CannotCreate(message)).with_source(error)
        })
    }

    fn finish(
        &self,
        cache: &Cache,
        chain: &Chain,
        filled: &Filled,
        clock: impl FnOnce() -> SystemTime,
    ) -> io::Result<()> {
        let sources = chain.layers().iter().flat_map(|layer| layer.files());
        // Of an image without a path of its own it can't be told when it is gone.
        let origins: Vec<_> =
            sources.filter_map(|(_, file)| Origin::of(file.path()).ok()).collect();
        // What takes long comes before the file is given its time: all of the data is read
        // once more for the checksums, and written to the disk.
        let (length, identity) = (cache.scratch_length, cache.identity);
        let trailer =
            Trailer::write_lists(&self.writer, length, identity, &filled.zero_runs, &origins)?;
        self.writer.sync_all()?;
        // In whole seconds, of which every file system keeps the even ones.
        let now = clock().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let modified = now.as_secs() & !1;
        let recorded = i64::try_from(modified).unwrap_or(0);
        trailer.write_header(&self.writer, recorded)?;
        self.writer.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(modified))?;
        self.writer.sync_all()?;
        match &self.temporary {
            Some((path, _)) => std::fs::rename(path, cache.path())?,
            None => name_file(&self.writer, &cache.path())?,
        }
        File::open(&cache.directory)?.sync_all()
    }
}

/// Waits until a change of a file that has this time is sure to give it another.
pub(crate) fn wait_for_the_clock((seconds, nanoseconds): (i64, i64)) {
    let tick = if nanoseconds == 0 { COARSE_TICK } else { CLOCK_TICK };
    let (seconds, nanoseconds) = (u64::try_from(seconds), u32::try_from(nanoseconds));
    let then = Duration::new(seconds.unwrap_or(0), nanoseconds.unwrap_or(0));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    // A time in the future is a clock's fault, and nothing to wait for.
    if let Some(age) = now.checked_sub(then)
        && let Some(rest) = tick.checked_sub(age)
    {
        std::thread::sleep(rest);
    }
}

/// Gives a file without a name this one, from whatever has it.
fn name_file(file: &File, path: &Path) -> io::Result<()> {
    let mut attempt = 0;
    loop {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let from = descriptor_path(file);
        match linkat(AT_FDCWD, &from, AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW) {
            Ok(()) => return Ok(()),
            Err(nix::errno::Errno::EEXIST) if attempt < NAMING_ATTEMPTS => attempt += 1,
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Opens for reading a file that nobody but this user can have made.
pub(super) fn open_ours(path: &Path) -> io::Result<(File, Metadata)> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    let ours = metadata.file_type().is_file()
        && metadata.uid() == geteuid().as_raw()
        && metadata.mode() & 0o022 == 0;
    if ours {
        Ok((file, metadata))
    } else {
        Err(io::Error::other("it is not a file that only we can write"))
    }
}

/// Refuses a directory in which others could put files in the place of ours.
fn check_owner(directory: &Path) -> Result<()> {
    let refuse = |why: String| {
        let message = format!(
            "no file can be kept in this directory: {why}; choose one of your own with --cache-dir"
        );
        Err(Error::new(ErrorKind::CannotCreate(message)).at_path(directory))
    };
    let metadata = match directory.metadata() {
        Ok(metadata) if metadata.is_dir() => metadata,
        Ok(_) => return refuse("it is not one".to_owned()),
        Err(error) => return refuse(error.to_string()),
    };
    let (owner, mode) = (metadata.uid(), metadata.mode());
    if owner != 0 && owner != geteuid().as_raw() {
        return refuse(format!("it belongs to user {owner}"));
    }
    // In a sticky one nobody can take another's files away.
    if mode & 0o022 != 0 && mode & libc::S_ISVTX == 0 {
        return refuse(format!("others can write in it (its mode is {:o})", mode & 0o7777));
    }
    Ok(())
}

/// A name that the same images at the same place have again, so that a changed image's
/// file takes the place of the old one.
fn file_name(chain: &Chain) -> String {
    let mut hash = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    for layer in chain.layers() {
        add(layer.image.format().name().as_bytes());
        for (role, source) in layer.files() {
            let path = std::fs::canonicalize(source.path());
            let path = path.unwrap_or_else(|_| source.absolute_path());
            add(&[role as u8]);
            add(path.as_os_str().as_bytes());
        }
        if let Some(snapshot) = layer.image.snapshot() {
            add(snapshot.id.as_bytes());
            add(snapshot.name.as_bytes());
        }
    }
    let mut name = hash.finalize().to_hex().to_string();
    name.truncate(32);
    // For the people who look into the directory; the hash alone tells files apart.
    let stem = chain.layers()[0].source.path().file_stem().map(OsStr::to_string_lossy);
    let stem: String = stem
        .unwrap_or_default()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
        .take(64)
        .collect();
    format!("{stem}-{name}{SUFFIX}")
}

fn role_of(job: &ScratchJob) -> FileRole {
    match job.what {
        ScratchContent::Inflate { .. } => FileRole::Image,
        ScratchContent::Copy { role, .. } => role,
    }
}

fn source_of(chain: &Chain, layer: u32, role: FileRole) -> Option<&Source> {
    chain.layers().get(layer as usize).map(|layer| layer.file(role).as_ref())
}

/// Hashes jobs. Most follow on the one before in all but their place in the file: for those
/// only that is hashed, since an image has millions.
struct JobHasher {
    hash: blake3::Hasher,
    /// What is to be hashed: by little pieces that would be slow.
    bytes: Vec<u8>,
    last: Option<ScratchJob>,
    /// Where the stream before starts.
    last_host: u64,
}

impl JobHasher {
    const BUFFER: usize = 16 << 10;
    /// Bytes of a job at most: a tag and eight numbers of up to ten.
    const LONGEST: usize = 1 + 8 * 10;

    fn new(hash: blake3::Hasher) -> Self {
        Self { hash, bytes: Vec::with_capacity(Self::BUFFER), last: None, last_host: 0 }
    }

    fn add(&mut self, job: &ScratchJob) {
        if self.bytes.len() + Self::LONGEST > Self::BUFFER {
            self.hash.update(&self.bytes);
            self.bytes.clear();
        }
        let place = [job.at, job.length, job.guest.get(), u64::from(job.layer)];
        // A tag has always as many numbers, and each of them its end, so that no two lists
        // of jobs come to the same bytes.
        match job.what {
            ScratchContent::Inflate { host, stream_length, cluster } => {
                let follows =
                    self.last.map(|last| successor(&last)) == Some((place, cluster.get()));
                if follows {
                    self.push(1, &[]);
                } else {
                    self.push(2, &place);
                    self.push_number(cluster.get());
                }
                self.push_number(host.get().wrapping_sub(self.last_host));
                self.push_number(stream_length.get());
                self.last_host = host.get();
            }
            ScratchContent::Copy { role, host, bytes } => {
                self.push(3, &place);
                for number in [role as u64, host.get(), bytes] {
                    self.push_number(number);
                }
            }
        }
        self.last = Some(*job);
    }

    fn push(&mut self, tag: u8, numbers: &[u64]) {
        self.bytes.push(tag);
        numbers.iter().for_each(|&number| self.push_number(number));
    }

    /// Seven bits a byte, the lowest first; the last byte has its highest bit clear.
    #[allow(clippy::cast_possible_truncation)] // Of seven bits.
    fn push_number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.bytes.push((number & 0x7f) as u8 | 0x80);
            number >>= 7;
        }
        self.bytes.push((number & 0x7f) as u8);
    }

    fn finish(mut self) -> blake3::Hasher {
        self.hash.update(&self.bytes);
        self.hash
    }
}

/// Place and cluster of the job for the whole cluster behind that of `job`.
fn successor(job: &ScratchJob) -> ([u64; 4], u64) {
    let guest = job.guest.get().wrapping_add(job.length);
    ([job.at.wrapping_add(job.length), job.length, guest, u64::from(job.layer)], guest)
}

#[cfg(test)]
mod tests;
