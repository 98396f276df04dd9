//! Facts that are printed twice: as JSON, and as the indented text that QEMU makes of the
//! same (dump_qobject() in its block/qapi.c).

use std::io::{self, Write};

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use imgdm::error::printable;

/// A value in the order that QEMU prints it in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fact {
    Text(String),
    Number(u64),
    Flag(bool),
    Dict(Vec<(&'static str, Fact)>),
    List(Vec<Fact>),
}

impl From<&str> for Fact {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<u64> for Fact {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<bool> for Fact {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl Serialize for Fact {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => serializer.serialize_str(text),
            Self::Number(number) => serializer.serialize_u64(*number),
            Self::Flag(flag) => serializer.serialize_bool(*flag),
            Self::List(list) => serializer.collect_seq(list),
            Self::Dict(entries) => {
                let mut map = serializer.serialize_map(Some(entries.len()))?;
                for (key, value) in entries {
                    map.serialize_entry(key, value)?;
                }
                map.end()
            }
        }
    }
}

impl Fact {
    /// True where [`dump`](Self::dump) prints nothing.
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Dict(entries) => entries.is_empty(),
            Self::List(list) => list.is_empty(),
            Self::Text(_) | Self::Number(_) | Self::Flag(_) => false,
        }
    }

    /// Prints the value for people, `depth` steps of four spaces to the right.
    pub(crate) fn dump(&self, out: &mut impl Write, depth: usize) -> io::Result<()> {
        match self {
            Self::Text(text) => writeln!(out, "{}", printable(text)),
            Self::Number(number) => writeln!(out, "{number}"),
            Self::Flag(flag) => writeln!(out, "{flag}"),
            Self::Dict(entries) => entries
                .iter()
                .try_for_each(|(key, value)| value.dump_entry(out, depth, &key.replace('-', " "))),
            Self::List(list) => (0usize..)
                .zip(list)
                .try_for_each(|(i, value)| value.dump_entry(out, depth, &format!("[{i}]"))),
        }
    }

    fn dump_entry(&self, out: &mut impl Write, depth: usize, key: &str) -> io::Result<()> {
        let nested = matches!(self, Self::Dict(_) | Self::List(_));
        let indent = depth * 4;
        write!(out, "{:indent$}{key}:{}", "", if nested { '\n' } else { ' ' })?;
        self.dump(out, depth + 1)
    }
}
