//! `attach --evidence`: what it refuses, and the record that it keeps.
//!
//! The record is written before there is a device and completed at each step, always whole:
//! what a kill cuts off says how far it got. Where the record of a device lies, a symbolic
//! link by the device's UUID tells, in a directory that goes with the next boot as the
//! device does.

pub(crate) mod detach;
pub(crate) mod record;

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgdm::chain::Chain;
use imgdm::device::attach::Options;
use imgdm::device::name::{DmName, DmUuid};
use imgdm::device::writers::{CanWrite, can_write};
use imgdm::device::{Interrupt, fault};
use imgdm::hash::{Algorithm, hash_file};
use imgdm::lock::Sharing;
use imgdm::open::OpenPolicy;
use imgdm::plan::Plan;
use imgdm::scratch::{OnError, ScratchWork};
use imgdm::source::{FileId, Source};
use imgdm::units::ByteLen;
use imgdm::{Error, ErrorKind, Result};
use nix::libc;

use super::Globals;
use super::output::{JsonPath, show_path};
use super::save::{save_new, save_over};
use super::scratch::{Compressed, ContentArgs, PlaceArgs};
use super::table::table_digest;
use record::{Act, FileState, Record, RecordedFile, RecordedSnapshot, State, VERSION};

/// Links by UUID to the records of what is attached.
const LINKS: &str = "/run/imgdm/evidence";
/// Bytes of a record, at most: one of 1024 files has less than two million.
const RECORD_MAX: u64 = 64 << 20;

/// Arguments of an attachment that a record is kept of.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct EvidenceArgs {
    /// Keep a record of the attachment in REPORT (default: NAME.evidence.json, in the working
    /// directory): its files with times and sha256, now and at detach, the chain, who and
    /// when. Refuses whatever would leave a trace on the files or in what is read of them
    #[arg(
        long,
        value_name = "REPORT",
        num_args = 0..=1,
        require_equals = true,
        conflicts_with = "overlay"
    )]
    evidence: Option<Option<PathBuf>>,

    /// Read all of the device after attaching it, and put its sha256 into the record
    #[arg(long, requires = "evidence")]
    hash: bool,
}

/// What an evidence attachment is to be made of.
pub(crate) struct Planned<'a> {
    pub(crate) chain: &'a Chain,
    pub(crate) plan: &'a Plan<'a>,
    pub(crate) name: &'a DmName,
    pub(crate) uuid: &'a DmUuid,
    pub(crate) content: ContentArgs,
    pub(crate) places: &'a PlaceArgs,
    /// What the user was warned of.
    pub(crate) warnings: &'a [String],
    pub(crate) interrupt: &'a Interrupt<'a>,
}

fn refused(message: String) -> Error {
    Error::new(ErrorKind::Usage(format!("--evidence: {message}")))
}

impl EvidenceArgs {
    /// True where a record is to be kept.
    pub(crate) fn is_given(&self) -> bool {
        self.evidence.is_some()
    }

    /// Has the files lie in the directory of the image, or where this very command line
    /// allows: what the machine allows for its own images says nothing of a stranger's.
    pub(crate) fn narrow(&self, policy: &mut OpenPolicy) {
        if self.is_given() {
            policy.reach.policy_file = None;
        }
    }

    /// Refuses what does not go with evidence, before any file is opened.
    ///
    /// # Errors
    /// `Usage`, naming the option.
    pub(crate) fn check(&self, policy: &OpenPolicy, options: &Options) -> Result<()> {
        if !self.is_given() {
            return Ok(());
        }
        let refused_with = [
            (
                policy.sharing == Sharing::Writers,
                "--force-share",
                "the files could be written to meanwhile",
            ),
            (
                policy.allow_changed_backing,
                "--allow-changed-backing",
                "what is read would be nobody's disk",
            ),
            (policy.probe_backing, "--probe-backing", "what is read would rest on a guess"),
            (
                options.on_error == OnError::Zero,
                "--on-error=zero",
                "zeros would stand for what can't be read (--on-error=error-target lets reading it fail)",
            ),
            (
                options.direct_block,
                "--direct-block",
                "neither the locks nor the loop device's guard against writes would last",
            ),
            (options.publish, "--publish", "the host would look into the device"),
        ];
        match refused_with.iter().find(|(given, ..)| *given) {
            Some((_, option, why)) => Err(refused(format!("not with {option}: {why}"))),
            None => Ok(()),
        }
    }

