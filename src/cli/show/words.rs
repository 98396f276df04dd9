//! Numbers and names in few columns.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// A number of bytes in three digits and a unit: `1.23 GiB`, `16 TiB`, `512 bytes`.
pub(crate) fn size(bytes: u64) -> String {
    let unit = (0..UNITS.len()).rev().find(|&unit| bytes >> (10 * unit) > 0).unwrap_or(0);
    if unit == 0 {
        return format!("{bytes} bytes");
    }
    let divisor = 1u128 << (10 * unit);
    let rounded = |scale: u128| (u128::from(bytes) * scale * 2 + divisor) / (divisor * 2);
    for (decimals, scale) in [(2usize, 100), (1, 10)] {
        let number = rounded(scale);
        if number < 1000 {
            let text = format!("{}.{:0decimals$}", number / scale, number % scale);
            let short = text.trim_end_matches('0').trim_end_matches('.');
            return format!("{short} {}", UNITS[unit]);
        }
    }
    match (rounded(1), UNITS.get(unit + 1)) {
        (1024, Some(next)) => format!("1 {next}"),
        (number, _) => format!("{number} {}", UNITS[unit]),
    }
}

/// A share in per cent that calls nothing none or all that is not.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 || part == 0 {
        return "0%".to_owned();
    }
    if part >= whole {
        return "100%".to_owned();
    }
    let (part, whole) = (u128::from(part), u128::from(whole));
    if part * 100 < whole {
        "<1%".to_owned()
    } else if part * 100 > whole * 99 {
        ">99%".to_owned()
    } else {
        format!("{}%", (part * 200 + whole) / (whole * 2))
    }
}

/// A count with its thousands apart.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `1 layer`, `2 layers`.
pub(crate) fn counted(number: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(number), if number == 1 { "" } else { "s" })
}

/// Columns that a text takes on a terminal.
pub(crate) fn columns(text: &str) -> usize {
    text.width()
}

/// `text` in at most `most` columns: `ellipsis` in place of its middle, where it is longer.
pub(crate) fn shorten(text: &str, most: usize, ellipsis: &str) -> String {
    if columns(text) <= most {
        return text.to_owned();
    }
    let Some(room) = most.checked_sub(columns(ellipsis)) else {
        return ellipsis.chars().take(most).collect();
    };
    // A name's last part tells more than its first: versions and suffixes.
    let head = take_columns(text.chars(), room / 2);
    let tail: Vec<char> = take_columns(text.chars().rev(), room - room / 2);
    head.into_iter().chain(ellipsis.chars()).chain(tail.into_iter().rev()).collect()
}

fn take_columns(chars: impl Iterator<Item = char>, most: usize) -> Vec<char> {
    let mut room = most;
    let fits = |c: &char| {
        let width = c.width().unwrap_or(0);
        let fits = width <= room;
        room -= if fits { width } else { room };
        fits
    };
    chars.take_while(fits).collect()
}

/// What a screen that knows only ASCII can show.
pub(crate) fn ascii(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_ascii() { c.to_string() } else { c.escape_default().to_string() })
        .collect()
}

/// Words in lines of at most `width` columns.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if columns(line) + 1 + columns(word) <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Offsets at which an axis of a disk of `size` bytes is marked, with `most` marks at most
/// between its ends: equal steps of a round number, and the end.
pub(crate) fn ticks(size: u64, most: u64) -> Vec<u64> {
    const ROUND: [u64; 15] = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512];
    let least = size.div_ceil(most.max(1)).max(1);
    let steps = (0..=6).flat_map(|unit| ROUND.map(|round| u128::from(round) << (10 * unit)));
    let mut steps =
        steps.filter(|&step| step >= u128::from(least)).filter_map(|s| u64::try_from(s).ok());
    // One that ends where the disk does, where it is not much longer.
    let first = steps.clone().next().unwrap_or(u64::MAX);
    let even = steps.find(|step| size.is_multiple_of(*step) && step / 2 <= least);
    let step = even.unwrap_or(first);
    let mut at = 0;
    let mut ticks = Vec::new();
    while at < size {
        ticks.push(at);
        at = at.saturating_add(step);
    }
    ticks.push(size);
    ticks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits_and_no_empty_decimals() {
        let cases = [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (65536, "64 KiB"),
            (1_234_567, "1.18 MiB"),
            ((1 << 20) - 1, "1 MiB"),
            (10239, "10 KiB"),
            (999 << 20, "999 MiB"),
            (1023 << 20, "1023 MiB"),
            (16 << 40, "16 TiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn what_is_left_of_all_is_never_rounded_away() {
        let cases = [
            (0, 0, "0%"),
            (0, 9, "0%"),
            (1, 1000, "<1%"),
            (10, 1000, "1%"),
            (335, 1000, "34%"),
            (990, 1000, "99%"),
            (999, 1000, ">99%"),
            (1000, 1000, "100%"),
            (u64::MAX - 1, u64::MAX, ">99%"),
        ];
        for (part, whole, text) in cases {
            assert_eq!(percent(part, whole), text, "{part} of {whole}");
        }
    }

    #[test]
    fn long_names_lose_their_middle() {
        assert_eq!(shorten("disk.qcow2", 10, "…"), "disk.qcow2");
        assert_eq!(shorten("a-long-name.qcow2", 10, "…"), "a-lo…qcow2");
        assert_eq!(shorten("a-long-name.qcow2", 10, "..."), "a-l...cow2");
        // A wide character takes two columns, and none is cut in two.
        assert_eq!(shorten("長い名前.raw", 8, "…"), "長….raw");
        assert_eq!(shorten("abc", 2, "..."), "..");
        assert_eq!(shorten("abc", 0, "…"), "");
    }

    #[test]
    fn thousands_are_apart() {
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(counted(1, "layer"), "1 layer");
    }

    #[test]
    fn lines_are_no_longer_than_the_screen() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("unbreakable", 3), ["unbreakable"]);
    }

    #[test]
    fn an_axis_has_round_marks_and_ends_with_the_disk() {
        let marks = |size, most| ticks(size, most).into_iter().map(super::size).collect::<Vec<_>>();
        assert_eq!(marks(16 << 40, 6), ["0 bytes", "4 TiB", "8 TiB", "12 TiB", "16 TiB"]);
        assert_eq!(
            marks(100 << 30, 6),
            ["0 bytes", "20 GiB", "40 GiB", "60 GiB", "80 GiB", "100 GiB"]
        );
        assert_eq!(marks(2_361_393_152, 4), ["0 bytes", "1 GiB", "2 GiB", "2.2 GiB"]);
        assert_eq!(marks(1 << 20, 6), ["0 bytes", "256 KiB", "512 KiB", "768 KiB", "1 MiB"]);
        assert_eq!(marks(512, 1), ["0 bytes", "512 bytes"]);
        assert_eq!(marks(0, 6), ["0 bytes"]);
        assert!(ticks(u64::MAX, 5).len() <= 7);
    }
}
