//! Partition tables beside libblkid's reading of them (`partx`).

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use imgdm::partition::{self, Disk, Unusable};
use imgdm::units::{ByteLen, GuestOffset};

use crate::common::images::scratch_dir;
use crate::common::process::{Outcome, run};
use crate::common::rng::Rng;

const MIB: u64 = 1 << 20;
pub(crate) const DISK_BYTES: u64 = 64 * MIB;

pub(crate) struct FileDisk(pub(crate) File);

impl Disk for FileDisk {
    fn size(&self) -> ByteLen {
        ByteLen::new(self.0.metadata().unwrap().len())
    }

    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> imgdm::Result<()> {
        self.0.read_exact_at(buffer, offset.get()).unwrap();
        Ok(())
    }
}

/// A partition as both tell it: number, first sector, sectors, type, UUID, name, flags and
/// the table's kind.
pub(crate) type Row = (u32, u64, u64, String, String, String, u64, String);

fn ours(image: &Path) -> Vec<Row> {
    let mut disk = FileDisk(File::open(image).unwrap());
    let table = partition::read(&mut disk).unwrap();
    let partitions = table.into_iter().flat_map(|table| table.partitions);
    let row = |p: partition::Partition| {
        let kind = p.kind.map(|kind| kind.to_string()).unwrap_or_default();
        (
            p.number,
            p.range.start.get() / 512,
            p.range.length().get() / 512,
            kind,
            p.uuid.unwrap_or_default(),
            p.name.unwrap_or_default(),
            p.flags,
            p.table.name().to_owned(),
        )
    };
    partitions.map(row).collect()
}

pub(crate) fn partx(image: &Path) -> Outcome<Vec<Row>> {
    let columns = "NR,START,SECTORS,TYPE,UUID,NAME,FLAGS,SCHEME";
    let ran = run(Command::new("partx").args(["--pairs", "-o", columns]).arg(image))?;
    if ran.stderr.contains("failed to read partition table") {
        return Ok(Vec::new());
    }
    let ran = ran.ok()?;
    let mut rows = Vec::new();
    for line in ran.text().lines() {
        let field = |name: &str| -> Outcome<String> {
            let start = format!("{name}=\"");
            let rest = line.split_once(&start).ok_or_else(|| format!("{name} in {line}"))?.1;
            Ok(rest.split_once('"').ok_or_else(|| format!("no end: {line}"))?.0.to_owned())
        };
        let number = |name: &str| -> Outcome<u64> {
            let text = field(name)?;
            let parsed = match text.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16),
                None if text.is_empty() => Ok(0),
                None => text.parse(),
            };
            parsed.map_err(|error| format!("{name} in {line}: {error}"))
        };
        rows.push((
            u32::try_from(number("NR")?).map_err(|error| error.to_string())?,
            number("START")?,
            number("SECTORS")?,
            field("TYPE")?,
            field("UUID")?,
            field("NAME")?,
            number("FLAGS")?,
            field("SCHEME")?,
        ));
    }
    Ok(rows)
}

/// Writes a table as sfdisk's script describes it.
pub(crate) fn sfdisk(image: &Path, script: &str) -> Outcome {
    File::create(image).and_then(|file| file.set_len(DISK_BYTES)).map_err(|e| e.to_string())?;
    let mut sfdisk = Command::new("sfdisk");
    sfdisk.args(["--quiet", "--no-reread", "--no-tell-kernel", "--force"]).arg(image);
    run_with_input(&mut sfdisk, script)
}

/// Runs sfdisk with a script.
fn run_with_input(command: &mut Command, script: &str) -> Outcome {
    let mut child = command
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("sfdisk: {error}"))?;
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(script.as_bytes()).map_err(|error| error.to_string())?;
    drop(stdin);
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("sfdisk: {}\n{script}", String::from_utf8_lossy(&output.stderr)))
}

/// A script with some partitions; sfdisk refuses some, which is no matter.
fn script(rng: &mut Rng, label: &str) -> String {
    let mut script = format!("label: {label}\n");
    let mut extended = false;
    let mut at = 2048;
    for number in 1..=rng.range(1, 9) {
        let sectors = rng.range(1, 5) * 2048;
        let kind = match (label, rng.below(5)) {
            ("dos", 0) if !extended => {
                extended = true;
                script += &format!("start={at}, size={}, type=5\n", 40 * 2048);
                at += 2048;
                continue;
            }
            ("dos", 1) => "82",
            ("dos", 2) => "c, bootable",
            ("dos", _) => "83",
            ("sun", _) => "3",
            ("sgi", _) => "83",
            (_, 0) => "U, name=\"a name\"",
            (_, 1) => "S, attrs=\"LegacyBIOSBootable\"",
            _ => "L",
        };
        if label == "dos" && number > 4 && !extended {
            break;
        }
        script += &format!("start={at}, size={sectors}, type={kind}\n");
        // In an extended partition each needs room for its record.
        at += sectors + 2048 * rng.range(1, 2);
    }
    script
}