    /// Refuses files on which reading them would leave a trace, or that somebody can write to;
    /// gives a warning of each of which that can't be told.
    ///
    /// # Errors
    /// `PermissionDenied` or `InUse`, naming the file.
    pub(crate) fn check_files(&self, chain: &Chain) -> Result<Vec<String>> {
        let mut unknown = Vec::new();
        for (.., file) in sources(chain).filter(|_| self.is_given()) {
            if !file.leaves_access_time() {
                let message = "--evidence: it can't be read without changing its access time (O_NOATIME): be its owner, or root";
                return Err(Error::new(ErrorKind::PermissionDenied(message.to_owned()))
                    .at_path(file.path()));
            }
            match can_write(file) {
                CanWrite::Nobody => {}
                CanWrite::Somebody(who) => {
                    let who = match who.as_slice() {
                        [] => "somebody who can't be found".to_owned(),
                        who => who.join(", "),
                    };
                    let message = format!("--evidence: it can be written to meanwhile, by {who}");
                    return Err(Error::new(ErrorKind::InUse(message)).at_path(file.path()));
                }
                CanWrite::Unknown => unknown.push(format!(
                    "{}: whether anybody has it open for writing can't be told here",
                    show_path(file.path())
                )),
            }
        }
        Ok(unknown)
    }

    /// Refuses to take the record that there is of an attachment for the one asked for, where
    /// it is not.
    ///
    /// # Errors
    /// `InUse`: another REPORT is asked for, or a hash that it has not.
    pub(crate) fn check_record_of(&self, uuid: &DmUuid) -> Result<()> {
        let Some(report) = &self.evidence else { return Ok(()) };
        let known = record_path(uuid);
        let is_other = report.as_ref().is_some_and(|report| {
            let report = std::path::absolute(report).unwrap_or_else(|_| report.clone());
            known.as_ref() != Some(&report)
        });
        let record = known.as_deref().map(read_record);
        let has_hash = matches!(&record, Some(Ok(Record { device_sha256: Some(_), .. })));
        let why = match (is_other, self.hash && !has_hash) {
            (true, _) => "it gets no other",
            (_, true) => "which has no sha256 of the device, and gets none later",
            (false, false) => return Ok(()),
        };
        let place = known.map_or_else(|| "not known any more".to_owned(), |path| show_path(&path));
        let message =
            format!("it is attached already, and its record is {place}: {why} (detach it first)");
        Err(Error::new(ErrorKind::InUse(message)))
    }

    /// Hashes the files and writes the record; none where no record is to be kept.
    ///
    /// # Errors
    /// Something would leave a trace; a file can't be read; the record can't be written.
    pub(crate) fn begin(
        &self,
        planned: &Planned<'_>,
        globals: Globals,
    ) -> anyhow::Result<Option<Evidence>> {
        let Some(report) = &self.evidence else { return Ok(None) };
        let act = Act::begin();
        let default = || PathBuf::from(format!("./{}.evidence.json", planned.name.as_str()));
        let report = std::path::absolute(report.clone().unwrap_or_else(default))?;
        writes_elsewhere(planned, &report)?;
        if report.symlink_metadata().is_ok() {
            let message = "something of that name is there already: give --evidence=REPORT another";
            return Err(Error::new(ErrorKind::CannotCreate(message.to_owned()))
                .at_path(report)
                .into());
        }
        let (chain, active) = (planned.chain, &planned.chain.layers()[0]);
        let files: Vec<Arc<Source>> = sources(chain).map(|(.., file)| Arc::clone(file)).collect();
        let hashes = hash_files(&files, planned.interrupt, globals)?;
        let mut recorded = Vec::new();
        for ((layer, role, file), hash) in sources(chain).zip(hashes) {
            recorded.push(RecordedFile {
                layer,
                role: record::role_name(role).to_owned(),
                path: JsonPath::from(file.absolute_path().as_path()),
                before: FileState { sha256: Some(hash?), ..FileState::of(file)? },
                after: None,
                changed: None,
                problem: None,
            });
        }
        let record = Record {
            imgdm_evidence: VERSION,
            state: State::Attaching,
            name: planned.name.as_str().to_owned(),
            uuid: planned.uuid.to_string(),
            virtual_size: chain.virtual_size().get(),
            snapshot: active.image.snapshot().map(|snapshot| RecordedSnapshot {
                id: snapshot.id.clone(),
                name: snapshot.name.clone(),
            }),
            chain: record::layers(chain)?,
            files: recorded,
            table_sha256: table_digest(planned.plan)?.to_string(),
            device_sha256: None,
            warnings: planned.warnings.to_vec(),
            attach: act,
            detach: None,
        };
        save_new(&report, &text_of(&record)?)?;
        let evidence = Evidence {
            path: report,
            record,
            device_hash: self.hash,
            remembered: false,
            stays: false,
        };
        fault::point(format_args!("evidence.record"))?;
        if !globals.quiet {
            let path = show_path(&evidence.path);
            let _ = writeln!(std::io::stderr(), "imgdm: the record of this evidence is {path}");
        }
        Ok(Some(evidence))
    }
}

