//! The options of a qcow2 output, and which of them go together.

use super::text::Settings;
use super::{Preallocation, bad_value, take_preallocation, usage};
use crate::error::Result;
use crate::format::qcow2::Compression;
use crate::units::ByteLen;

/// The version of the format (`compat`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompatibilityLevel {
    /// Version 2, that QEMU reads since 0.10: no zero clusters.
    V2,
    /// Version 3, that QEMU reads since 1.1.
    #[default]
    V3,
}

/// Options of a qcow2 output, of which the combination is a valid one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Options {
    pub(crate) compat: CompatibilityLevel,
    pub(crate) cluster_bits: u32,
    pub(crate) extended_l2: bool,
    pub(crate) refcount_order: u32,
    pub(crate) compression: Compression,
    pub(crate) preallocation: Preallocation,
    pub(crate) data_file: Option<String>,
    pub(crate) data_file_raw: bool,
    pub(crate) lazy_refcounts: bool,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Self {
            compat: CompatibilityLevel::V3,
            cluster_bits: 16,
            extended_l2: false,
            refcount_order: 4,
            compression: Compression::Zlib,
            preallocation: Preallocation::Off,
            data_file: None,
            data_file_raw: false,
            lazy_refcounts: false,
        }
    }
}

/// Smallest clusters with subclusters: 32 of 512 bytes.
const MIN_EXTENDED_L2_CLUSTER: u64 = 16 << 10;

pub(super) const HELP: &str = "\
cluster_size=SIZE           bytes of a cluster, a power of two from 512 to 2M (default 64k)
compat=v2|v3                version of the format, also said 0.10 and 1.1 (default v3); v2 has
                            no zero clusters
compression_type=zlib|zstd  how clusters are compressed with -c (default zlib)
data_file=FILE              keep the disk's data in this file, and metadata alone in the image;
                            FILE is named as seen from the image (default: none)
data_file_raw=on|off        the data file is a raw image by itself (default off)
extended_l2=on|off          32 subclusters in each cluster, of at least 16k (default off)
lazy_refcounts=on|off       QEMU can postpone its refcount updates later (default off)
preallocation=off|metadata|falloc|full
                            what is allocated where there is no data: nothing (off, the
                            default), a place (metadata), its space too (falloc), or written
                            zeros (full)
refcount_bits=N             bits of a reference count: 1, 2, 4, 8, 16, 32 or 64 (default 16)
";

impl Qcow2Options {
    /// Takes what of the settings is for qcow2.
    pub(super) fn take(settings: &mut Settings) -> Result<Self> {
        let mut options = Self::default();
        if let Some(text) = settings.take("compat") {
            options.compat = match text.as_str() {
                "v2" | "0.10" => CompatibilityLevel::V2,
                "v3" | "1.1" => CompatibilityLevel::V3,
                _ => return Err(bad_value("compat", &text, "v2 (0.10) or v3 (1.1)")),
            };
        }
        if let Some(size) = settings.take_size("cluster_size")? {
            if !size.is_power_of_two() || !(512..=2 << 20).contains(&size) {
                let possible = "a power of two from 512 to 2M";
                return Err(bad_value("cluster_size", &size.to_string(), possible));
            }
            options.cluster_bits = size.ilog2();
        }
        if let Some(bits) = settings.take_number("refcount_bits")? {
            if !bits.is_power_of_two() || bits > 64 {
                let possible = "1, 2, 4, 8, 16, 32 or 64";
                return Err(bad_value("refcount_bits", &bits.to_string(), possible));
            }
            options.refcount_order = bits.ilog2();
        }
        if let Some(text) = settings.take("compression_type") {
            options.compression = match text.as_str() {
                "zlib" => Compression::Zlib,
                "zstd" => Compression::Zstd,
                _ => return Err(bad_value("compression_type", &text, "zlib or zstd")),
            };
        }
        options.extended_l2 = settings.take_bool("extended_l2")?;
        options.lazy_refcounts = settings.take_bool("lazy_refcounts")?;
        options.preallocation = take_preallocation(settings, true)?;
        options.data_file = settings.take("data_file");
        options.data_file_raw = settings.take_bool("data_file_raw")?;
        options.check_together()?;
        if options.data_file_raw && options.preallocation == Preallocation::Off {
            // Else a byte that only the data file has would be none of the disk.
            options.preallocation = Preallocation::Metadata;
        }
        Ok(options)
    }

