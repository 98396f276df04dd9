//! Header extensions (docs/interop/qcow2, section "Header extensions").

use crate::error::{Error, Result};
use crate::units::{ByteLen, HostOffset};

/// End of the header extension area.
pub(crate) const END: u32 = 0;
/// Backing file format name string.
pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Feature name table.
pub(crate) const FEATURE_NAME_TABLE: u32 = 0x6803_f857;
/// Full disk encryption header pointer.
const CRYPTO_HEADER: u32 = 0x0537_be77;
/// External data file name string.
pub(crate) const DATA_FILE_NAME: u32 = 0x4441_5441;
/// Bitmaps extension.
const BITMAPS: u32 = 0x2385_2875;

/// QEMU's field for the backing format's name holds 15 bytes and a NUL.
const MAX_FORMAT_NAME: usize = 15;
const FEATURE_ENTRY_LENGTH: usize = 48;
/// Bytes of an extension before its data: type and length.
const HEAD_LENGTH: u64 = 8;

/// Where one header extension lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtensionPlace {
    /// The type.
    pub kind: u32,
    /// Where its type field starts.
    pub offset: HostOffset,
    /// Bytes of type, length and data, without the padding to a multiple of 8.
    pub length: ByteLen,
}

impl ExtensionPlace {
    /// The specification's name of the type; `None` for one that imgdm does not know.
    pub fn name(&self) -> Option<&'static str> {
        extension_name(self.kind)
    }
}

/// The specification's name of a header extension's type; `None` for one that imgdm does not
/// know.
pub fn extension_name(kind: u32) -> Option<&'static str> {
    match kind {
        END => Some("end"),
        BACKING_FORMAT => Some("backing-format"),
        FEATURE_NAME_TABLE => Some("feature-name-table"),
        CRYPTO_HEADER => Some("crypto-header"),
        DATA_FILE_NAME => Some("data-file-name"),
        BITMAPS => Some("bitmaps"),
        _ => None,
    }
}

/// What the header extensions say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// The backing file's declared format.
    pub backing_format: Option<Vec<u8>>,
    /// The external data file's name.
    pub data_file: Option<Vec<u8>>,
    /// Where the full disk encryption header is, and its length in bytes.
    pub crypt_header: Option<(u64, u64)>,
    /// The feature name table: type (0 incompatible, 1 compatible, 2 autoclear), bit, name.
    pub feature_names: Vec<(u8, u8, String)>,
    /// The data of the bitmaps extension, read by
    /// [`BitmapsExtension::parse`](super::bitmap::BitmapsExtension::parse): a map needs none
    /// of it.
    pub bitmaps: Option<Vec<u8>>,
    /// All of them in the order of the file, the end mark included.
    pub places: Vec<ExtensionPlace>,
}