/// Refuses to write anything to the directories of the files.
fn writes_elsewhere(planned: &Planned<'_>, report: &Path) -> Result<()> {
    let beside: BTreeSet<FileId> = sources(planned.chain)
        .filter(|(.., file)| !file.is_block_device())
        .filter_map(|(.., file)| FileId::of_path(file.path().canonicalize().ok()?.parent()?))
        .collect();
    let is_beside =
        |directory: &Path| FileId::of_path(directory).is_some_and(|id| beside.contains(&id));
    let refuse = |directory: &Path, what: &str, how: &str| {
        let what = format!("{what} would be written to the directory of the evidence: {how}");
        Err(refused(what).at_path(directory))
    };
    if let Some(directory) = report.parent().filter(|directory| is_beside(directory)) {
        return refuse(directory, "the record", "give --evidence=REPORT elsewhere");
    }
    if planned.plan.scratch_bytes() == 0 {
        return Ok(());
    }
    let places: Vec<&Path> = match (planned.content.compressed, &planned.places.scratch_dir) {
        (Compressed::Cache, _) => vec![&planned.places.cache_dir],
        (_, Some(directory)) => vec![directory],
        (_, None) => ["/var/tmp", "/run"].map(Path::new).to_vec(),
    };
    match places.into_iter().find(|directory| is_beside(directory)) {
        Some(directory) => refuse(directory, "the scratch file", "give --scratch-dir elsewhere"),
        None => Ok(()),
    }
}

/// All files of a chain, with the depths of their layers and their roles.
fn sources(chain: &Chain) -> impl Iterator<Item = (u32, imgdm::status::FileRole, &Arc<Source>)> {
    let layers = (0..).zip(chain.layers());
    layers.flat_map(|(depth, layer)| layer.files().map(move |(role, file)| (depth, role, file)))
}

/// The sha256 of each file; of those that can't be read, why.
///
/// # Errors
/// A signal.
fn hash_files(
    files: &[Arc<Source>],
    interrupt: &Interrupt<'_>,
    globals: Globals,
) -> Result<Vec<Result<String>>> {
    let total = files.iter().map(|file| file.length().get()).fold(0, u64::saturating_add);
    let bar = globals.progress(total, "hashing the files");
    let mut before = 0u64;
    let mut hashes = Vec::new();
    for file in files {
        let tick = |done: ByteLen| {
            bar.set_position(before.saturating_add(done.get()));
            interrupt.check()
        };
        let hashed = sha256(file, &tick);
        interrupt.check()?;
        hashes.push(hashed);
        before = before.saturating_add(file.length().get());
    }
    bar.finish_and_clear();
    Ok(hashes)
}

fn sha256(file: &Arc<Source>, tick: &imgdm::hash::Tick<'_>) -> Result<String> {
    let digests = hash_file(file, &[Algorithm::Sha256].into(), tick)?;
    let digest = digests.get(&Algorithm::Sha256);
    Ok(digest.map(ToString::to_string).unwrap_or_default())
}

fn text_of(record: &Record) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(record)
        .map_err(|error| Error::io("cannot write the record", error.into()))?;
    text.push(b'\n');
    Ok(text)
}

/// The record of an attachment that is being made. Dropped before it [stays](Self::stays), or
/// where it [goes](Self::goes), the record goes: there will be no device either.
#[must_use = "dropped, it takes the record away"]
pub(crate) struct Evidence {
    path: PathBuf,
    record: Record,
    device_hash: bool,
    /// The link leads to this record.
    remembered: bool,
    stays: bool,
}

impl Drop for Evidence {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        if self.remembered {
            unlink(&self.record.uuid);
        }
        let _ = fs::remove_file(&self.path);
    }
}

