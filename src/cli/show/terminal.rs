//! What the terminal can show.

use std::ffi::OsStr;
use std::io::{IsTerminal, stdout};

use clap::ValueEnum;

use super::words;

/// Columns where nobody says how many there are.
const DEFAULT_WIDTH: usize = 80;
/// Fewer leave no room beside the names.
pub(crate) const LEAST_WIDTH: usize = 40;
pub(crate) const GREATEST_WIDTH: usize = 4096;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ColorChoice {
    /// On a terminal, unless NO_COLOR is set
    #[default]
    Auto,
    /// Also into a file or pipe
    Always,
    /// Tell the states apart by letters
    Never,
}

/// The colours that are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Colours {
    None,
    /// The sixteen that every terminal has.
    Sixteen,
    /// 256.
    Many,
}

/// How the picture is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Screen {
    pub(crate) width: usize,
    pub(crate) colours: Colours,
    /// Whether it shows more than ASCII.
    pub(crate) unicode: bool,
}

impl Screen {
    /// What stdout is, as far as the arguments leave it open.
    pub(crate) fn new(width: Option<usize>, color: ColorChoice, ascii: bool) -> Self {
        let variable = |name: &str| std::env::var_os(name);
        let is_terminal = stdout().is_terminal();
        let terminal_width =
            || terminal_size::terminal_size_of(stdout()).map(|size| size.0.0.into());
        let width = width
            .or_else(|| variable("COLUMNS")?.to_str()?.parse().ok().filter(|&width| width > 0))
            .or_else(terminal_width)
            .unwrap_or(DEFAULT_WIDTH)
            .clamp(LEAST_WIDTH, GREATEST_WIDTH);
        let colours = colours(
            color,
            is_terminal,
            variable("NO_COLOR").as_deref(),
            variable("TERM").as_deref(),
            variable("COLORTERM").as_deref(),
        );
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .into_iter()
            .find_map(|name| variable(name).filter(|value| !value.is_empty()));
        Self { width, colours, unicode: !ascii && is_utf8(locale.as_deref()) }
    }

    /// A stranger's text as the screen can show it.
    pub(crate) fn show(self, text: &str) -> String {
        if self.unicode { text.to_owned() } else { words::ascii(text) }
    }
}

fn colours(
    choice: ColorChoice,
    is_terminal: bool,
    no_color: Option<&OsStr>,
    term: Option<&OsStr>,
    colorterm: Option<&OsStr>,
) -> Colours {
    // https://no-color.org: any value but an empty one.
    let refused = no_color.is_some_and(|value| !value.is_empty());
    let dumb = term.is_none_or(|term| term.is_empty() || term == "dumb");
    let wanted = match choice {
        ColorChoice::Auto => is_terminal && !refused && !dumb,
        ColorChoice::Always => true,
        ColorChoice::Never => false,
    };
    let many = term.is_some_and(|term| term.to_string_lossy().contains("256color"))
        || colorterm.is_some_and(|value| !value.is_empty());
    match (wanted, many) {
        (false, _) => Colours::None,
        (true, false) => Colours::Sixteen,
        (true, true) => Colours::Many,
    }
}

/// Whether a locale's name says UTF-8; the C locale's does not.
fn is_utf8(locale: Option<&OsStr>) -> bool {
    let name = locale.map(|name| name.to_string_lossy().to_ascii_lowercase());
    name.is_some_and(|name| name.contains("utf-8") || name.contains("utf8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_that_have_them_and_users_who_want_them() {
        let auto = |is_terminal, no_color: Option<&str>, term: Option<&str>| {
            colours(
                ColorChoice::Auto,
                is_terminal,
                no_color.map(OsStr::new),
                term.map(OsStr::new),
                None,
            )
        };
        assert_eq!(auto(true, None, Some("xterm-256color")), Colours::Many);
        assert_eq!(auto(true, None, Some("linux")), Colours::Sixteen);
        assert_eq!(auto(true, Some(""), Some("linux")), Colours::Sixteen);
        assert_eq!(auto(true, Some("1"), Some("linux")), Colours::None);
        assert_eq!(auto(true, None, Some("dumb")), Colours::None);
        assert_eq!(auto(true, None, None), Colours::None);
        assert_eq!(auto(false, None, Some("xterm-256color")), Colours::None);
        let term = Some(OsStr::new("linux"));
        let no_color = Some(OsStr::new("1"));
        assert_eq!(colours(ColorChoice::Always, false, no_color, term, None), Colours::Sixteen);
        assert_eq!(colours(ColorChoice::Never, true, None, term, None), Colours::None);
    }

    #[test]
    fn only_a_utf_8_locale_gets_more_than_ascii() {
        for name in ["en_US.UTF-8", "C.utf8", "de_DE.utf-8@euro"] {
            assert!(is_utf8(Some(OsStr::new(name))), "{name}");
        }
        for name in [Some("C"), Some("POSIX"), Some("de_DE.ISO-8859-1"), None] {
            assert!(!is_utf8(name.map(OsStr::new)), "{name:?}");
        }
    }
}
