//! Raw images: the file is the disk; its holes read as zero.

use std::sync::Arc;

use super::{Format, ImageFormat, Scratch};
use crate::error::{Error, Result};
use crate::holes::{Piece, for_each_piece};
use crate::source::Source;
use crate::status::{BlockStatus, HostPlace, StatusRun, ZeroStatus};
use crate::units::{ByteLen, GuestRange, HostOffset, SECTOR_SIZE};

/// A raw image.
#[derive(Debug)]
pub struct RawImage {
    source: Arc<Source>,
    virtual_size: ByteLen,
}

impl RawImage {
    /// Takes any file as a raw image. A size that is no multiple of 512 is rounded up,
    /// and the bytes past the file's end read as zero (QEMU: bdrv_refresh_total_sectors()).
    ///
    /// # Errors
    /// The size is past 2^63 bytes.
    pub fn open(source: Arc<Source>) -> Result<Self> {
        let size = source
            .length()
            .get()
            .checked_next_multiple_of(SECTOR_SIZE)
            .filter(|&size| i64::try_from(size).is_ok())
            .ok_or_else(|| Error::invalid("the file is too large").at_path(source.path()))?;
        Ok(Self { source, virtual_size: ByteLen::new(size) })
    }
}

impl ImageFormat for RawImage {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn virtual_size(&self) -> ByteLen {
        self.virtual_size
    }

    fn granularity(&self) -> u64 {
        crate::holes::GRANULARITY
    }

    fn page_coverage(&self) -> u64 {
        // No page, but a question to the kernel: that is worth a few holes.
        16 * crate::holes::GRANULARITY
    }

    fn status(
        &self,
        range: GuestRange,
        _scratch: &mut Scratch,
        runs: &mut Vec<StatusRun>,
    ) -> Result<()> {
        let host = HostOffset::new(range.start.get());
        for_each_piece(&self.source, host, range.length(), &mut |distance, length, piece| {
            let place = HostPlace::in_image(host.saturating_add(distance));
            let status = match piece {
                Piece::Data => BlockStatus::Data(place),
                Piece::Hole => BlockStatus::Zero(ZeroStatus::Hole(place)),
                Piece::Unwritten => BlockStatus::Zero(ZeroStatus::Unwritten(place)),
                Piece::PastEnd => BlockStatus::Zero(ZeroStatus::PastFileEnd(place)),
            };
            runs.push(StatusRun { start: range.start.saturating_add(distance), length, status });
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::GuestOffset;

    #[test]
    fn an_odd_size_is_rounded_up_with_zeros() {
        let source = Arc::new(Source::from_bytes("x", vec![1; 1000]));
        let image = RawImage::open(source).unwrap();
        assert_eq!(image.virtual_size(), ByteLen::new(1024));
        let mut runs = Vec::new();
        let all = GuestRange::new(GuestOffset::ZERO, GuestOffset::new(1024));
        image.status(all, &mut Scratch::default(), &mut runs).unwrap();
        let lengths: Vec<_> = runs.iter().map(|run| run.length.get()).collect();
        assert_eq!(lengths, [1000, 24]);
        let place = HostPlace::in_image(HostOffset::new(1000));
        assert_eq!(runs[1].status, BlockStatus::Zero(ZeroStatus::PastFileEnd(place)));
    }
}
