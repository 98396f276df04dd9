//! The picture as SVG, for a report: one document that needs nothing else.

use std::fmt::Write as _;

use imgdm::picture::{State, Sums};

use super::scene::{Column, Field, Named, Row, Scene};
use super::text::label;
use super::words::{count, shorten, size, ticks, wrap};

/// Lengths in the document's own units.
const WIDTH: usize = 1270;
const MARGIN: usize = 24;
const LABELS: usize = 210;
const STRIP_LEFT: usize = MARGIN + LABELS;
const STRIP_WIDTH: usize = 1000;
const STRIP_HEIGHT: usize = 32;
const ROW_HEIGHT: usize = 42;
const LINE_HEIGHT: usize = 20;
/// Content is drawn so high at least: one cluster of a large disk has to be seen.
const LEAST_HEIGHT: usize = 10;
/// Letters of a name that fit before a strip, and of a note in a line.
const LABEL_LETTERS: usize = 25;
const NOTE_LETTERS: usize = 165;
/// What a share takes of a table's column.
const SHARE_WIDTH: usize = 46;
const TITLE_LETTERS: usize = 60;

const INK: &str = "#222222";
const FAINT: &str = "#666666";

/// Colours of Okabe and Ito, which are told apart with any colour vision, and greys.
fn colour(state: State) -> &'static str {
    match state {
        State::Damaged => "#c1121f",
        State::Data => "#0072b2",
        State::Compressed => "#e69f00",
        State::Encrypted => "#cc79a7",
        State::Zero => "#a6a6a6",
        State::Unallocated => "#eeeeee",
    }
}

/// Draws the scene of a chain of so many layers.
pub(crate) fn draw(scene: &Scene<'_>, layers: usize) -> String {
    let mut drawing = Drawing { scene, layers, body: String::new(), y: 0 };
    drawing.title();
    drawing.strips();
    drawing.legend();
    drawing.table(&scene.bytes_table());
    drawing.table(&scene.fragments_table());
    drawing.notes();
    let Drawing { body, y: height, .. } = drawing;
    let title = escaped(&scene.name);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" font-family=\"sans-serif\" font-size=\"13\" fill=\"{INK}\">\n<title>{title}</title>\n<desc>{}</desc>\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n{body}</svg>\n",
        escaped(&scene.facts)
    )
}

struct Drawing<'a> {
    scene: &'a Scene<'a>,
    layers: usize,
    body: String,
    /// Down to where it is drawn.
    y: usize,
}

