//! What `imgdm explain` prints of one byte of the disk.

use std::io::{self, Write};

use imgdm::chain::{Chain, Layer};
use imgdm::explain::{AskedLayer, Encrypted, Explanation, Outcome};
use imgdm::extent::Mapping;
use imgdm::format::Format;
use imgdm::format::qcow2::Compression;
use imgdm::holes::Piece;
use imgdm::status::{Encryption, FileRole, HostPlace};
use imgdm::units::SECTOR_SIZE;
use serde::Serialize;

use super::Shown;
use super::steps::{JsonSnapshot, Step};
use crate::cli::map::zero_cause;
use crate::cli::output::JsonPath;

/// The whole report.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// The byte of the disk, and its sector of 512 bytes.
    offset: u64,
    sector: u64,
    pub(super) steps: Vec<Step>,
    answer: Answer,
}

/// Where the byte comes from.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Answer {
    Data {
        depth: u32,
        #[serde(flatten)]
        file: JsonPath,
        offset: u64,
    },
    Encrypted {
        depth: u32,
        #[serde(flatten)]
        file: JsonPath,
        offset: u64,
    },
    Compressed {
        depth: u32,
        #[serde(flatten)]
        file: JsonPath,
        stream_offset: u64,
        stream_length: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        compression: Option<&'static str>,
        /// Which byte of what the stream inflates to.
        offset_in_cluster: u64,
    },
    Zero {
        depth: u32,
        cause: &'static str,
        /// The place in a file that belongs to the zeros, where there is one.
        #[serde(flatten)]
        file: Option<JsonPath>,
        #[serde(skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
    },
    Damaged {
        depth: u32,
    },
}

/// A layer's file, by its absolute path.
pub(super) fn json_path(layer: &Layer, role: FileRole) -> JsonPath {
    JsonPath::from(layer.file(role).absolute_path().as_path())
}

impl Report {
    pub(super) fn of(chain: &Chain, explanation: &Explanation) -> Self {
        let mut steps = Vec::new();
        for asked in &explanation.layers {
            let Some(layer) = chain.layers().get(asked.depth as usize) else { continue };
            add_layer(layer, asked, &mut steps);
        }
        let answer = match chain.layers().get(explanation.depth() as usize) {
            Some(layer) => {
                add_place(layer, explanation, &mut steps);
                Answer::of(layer, explanation)
            }
            None => Answer::Damaged { depth: explanation.depth() },
        };
        let offset = explanation.offset.get();
        Self { offset, sector: offset / SECTOR_SIZE, steps, answer }
    }

    fn print_answer(&self, out: &mut dyn Write) -> io::Result<()> {
        let at = self.offset;
        match &self.answer {
            Answer::Data { file, offset, .. } => {
                writeln!(out, "byte {at:#x} of the disk is byte {offset:#x} of {}", file.shown())
            }
            Answer::Encrypted { file, offset, .. } => writeln!(
                out,
                "byte {at:#x} of the disk is, decrypted, byte {offset:#x} of {}",
                file.shown()
            ),
            Answer::Compressed {
                file,
                stream_offset,
                stream_length,
                compression,
                offset_in_cluster,
                ..
            } => {
                let compression = compression.unwrap_or("compressed");
                writeln!(
                    out,
                    "byte {at:#x} of the disk is byte {offset_in_cluster:#x} of what the {compression} stream at {stream_offset:#x} (at most {stream_length} bytes) of {} inflates to",
                    file.shown()
                )
            }
            Answer::Zero { cause, file, offset, .. } => {
                write!(out, "byte {at:#x} of the disk reads as zero: {}", cause_words(cause))?;
                match (file, offset) {
                    (Some(file), Some(offset)) => {
                        writeln!(out, " (at {offset:#x} of {})", file.shown())
                    }
                    _ => writeln!(out),
                }
            }
            Answer::Damaged { .. } => {
                writeln!(out, "where byte {at:#x} of the disk is can't be told")
            }
        }
    }
}

impl Shown for Report {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let Self { offset, sector, .. } = self;
        writeln!(out, "byte {offset} ({offset:#x}) of the disk, in sector {sector}")?;
        for (number, step) in (1..).zip(&self.steps) {
            writeln!(out, "{number:>3}. {step}")?;
        }
        self.print_answer(out)
    }
}

