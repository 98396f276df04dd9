//! What is shown, whatever it is drawn with: rows of strips with their names, and tables
//! of the numbers behind them.

use imgdm::chain::{Chain, Layer};
use imgdm::error::printable;
use imgdm::picture::{Fragmentation, Picture, State, Strip, Sums};

use super::words::{count, counted, percent, size};

/// Layers that are shown of a longer chain: so many of the top, and the base.
const TOP_LAYERS: usize = 8;

/// The label of the resolved disk.
pub(crate) const WHOLE: &str = "whole";

/// Whether a layer of a chain of so many is shown without being asked for. A single one
/// is never left out: its own row would take no more room than saying so.
pub(crate) fn is_shown(depth: usize, layers: usize) -> bool {
    layers <= TOP_LAYERS + 2 || depth < TOP_LAYERS || depth + 1 == layers
}

/// A layer's file name, and its snapshot's where it is one; control characters escaped.
pub(crate) fn layer_name(layer: &Layer) -> String {
    let path = layer.source.path();
    let name = printable(&path.file_name().unwrap_or(path.as_os_str()).to_string_lossy());
    match layer.image.snapshot() {
        Some(snapshot) => format!("{name}@{}", printable(&snapshot.name)),
        None => name,
    }
}

/// A row of the picture.
pub(crate) enum Row<'p> {
    Strip(Named<'p>),
    /// So many layers that are not shown, and what is visible of them.
    LeftOut {
        layers: u64,
        visible: Sums,
    },
}

/// A strip with its name.
pub(crate) struct Named<'p> {
    pub(crate) depth: Option<usize>,
    /// A layer's file, control characters escaped.
    pub(crate) name: String,
    pub(crate) format: Option<&'static str>,
    /// Bytes of its virtual disk.
    pub(crate) size: u64,
    pub(crate) strip: &'p Strip,
    /// What of it is visible, where there is more than one layer.
    pub(crate) visible: Option<Sums>,
    pub(crate) snapshots: u32,
}

/// All that is drawn.
pub(crate) struct Scene<'p> {
    pub(crate) picture: &'p Picture,
    /// The image's file name and its snapshot's, control characters escaped.
    pub(crate) name: String,
    /// Size, format, number of layers and of snapshots.
    pub(crate) facts: String,
    /// The whole first, then the layers from the top down. One layer is all there is: then
    /// the whole has no row of its own.
    pub(crate) rows: Vec<Row<'p>>,
}

/// A column of a table; one field for each row of the picture.
pub(crate) struct Column {
    pub(crate) head: &'static str,
    pub(crate) fields: Vec<Field>,
}

/// A number, and what share of something that is.
#[derive(Default)]
pub(crate) struct Field {
    pub(crate) value: String,
    pub(crate) share: Option<String>,
}

impl From<String> for Field {
    fn from(value: String) -> Self {
        Self { value, share: None }
    }
}

impl Field {
    /// A number of bytes and their share; a dash for none.
    fn bytes(bytes: u64, of: u64) -> Self {
        match bytes {
            0 => "-".to_owned().into(),
            _ => Self { value: size(bytes), share: Some(percent(bytes, of)) },
        }
    }
}

impl<'p> Scene<'p> {
    pub(crate) fn new(chain: &Chain, picture: &'p Picture) -> Self {
        let layers = chain.layers();
        let mut rows = Vec::new();
        if layers.len() > 1 {
            rows.push(Row::Strip(Named {
                depth: None,
                name: WHOLE.to_owned(),
                format: None,
                size: picture.grid.size().get(),
                strip: &picture.whole,
                visible: None,
                snapshots: 0,
            }));
        }
        let mut next = 0;
        for layer in &picture.layers {
            rows.extend(left_out(picture, next, layer.depth));
            next = layer.depth + 1;
            let image = &layers[layer.depth].image;
            rows.push(Row::Strip(Named {
                depth: Some(layer.depth),
                name: layer_name(&layers[layer.depth]),
                format: Some(image.format().name()),
                size: image.virtual_size().get(),
                strip: &layer.strip,
                visible: (layers.len() > 1).then(|| picture.visible[layer.depth]),
                snapshots: image.snapshot_count(),
            }));
        }
        let image = &layers[0].image;
        let mut facts = format!("{}, {}", size(image.virtual_size().get()), image.format().name());
        let snapshots = u64::from(image.snapshot_count());
        for (number, noun) in [(layers.len() as u64, "layer"), (snapshots, "internal snapshot")] {
            if number > 0 {
                facts.push_str(&format!(", {}", counted(number, noun)));
            }
        }
        Self { picture, name: layer_name(&layers[0]), facts, rows }
    }

