//! Whether the files of a chain stay as they are while they are read: QEMU's locks keep
//! QEMU from writing, and nobody else.

use imgdm::chain::Chain;
use imgdm::source::{FileStamp, Source};
use imgdm::{Error, ErrorKind, Result};

/// The lengths and times of a chain's files at one moment.
pub(crate) struct Stamps(Vec<Option<FileStamp>>);

fn files(chain: &Chain) -> impl Iterator<Item = &Source> {
    chain.layers().iter().flat_map(|layer| layer.files()).map(|(_, file)| file.as_ref())
}

impl Stamps {
    /// As they are now.
    ///
    /// # Errors
    /// A file can't be looked at.
    pub(crate) fn of(chain: &Chain) -> Result<Self> {
        Ok(Self(files(chain).map(Source::stamp).collect::<Result<_>>()?))
    }

    /// Refuses files that were written to since.
    ///
    /// # Errors
    /// `InUse`, naming the first.
    pub(crate) fn check(&self, chain: &Chain) -> Result<()> {
        for (file, before) in files(chain).zip(&self.0) {
            // Not by the inode's own time: a new name or owner is no matter.
            let content = |stamp: &FileStamp| (stamp.length, stamp.modified);
            if file.stamp()?.as_ref().map(content) != before.as_ref().map(content) {
                let message = "the file was written to while it was read: end what writes to it, or read it as it is with --force-share".to_owned();
                return Err(Error::new(ErrorKind::InUse(message)).at_path(file.path()));
            }
        }
        Ok(())
    }
}
