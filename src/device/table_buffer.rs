//! Tables in the form in which device-mapper's ioctl takes them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::{FromZeros, IntoBytes};
use zeroize::Zeroize;

use super::dm::{SPEC_LENGTH, TargetSpec, put};
use super::sys::{DM_HEADER_LENGTH, memory_file};
use crate::error::{Error, ErrorKind, Result};
use crate::table::{CryptKey, DeviceRef, TableLine, Target};

/// Bytes of a table that are gathered before they go to a memory file.
const CHUNK: usize = 256 << 10;

/// A table on its way to the kernel, in the ioctl's own form.
///
/// A large one goes to a memory file piece by piece: then no page of it is ever touched from
/// here, each of which would be a fault to handle. In a guest without help from its processor
/// these took nearly as long as the kernel took to load the table.
pub(crate) struct TableBuffer {
    /// Its header and lines, or those that are not in the file yet.
    buffer: Vec<u8>,
    spilled: Option<File>,
    /// Bytes of it in the file.
    length: u64,
    count: u32,
    /// A key is in it: to be wiped.
    has_key: bool,
}

/// All of a table, and where it is.
#[derive(Debug)]
pub(crate) enum Finished<'t> {
    /// In memory.
    Memory(&'t mut [u8]),
    /// In a file of so many bytes.
    File(&'t File, u64),
}

impl Drop for TableBuffer {
    fn drop(&mut self) {
        if !self.has_key {
            return;
        }
        self.buffer.zeroize();
        let Some(file) = &self.spilled else { return };
        for at in (0..self.length).step_by(CHUNK) {
            let _ = file.write_all_at(&vec![0; CHUNK], at);
        }
    }
}

impl TableBuffer {
    /// Room for about `lines` lines, or a piece of them. Nothing more is opened from then on.
    ///
    /// # Errors
    /// There is no memory file.
    pub(crate) fn with_capacity(lines: u64) -> io::Result<Self> {
        let lines = usize::try_from(lines).unwrap_or(CHUNK).saturating_mul(SPEC_LENGTH + 24);
        let mut buffer = Vec::with_capacity(DM_HEADER_LENGTH + lines.min(CHUNK + 4096));
        buffer.resize(DM_HEADER_LENGTH, 0);
        let spilled = (lines > CHUNK).then(|| memory_file("imgdm-table")).transpose()?;
        Ok(Self { buffer, spilled, length: 0, count: 0, has_key: false })
    }

    /// Writes what is gathered to the memory file, where there is one.
    fn spill(&mut self) -> io::Result<()> {
        let Some(file) = &self.spilled else { return Ok(()) };
        file.write_all_at(&self.buffer, self.length)?;
        self.length = self.length.saturating_add(u64::try_from(self.buffer.len()).unwrap_or(0));
        self.buffer.clear();
        Ok(())
    }

    /// How many lines it has.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Whether there is a key in it.
    pub(crate) fn has_key(&self) -> bool {
        self.has_key
    }

    /// Puts the header before the lines; gives the whole.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn finish(&mut self, header: &[u8]) -> io::Result<Finished<'_>> {
        if self.spilled.is_some() {
            self.spill()?;
        }
        match &self.spilled {
            None => {
                self.buffer[..header.len()].copy_from_slice(header);
                Ok(Finished::Memory(&mut self.buffer))
            }
            Some(file) => {
                file.write_all_at(header, 0)?;
                Ok(Finished::File(file, self.length))
            }
        }
    }

    /// Appends a line.
    pub(crate) fn push(&mut self, line: &TableLine) -> Result<()> {
        let full = || Error::new(ErrorKind::NotRepresentable("the table is too large".to_owned()));
        if self.buffer.len() >= CHUNK {
            self.spill().map_err(|e| Error::io("cannot write a table to a memory file", e))?;
        }
        let at = self.buffer.len();
        let mut spec = TargetSpec::new_zeroed();
        spec.sector_start = line.start.get();
        spec.length = line.length.get();
        put(&mut spec.target_type, line.target.kind()).map_err(|_| full())?;
        self.buffer.extend_from_slice(spec.as_bytes());
        match &line.target {
            Target::Linear { device, offset } => {
                self.buffer.extend_from_slice(device.as_str().as_bytes());
                self.buffer.push(b' ');
                let mut digits = itoa::Buffer::new();
                self.buffer.extend_from_slice(digits.format(offset.get()).as_bytes());
            }
            Target::Crypt { cipher, key: CryptKey::Raw(key), device } => {
                self.push_with_key(cipher, key, device);
            }
            Target::Striped { .. } | Target::Crypt { .. } | Target::Snapshot { .. } => {
                self.buffer.extend_from_slice(line.target.parameters().as_bytes());
            }
            Target::Zero | Target::Error => {}
        }
        self.buffer.push(0);
        // The header is a multiple of 8 too, and so is what was spilled.
        let end = self.buffer.len().next_multiple_of(8);
        self.buffer.resize(end, 0);
        let next = u32::try_from(end - at).map_err(|_| full())?;
        // `next` counts from the line's own start.
        self.buffer[at + 20..at + 24].copy_from_slice(&next.to_ne_bytes());
        self.count = self.count.checked_add(1).ok_or_else(full)?;
        Ok(())
    }

    /// Appends a crypt target's parameters with the key itself in hex.
    fn push_with_key(&mut self, cipher: &str, key: &[u8], device: &DeviceRef) {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        self.has_key = true;
        // Room for all of it at once, and for what follows: a vector that grows leaves a
        // copy behind that nobody wipes.
        let needed = cipher.len() + 2 * key.len() + device.as_str().len() + 64;
        if self.buffer.capacity() - self.buffer.len() < needed {
            let mut larger = Vec::with_capacity(self.buffer.len() + needed + 4096);
            larger.extend_from_slice(&self.buffer);
            self.buffer.zeroize();
            self.buffer = larger;
        }
        self.buffer.extend_from_slice(cipher.as_bytes());
        self.buffer.push(b' ');
        for &byte in key {
            self.buffer.push(DIGITS[usize::from(byte >> 4)]);
            self.buffer.push(DIGITS[usize::from(byte & 15)]);
        }
        self.buffer.extend_from_slice(b" 0 ");
        self.buffer.extend_from_slice(device.as_str().as_bytes());
        self.buffer.extend_from_slice(b" 0");
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromBytes;

    use super::*;
    use crate::device::dm::text;
    use crate::table::Table;
    use crate::units::Sectors;

    #[test]
    fn a_table_is_laid_out_as_the_kernel_reads_it() {
        let table: Table = "0 8 linear 7:0 2048\n8 16 zero\n".parse().unwrap();
        let mut buffer = TableBuffer::with_capacity(2).unwrap();
        for line in table.lines() {
            buffer.push(line).unwrap();
        }
        assert_eq!(buffer.count, 2);
        let lines = &buffer.buffer[DM_HEADER_LENGTH..];
        assert_eq!(lines.len() % 8, 0);
        let (first, parameters) = TargetSpec::read_from_prefix(lines).unwrap();
        assert_eq!((first.sector_start, first.length), (0, 8));
        assert_eq!(text(&first.target_type), "linear");
        assert_eq!(text(parameters), "7:0 2048");
        let second = &lines[usize::try_from(first.next).unwrap()..];
        let (second, parameters) = TargetSpec::read_from_prefix(second).unwrap();
        assert_eq!((second.sector_start, second.length), (8, 16));
        assert_eq!(text(&second.target_type), "zero");
        assert_eq!(text(parameters), "");
    }

    #[test]
    fn a_large_table_is_the_same_in_a_file() {
        let line = |start: u64, target| TableLine {
            start: Sectors::new(start),
            length: Sectors::new(1),
            target,
        };
        let mut buffer = TableBuffer::with_capacity(20_000).unwrap();
        let mut wanted = vec![0; DM_HEADER_LENGTH];
        for start in 0..20_000 {
            let device = DeviceRef::from_numbers(7, 1);
            let target = Target::Linear { device, offset: Sectors::new(start * 1_000_003) };
            let line = line(start, if start % 3 == 0 { Target::Zero } else { target });
            buffer.push(&line).unwrap();
            let mut alone = TableBuffer::with_capacity(1).unwrap();
            alone.push(&line).unwrap();
            wanted.extend_from_slice(&alone.buffer[DM_HEADER_LENGTH..]);
        }
        assert!(buffer.buffer.capacity() < 2 * CHUNK);
        let header = [7; DM_HEADER_LENGTH];
        wanted[..DM_HEADER_LENGTH].copy_from_slice(&header);
        assert_eq!(buffer.count, 20_000);
        let Finished::File(file, length) = buffer.finish(&header).unwrap() else {
            panic!("a table in memory")
        };
        let mut written = vec![0; wanted.len()];
        file.read_exact_at(&mut written, 0).unwrap();
        assert!(written == wanted && length == wanted.len() as u64);
        assert_eq!(file.metadata().unwrap().len(), length);
    }

    #[test]
    fn a_key_in_a_large_table_is_wiped_from_its_file() {
        let mut buffer = TableBuffer::with_capacity(20_000).unwrap();
        let key = CryptKey::Raw(vec![0xab; 64].into());
        let device = DeviceRef::from_numbers(7, 1);
        let target = Target::Crypt { cipher: "aes-xts-plain64".to_owned(), key, device };
        let line = TableLine { start: Sectors::new(0), length: Sectors::new(8), target };
        for _ in 0..5_000 {
            buffer.push(&line).unwrap();
        }
        buffer.spill().unwrap();
        let file = buffer.spilled.as_ref().unwrap().try_clone().unwrap();
        let length = usize::try_from(buffer.length).unwrap();
        drop(buffer);
        let mut left = vec![1; length];
        file.read_exact_at(&mut left, 0).unwrap();
        assert!(left.iter().all(|&byte| byte == 0));
    }
}