    fn check_together(&self) -> Result<()> {
        if self.compat == CompatibilityLevel::V2 {
            let newer = [
                (self.extended_l2, "extended_l2=on"),
                (self.lazy_refcounts, "lazy_refcounts=on"),
                (self.refcount_order != 4, "refcount_bits other than 16"),
                (self.data_file.is_some(), "data_file"),
                (self.data_file_raw, "data_file_raw"),
                (self.compression == Compression::Zstd, "compression_type=zstd"),
            ];
            if let Some((_, option)) = newer.iter().find(|(given, _)| *given) {
                return Err(usage(format!(
                    "-o {option} takes compat=v3: qcow2 v2 has no such thing"
                )));
            }
        }
        if self.extended_l2 && self.cluster_size() < MIN_EXTENDED_L2_CLUSTER {
            return Err(usage("-o extended_l2=on takes a cluster_size of at least 16k"));
        }
        match &self.data_file {
            None if self.data_file_raw => Err(usage("-o data_file_raw=on takes data_file=FILE")),
            Some(name) if name.is_empty() || name.contains('\0') => {
                Err(bad_value("data_file", &name.replace('\0', "\\0"), "the name of a file"))
            }
            _ => Ok(()),
        }
    }

    /// See [`FormatOptions::check`](super::FormatOptions::check).
    pub(in crate::convert) fn check(&self, compressed: bool, backing: bool) -> Result<()> {
        if compressed && self.data_file.is_some() {
            return Err(usage(
                "-c does not go with -o data_file: data files hold nothing compressed",
            ));
        }
        if compressed && self.preallocation != Preallocation::Off {
            return Err(usage(
                "-c does not go with -o preallocation: a compressed cluster has no place of its own",
            ));
        }
        if backing && self.data_file_raw {
            return Err(usage(
                "-B does not go with -o data_file_raw=on: the data file has to have all of the disk",
            ));
        }
        if backing && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return Err(usage(
                "-B goes with -o preallocation only where extended_l2=on: else each cluster that \
                 has a place hides what the backing file has there",
            ));
        }
        Ok(())
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of what is data, zeros or the backing file's by itself.
    pub fn granularity(&self) -> u64 {
        if self.extended_l2 { self.cluster_size() / 32 } else { self.cluster_size() }
    }

    /// The version.
    pub fn compat(&self) -> CompatibilityLevel {
        self.compat
    }

    /// How clusters are compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// What is allocated where there is no data.
    pub fn preallocation(&self) -> Preallocation {
        self.preallocation
    }

    /// The data file's name, and whether it is a raw image by itself.
    pub fn data_file(&self) -> Option<(&str, bool)> {
        self.data_file.as_deref().map(|name| (name, self.data_file_raw))
    }
}

impl Qcow2Options {
    /// Bytes of the largest disk: an L1 table has 32 MiB at most.
    pub fn max_virtual_size(&self) -> ByteLen {
        let l2_entry_bits = if self.extended_l2 { 4 } else { 3 };
        let l1_entries = crate::format::qcow2::header::MAX_L1_BYTES / 8;
        let l2_span_bits = 2 * self.cluster_bits - l2_entry_bits;
        // Offsets are signed 64-bit numbers in QEMU.
        let bytes = u128::from(l1_entries) << l2_span_bits;
        let limit = (1u128 << 63) - 512;
        ByteLen::new(u64::try_from(bytes.min(limit)).unwrap_or(u64::MAX))
    }
}
