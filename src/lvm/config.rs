//! The syntax of LVM's metadata (that of lvm.conf): sections in braces, and `name = value`,
//! where a value is a number, a string or an array of these. No recursion, and no more
//! entries than [`MAX_ENTRIES`], whatever the text says.

use super::Fault;

/// Most entries and array elements, each, of a text. One logical volume has some 15.
pub(super) const MAX_ENTRIES: usize = 1 << 20;
/// Most sections inside of each other. LVM's own metadata has six.
pub(super) const MAX_DEPTH: usize = 16;
/// No node.
const NONE: u32 = u32::MAX;

/// A value, or an element of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value<'t> {
    Number(i64),
    /// What stands between the quotes.
    Text(&'t str),
}

impl Value<'_> {
    pub(super) fn text(self) -> Option<String> {
        match self {
            Self::Number(_) => None,
            // A backslash stands before a quote or another backslash.
            Self::Text(raw) => Some(raw.replace("\\\"", "\"").replace("\\\\", "\\")),
        }
    }

    pub(super) fn number(self) -> Option<u64> {
        match self {
            Self::Number(number) => u64::try_from(number).ok(),
            Self::Text(_) => None,
        }
    }
}

#[derive(Debug)]
struct Node<'t> {
    name: &'t str,
    /// The first of a section's entries.
    child: u32,
    /// The next entry of the same section.
    next: u32,
    /// Where in `values`; none of a section.
    values: Option<(u32, u32)>,
}

/// A text, taken apart.
#[derive(Debug)]
pub(super) struct Config<'t> {
    nodes: Vec<Node<'t>>,
    values: Vec<Value<'t>>,
}

/// A section, or the whole text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Section<'c> {
    config: &'c Config<'c>,
    /// Its first entry.
    first: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'t> {
    Open,
    Close,
    OpenArray,
    CloseArray,
    Comma,
    Equals,
    Value(Value<'t>),
    Word(&'t str),
}

/// The text that is still to be read.
struct Tokens<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Tokens<'t> {
    fn fault(&self) -> Fault {
        let before = self.text.get(..self.at).unwrap_or(self.text);
        Fault::Syntax { line: before.bytes().filter(|&byte| byte == b'\n').count() as u64 + 1 }
    }

    /// Takes as many bytes as `wanted` holds for, from `start` on; where they end.
    fn run(&self, start: usize, wanted: impl Fn(u8) -> bool) -> usize {
        let rest = self.text.as_bytes().get(start..).unwrap_or_default();
        start + rest.iter().position(|&byte| !wanted(byte)).unwrap_or(rest.len())
    }

    fn next(&mut self) -> Result<Option<Token<'t>>, Fault> {
        let bytes = self.text.as_bytes();
        let first = loop {
            match bytes.get(self.at) {
                // The text ends with a NUL.
                None | Some(0) => return Ok(None),
                Some(b'#') => self.at = self.run(self.at, |byte| byte != b'\n'),
                Some(byte) if byte.is_ascii_whitespace() => self.at += 1,
                Some(&byte) => break byte,
            }
        };
        let start = self.at;
        self.at += 1;
        let token = match first {
            b'{' => Token::Open,
            b'}' => Token::Close,
            b'[' => Token::OpenArray,
            b']' => Token::CloseArray,
            b',' => Token::Comma,
            b'=' => Token::Equals,
            b'"' => {
                let mut end = self.at;
                while let Some(&byte) = bytes.get(end).filter(|&&byte| byte != b'"') {
                    end += if byte == b'\\' { 2 } else { 1 };
                }
                let text = self.text.get(self.at..end).filter(|_| end < bytes.len());
                let text = text.ok_or_else(|| self.fault())?;
                self.at = end + 1;
                Token::Value(Value::Text(text))
            }
            byte if is_of_a_word(byte) => {
                self.at = self.run(start, is_of_a_word);
                let word = self.text.get(start..self.at).ok_or_else(|| self.fault())?;
                Token::Word(word)
            }
            _ => return Err(self.fault()),
        };
        Ok(Some(token))
    }

    /// The next token, where there has to be one.
    fn need(&mut self) -> Result<Token<'t>, Fault> {
        self.next()?.ok_or_else(|| self.fault())
    }

    /// The value that a token is, if it is one.
    fn value(&self, token: Token<'t>) -> Result<Value<'t>, Fault> {
        match token {
            Token::Value(value) => Ok(value),
            Token::Word(word) => Ok(word.parse().map_or(Value::Text(word), Value::Number)),
            _ => Err(self.fault()),
        }
    }
}