fn assert_same(image: &Path, what: &dyn Fn() -> String) -> Outcome<usize> {
    let (ours, theirs) = (ours(image), partx(image)?);
    // Logical partitions outside of the extended one count for the kernel and for libblkid
    // until 2.39, but not for later ones.
    let is_extended = |row: &Row| matches!(row.3.as_str(), "0x5" | "0xf" | "0x85");
    let areas: Vec<_> = ours.iter().filter(|row| is_extended(row)).collect();
    let strays = ours.iter().any(|row| {
        let holds = |area: &&&Row| area.1 <= row.1 && row.1 + row.2 <= area.1 + area.2;
        row.7 == "dos" && row.0 > 4 && !areas.iter().any(|area| holds(&area))
    });
    if strays {
        return Ok(0);
    }
    if ours == theirs {
        return Ok(ours.len());
    }
    Err(format!("{}\nimgdm: {ours:#?}\npartx: {theirs:#?}", what()))
}

#[test]
fn tables_of_sfdisk_are_read_as_libblkid_reads_them() {
    let dir = scratch_dir("partitions").unwrap();
    let image = dir.path().join("disk");
    let mut found = 0;
    for index in 0..80 {
        let mut rng = Rng::for_case(7, "partitions", index);
        let label = *rng.pick(&["gpt", "dos", "dos", "sun", "sgi"]);
        let script = script(&mut rng, label);
        if sfdisk(&image, &script).is_ok() {
            found += assert_same(&image, &|| script.clone()).unwrap();
        }
    }
    assert!(found > 100, "only {found} partitions were made");
}

#[test]
fn logical_partitions_out_of_order_are_read_as_libblkid_reads_them() {
    let dir = scratch_dir("partitions-backwards").unwrap();
    let image = dir.path().join("disk");
    let logical = |start: u32| format!("start={start}, size=8000, type=83\n");
    let script = format!(
        "label: dos\nstart=2048, size=100000, type=5\n{}{}{}",
        logical(4096),
        logical(20480),
        logical(40960)
    );
    sfdisk(&image, &script).unwrap();
    let in_order = ours(&image);
    let sfdisk_again = |arguments: &[&str], script: &str| {
        let mut sfdisk = Command::new("sfdisk");
        sfdisk.args(["--quiet", "--no-reread", "--no-tell-kernel"]).args(arguments);
        run_with_input(&mut sfdisk, script).unwrap();
    };
    let path = image.to_str().unwrap();
    sfdisk_again(&["--delete", path, "6"], "");
    sfdisk_again(&["--append", path], &logical(20480));
    assert_eq!(assert_same(&image, &|| script.clone()).unwrap(), in_order.len());
    let starts = |rows: &[Row]| rows.iter().map(|row| row.1).collect::<Vec<_>>();
    assert_eq!(starts(&ours(&image)), [2048, 4096, 40960, 20480]);
    let table = partition::read(&mut FileDisk(File::open(&image).unwrap())).unwrap().unwrap();
    assert_eq!(table.warnings, []);
}

#[test]
fn damaged_tables_are_read_as_libblkid_reads_them() {
    let dir = scratch_dir("partitions-damaged").unwrap();
    let image = dir.path().join("disk");
    let (mut tried, mut with_partitions) = (0, 0);
    for index in 0..24 {
        let mut rng = Rng::for_case(8, "partitions-damaged", index);
        let label = *rng.pick(&["gpt", "dos", "dos", "sun", "sgi"]);
        let script = script(&mut rng, label);
        if sfdisk(&image, &script).is_err() {
            continue;
        }
        let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
        // The tables themselves, and the records of the first logical partitions.
        let mut starts = vec![0, 512, 1024];
        if label == "gpt" {
            starts.extend([DISK_BYTES - 512, DISK_BYTES - 33 * 512]);
        }
        starts.extend(ours(&image).iter().map(|row| row.1.saturating_sub(2048) * 512));
        for _ in 0..25 {
            let at = *rng.pick(&starts)
                + if rng.percent(50) { 440 + rng.below(72) } else { rng.below(512) };
            let mut before = [0];
            file.read_exact_at(&mut before, at).unwrap();
            let byte = if rng.percent(30) { 0xff } else { before[0] ^ (1 << rng.below(8)) };
            file.write_all_at(&[byte], at).unwrap();
            let what = || format!("byte {at:#x} from {:#x} to {byte:#x} of\n{script}", before[0]);
            let found = assert_same(&image, &what).unwrap();
            tried += 1;
            with_partitions += usize::from(found > 0);
            file.write_all_at(&before, at).unwrap();
        }
    }
    assert!(
        tried > 300 && with_partitions > 100,
        "{tried} tried, {with_partitions} had partitions"
    );
}

