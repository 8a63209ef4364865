//! Values with units as people write them: "5s", "8 GiB", "0..16".
//!
//! Each parser returns `None` for what it does not understand; the caller knows the key and says what is allowed.

use std::{fmt, ops::Range, time::Duration};

use grokpipe_model::Bytes;

/// A number of bytes; shown with the largest binary unit that fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ByteSize(pub(crate) u64);

const BYTE_UNITS: [(&str, u64); 9] = [
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Bytes(self.0).fmt(f)
    }
}

impl ByteSize {
    /// "8 GiB", "512MiB", "1.5 GB", or plain bytes.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (number, unit) = split_unit(text)?;
        let factor = if unit.is_empty() {
            1
        } else {
            BYTE_UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, factor)| *factor)?
        };
        scaled(number, factor).map(Self)
    }
}

/// "250ms", "5s", "10m", "2h", in whole milliseconds. A unit is required, except for 0.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = split_unit(text)?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "" if number == "0" => 1,
        _ => return None,
    };
    scaled(number, millis).map(Duration::from_millis)
}

/// "0..16": from layer 0 to before layer 16.
pub(crate) fn layer_range(text: &str) -> Option<Range<u32>> {
    let (start, end) = text.trim().split_once("..")?;
    let (start, end) = (start.trim().parse().ok()?, end.trim().parse().ok()?);
    (start < end).then_some(start..end)
}

/// "16", "8192": a whole number.
pub(crate) fn whole(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// A number and what follows it.
fn split_unit(text: &str) -> Option<(&str, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (!number.is_empty()).then_some((number, unit.trim_start()))
}

/// `number * factor`, rounded; `None` where it does not fit.
fn scaled(number: &str, factor: u64) -> Option<u64> {
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor);
    }
    let value = number.parse::<f64>().ok()? * factor as f64;
    // Beyond 2^53 a float no longer holds whole numbers, and no machine has as many bytes or milliseconds.
    (value.is_finite() && value < 9.0e15).then_some(value.round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_sizes_are_read_and_shown() {
        let cases = [
            ("4096", Some(4096)),
            ("8 GiB", Some(8 << 30)),
            ("8gib", Some(8 << 30)),
            ("1.5KiB", Some(1536)),
            ("2 GB", Some(2_000_000_000)),
            ("", None),
            ("GiB", None),
            ("-1 GiB", None),
            ("1 Gibibyte", None),
            ("1.2.3 GiB", None),
            ("99999999999 TiB", None),
        ];
        for (text, bytes) in cases {
            assert_eq!(ByteSize::parse(text), bytes.map(ByteSize), "{text:?}");
        }
        assert_eq!(ByteSize(8 << 30).to_string(), "8.0 GiB");
        assert_eq!(ByteSize(12).to_string(), "12 B");
    }

    #[test]
    fn durations_need_a_unit() {
        let ms = Duration::from_millis;
        let cases = [
            ("250ms", Some(ms(250))),
            ("5s", Some(ms(5_000))),
            ("1.5 s", Some(ms(1_500))),
            ("10m", Some(ms(600_000))),
            ("2h", Some(ms(7_200_000))),
            ("0", Some(ms(0))),
            ("5", None),
            ("5 parsecs", None),
            ("soon", None),
        ];
        for (text, expected) in cases {
            assert_eq!(duration(text), expected, "{text:?}");
        }
    }

    #[test]
    fn layer_ranges_are_half_open_and_not_empty() {
        let cases = [("0..16", Some(0..16)), (" 3 .. 4 ", Some(3..4)), ("4..4", None), ("9..3", None), ("0-16", None)];
        for (text, expected) in cases {
            assert_eq!(layer_range(text), expected, "{text:?}");
        }
    }
}
