//! A prediction and what was measured, in words. An unknown figure is not mentioned.

use std::fmt;

use super::SnapshotPlan;

/// Tokens a second, predicted and measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// What the planner expects.
    pub predicted: f64,
    /// What it came to, once that is known.
    pub measured: Option<f64>,
}

impl Prediction {
    /// By how much the measured figure is larger than the predicted one, in per cent.
    pub fn difference_percent(self) -> Option<f64> {
        self.measured.filter(|_| self.predicted > 0.0).map(|measured| 100.0 * (measured / self.predicted - 1.0))
    }
}

/// `predicted 823.5 tokens/s, measured 790.1, −4 %`.
impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "predicted {:.1} tokens/s", self.predicted)?;
        if let (Some(measured), Some(percent)) = (self.measured, self.difference_percent()) {
            let sign = if percent.round() < 0.0 { "−" } else { "+" };
            write!(f, ", measured {measured:.1}, {sign}{:.0} %", percent.round().abs())?;
        }
        Ok(())
    }
}

impl SnapshotPlan {
    /// With every stage busy.
    pub fn prediction(&self) -> Option<Prediction> {
        let measured = self.measured_tokens_per_second;
        self.predicted_tokens_per_second.map(|predicted| Prediction { predicted, measured })
    }

    /// Of one stream alone.
    pub fn stream_prediction(&self) -> Option<Prediction> {
        let measured = self.measured_stream_tokens_per_second;
        self.predicted_stream_tokens_per_second.map(|predicted| Prediction { predicted, measured })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_difference_is_shown_when_something_was_measured() {
        let cases = [
            (823.49, Some(790.12), "predicted 823.5 tokens/s, measured 790.1, −4 %"),
            (10.0, Some(12.5), "predicted 10.0 tokens/s, measured 12.5, +25 %"),
            (100.0, Some(99.8), "predicted 100.0 tokens/s, measured 99.8, +0 %"),
            (41.0, None, "predicted 41.0 tokens/s"),
            (0.0, Some(1.0), "predicted 0.0 tokens/s"),
        ];
        for (predicted, measured, expected) in cases {
            assert_eq!(Prediction { predicted, measured }.to_string(), expected);
        }
    }
}
