//! `imgdm report`: the record of an evidence attachment, and what is now.

use std::io::Write;
use std::path::{Path, PathBuf};

use imgdm::device::detach::find;
use imgdm::device::linux::LinuxKernel;
use imgdm::device::list::Attached;
use imgdm::device::verify::Verifier;
use imgdm::error::printable;
use imgdm::source::FileId;
use imgdm::{Error, ErrorKind, Result};

use super::evidence::record::{Act, FileState, Record, RecordedFile, State, is_change};
use super::evidence::{in_full, read_record, record_path};
use super::output::{OutputFormat, print_json, show_path, stdout};
use super::verify::described;
use super::{Globals, signal, workers};

/// Print the record of an evidence attachment, beside what is now
///
/// What is now: whether the device is attached, its tables are those that the image gives and
/// nothing of it can be written to, as 'imgdm verify' finds it; and whether the files are as
/// the record has them, by what the file system says of them.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm report disk\n  imgdm report --output=json disk | jq .now\n  imgdm report disk.evidence.json               also after it was detached\n\nExits with 1 where anything is not as it was recorded."
)]
pub(crate) struct Args {
    /// What to report on: a NAME, /dev/mapper/NAME, the path of an image, or that of a record
    #[arg(value_name = "NAME|PATH", required_unless_present = "record")]
    target: Option<PathBuf>,

    /// The record's file, where it is not known any more
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,

    /// How to print
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,
}

/// What is found beside the record.
#[derive(serde::Serialize)]
struct Now {
    at: String,
    /// Null where that can't be told: it needs root.
    attached: Option<bool>,
    /// Live tables, files in their places, and that nothing can be written to: as
    /// `imgdm verify` has it. Null where it is not attached.
    verified: Option<bool>,
    findings: Vec<String>,
    files: Vec<FileNow>,
    /// All is as it was recorded.
    as_recorded: bool,
}

#[derive(serde::Serialize)]
struct FileNow {
    #[serde(flatten)]
    path: super::output::JsonPath,
    /// What is not as it was when the record was last written; only that it was read is
    /// `accessed`.
    changed: Vec<String>,
    /// Why it can't be looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

#[derive(serde::Serialize)]
struct Report<'r> {
    record: &'r Record,
    now: Now,
}

pub(crate) fn run(args: &Args, _: Globals) -> anyhow::Result<()> {
    workers::prepare()?;
    let interrupt = signal::catch()?;
    let kernel = LinuxKernel::new();
    let (record, device) = find_both(args, &kernel)?;
    let mut now = Now {
        at: super::evidence::record::now(),
        attached: device.as_ref().ok().map(Option::is_some),
        verified: None,
        findings: Vec::new(),
        files: record.files.iter().map(file_now).collect(),
        as_recorded: false,
    };
    if let Ok(Some(attached)) = &device {
        // The path as it was then: the kernel knows it only as long as a loop is there.
        let image = record.files.first().map(RecordedFile::path);
        let verified = Verifier::open(&kernel, attached.clone(), image.as_deref())
            .and_then(|verifier| verifier.run(None, &|_| interrupt.check()));
        interrupt.check()?;
        match verified {
            Ok(verified) => {
                now.verified = Some(verified.is_same());
                now.findings.extend(verified.findings().iter().map(described));
            }
            Err(error) => {
                now.verified = Some(false);
                now.findings.push(in_full(&error));
            }
        }
    }
    if let Some(finding) = finding(record.state, &device) {
        now.findings.push(finding);
    }
    let is_good = |file: &FileNow| file.problem.is_none() && !is_change(&file.changed);
    now.as_recorded = now.findings.is_empty()
        && now.verified != Some(false)
        && now.files.iter().all(is_good)
        && record.files.iter().all(|file| {
            file.problem.is_none() && !is_change(file.changed.as_deref().unwrap_or_default())
        });
    let as_recorded = now.as_recorded;
    match args.output {
        OutputFormat::Json => print_json(&Report { record: &record, now })?,
        OutputFormat::Human => print_human(&record, &now)?,
    }
    anyhow::ensure!(as_recorded, "not all is as it was recorded");
    Ok(())
}

/// What is attached of a record; an error where the kernel does not tell.
type Device = Result<Option<Attached>>;

/// The record, and the attachment, where it is there.
fn find_both(args: &Args, kernel: &LinuxKernel) -> anyhow::Result<(Record, Device)> {
    let by_uuid = |record: &Record| -> Device {
        match imgdm::device::list::list(kernel) {
            Ok(all) => {
                Ok(all.into_iter().find(|attached| attached.uuid.to_string() == record.uuid))
            }
            // Without device-mapper nothing is attached.
            Err(error) if matches!(error.kind(), ErrorKind::KernelLacks(_)) => Ok(None),
            Err(error) => Err(error),
        }
    };
    let by_path = |path: &Path| -> Result<(Record, Device)> {
        let record = read_record(&end_of_links(path))?;
        let device = by_uuid(&record);
        Ok((record, device))
    };
    let Some(target) = &args.target else {
        return Ok(by_path(args.record.as_deref().unwrap_or(Path::new("")))?);
    };
    match find(kernel, target, FileId::of_path(target)) {
        Ok(attached) => {
            let named = args.record.as_deref().map(end_of_links);
            let known = named.or_else(|| record_path(&attached.uuid));
            let path = known.ok_or_else(|| {
                let name = printable(&attached.name);
                let message = format!("no record of '{name}' is known: it was attached without --evidence, or give --record FILE");
                Error::new(ErrorKind::NotFound(message))
            })?;
            let record = read_record(&path)?;
            if record.uuid != attached.uuid.to_string() {
                let message = "this is the record of another attachment".to_owned();
                return Err(Error::new(ErrorKind::Usage(message)).at_path(path).into());
            }
            Ok((record, Ok(Some(attached))))
        }
        Err(not_attached) => match &args.record {
            Some(path) => Ok(by_path(path)?),
            None if target.is_file() => Ok(by_path(target)?),
            None => Err(not_attached.into()),
        },
    }
}

