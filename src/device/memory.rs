//! How much kernel memory an attachment may take. Tables lie in memory that the kernel can
//! neither swap out nor drop, and when there is none left it ends programs.

use std::fs;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};
use crate::plan::KernelMemory;

/// The share of the free memory that is the limit where no other is given: one of so many.
const SHARE: u64 = 4;

/// What an attachment may take of the kernel's memory at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryLimit {
    /// A quarter of what is free.
    #[default]
    Quarter,
    /// So many bytes.
    Bytes(u64),
    /// Whatever it takes.
    None,
}

impl MemoryLimit {
    /// The limit in bytes, where so much is free; none where there is no limit, or where
    /// nobody knows what is free.
    pub fn bytes(self, available: Option<u64>) -> Option<u64> {
        match self {
            Self::Quarter => available.map(|available| available / SHARE),
            Self::Bytes(bytes) => Some(bytes),
            Self::None => None,
        }
    }

    /// Refuses what takes more.
    ///
    /// # Errors
    /// `CannotCreate`, with what it takes, the limit, and how to go past it.
    pub fn check(self, wanted: KernelMemory, available: Option<u64>) -> Result<()> {
        let Some(limit) = self.bytes(available).filter(|&limit| wanted.peak() > limit) else {
            return Ok(());
        };
        let (kept, loading) = (mib(wanted.kept), mib(wanted.loading));
        let whose = match (self, available) {
            (Self::Quarter, Some(available)) => {
                format!("a quarter of the {} that are free", mib(available))
            }
            _ => "what --max-kernel-memory allows".to_owned(),
        };
        Err(Error::new(ErrorKind::CannotCreate(format!(
            "its tables take about {kept} of kernel memory, which can't be swapped out, and {loading} more while they are loaded; the limit is {}, {whose}. Give a larger --max-kernel-memory, or none for no limit; or copy the image, so that its clusters lie in order ('imgdm convert')",
            mib(limit)
        ))))
    }
}

/// Bytes for people.
fn mib(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{} KiB", bytes.div_ceil(1 << 10)),
        _ => format!("{} MiB", bytes.div_ceil(1 << 20)),
    }
}

/// Bytes of memory that can be had without swapping (`MemAvailable`); none where /proc does
/// not tell.
pub fn available() -> Option<u64> {
    parse(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib = u64::from_str(line.trim().strip_suffix("kB")?.trim_end()).ok()?;
    kib.checked_mul(1 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_a_quarter_of_what_is_free_unless_another_is_given() {
        let wanted = KernelMemory { kept: 100 << 20, loading: 20 << 20 };
        let free = |mib: u64| Some(mib << 20);
        assert!(MemoryLimit::Quarter.check(wanted, free(480)).is_ok());
        let refused = MemoryLimit::Quarter.check(wanted, free(479)).unwrap_err();
        assert!(matches!(refused.kind(), ErrorKind::CannotCreate(_)), "{refused:?}");
        let said = refused.to_string();
        for word in
            ["100 MiB", "20 MiB more", "the limit is 120 MiB", "the 479 MiB", "--max-kernel-memory"]
        {
            assert!(said.contains(word), "{said}");
        }
        assert!(MemoryLimit::Bytes(120 << 20).check(wanted, free(1)).is_ok());
        let refused = MemoryLimit::Bytes((120 << 20) - 1).check(wanted, free(1 << 20)).unwrap_err();
        assert!(refused.to_string().contains("what --max-kernel-memory allows"), "{refused}");
        assert!(MemoryLimit::None.check(wanted, free(1)).is_ok());
        assert!(MemoryLimit::Quarter.check(wanted, None).is_ok());
    }

    #[test]
    fn what_is_free_is_what_the_kernel_calls_available() {
        let text = "MemTotal:       24587844 kB\nMemFree:  1 kB\nMemAvailable:   23512345 kB\n";
        assert_eq!(parse(text), Some(23_512_345 << 10));
        for bad in ["", "MemAvailable:", "MemAvailable: x kB", "MemAvailable: 5", "MemFree: 1 kB"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert!(available().is_some_and(|bytes| bytes > 0));
    }
}
