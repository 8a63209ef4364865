//! What several runs come to: their median, and how far they differ.

/// Of some runs' figures; all 0 of none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// As [`median()`] has it.
    pub median: f64,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
}

impl Spread {
    /// The spread of these figures.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or_default();
        let last = values.len().saturating_sub(1);
        Self { median: f64::midpoint(at(last / 2), at(values.len() / 2)), least: at(0), most: at(last) }
    }
}

/// The one in the middle, of an even number the mean of the two there; 0 of none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    Spread::of(values).median
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_in_the_middle() {
        for (values, expected) in [(vec![], 0.0), (vec![3.0], 3.0), (vec![4.0, 1.0], 2.5), (vec![9.0, 1.0, 2.0], 2.0)] {
            assert_eq!(median(values), expected);
        }
        let Spread { least, most, .. } = Spread::of([9.0, 1.0, 2.0, -3.0]);
        assert_eq!((least, most), (-3.0, 9.0));
    }
}