/// What is to be said of the device, by how far its record got.
fn finding(state: State, device: &Device) -> Option<String> {
    let text = match (state, device) {
        (State::Detached, _) | (State::Attached | State::Detaching, Ok(Some(_))) => return None,
        (_, Err(error)) => {
            return Some(format!("can't tell whether it is attached: {}", in_full(error)));
        }
        (State::Attached | State::Detaching, Ok(None)) => {
            "the device went without 'imgdm detach': its files were not hashed again"
        }
        (State::Attaching, Ok(Some(_))) => "attaching was cut off: the record was not completed",
        (State::Attaching, Ok(None)) => "attaching was cut off: nothing is attached",
    };
    Some(text.to_owned())
}

/// The record that the user names, by a link perhaps.
fn end_of_links(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

fn file_now(file: &RecordedFile) -> FileNow {
    let last = file.after.as_ref().unwrap_or(&file.before);
    let (changed, problem) = match FileState::of_path(&file.path()) {
        Ok(now) => (last.differences(&now), None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    FileNow { path: file.path.clone(), changed, problem }
}

fn print_human(record: &Record, now: &Now) -> anyhow::Result<()> {
    let mut out = stdout()?;
    let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".to_owned());
    writeln!(out, "{}: {}", printable(&record.name), record.state.name())?;
    writeln!(out, "  UUID:            {}", printable(&record.uuid))?;
    writeln!(out, "  virtual size:    {}", record.virtual_size)?;
    if let Some(snapshot) = &record.snapshot {
        let (id, name) = (printable(&snapshot.id), printable(&snapshot.name));
        writeln!(out, "  snapshot:        {name} (ID {id})")?;
    }
    writeln!(out, "  sha256 of table: {}", printable(&record.table_sha256))?;
    writeln!(out, "  sha256 of disk:  {}", printable(&or_none(&record.device_sha256)))?;
    for warning in &record.warnings {
        writeln!(out, "  warning:         {}", printable(warning))?;
    }
    print_act(&mut out, "attach", &record.attach)?;
    if let Some(act) = &record.detach {
        print_act(&mut out, "detach", act)?;
    }
    for layer in &record.chain {
        let how = if layer.format_declared { "declared" } else { "probed" };
        writeln!(
            out,
            "  layer {}: {}, {how}, {} bytes",
            layer.depth,
            printable(&layer.format),
            layer.virtual_size
        )?;
        let files =
            record.files.iter().zip(&now.files).filter(|(file, _)| file.layer == layer.depth);
        for (file, file_now) in files {
            print_file(&mut out, file, file_now)?;
        }
    }
    let attached = match now.attached {
        Some(true) => "attached",
        Some(false) => "not attached",
        None => "can't tell whether it is attached",
    };
    let verified = match now.verified {
        Some(true) => ", its tables are those of the image, and nothing can be written to",
        _ => "",
    };
    writeln!(out, "now, {}: {attached}{verified}", now.at)?;
    for finding in &now.findings {
        writeln!(out, "  {finding}")?;
    }
    out.flush()?;
    Ok(())
}

fn print_act(out: &mut impl Write, what: &str, act: &Act) -> std::io::Result<()> {
    let finished = act.finished.as_deref().unwrap_or("(cut off)");
    let login = act.by.login_uid.map(|uid| format!(", logged in as {uid}")).unwrap_or_default();
    let sudo = act.by.sudo_user.as_deref().map(|user| format!(", by sudo of {user}"));
    let host = act.hostname.as_deref().unwrap_or("?");
    writeln!(out, "  {what}:          {} to {}", printable(&act.started), printable(finished))?;
    writeln!(
        out,
        "    {} on {}, uid {}{login}{}",
        printable(&act.tool),
        printable(host),
        act.by.uid,
        printable(&sudo.unwrap_or_default())
    )?;
    writeln!(out, "    {}", printable(&act.arguments.join(" ")))
}

fn print_file(out: &mut impl Write, file: &RecordedFile, now: &FileNow) -> std::io::Result<()> {
    writeln!(out, "    {} ({})", show_path(&file.path()), printable(&file.role))?;
    for (when, state) in [("before", Some(&file.before)), ("after", file.after.as_ref())] {
        let Some(state) = state else { continue };
        let hash = state.sha256.as_deref().unwrap_or("unknown");
        writeln!(out, "      {when}: {} bytes, sha256 {}", state.size, printable(hash))?;
    }
    if let Some(changed) = file.changed.as_ref().filter(|changed| !changed.is_empty()) {
        writeln!(out, "      changed while attached: {}", printable(&changed.join(", ")))?;
    }
    for problem in file.problem.iter().chain(&now.problem) {
        writeln!(out, "      {}", printable(problem))?;
    }
    if !now.changed.is_empty() {
        writeln!(out, "      changed since: {}", now.changed.join(", "))?;
    }
    Ok(())
}