fn is_of_a_word(byte: u8) -> bool {
    byte.is_ascii_graphic() && !b"{}[],=\"'#".contains(&byte) || !byte.is_ascii()
}

impl<'t> Config<'t> {
    /// Takes a text apart.
    pub(super) fn parse(text: &'t str) -> Result<Self, Fault> {
        let mut config = Config { nodes: Vec::new(), values: Vec::new() };
        let mut tokens = Tokens { text, at: 0 };
        // Of each open section: itself, and its last entry so far.
        let mut open = vec![(NONE, NONE)];
        while let Some(token) = tokens.next()? {
            let name = match token {
                Token::Close if open.len() > 1 => {
                    open.pop();
                    continue;
                }
                Token::Word(name) | Token::Value(Value::Text(name)) => name,
                _ => return Err(tokens.fault()),
            };
            let index = config.push(name, &mut open)?;
            match tokens.need()? {
                Token::Open if open.len() < MAX_DEPTH => open.push((index, NONE)),
                Token::Open => return Err(Fault::TooDeep),
                Token::Equals => {
                    let values = config.values(&mut tokens)?;
                    if let Some(node) = config.nodes.last_mut() {
                        node.values = Some(values);
                    }
                }
                _ => return Err(tokens.fault()),
            }
        }
        if open.len() == 1 { Ok(config) } else { Err(tokens.fault()) }
    }

    /// Adds an entry to the innermost open section.
    fn push(&mut self, name: &'t str, open: &mut [(u32, u32)]) -> Result<u32, Fault> {
        let index = u32::try_from(self.nodes.len()).map_err(|_| Fault::TooManyEntries)?;
        if self.nodes.len() >= MAX_ENTRIES {
            return Err(Fault::TooManyEntries);
        }
        self.nodes.push(Node { name, child: NONE, next: NONE, values: None });
        let Some((section, last)) = open.last_mut() else { return Err(Fault::TooDeep) };
        if let Some(last) = self.nodes.get_mut(*last as usize) {
            last.next = index;
        } else if let Some(section) = self.nodes.get_mut(*section as usize) {
            section.child = index;
        }
        *last = index;
        Ok(index)
    }

    /// What stands behind an equals sign.
    fn values(&mut self, tokens: &mut Tokens<'t>) -> Result<(u32, u32), Fault> {
        let start = self.values.len();
        let first = tokens.need()?;
        if first == Token::OpenArray {
            loop {
                match tokens.need()? {
                    Token::CloseArray => break,
                    Token::Comma => {}
                    token => {
                        let value = tokens.value(token)?;
                        self.push_value(value)?;
                    }
                }
            }
        } else {
            let value = tokens.value(first)?;
            self.push_value(value)?;
        }
        let index = |at: usize| u32::try_from(at).map_err(|_| Fault::TooManyEntries);
        Ok((index(start)?, index(self.values.len())?))
    }

    fn push_value(&mut self, value: Value<'t>) -> Result<(), Fault> {
        if self.values.len() >= MAX_ENTRIES {
            return Err(Fault::TooManyEntries);
        }
        self.values.push(value);
        Ok(())
    }

    /// The whole text.
    pub(super) fn root(&self) -> Section<'_> {
        Section { config: self, first: if self.nodes.is_empty() { NONE } else { 0 } }
    }
}

impl<'c> Section<'c> {
    fn entries(self) -> impl Iterator<Item = &'c Node<'c>> {
        let node = |index: u32| self.config.nodes.get(index as usize);
        std::iter::successors(node(self.first), move |entry| node(entry.next))
    }

    /// Its subsections, by name and in order.
    pub(super) fn sections(self) -> impl Iterator<Item = (&'c str, Self)> {
        let sections = self.entries().filter(|entry| entry.values.is_none());
        sections.map(move |entry| (entry.name, Self { first: entry.child, ..self }))
    }