impl Drawing<'_> {
    /// A line of the body. (Writing to a string does not fail.)
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.body, "{line}");
    }

    fn text(&mut self, x: usize, anchor: &str, more: &str, text: &str) {
        let (y, text) = (self.y, escaped(text));
        self.line(format_args!(
            "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\"{more}>{text}</text>"
        ));
    }

    fn title(&mut self) {
        self.y += MARGIN + 16;
        let name = shorten(&self.scene.name, TITLE_LETTERS, "…");
        self.text(MARGIN, "start", " font-size=\"20\" font-weight=\"bold\"", &name);
        self.y += LINE_HEIGHT + 2;
        let facts = self.scene.facts.clone();
        self.text(MARGIN, "start", &format!(" fill=\"{FAINT}\""), &facts);
        self.y += 2 * LINE_HEIGHT;
    }

    fn label_of(&self, row: &Row<'_>) -> String {
        match row {
            Row::Strip(named) => {
                shorten(&label(named.depth, self.layers, &named.name), LABEL_LETTERS, "…")
            }
            Row::LeftOut { layers, .. } => format!("({} more layers)", count(*layers)),
        }
    }

    fn strips(&mut self) {
        let disk = self.scene.picture.grid.size().get();
        if disk == 0 {
            self.text(MARGIN, "start", "", "The disk is of no bytes.");
            self.y += LINE_HEIGHT;
            return;
        }
        let bottom = self.y + 10 + ROW_HEIGHT * self.scene.rows.len();
        for tick in ticks(disk, 10) {
            let x = STRIP_LEFT + scaled(tick, disk, STRIP_WIDTH);
            // The last mark before the end leaves room for the end's own.
            if tick == disk || x + 70 <= STRIP_LEFT + STRIP_WIDTH {
                let text = if tick == 0 { "0".to_owned() } else { size(tick) };
                self.text(x, "middle", &format!(" font-size=\"12\" fill=\"{FAINT}\""), &text);
            }
            let top = self.y + 5;
            self.line(format_args!(
                "<path d=\"M{x} {top}V{bottom}\" stroke=\"#cccccc\" stroke-width=\"1\"/>"
            ));
        }
        self.y += 12;
        let rows = &self.scene.rows;
        for row in rows {
            let label = self.label_of(row);
            self.y += STRIP_HEIGHT / 2 + 5;
            let weight = matches!(row, Row::Strip(named) if named.depth.is_none());
            let weight = if weight { " font-weight=\"bold\"" } else { "" };
            self.text(MARGIN, "start", weight, &label);
            self.y -= STRIP_HEIGHT / 2 + 5;
            if let Row::Strip(named) = row {
                self.strip(named);
            }
            self.y += ROW_HEIGHT;
        }
        self.y += LINE_HEIGHT / 2;
    }

    /// Columns of a strip, each a stack of its states from the bottom up.
    fn strip(&mut self, named: &Named<'_>) {
        let disk = self.scene.picture.grid.size().get();
        let (x, y) = (STRIP_LEFT, self.y);
        let end = scaled(named.size.min(disk), disk, STRIP_WIDTH).max(1);
        self.line(format_args!("<g><title>{}</title>", escaped(&named.name)));
        self.line(format_args!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"{end}\" height=\"{STRIP_HEIGHT}\" fill=\"{}\"/>",
            colour(State::Unallocated)
        ));
        let stacks: Vec<Stack> = named.strip.cells.iter().map(stack).collect();
        for (index, state) in STACKED.into_iter().enumerate() {
            let mut path = String::new();
            let mut at = 0;
            for same in stacks.chunk_by(|a, b| a[index] == b[index]) {
                let (from, to) = (at, at + same.len());
                at = to;
                let (bottom, height) = same[0][index];
                if height > 0 {
                    let left = Fixed(from, stacks.len());
                    let width = Fixed(to - from, stacks.len());
                    let top = y + STRIP_HEIGHT - bottom - height;
                    let _ = write!(path, "M{left} {top}h{width}v{height}h-{width}z");
                }
            }
            if !path.is_empty() {
                self.line(format_args!(
                    "<path transform=\"translate({STRIP_LEFT} 0)\" d=\"{path}\" fill=\"{}\"/>",
                    colour(state)
                ));
            }
        }
        // Around it, so that the first and the last column are seen.
        let (x, y, width, height) = (x - 1, y - 1, end + 2, STRIP_HEIGHT + 2);
        self.line(format_args!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"none\" stroke=\"#888888\"/></g>"
        ));
    }

    fn legend(&mut self) {
        let mut x = STRIP_LEFT;
        self.y += LINE_HEIGHT;
        for state in self.scene.states() {
            let y = self.y - 11;
            self.line(format_args!(
                "<rect x=\"{x}\" y=\"{y}\" width=\"14\" height=\"14\" fill=\"{}\" stroke=\"#888888\"/>",
                colour(state)
            ));
            self.text(x + 20, "start", "", state.name());
            x += 130;
        }
        self.y += LINE_HEIGHT;
        if let Some(cell) = self.scene.cell_note() {
            let note = format!(
                "A column of a strip is {cell}; what is stored of it fills it from below, and is drawn at least so high that a single cluster is seen."
            );
            self.text(STRIP_LEFT, "start", &format!(" fill=\"{FAINT}\""), &note);
        }
        self.y += LINE_HEIGHT;
    }

    fn table(&mut self, table: &[Column]) {
        let labels: Vec<String> = self.scene.rows.iter().map(|row| self.label_of(row)).collect();
        self.y += LINE_HEIGHT;
        let step = (STRIP_WIDTH / table.len().max(1)).min(150);
        let right = |index: usize| STRIP_LEFT + step * (index + 1) - 10;
        for (index, column) in table.iter().enumerate() {
            self.text(right(index), "end", &format!(" fill=\"{FAINT}\""), column.head);
        }
        let (y, end) = (self.y + 6, STRIP_LEFT + step * table.len());
        self.line(format_args!("<path d=\"M{MARGIN} {y}H{end}\" stroke=\"#cccccc\"/>"));
        self.y += 4;
        for (row, label) in labels.iter().enumerate() {
            self.y += LINE_HEIGHT;
            self.text(MARGIN, "start", "", label);
            for (index, column) in table.iter().enumerate() {
                let Some(Field { value, share }) = column.fields.get(row) else { continue };
                match share {
                    None => self.text(right(index), "end", "", value),
                    Some(share) => {
                        self.text(right(index) - SHARE_WIDTH, "end", "", value);
                        self.text(right(index), "end", &format!(" fill=\"{FAINT}\""), share);
                    }
                }
            }
        }
        self.y += LINE_HEIGHT;
    }

    fn notes(&mut self) {
        for note in self.scene.notes() {
            for line in wrap(&note, NOTE_LETTERS) {
                self.y += LINE_HEIGHT;
                self.text(MARGIN, "start", &format!(" fill=\"{FAINT}\""), &line);
            }
        }
        self.y += MARGIN;
    }
}

/// The states that are stacked on the ground that is unallocated, from the bottom up.
const STACKED: [State; 5] =
    [State::Damaged, State::Data, State::Compressed, State::Encrypted, State::Zero];

/// For each of them where it starts, and how high it is.
type Stack = [(usize, usize); STACKED.len()];

fn stack(sums: &Sums) -> Stack {
    let total = sums.total();
    if sums.get(State::Damaged) > 0 {
        // Whatever else is there: nobody must miss it.
        return STACKED.map(|state| match state {
            State::Damaged => (0, STRIP_HEIGHT),
            _ => (0, 0),
        });
    }
    let mut heights = STACKED.map(|state| match sums.get(state) {
        0 => 0,
        bytes => scaled(bytes, total, STRIP_HEIGHT).max(LEAST_HEIGHT),
    });
    // What the least heights take too much goes off the highest.
    while heights.iter().sum::<usize>() > STRIP_HEIGHT {
        let Some(highest) = heights.iter_mut().max() else { break };
        *highest -= 1;
    }
    let mut bottom = 0;
    heights.map(|height| {
        bottom += height;
        (bottom - height, height)
    })
}

/// Where `part` of `whole` is on a line of `length`, rounded.
fn scaled(part: u64, whole: u64, length: usize) -> usize {
    let whole = u128::from(whole.max(1));
    let scaled = (u128::from(part) * length as u128 * 2 + whole) / (whole * 2);
    usize::try_from(scaled).unwrap_or(length).min(length)
}

/// A cell's edge on a strip of so many cells, to a hundredth.
struct Fixed(usize, usize);

impl std::fmt::Display for Fixed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hundredths = self.0 * STRIP_WIDTH * 100 / self.1.max(1);
        match hundredths % 100 {
            0 => write!(f, "{}", hundredths / 100),
            part => write!(f, "{}.{part:02}", hundredths / 100),
        }
    }
}

/// Text as XML 1.0 can hold it: markup quoted, and what it has no characters for escaped.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\u{fffe}' | '\u{ffff}' => out.extend(c.escape_default()),
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}
