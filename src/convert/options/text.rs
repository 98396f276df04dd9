//! Taking `-o` text apart, as QEMU's QemuOpts does.

use super::{bad_value, usage};
use crate::error::Result;
use crate::format::Format;

/// Splits at commas; two of them are one of the value.
pub(super) fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.next_if_eq(&',').is_none() => parts.push(String::new()),
            c => {
                if let Some(part) = parts.last_mut() {
                    part.push(c);
                }
            }
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// The options that are given, of which the known ones are taken.
pub(super) struct Settings {
    format: Format,
    given: Vec<(String, Option<String>)>,
}

impl Settings {
    pub(super) fn parse<T: AsRef<str>>(format: Format, texts: &[T]) -> Result<Self> {
        let mut given: Vec<(String, Option<String>)> = Vec::new();
        for part in texts.iter().flat_map(|text| split(text.as_ref())) {
            let (name, value) = match part.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (part, None),
            };
            if given.iter().any(|(other, _)| *other == name) {
                return Err(usage(format!("-o {name} is given twice")));
            }
            given.push((name, value));
        }
        let mut settings = Self { format, given };
        settings.refuse_what_others_decide()?;
        settings.pass_over_hints()?;
        Ok(settings)
    }

    /// The value of an option, where it is given; of one without a value that is "on".
    pub(super) fn take(&mut self, name: &str) -> Option<String> {
        let at = self.given.iter().position(|(other, _)| other == name)?;
        Some(self.given.remove(at).1.unwrap_or_else(|| "on".to_owned()))
    }

    /// An option that is on or off.
    pub(super) fn take_bool(&mut self, name: &str) -> Result<bool> {
        let Some(text) = self.take(name) else { return Ok(false) };
        match text.as_str() {
            "on" | "yes" | "true" | "y" => Ok(true),
            "off" | "no" | "false" | "n" => Ok(false),
            _ => Err(bad_value(name, &text, "on or off")),
        }
    }

    /// A size in bytes, or with one of QEMU's suffixes.
    pub(super) fn take_size(&mut self, name: &str) -> Result<Option<u64>> {
        let Some(text) = self.take(name) else { return Ok(None) };
        let possible = "a number of bytes, like 512, 0x200, 64k or 2M";
        parse_size(&text).map(Some).ok_or_else(|| bad_value(name, &text, possible))
    }

    /// A plain number.
    pub(super) fn take_number(&mut self, name: &str) -> Result<Option<u64>> {
        let Some(text) = self.take(name) else { return Ok(None) };
        let number = match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => text.parse(),
        };
        number.map(Some).map_err(|_| bad_value(name, &text, "a number"))
    }

    /// All known ones are taken: what is left is unknown.
    pub(super) fn refuse_the_rest(&self) -> Result<()> {
        let Some((name, _)) = self.given.first() else { return Ok(()) };
        let format = self.format;
        Err(usage(format!("{format} has no option '{name}': -o help lists those it has")))
    }

    fn refuse_what_others_decide(&self) -> Result<()> {
        for (name, _) in &self.given {
            let instead = match name.as_str() {
                "size" => "the output has the size of the input",
                "backing_file" => "give the backing file with -B",
                "backing_fmt" => "give the backing file's format with -F, beside -B",
                name if name == "encryption" || name.starts_with("encrypt.") => {
                    "imgdm writes nothing encrypted: encrypt the output with qemu-img convert, or \
                     put it on an encrypted file system"
                }
                _ => continue,
            };
            return Err(usage(format!("-o {name} is not for imgdm: {instead}")));
        }
        Ok(())
    }

    /// What QEMU hands to the file system, as far as it changes nothing.
    fn pass_over_hints(&mut self) -> Result<()> {
        // A hint for XFS how to lay out a file that grows in small steps, which ours does not.
        self.take_size("extent_size_hint")?;
        if self.take_bool("nocow")? {
            return Err(usage(
                "-o nocow=on is not for imgdm: files that are cloned share what copy-on-write \
                 keeps apart; set it for the directory with chattr +C",
            ));
        }
        Ok(())
    }
}

/// qemu_strtosz(): decimal with a fraction where a suffix makes bytes of it, powers of 1024.
fn parse_size(text: &str) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).ok();
    }
    let digits_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits_end);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.is_empty() {
        return whole.parse::<u64>().ok()?.checked_mul(1 << shift);
    }
    let whole = if whole.is_empty() { 0 } else { whole.parse::<u64>().ok()? };
    let whole = whole.checked_mul(1 << shift)?;
    let tenths = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let part = fraction.parse::<u128>().ok()?.checked_mul(1 << shift)?;
    // A fraction of a byte is none of QEMU's sizes.
    if shift == 0 {
        return None;
    }
    whole.checked_add(u64::try_from(part / tenths).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_commas_are_one_of_the_value() {
        assert_eq!(split("a=1,b=x,,y,c"), ["a=1", "b=x,y", "c"]);
        assert_eq!(split("a=,,,,b"), ["a=,,b"]);
        assert_eq!(split(",,,a"), [",", "a"]);
        assert!(split("").is_empty());
    }

    #[test]
    fn sizes_have_suffixes_and_fractions() {
        assert_eq!(parse_size("512"), Some(512));
        assert_eq!(parse_size("64k"), Some(65536));
        assert_eq!(parse_size("0x10000"), Some(65536));
        assert_eq!(parse_size("0.5M"), Some(1 << 19));
        assert_eq!(parse_size(".5M"), Some(1 << 19));
        assert_eq!(parse_size("15E"), Some(15 << 60));
        for wrong in ["", "k", "16E", "1.5", "1x", "-1", "64kb", ".", "1.2.3k", "0x", "+1"] {
            assert_eq!(parse_size(wrong), None, "{wrong}");
        }
    }
}
