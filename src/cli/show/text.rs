//! The picture in text.

use imgdm::picture::{Density, Look, State};

use super::scene::{Column, Field, Named, Row, Scene, WHOLE};
use super::terminal::{Colours, Screen};
use super::words::{columns, count, shorten, size, ticks, wrap};

/// Before and between the columns.
const GAP: usize = 2;

/// Columns that one mark of the axis takes at least.
const TICK_WIDTH: usize = 11;

/// Columns that a strip has on a screen, where the layers have these names.
pub(crate) fn strip_width(
    screen: Screen,
    names: &[String],
    is_shown: &dyn Fn(usize) -> bool,
) -> usize {
    let shown = (0..).zip(names).filter(|(depth, _)| is_shown(*depth));
    let labels = shown.map(|(depth, name)| label(Some(depth), names.len(), &screen.show(name)));
    let longest = labels.map(|label| columns(&label)).max().unwrap_or(0);
    beside(screen.width, longest).1
}

/// The widths of the names' column and of the strips on a screen.
fn beside(width: usize, longest_label: usize) -> (usize, usize) {
    let label = longest_label.max(WHOLE.len()).min((width / 4).clamp(10, 40));
    (label, width.saturating_sub(label + 2 * GAP).max(1))
}

/// A layer's label: its depth, where there are several, and its name.
pub(crate) fn label(depth: Option<usize>, layers: usize, name: &str) -> String {
    match depth {
        Some(depth) if layers > 1 => {
            let digits = (layers - 1).to_string().len();
            format!("{depth:>digits$} {name}")
        }
        _ => name.to_owned(),
    }
}

/// Draws the scene; its picture has as many cells as [`strip_width`] says, or fewer.
pub(crate) fn draw(scene: &Scene<'_>, layers: usize, screen: Screen) -> String {
    Drawing { scene, layers, screen }.draw()
}

struct Drawing<'a> {
    scene: &'a Scene<'a>,
    layers: usize,
    screen: Screen,
}

