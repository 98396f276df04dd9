//! The numbers behind the picture.

use imgdm::chain::Chain;
use imgdm::picture::{Fragmentation, Grid, Picture, State, Strip, Sums};

use super::super::output::JsonPath;

/// All that `show --output=json` prints.
#[derive(serde::Serialize)]
pub(crate) struct Report {
    #[serde(flatten)]
    image: JsonPath,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<Snapshot>,
    /// Bytes of the disk.
    virtual_size: u64,
    /// The resolved disk.
    whole: JsonStrip,
    /// Rows of `imgdm map --output=json-full`.
    segments: u64,
    layers: Vec<JsonLayer>,
}

#[derive(serde::Serialize)]
struct Snapshot {
    id: String,
    name: String,
}

#[derive(serde::Serialize)]
struct JsonStrip {
    bytes: Bytes,
    fragmentation: JsonFragmentation,
    cells: Vec<Cell>,
}

/// Bytes of each state.
#[derive(serde::Serialize)]
struct Bytes {
    damaged: u64,
    data: u64,
    compressed: u64,
    encrypted: u64,
    zero: u64,
    unallocated: u64,
}

#[derive(serde::Serialize)]
struct Cell {
    start: u64,
    length: u64,
    /// Sum to less than the length where the layer ends in or before the cell.
    #[serde(flatten)]
    bytes: Bytes,
}

#[derive(serde::Serialize)]
struct JsonFragmentation {
    stored_bytes: u64,
    extents: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    mean_extent_bytes: Option<u64>,
    steps: u64,
    jumps: u64,
}

#[derive(serde::Serialize)]
struct JsonLayer {
    depth: usize,
    #[serde(flatten)]
    file: JsonPath,
    format: &'static str,
    virtual_size: u64,
    /// Internal snapshots of the image.
    snapshots: u32,
    /// What of the whole this layer answers for.
    visible: Bytes,
    /// What lies past the end of the disk; part of `bytes`, and in no cell.
    beyond: Bytes,
    #[serde(flatten)]
    strip: JsonStrip,
}

impl From<&Sums> for Bytes {
    fn from(sums: &Sums) -> Self {
        Self {
            damaged: sums.get(State::Damaged),
            data: sums.get(State::Data),
            compressed: sums.get(State::Compressed),
            encrypted: sums.get(State::Encrypted),
            zero: sums.get(State::Zero),
            unallocated: sums.get(State::Unallocated),
        }
    }
}

impl JsonStrip {
    fn new(grid: Grid, strip: &Strip) -> Self {
        let Fragmentation { stored, extents, steps, jumps } = strip.fragmentation;
        let cell = |(index, sums): (usize, &Sums)| {
            let range = grid.range(index);
            let (start, length) = (range.start.get(), range.length().get());
            Cell { start, length, bytes: sums.into() }
        };
        Self {
            bytes: (&strip.total).into(),
            fragmentation: JsonFragmentation {
                stored_bytes: stored.get(),
                extents,
                mean_extent_bytes: strip.fragmentation.mean_extent().map(|mean| mean.get()),
                steps,
                jumps,
            },
            cells: strip.cells.iter().enumerate().map(cell).collect(),
        }
    }
}

impl Report {
    pub(crate) fn new(chain: &Chain, picture: &Picture) -> Self {
        let layer = |strip: &imgdm::picture::LayerStrip| {
            let layer = &chain.layers()[strip.depth];
            JsonLayer {
                depth: strip.depth,
                file: JsonPath::from(layer.source.absolute_path().as_path()),
                format: layer.image.format().name(),
                virtual_size: layer.image.virtual_size().get(),
                snapshots: layer.image.snapshot_count(),
                visible: (&picture.visible[strip.depth]).into(),
                beyond: (&strip.beyond).into(),
                strip: JsonStrip::new(picture.grid, &strip.strip),
            }
        };
        let top = &chain.layers()[0];
        let snapshot = top.image.snapshot();
        Self {
            image: JsonPath::from(top.source.absolute_path().as_path()),
            snapshot: snapshot
                .map(|snapshot| Snapshot { id: snapshot.id.clone(), name: snapshot.name.clone() }),
            virtual_size: chain.virtual_size().get(),
            whole: JsonStrip::new(picture.grid, &picture.whole),
            segments: picture.segments,
            layers: picture.layers.iter().map(layer).collect(),
        }
    }
}