    /// The states that occur in any strip.
    pub(crate) fn states(&self) -> Vec<State> {
        let strips = self.strips();
        let occurs = |state: &State| strips.iter().any(|named| named.strip.total.get(*state) > 0);
        State::ALL.into_iter().filter(occurs).collect()
    }

    fn strips<'s>(&'s self) -> Vec<&'s Named<'p>> {
        let strip = |row: &'s Row<'p>| match row {
            Row::Strip(named) => Some(named),
            Row::LeftOut { .. } => None,
        };
        self.rows.iter().filter_map(strip).collect()
    }

    /// A column of the strips' fields; of the layers left out it says nothing.
    fn column(&self, head: &'static str, field: impl Fn(&Named<'_>) -> Field) -> Column {
        let field = |row: &Row<'_>| match row {
            Row::Strip(named) => field(named),
            Row::LeftOut { .. } => Field::default(),
        };
        Column { head, fields: self.rows.iter().map(field).collect() }
    }

    /// Size, and bytes of each state that occurs.
    pub(crate) fn bytes_table(&self) -> Vec<Column> {
        let mut columns = vec![self.column("size", |named| size(named.size).into())];
        columns.extend(self.states().into_iter().map(|state| {
            let bytes = |named: &Named<'_>| named.strip.total.get(state);
            self.column(state.name(), |named| Field::bytes(bytes(named), named.size))
        }));
        columns
    }

    /// What is visible, how scattered it lies, and snapshots of backing files.
    pub(crate) fn fragments_table(&self) -> Vec<Column> {
        let format = |named: &Named<'_>| named.format.unwrap_or_default().to_owned().into();
        let mut columns = vec![self.column("format", format)];
        if self.strips().iter().any(|named| named.visible.is_some()) {
            columns.push(self.visible_column());
        }
        columns
            .push(self.column("extents", |named| count(named.strip.fragmentation.extents).into()));
        columns.push(self.column("mean extent", |named| {
            let mean = named.strip.fragmentation.mean_extent();
            mean.map_or("-".to_owned(), |mean| size(mean.get())).into()
        }));
        columns.push(self.column("jumps", |named| {
            let Fragmentation { jumps, steps, .. } = named.strip.fragmentation;
            match (jumps, steps) {
                (_, 0) => "-".to_owned().into(),
                (0, _) => "none".to_owned().into(),
                _ => Field { value: count(jumps), share: Some(percent(jumps, steps)) },
            }
        }));
        // The active layer's stand in the title.
        if self.strips().iter().any(|named| named.depth != Some(0) && named.snapshots > 0) {
            columns.push(self.column("snapshots", |named| match named.depth {
                Some(_) => count(named.snapshots.into()).into(),
                None => Field::default(),
            }));
        }
        columns
    }

    fn visible_column(&self) -> Column {
        let field = |row: &Row<'_>| match row {
            Row::Strip(named) => match &named.visible {
                Some(visible) => Field::bytes(held(visible), held(&named.strip.total)),
                None => Field::default(),
            },
            // How much the layers left out hold in all is not known.
            Row::LeftOut { visible, .. } => match held(visible) {
                0 => "-".to_owned().into(),
                bytes => Field { value: size(bytes), share: Some(String::new()) },
            },
        };
        Column { head: "visible", fields: self.rows.iter().map(field).collect() }
    }

    /// What the words over the columns mean.
    pub(crate) fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.rows.len() > 1 {
            notes.push("visible: what of a layer's data and zeros no overlay covers.".to_owned());
        }
        notes.push(
            "jumps: of the steps from one stored cluster to the next of the disk, those that lead elsewhere in a file."
                .to_owned(),
        );
        notes.push(format!(
            "The whole has {} (rows of imgdm map --output=json-full).",
            counted(self.picture.segments, "segment")
        ));
        notes
    }

    /// What one cell stands for.
    pub(crate) fn cell_note(&self) -> Option<String> {
        let cells = self.picture.grid.cells() as u64;
        let bytes = self.picture.grid.size().get().checked_div(cells)?;
        Some(size(bytes))
    }
}

/// Data and zeros: what hides the backing file's.
fn held(sums: &Sums) -> u64 {
    sums.total().saturating_sub(sums.get(State::Unallocated))
}

fn left_out<'p>(picture: &Picture, from: usize, to: usize) -> Option<Row<'p>> {
    let left_out = picture.visible.get(from..to).filter(|layers| !layers.is_empty())?;
    let mut visible = Sums::default();
    left_out.iter().for_each(|sums| visible.add_all(sums));
    Some(Row::LeftOut { layers: left_out.len() as u64, visible })
}