impl Evidence {
    /// From now on the record can be found by the device, which this run has made: under the
    /// lock of the one who makes it, so that nobody else remembers another.
    ///
    /// # Errors
    /// The link can't be made.
    pub(crate) fn remember(&mut self) -> Result<()> {
        link(&self.record.uuid, &self.path)?;
        self.remembered = true;
        Ok(())
    }

    /// The device is there: notes that, and with `--hash` what it gives.
    ///
    /// # Errors
    /// The device can't be read, the record can't be written, or a signal came: then the
    /// device has to go.
    pub(crate) fn attached(
        &mut self,
        device: &Path,
        interrupt: &Interrupt<'_>,
        globals: Globals,
    ) -> Result<()> {
        fault::point(format_args!("evidence.commit"))?;
        self.record.state = State::Attached;
        self.record.attach.finished = Some(record::now());
        self.save()?;
        fault::point(format_args!("evidence.attached"))?;
        if !self.device_hash {
            return Ok(());
        }
        let source = Arc::new(Source::open(device)?);
        let bar = globals.progress(source.length().get(), "hashing the device");
        let hashed = sha256(&source, &|done| {
            bar.set_position(done.get());
            interrupt.check()
        });
        bar.finish_and_clear();
        self.record.device_sha256 = Some(hashed?);
        self.record.attach.finished = Some(record::now());
        self.save()
    }

    /// The device is there for good, as far as anybody knows.
    pub(crate) fn stays(&mut self) {
        self.stays = true;
    }

    /// The device is gone again.
    pub(crate) fn goes(mut self) {
        self.stays = false;
    }

    fn save(&self) -> Result<()> {
        save_over(&self.path, &text_of(&self.record)?)
    }
}

fn link_of(uuid: &str) -> PathBuf {
    Path::new(LINKS).join(uuid)
}

/// An error with its file and its causes.
pub(crate) fn in_full(error: &Error) -> String {
    match error.path() {
        Some(path) => format!("{}: {}", show_path(path), error.without_path()),
        None => error.without_path(),
    }
}

/// Remembers where the record of a device is.
fn link(uuid: &str, record: &Path) -> Result<()> {
    let link = link_of(uuid);
    let make = || -> std::io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(LINKS)?;
        // Of an earlier attachment that was removed without imgdm.
        remove_link(&link)?;
        std::os::unix::fs::symlink(record, &link)
    };
    make().map_err(|error| {
        let message = "cannot note where the record is".to_owned();
        Error::new(ErrorKind::CannotCreate(message)).with_source(error).at_path(&link)
    })
}

fn unlink(uuid: &str) {
    let _ = remove_link(&link_of(uuid));
}

/// Removes a symbolic link, where it is there; anything else stays.
fn remove_link(link: &Path) -> std::io::Result<()> {
    match link.symlink_metadata() {
        Ok(metadata) if metadata.is_symlink() => fs::remove_file(link),
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Keeps a record that can't be written where it belongs, under a name that no other has.
///
/// # Errors
/// Nor can it be written there.
fn rescue(record: &Record) -> Result<PathBuf> {
    let place = Path::new(LINKS).join(format!("{}.{}.json", record.uuid, record::now()));
    save_new(&place, &text_of(record)?)?;
    Ok(place)
}

/// Where the record of the device of that UUID is, as far as that is known.
pub(crate) fn record_path(uuid: &DmUuid) -> Option<PathBuf> {
    fs::read_link(link_of(&uuid.to_string())).ok()
}

/// Reads a record, through no symbolic link.
///
/// # Errors
/// It can't be read, or is none of this imgdm's.
pub(crate) fn read_record(path: &Path) -> Result<Record> {
    let failed = |error| Error::io("cannot read the record", error).at_path(path);
    let not_one = |why: String| {
        let message = format!("this is no record of an evidence attachment: {why}");
        Error::invalid(message).at_path(path)
    };
    let no_file = || not_one("it is no regular file".to_owned());
    if !path.symlink_metadata().map_err(failed)?.is_file() {
        return Err(no_file());
    }
    // Whatever has come there since, it is not waited for.
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(no_file());
    }
    let mut text = Vec::new();
    file.take(RECORD_MAX + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > RECORD_MAX {
        return Err(not_one(format!("it is longer than {RECORD_MAX} bytes")));
    }
    let record: Record =
        serde_json::from_slice(&text).map_err(|error| not_one(error.to_string()))?;
    match record.imgdm_evidence {
        VERSION => Ok(record),
        other => Err(not_one(format!("version {other}, and this imgdm knows {VERSION}"))),
    }
}