fn cause_words(cause: &str) -> &str {
    match cause {
        "zero-cluster" => "the layer says so",
        "hole" => "a hole of the file",
        "unwritten" => "an unwritten extent of the file",
        "unallocated" => "no layer has it",
        "past-backing-end" => "it lies past the end of the backing file",
        "past-file-end" => "it lies past the end of the file",
        other => other,
    }
}

/// The steps of one layer that was asked.
fn add_layer(layer: &Layer, asked: &AskedLayer, steps: &mut Vec<Step>) {
    let format = layer.image.format();
    steps.push(Step::Layer {
        depth: asked.depth,
        file: json_path(layer, FileRole::Image),
        format: format.name(),
        virtual_size: layer.image.virtual_size().get(),
        snapshot: layer
            .image
            .snapshot()
            .map(|snapshot| JsonSnapshot { id: snapshot.id.clone(), name: snapshot.name.clone() }),
    });
    let is_qcow2 = format == Format::Qcow2;
    steps.extend(asked.trace.iter().map(|step| Step::of_trace(step, is_qcow2)));
    match &asked.outcome {
        Outcome::Answers => {}
        Outcome::GoesOn => steps.push(Step::GoesOn { to: asked.depth.saturating_add(1) }),
        Outcome::PastBackingEnd { size } => {
            steps.push(Step::PastBackingEnd { backing_size: size.get() });
        }
        Outcome::NoBacking => steps.push(Step::NoBacking),
        Outcome::Damaged(error) => steps.push(Step::Damage { message: error.without_path() }),
    }
}

/// The steps below the layer that answers.
fn add_place(layer: &Layer, explanation: &Explanation, steps: &mut Vec<Step>) {
    if let Some(Encrypted { method, iv_sector, header }) = &explanation.encrypted {
        steps.push(Step::Encryption {
            method: match method {
                Encryption::Aes => "aes",
                Encryption::Luks => "luks",
            },
            cipher: header.as_ref().ok().map(|header| header.cipher_spec()),
            iv_sector: *iv_sector,
            problem: header.as_ref().err().map(|error| error.without_path()),
        });
    }
    let place = match explanation.mapping {
        Mapping::Data(place) | Mapping::Encrypted { place, .. } => place,
        Mapping::Compressed { host, .. } => HostPlace::in_image(host),
        Mapping::Zero(_) | Mapping::Damaged { .. } => return,
    };
    if let Some(piece) = explanation.below {
        steps.push(Step::FileSystem {
            file: json_path(layer, place.file),
            offset: place.offset.get(),
            says: match piece {
                Piece::Data => "data",
                Piece::Hole => "hole",
                Piece::Unwritten => "unwritten",
                Piece::PastEnd => "past-end",
            },
        });
    }
}

impl Answer {
    fn of(layer: &Layer, explanation: &Explanation) -> Self {
        let depth = explanation.depth();
        match explanation.mapping {
            Mapping::Data(place) => {
                Self::Data { depth, file: json_path(layer, place.file), offset: place.offset.get() }
            }
            Mapping::Encrypted { place, .. } => Self::Encrypted {
                depth,
                file: json_path(layer, place.file),
                offset: place.offset.get(),
            },
            Mapping::Compressed { host, stream_length, cluster } => Self::Compressed {
                depth,
                file: json_path(layer, FileRole::Image),
                stream_offset: host.get(),
                stream_length: stream_length.get(),
                compression: layer.image.compression().map(|compression| match compression {
                    Compression::Zlib => "zlib",
                    Compression::Zstd => "zstd",
                }),
                offset_in_cluster: explanation.offset.since(cluster).get(),
            },
            Mapping::Zero(cause) => {
                let place = explanation.mapping.place();
                Self::Zero {
                    depth,
                    cause: zero_cause(cause),
                    file: place.map(|place| json_path(layer, place.file)),
                    offset: place.map(|place| place.offset.get()),
                }
            }
            Mapping::Damaged { .. } => Self::Damaged { depth },
        }
    }
}
