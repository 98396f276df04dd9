//! Whether a range of a file is all zeros.

use crate::error::Result;
use crate::source::{Allocation, Source};
use crate::units::{ByteLen, HostOffset};

/// Bytes that are read at a time.
const CHUNK: u64 = 256 << 10;

/// The first byte of the range that is not 0; `None` where all of it, as far as it lies in the
/// file, is zeros. Holes are not read.
///
/// # Errors
/// A read failed.
pub fn first_non_zero(
    source: &Source,
    offset: HostOffset,
    length: ByteLen,
) -> Result<Option<HostOffset>> {
    let file_end = HostOffset::new(source.length().get());
    let end = offset.saturating_add(length).min(file_end);
    let mut buffer = Vec::new();
    let mut at = offset;
    while at < end {
        let data_end = match source.allocation(at) {
            Allocation::Hole { until } => {
                at = until.unwrap_or(end).max(at);
                continue;
            }
            Allocation::Data { until } => until.min(end),
        };
        while at < data_end {
            let length = CHUNK.min(data_end.since(at).get());
            buffer.resize(usize::try_from(length).unwrap_or(0), 0);
            let read = source.read_up_to(at, &mut buffer)?;
            if let Some(first) = buffer[..read].iter().position(|&byte| byte != 0) {
                return Ok(Some(at.saturating_add(ByteLen::new(first as u64))));
            }
            if read < buffer.len() {
                return Ok(None); // The file has become shorter.
            }
            at = at.saturating_add(ByteLen::new(length));
        }
    }
    Ok(None)
}
