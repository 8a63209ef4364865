//! How far two clocks are apart, from one question and its answer. Pure.

/// By how much the other clock is ahead, and how far from that it may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Offset {
    pub(super) ahead_seconds: f64,
    pub(super) uncertainty_seconds: f64,
}

/// A question that left at `sent` and came back at `back` by our clock, and came at `asked` and was answered at `answered` by the other.
/// The way took at most what is left of the time, whichever part of it was the way there. `None` where the other tells no time.
pub(super) fn offset(sent: u64, asked: u64, answered: u64, back: u64) -> Option<Offset> {
    if asked == 0 || answered == 0 {
        return None;
    }
    // All are microseconds since 1970: exact as floats until the year 2255.
    let [sent, asked, answered, back] = [sent, asked, answered, back].map(|us| us as f64 / 1e6);
    let way = ((back - sent) - (answered - asked)).max(0.0);
    Some(Offset { ahead_seconds: ((asked - sent) + (answered - back)) / 2.0, uncertainty_seconds: way / 2.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_other_end_did_meanwhile_is_no_doubt_about_its_clock() {
        let base = 1_800_000_000_000_000;
        // (true difference, way there, work, way back, all in us)
        for (ahead, there, work, back) in [
            (0_i64, 100_u64, 0_u64, 100_u64),
            (5_000_000, 300, 900_000, 100),
            (-120_000_000, 0, 1_000, 40_000),
            (7, 0, 0, 0),
        ] {
            let other = |ours: u64| ours.checked_add_signed(ahead).unwrap();
            let found =
                offset(base, other(base + there), other(base + there + work), base + there + work + back).unwrap();
            assert!((found.uncertainty_seconds - (there + back) as f64 / 2e6).abs() < 1e-5, "{found:?}");
            let wrong = (found.ahead_seconds - ahead as f64 / 1e6).abs();
            assert!(wrong <= found.uncertainty_seconds + 1e-5, "{found:?} for {ahead}");
        }
        assert_eq!(offset(base, 0, 0, base), None);
    }
}
