//! How much of the kernel's memory an image may take.

use imgdm::device::memory::MemoryLimit;

use super::open::parse_size;

/// The limit of the kernel memory.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct MemoryArgs {
    /// Most kernel memory that an attachment may take, or none for no limit [default: a
    /// quarter of what is free]
    #[arg(long, value_name = "SIZE", value_parser = parse_limit)]
    max_kernel_memory: Option<MemoryLimit>,
}

impl MemoryArgs {
    pub(crate) fn limit(self) -> MemoryLimit {
        self.max_kernel_memory.unwrap_or_default()
    }
}

fn parse_limit(text: &str) -> Result<MemoryLimit, String> {
    match text {
        "none" => Ok(MemoryLimit::None),
        _ => match parse_size(text) {
            Ok(bytes) => Ok(MemoryLimit::Bytes(bytes)),
            Err(error) => Err(format!("{error}, nor 'none'")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_size_or_none() {
        assert_eq!(parse_limit("none"), Ok(MemoryLimit::None));
        assert_eq!(parse_limit("64M"), Ok(MemoryLimit::Bytes(64 << 20)));
        assert!(parse_limit("half").is_err_and(|error| error.contains("none")));
    }
}