impl Drawing<'_> {
    fn draw(&self) -> String {
        let mut lines = Vec::new();
        self.title(&mut lines);
        lines.push(String::new());
        let labels: Vec<String> = self.scene.rows.iter().map(|row| self.label(row)).collect();
        let longest = labels.iter().map(|label| columns(label)).max().unwrap_or(0);
        let (label_width, width) = beside(self.screen.width, longest);
        let labels: Vec<String> = labels
            .iter()
            .map(|label| {
                // The depth stays whatever is cut.
                let (depth, name) = label.split_at(self.depth_length(label));
                let room = label_width.saturating_sub(columns(depth));
                self.padded(
                    &format!("{depth}{}", shorten(name, room, self.ellipsis())),
                    label_width,
                )
            })
            .collect();
        let indent = " ".repeat(label_width + 2 * GAP);
        if self.scene.picture.grid.cells() == 0 {
            lines.push(format!("{:GAP$}The disk is of no bytes.", ""));
        } else {
            lines.extend(self.axis(width).map(|line| format!("{indent}{line}")));
            for (row, label) in self.scene.rows.iter().zip(&labels) {
                let strip = match row {
                    Row::Strip(named) => self.strip(named, width),
                    Row::LeftOut { layers, .. } => {
                        let note = format!("({} more layers, shown with --all)", count(*layers));
                        shorten(&note, width, self.ellipsis())
                    }
                };
                lines.push(format!("{:GAP$}{label}{:GAP$}{strip}", "", ""));
            }
            lines.push(String::new());
            lines.extend(self.legend());
        }
        for table in [self.scene.bytes_table(), self.scene.fragments_table()] {
            self.table(&labels, label_width, &table, &mut lines);
        }
        lines.push(String::new());
        for note in self.scene.notes() {
            self.paragraph(&note, &mut lines);
        }
        let mut text = String::new();
        for line in lines {
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    fn ellipsis(&self) -> &'static str {
        if self.screen.unicode { "…" } else { "..." }
    }

    fn padded(&self, text: &str, width: usize) -> String {
        format!("{text}{}", " ".repeat(width.saturating_sub(columns(text))))
    }

    /// The image's name and facts, in one line where they fit.
    fn title(&self, lines: &mut Vec<String>) {
        let name = self.screen.show(&self.scene.name);
        let line = format!("{name}: {}", self.scene.facts);
        if columns(&line) <= self.screen.width {
            return lines.push(line);
        }
        lines.push(shorten(&name, self.screen.width, self.ellipsis()));
        self.paragraph(&self.scene.facts, lines);
    }

    fn label(&self, row: &Row<'_>) -> String {
        match row {
            Row::Strip(named) => label(named.depth, self.layers, &self.screen.show(&named.name)),
            Row::LeftOut { .. } => self.ellipsis().to_owned(),
        }
    }

    /// Bytes of a label that are its depth.
    fn depth_length(&self, label: &str) -> usize {
        let is_layer =
            self.layers > 1 && label.trim_start().starts_with(|c: char| c.is_ascii_digit());
        if is_layer { (self.layers - 1).to_string().len() + 1 } else { 0 }
    }

    /// Offsets over marks.
    fn axis(&self, width: usize) -> impl Iterator<Item = String> {
        let disk = self.scene.picture.grid.size().get();
        let (line, start, mark, end) =
            if self.screen.unicode { ('─', '├', '┼', '┤') } else { ('-', '|', '+', '|') };
        let mut offsets = String::new();
        let mut marks = vec![line; width];
        let ticks = ticks(disk, (width / TICK_WIDTH) as u64);
        let end_label = size(disk);
        for &tick in ticks.iter().take(ticks.len().saturating_sub(1)) {
            let column = u128::from(tick) * width as u128 / u128::from(disk.max(1));
            let column = usize::try_from(column).unwrap_or(0).min(width - 1);
            marks[column] = mark;
            let text = if tick == 0 { "0".to_owned() } else { size(tick) };
            // The end's label is the one that has to be there.
            if column + text.len() + 1 + end_label.len() <= width {
                offsets.push_str(&" ".repeat(column.saturating_sub(offsets.len())));
                offsets.push_str(&text);
            }
        }
        marks[0] = start;
        marks[width - 1] = end;
        let room = width.saturating_sub(offsets.len());
        offsets.push_str(&format!("{end_label:>room$}"));
        [offsets, marks.into_iter().collect()].into_iter()
    }

    /// One character for each column; blanks past a layer's end.
    fn strip(&self, named: &Named<'_>, width: usize) -> String {
        let cells = &named.strip.cells;
        let mut out = String::new();
        let mut painted = None;
        for column in 0..width {
            // As many cells as columns, unless the disk has fewer bytes.
            let cell = cells.get(column * cells.len() / width);
            let look = cell.and_then(|sums| sums.look());
            let (glyph, state) = match look {
                Some(look) => (self.glyph(look), Some(look.state)),
                None => (' ', None),
            };
            if painted != state {
                out.push_str(&self.paint(state));
                painted = state;
            }
            out.push(glyph);
        }
        if painted.is_some() {
            out.push_str(&self.paint(None));
        }
        out
    }

    /// The four shades of a state, or as many characters as tell it without colours.
    fn glyphs(&self, state: State) -> &'static [char] {
        let coloured = self.screen.colours != Colours::None;
        match (state, self.screen.unicode) {
            (State::Damaged, _) => &['!'],
            (State::Unallocated, true) => &['·'],
            (State::Unallocated, false) => &['.'],
            (State::Compressed, _) if !coloured => &['c', 'C'],
            (State::Encrypted, _) if !coloured => &['e', 'E'],
            (State::Zero, _) if !coloured => &['z', 'Z'],
            (_, true) => &['░', '▒', '▓', '█'],
            (_, false) => &[':', '+', '*', '#'],
        }
    }

    fn glyph(&self, look: Look) -> char {
        match (self.glyphs(look.state), look.density()) {
            ([only], _) => *only,
            ([under_half, _], Density::Trace | Density::Some) => *under_half,
            ([_, from_half], _) => *from_half,
            ([trace, ..], Density::Trace) => *trace,
            ([_, some, ..], Density::Some) => *some,
            ([_, _, most, ..], Density::Most) => *most,
            (glyphs, _) => glyphs.last().copied().unwrap_or(' '),
        }
    }

    /// The sequence from which on everything is in a state's colour, or in none.
    fn paint(&self, state: Option<State>) -> String {
        // Blue, orange, purple and grey (and a sign for damage), which are told apart with any colour vision,
        // on a dark screen and on a light one.
        let code = match (self.screen.colours, state) {
            (Colours::None, _) => return String::new(),
            (_, None) => "0",
            (Colours::Sixteen, Some(State::Damaged)) => "91",
            (Colours::Sixteen, Some(State::Data)) => "94",
            (Colours::Sixteen, Some(State::Compressed)) => "33",
            (Colours::Sixteen, Some(State::Encrypted)) => "95",
            (Colours::Sixteen, Some(State::Zero)) => "37",
            (Colours::Sixteen, Some(State::Unallocated)) => "90",
            (Colours::Many, Some(State::Damaged)) => "38;5;160",
            (Colours::Many, Some(State::Data)) => "38;5;32",
            (Colours::Many, Some(State::Compressed)) => "38;5;172",
            (Colours::Many, Some(State::Encrypted)) => "38;5;133",
            (Colours::Many, Some(State::Zero)) => "38;5;248",
            (Colours::Many, Some(State::Unallocated)) => "38;5;243",
        };
        format!("\x1b[{code}m")
    }

    /// What the characters mean: those that occur.
    fn legend(&self) -> Vec<String> {
        let mut lines = vec![String::new()];
        let mut used = 0;
        for state in self.scene.states() {
            let glyphs: String = self.glyphs(state).iter().collect();
            let width = columns(&glyphs) + 1 + state.name().len();
            if used > 0 && GAP + used + 3 + width > self.screen.width {
                lines.push(String::new());
                used = 0;
            }
            let Some(line) = lines.last_mut() else { break };
            let gap = if used == 0 { GAP } else { 3 };
            used += width + gap;
            let (on, off) = (self.paint(Some(state)), self.paint(None));
            line.push_str(&format!("{:gap$}{on}{glyphs}{off} {}", "", state.name()));
        }
        if let Some(cell) = self.scene.cell_note() {
            let mut note = format!("A column is {cell}");
            let used: Vec<_> = self.scene.states().into_iter().map(|s| self.glyphs(s)).collect();
            if let Some([trace, some, most, full]) = used.iter().find(|glyphs| glyphs.len() == 4) {
                note.push_str(&format!(
                    "; {trace} under 10% of it, {some} under 50%, {most} under 90%, {full} more"
                ));
            }
            if used.iter().any(|glyphs| glyphs.len() == 2) {
                note.push_str("; small letters under 50%, capitals more");
            }
            note.push_str(". Content goes before zeros, and zeros before unallocated: a single cluster is seen.");
            self.paragraph(&note, &mut lines);
        }
        lines
    }

    fn paragraph(&self, text: &str, lines: &mut Vec<String>) {
        let wrapped = wrap(text, self.screen.width - GAP);
        lines.extend(wrapped.into_iter().map(|line| format!("{:GAP$}{line}", "")));
    }

    /// A table; columns that do not fit stand in another below.
    fn table(
        &self,
        labels: &[String],
        label_width: usize,
        table: &[Column],
        lines: &mut Vec<String>,
    ) {
        let width_of = |column: &Column| {
            let fields = column.fields.iter().map(|field| columns(&plain(field)));
            fields.chain([column.head.len()]).max().unwrap_or(0)
        };
        let mut rest = table;
        while !rest.is_empty() {
            let mut used = GAP + label_width;
            let fits = |column: &&Column| {
                used += GAP + width_of(column);
                used <= self.screen.width
            };
            let fitting = rest.iter().take_while(fits).count().max(1);
            let (now, later) = rest.split_at(fitting);
            let line = |label: &str, field: &dyn Fn(&Column) -> String| {
                let fields: String = now
                    .iter()
                    .map(|column| {
                        format!("{:GAP$}{:>width$}", "", field(column), width = width_of(column))
                    })
                    .collect();
                format!("{:GAP$}{label}{fields}", "")
            };
            lines.push(String::new());
            lines.push(line(&" ".repeat(label_width), &|column| column.head.to_owned()));
            for (index, label) in labels.iter().enumerate() {
                lines.push(line(label, &|column| {
                    column.fields.get(index).map(plain).unwrap_or_default()
                }));
            }
            rest = later;
        }
    }
}

/// A field in one piece, so that in a column numbers stand under numbers.
fn plain(field: &Field) -> String {
    match &field.share {
        Some(share) => format!("{} {share:>4}", field.value),
        None => field.value.clone(),
    }
}