    /// A subsection; an empty one where it has none of that name.
    pub(super) fn section(self, name: &str) -> Self {
        let found = self.sections().find(|(other, _)| *other == name);
        found.map_or(Self { first: NONE, ..self }, |(_, section)| section)
    }

    /// An array, or a single value; empty where there is neither.
    pub(super) fn list(self, name: &str) -> &'c [Value<'c>] {
        let found = self.entries().find(|entry| entry.name == name && entry.values.is_some());
        let (start, end) = found.and_then(|entry| entry.values).unwrap_or_default();
        self.config.values.get(start as usize..end as usize).unwrap_or_default()
    }

    /// A single value.
    fn value(self, name: &str) -> Option<Value<'c>> {
        match self.list(name) {
            [value] => Some(*value),
            _ => None,
        }
    }

    /// A string.
    pub(super) fn text(self, name: &'static str) -> Result<String, Fault> {
        self.optional_text(name).ok_or(Fault::Field(name))
    }

    pub(super) fn optional_text(self, name: &str) -> Option<String> {
        self.value(name).and_then(Value::text)
    }

    /// A number that is not negative.
    pub(super) fn number(self, name: &'static str) -> Result<u64, Fault> {
        self.value(name).and_then(Value::number).ok_or(Fault::Field(name))
    }

    /// A number of extents or of sectors, which LVM keeps in 32 bits.
    pub(super) fn count(self, name: &'static str) -> Result<u32, Fault> {
        u32::try_from(self.number(name)?).map_err(|_| Fault::Field(name))
    }

    /// True where one of the words of an array is this one.
    pub(super) fn has_flag(self, name: &str, flag: &str) -> bool {
        self.list(name).contains(&Value::Text(flag))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_lvm_writes_is_read() {
        let text =
            "# a comment\nvg {\n\tid = \"a-b\" # more\n\tflags = []\n\tlist = [\"x\", 7,\n\"y\"]\n
            inner {\n} other { size = 12 } }\nlast = \"a \\\"quoted\\\" \\\\ thing\"\n\0rubbish {";
        let config = Config::parse(text).unwrap();
        let root = config.root();
        let group = root.section("vg");
        assert_eq!(group.text("id"), Ok("a-b".to_owned()));
        assert_eq!(group.list("flags"), []);
        assert_eq!(group.list("list"), [Value::Text("x"), Value::Number(7), Value::Text("y")]);
        assert!(group.has_flag("list", "y") && !group.has_flag("list", "z"));
        let names: Vec<_> = group.sections().map(|(name, _)| name).collect();
        assert_eq!(names, ["inner", "other"]);
        assert_eq!(group.section("other").number("size"), Ok(12));
        assert_eq!(group.section("inner").number("size"), Err(Fault::Field("size")));
        assert_eq!(root.text("last"), Ok("a \"quoted\" \\ thing".to_owned()));
        assert_eq!(root.number("last"), Err(Fault::Field("last")));
    }

    #[test]
    fn what_is_no_metadata_is_refused_with_its_line() {
        for (text, line) in [
            ("a", 1),
            ("a = ", 1),
            ("a {\n b = 1\n", 3),
            ("}", 1),
            ("a = \"x", 1),
            ("a = \"x\\", 1),
            ("\na = [1, ", 2),
            ("\n\na = [[1]]", 3),
            ("a = {", 1),
            ("= 1", 1),
            ("'", 1),
        ] {
            assert_eq!(Config::parse(text).unwrap_err(), Fault::Syntax { line }, "{text:?}");
        }
    }

    #[test]
    fn a_text_without_end_is_bounded() {
        assert_eq!(Config::parse(&"a {".repeat(1 << 20)).unwrap_err(), Fault::TooDeep);
        assert_eq!(
            Config::parse(&"a=1 ".repeat(MAX_ENTRIES + 1)).unwrap_err(),
            Fault::TooManyEntries
        );
        let array = format!("a = [{}]", "1,".repeat(MAX_ENTRIES + 1));
        assert_eq!(Config::parse(&array).unwrap_err(), Fault::TooManyEntries);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[a-z0-9{}=\\[\\],\"\\\\# \n\0é]{0,60}") {
            if let Ok(config) = Config::parse(&text) {
                for (_, section) in config.root().sections() {
                    section.list("a");
                }
            }
        }
    }
}