#[test]
fn the_backup_of_a_gpt_is_read_where_the_primary_is_damaged() {
    let dir = scratch_dir("partitions-backup").unwrap();
    let image = dir.path().join("disk");
    sfdisk(&image, "label: gpt\nsize=1MiB, name=first\nsize=2MiB\n").unwrap();
    let whole = ours(&image);
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    for at in [512, 600, 1024] {
        file.write_all_at(&[0xff; 8], at).unwrap();
        assert_eq!(assert_same(&image, &String::new).unwrap(), 2);
        assert_eq!(ours(&image), whole);
        let table = partition::read(&mut FileDisk(File::open(&image).unwrap())).unwrap().unwrap();
        assert_eq!(table.warnings, [partition::TableWarning::BackupGptUsed]);
    }
}

#[test]
fn boot_sectors_of_file_systems_are_no_tables_where_libblkid_says_so() {
    let dir = scratch_dir("partitions-none").unwrap();
    let image = dir.path().join("disk");
    for (mkfs, broken) in [
        (&["mkfs.vfat", "-F", "16"][..], (16, 0)),
        (&["mkfs.vfat", "-F", "32"], (21, 0x55)),
        (&["mkntfs", "-q", "-F", "-Q"], (16, 1)),
        (&["mkntfs", "-q", "-F", "-Q"], (64, 0)),
        (&["mkfs.exfat"], (3, b'X')),
    ] {
        File::create(&image).and_then(|file| file.set_len(DISK_BYTES)).unwrap();
        run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image)).and_then(|ran| ran.ok()).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
        let mut code = [0; 64];
        if mkfs[0] != "mkfs.exfat" {
            // What would be partitions is code.
            let slot = [0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0];
            code[..16].copy_from_slice(&slot);
            file.write_all_at(&code, 446).unwrap();
        }
        assert_eq!(ours(&image), []);
        assert_eq!(partx(&image).unwrap(), []);
        // Something that only resembles it may have a table.
        code[..16].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0]);
        file.write_all_at(&code, 446).unwrap();
        let (at, byte) = broken;
        file.write_all_at(&[byte], at).unwrap();
        assert_eq!(assert_same(&image, &|| format!("{mkfs:?}, broken at {at}")).unwrap(), 1);
    }
}

#[test]
fn a_gpt_of_sectors_of_4096_bytes_is_found_though_the_image_has_no_sector_size() {
    // sfdisk takes the sector size of a file from an option only since 2.40, so the table is
    // moved by hand: of sectors of 512 bytes to those of 4096.
    let dir = scratch_dir("partitions-4096").unwrap();
    let image = dir.path().join("disk");
    sfdisk(&image, "label: gpt\nfirst-lba: 34\nstart=2048, size=2048, name=first\n").unwrap();
    let expected = ours(&image);
    let small = std::fs::read(&image).unwrap();
    let mut large = vec![0; small.len() * 8];
    large[..512].copy_from_slice(&small[..512]);
    let backup = small.len() - 512;
    for (from, to) in [(512, 4096), (backup, backup * 8)] {
        large[to..to + 512].copy_from_slice(&small[from..from + 512]);
        let entries_at = u64::from_le_bytes(small[from + 72..from + 80].try_into().unwrap());
        let entries_at = usize::try_from(entries_at).unwrap();
        large[entries_at * 4096..][..16384].copy_from_slice(&small[entries_at * 512..][..16384]);
    }
    std::fs::write(&image, large).unwrap();
    let found = ours(&image);
    assert_eq!(found.len(), 1);
    let (number, start, sectors, kind, uuid, name, flags, scheme) = expected[0].clone();
    assert_eq!(found[0], (number, start * 8, sectors * 8, kind, uuid, name, flags, scheme));
    let table = partition::read(&mut FileDisk(File::open(&image).unwrap())).unwrap().unwrap();
    assert_eq!(table.sector_size, 4096);
    assert!(table.partitions.iter().all(|p| p.unusable != Some(Unusable::OutOfDisk)));
}
