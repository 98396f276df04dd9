//! What a qcow2 header, its extensions, snapshot table and bitmap directory say.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::{FormatFacts, InfoNotice};
use crate::crypt::LuksFacts;
use crate::error::Result;
use crate::format::qcow2::bitmap::{BitmapDirectoryEntry, read_bitmaps};
use crate::format::qcow2::{
    Extensions, Qcow2Header, Snapshot, check_table_in_file, incompatible, read_backing,
    read_extensions, read_header, read_luks_header, snapshot,
};
use crate::open::WarningKind;
use crate::source::Source;
use crate::status::Encryption;

/// What only qcow2 has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Facts {
    /// The header.
    pub header: Qcow2Header,
    /// The name in the external data file extension, whether or not the image uses it.
    pub data_file: Option<Vec<u8>>,
    /// How the clusters are encrypted; none for an image in the clear, or where the LUKS
    /// header can't be read.
    pub encryption: Option<EncryptionFacts>,
    /// The persistent dirty bitmaps.
    pub bitmaps: Vec<BitmapDirectoryEntry>,
}

/// How the clusters are encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EncryptionFacts {
    /// Method 1, legacy AES.
    Aes,
    /// Method 2, by this LUKS header.
    Luks(Box<LuksFacts>),
}

/// All that the metadata says.
///
/// # Errors
/// The header or its extensions are not valid; a read failed.
pub(super) fn facts(source: &Source) -> Result<FormatFacts> {
    read(source).map_err(|error| error.at_path(source.path()))
}

/// The snapshot table.
///
/// # Errors
/// The header, its extensions or the table is not valid; a read failed.
pub(super) fn read_snapshots(source: &Source) -> Result<Vec<Snapshot>> {
    let (header, _) =
        header_and_extensions(source).map_err(|error| error.at_path(source.path()))?;
    snapshot::read_table(source, &header)
}

fn header_and_extensions(source: &Source) -> Result<(Qcow2Header, Extensions)> {
    let header = read_header(source, Qcow2Header::parse_damaged)?;
    let extensions = read_extensions(source, &header)?;
    header.refuse_unknown_features(&extensions)?;
    Ok((header, extensions))
}

fn read(source: &Source) -> Result<FormatFacts> {
    let (header, extensions) = header_and_extensions(source)?;
    let features = header.incompatible_features;
    let mut facts = FormatFacts {
        virtual_size: header.virtual_size,
        cluster_size: Some(header.cluster_size()),
        encrypted: header.encryption.is_some(),
        dirty: features & incompatible::DIRTY != 0,
        data_file: header.has_data_file().then(|| {
            extensions.data_file.clone().map(|name| PathBuf::from(OsString::from_vec(name)))
        }),
        ..FormatFacts::default()
    };
    let marks =
        [(incompatible::DIRTY, WarningKind::Dirty), (incompatible::CORRUPT, WarningKind::Corrupt)];
    for (_, kind) in marks.into_iter().filter(|(bit, _)| features & bit != 0) {
        facts.notices.push(InfoNotice::Warning(kind));
    }
    facts.unless_damaged(source, header.check_tables())?;
    for (table, field, name) in
        [(header.l1_table, 40, "the L1 table"), (header.refcount_table, 48, "the refcount table")]
    {
        facts.unless_damaged(source, check_table_in_file(source, table, field, name))?;
    }
    facts.backing = facts.unless_damaged(source, read_backing(source, &header, &extensions))?;
    let mut snapshots = Vec::new();
    let table = snapshot::read_table_into(source, &header, &mut snapshots);
    facts.unless_damaged(source, table)?;
    facts.snapshots = snapshots;
    let bitmaps = facts.unless_damaged(source, read_bitmaps(source, &header, &extensions))?;
    let encryption = facts.unless_damaged(source, encryption(source, &header, &extensions))?;
    let data_file = extensions.data_file;
    facts.qcow2 = Some(Qcow2Facts { header, data_file, encryption, bitmaps });
    Ok(facts)
}

fn encryption(
    source: &Source,
    header: &Qcow2Header,
    extensions: &Extensions,
) -> Result<Option<EncryptionFacts>> {
    Ok(match header.encryption {
        None => None,
        Some(Encryption::Aes) => Some(EncryptionFacts::Aes),
        Some(Encryption::Luks) => {
            let luks = read_luks_header(source, header, extensions.crypt_header)?;
            Some(EncryptionFacts::Luks(Box::new(luks.facts().clone())))
        }
    })
}