impl Extensions {
    /// Reads the extensions in `area`, which starts at file offset `offset` and reaches to
    /// the backing file's name or the end of the first cluster. An extension that imgdm
    /// does not know is passed over, as the specification wants.
    ///
    /// # Errors
    /// An extension longer than the area, or a format name past 15 bytes.
    pub fn parse(area: &[u8], offset: u64) -> Result<Self> {
        let mut extensions = Self::default();
        let mut rest = area;
        while !rest.is_empty() {
            let here = offset + (area.len() - rest.len()) as u64;
            let invalid = |what: String| Err(Error::invalid(what).at_offset(here));
            let Some((head, body)) = rest.split_first_chunk::<8>() else {
                return invalid("a header extension is cut off".to_owned());
            };
            let [t0, t1, t2, t3, l0, l1, l2, l3] = *head;
            let kind = u32::from_be_bytes([t0, t1, t2, t3]);
            let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
            let Some(data) = body.get(..length) else {
                return invalid(format!(
                    "the header extension {kind:#010x} is too large: {length} bytes"
                ));
            };
            extensions.places.push(ExtensionPlace {
                kind,
                offset: HostOffset::new(here),
                length: ByteLen::new(HEAD_LENGTH + length as u64),
            });
            match kind {
                END => return Ok(extensions),
                BACKING_FORMAT if length > MAX_FORMAT_NAME => {
                    return invalid(format!(
                        "the backing file's format name is too long: {length} bytes"
                    ));
                }
                BACKING_FORMAT => extensions.backing_format = Some(c_string(data)),
                FEATURE_NAME_TABLE => extensions.feature_names = feature_names(data),
                CRYPTO_HEADER => {
                    let Some((offset, length)) = data
                        .split_first_chunk::<8>()
                        .and_then(|(offset, rest)| Some((offset, rest.first_chunk::<8>()?)))
                        .filter(|_| length == 16)
                    else {
                        return invalid(format!(
                            "the encryption header's extension has {length} bytes and not 16"
                        ));
                    };
                    extensions.crypt_header =
                        Some((u64::from_be_bytes(*offset), u64::from_be_bytes(*length)));
                }
                DATA_FILE_NAME => extensions.data_file = Some(c_string(data)),
                BITMAPS => extensions.bitmaps = Some(data.to_vec()),
                _ => {}
            }
            rest = body.get(length.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(extensions)
    }

    /// The names of the incompatible features in `bits`, for a message.
    pub fn name_incompatible(&self, bits: u64) -> String {
        let named = |bit: u8| {
            self.feature_names
                .iter()
                .find(|(kind, b, name)| *kind == 0 && *b == bit && !name.is_empty())
                .map_or_else(|| format!("bit {bit}"), |(_, _, name)| format!("bit {bit} ({name})"))
        };
        let names: Vec<_> = (0..64).filter(|bit| bits >> bit & 1 == 1).map(named).collect();
        names.join(", ")
    }
}

/// QEMU takes these as C strings: they end at a NUL, where there is one.
fn c_string(data: &[u8]) -> Vec<u8> {
    data.split(|&byte| byte == 0).next().unwrap_or_default().to_vec()
}

fn feature_names(table: &[u8]) -> Vec<(u8, u8, String)> {
    table
        .chunks_exact(FEATURE_ENTRY_LENGTH)
        .map(|entry| {
            let name = entry[2..].split(|&b| b == 0).next().unwrap_or_default();
            let name = crate::error::printable(&String::from_utf8_lossy(name));
            (entry[0], entry[1], name)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extension(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = kind.to_be_bytes().to_vec();
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn extensions_are_read_up_to_the_end_mark() {
        let mut area = extension(BACKING_FORMAT, b"raw\0");
        area.extend(extension(0x1234, b"unknown"));
        area.extend(extension(DATA_FILE_NAME, b"disk.data"));
        area.extend(extension(END, b""));
        area.extend([0xff; 3]);
        let extensions = Extensions::parse(&area, 72).unwrap();
        assert_eq!(extensions.backing_format.as_deref(), Some(&b"raw"[..]));
        assert_eq!(extensions.data_file.as_deref(), Some(&b"disk.data"[..]));
        let places: Vec<_> =
            extensions.places.iter().map(|p| (p.name(), p.offset.get(), p.length.get())).collect();
        assert_eq!(
            places,
            [
                (Some("backing-format"), 72, 12),
                (None, 88, 15),
                (Some("data-file-name"), 104, 17),
                (Some("end"), 128, 8),
            ]
        );
    }

    #[test]
    fn an_extension_past_the_area_is_refused_with_its_offset() {
        let mut area = extension(0x1234, b"");
        area.extend([0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]);
        let error = Extensions::parse(&area, 104).unwrap_err();
        assert_eq!(error.offset(), Some(112));
    }

    #[test]
    fn unknown_features_are_named_from_the_images_own_table() {
        let mut entry = vec![0, 7];
        entry.extend(b"time travel");
        entry.resize(FEATURE_ENTRY_LENGTH, 0);
        let extensions = Extensions::parse(&extension(FEATURE_NAME_TABLE, &entry), 104).unwrap();
        assert_eq!(extensions.name_incompatible(1 << 7 | 1 << 9), "bit 7 (time travel), bit 9");
    }
}
