//! The lines of a live table, in the form in which device-mapper's ioctl gives them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::FromBytes;
use zeroize::Zeroizing;

use super::LiveLine;
use super::dm::{SPEC_LENGTH, TargetSpec, text, until_nul};

/// Bytes of an answer in a file that are read at a time.
const CHUNK: usize = 256 << 10;

/// The lines of a live table. A key that is not in the keyring comes as `-`.
pub(crate) struct LiveTable {
    /// The kernel's answer, or what of it was read last.
    buffer: Zeroizing<Vec<u8>>,
    /// Where in the answer that starts.
    base: usize,
    /// Where all of it is, where it is large, and its length. A table with a key is one line, so
    /// there is none to be wiped in a file.
    file: Option<(File, usize)>,
    /// Where in it the lines start, and the next one.
    start: usize,
    at: usize,
    left: u32,
}

impl LiveTable {
    /// An answer of which `start` is where its `count` lines start.
    pub(crate) fn new(answer: Vec<u8>, start: usize, count: u32) -> Self {
        Self { buffer: answer.into(), base: 0, file: None, start, at: start, left: count }
    }

    /// The same of one in a file.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn in_file(file: File, start: usize, count: u32) -> io::Result<Self> {
        let length = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
        Ok(Self { file: Some((file, length)), ..Self::new(Vec::new(), start, count) })
    }

    /// So many bytes of the answer; none where it has not so many.
    fn bytes(&mut self, at: usize, length: usize) -> Option<&[u8]> {
        let inside = at.checked_sub(self.base).and_then(|from| {
            let to = from.checked_add(length)?;
            (to <= self.buffer.len()).then_some(from..to)
        });
        let range = match (inside, &self.file) {
            (Some(range), _) => range,
            (None, None) => return None,
            (None, Some((file, whole))) => {
                let most = whole.checked_sub(at)?;
                if length > most {
                    return None;
                }
                self.buffer.resize(length.max(CHUNK).min(most), 0);
                if let Err(error) = file.read_exact_at(&mut self.buffer, at as u64) {
                    log::warn!("a table's memory file can't be read: {error}");
                    return None;
                }
                self.base = at;
                0..length
            }
        };
        self.buffer.get(range)
    }
}

impl Iterator for LiveTable {
    type Item = LiveLine;

    fn next(&mut self) -> Option<LiveLine> {
        self.left = self.left.checked_sub(1)?;
        let spec = TargetSpec::read_from_bytes(self.bytes(self.at, SPEC_LENGTH)?).ok()?;
        // Here `next` counts from the start of the whole answer.
        let end = self.start.checked_add(usize::try_from(spec.next).ok()?)?;
        let line = self.bytes(self.at, end.checked_sub(self.at)?)?;
        let parameters = line.get(SPEC_LENGTH..)?;
        let kind = text(&spec.target_type);
        let parameters = match kind.as_str() {
            "crypt" => without_key(until_nul(parameters)),
            _ => text(parameters).trim_end().to_owned(),
        };
        self.at = end;
        Some(LiveLine { start: spec.sector_start, length: spec.length, kind, parameters })
    }
}

/// The parameters of a crypt target, `CIPHER KEY ...`, without a key that stands there.
pub(super) fn without_key(parameters: &[u8]) -> String {
    let words = parameters.split(|&byte| byte == b' ').enumerate().map(|(index, word)| {
        let is_key = index == 1 && !word.starts_with(b":");
        if is_key { "-".into() } else { String::from_utf8_lossy(word) }
    });
    words.collect::<Vec<_>>().join(" ").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use zerocopy::{FromZeros, IntoBytes};

    use super::super::dm::put;
    use super::super::sys::memory_file;
    use super::*;

    /// An answer as the kernel gives it: something, and lines from byte 312 on.
    fn answer(count: u32) -> Vec<u8> {
        const START: usize = 312;
        let mut answer = vec![7; START];
        for line in 0..count {
            let mut spec = TargetSpec::new_zeroed();
            (spec.sector_start, spec.length) = (u64::from(line) * 8, 8);
            put(&mut spec.target_type, if line % 3 == 0 { "zero" } else { "linear" }).unwrap();
            let at = answer.len();
            answer.extend_from_slice(spec.as_bytes());
            if line % 3 != 0 {
                // From very short to longer than what is read at a time.
                let spaces = if line == 4 { CHUNK + 5 } else { 1 };
                answer.extend_from_slice(format!("7:0 {line}{}", " ".repeat(spaces)).as_bytes());
            }
            answer.push(0);
            answer.resize(answer.len().next_multiple_of(8), 0);
            let next = u32::try_from(answer.len() - START).unwrap();
            answer[at + 20..at + 24].copy_from_slice(&next.to_ne_bytes());
        }
        answer
    }

    #[test]
    fn an_answer_in_a_file_has_the_same_lines() {
        let answer = answer(20_000);
        let file = memory_file("answer").unwrap();
        file.write_all_at(&answer, 0).unwrap();
        let lines: Vec<_> = LiveTable::new(answer, 312, 20_000).collect();
        assert_eq!(lines.len(), 20_000);
        let last = LiveLine {
            start: 19_999 * 8,
            length: 8,
            kind: "linear".to_owned(),
            parameters: "7:0 19999".to_owned(),
        };
        assert_eq!(lines.last(), Some(&last));
        assert_eq!(lines[3].parameters, "");
        let in_file = LiveTable::in_file(file, 312, 20_000).unwrap();
        assert!(in_file.eq(lines));
    }

    #[test]
    fn an_answer_that_is_cut_off_ends_there() {
        let answer = answer(3);
        for length in 312..answer.len() {
            let cut = answer[..length].to_vec();
            let file = memory_file("answer").unwrap();
            file.write_all_at(&cut, 0).unwrap();
            let in_memory = LiveTable::new(cut, 312, 3);
            let whole = in_memory.count();
            assert!(whole < 3);
            assert_eq!(LiveTable::in_file(file, 312, 3).unwrap().count(), whole);
        }
    }
}
