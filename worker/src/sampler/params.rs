//! How tokens are drawn, checked once: a [`Sampling`] cannot be wrong.

use thiserror::Error;

/// Checked sampling parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    seed: u64,
}

/// A sampling parameter out of its range.
#[derive(Clone, Debug, PartialEq, Error)]
#[error("expected {expected} as {parameter}, found {value}")]
pub struct InvalidSampling {
    /// Name of the parameter.
    pub parameter: &'static str,
    /// Its range.
    pub expected: &'static str,
    /// What it is.
    pub value: f32,
}

impl Sampling {
    /// Checks the parameters. Temperature 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 keep all tokens.
    ///
    /// # Errors
    /// [`InvalidSampling`] for NaN, a negative or infinite temperature, a `top_p` outside (0, 1], a `min_p` outside [0, 1].
    pub fn new(temperature: f32, top_k: u32, top_p: f32, min_p: f32, seed: u64) -> Result<Self, InvalidSampling> {
        let checks = [
            ("temperature", "a finite number not below 0", temperature, temperature.is_finite() && temperature >= 0.0),
            ("top_p", "a number above 0 and up to 1", top_p, top_p > 0.0 && top_p <= 1.0),
            ("min_p", "a number from 0 to 1", min_p, (0.0..=1.0).contains(&min_p)),
        ];
        match checks.into_iter().find(|(_, _, _, fine)| !fine) {
            Some((parameter, expected, value, _)) => Err(InvalidSampling { parameter, expected, value }),
            None => Ok(Self { temperature, top_k, top_p, min_p, seed }),
        }
    }

    /// The largest logit, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }

    /// The logits are divided by it; 0 is greedy.
    pub fn temperature(&self) -> f32 {
        self.temperature
    }

    /// The likeliest tokens kept; 0 keeps all.
    pub fn top_k(&self) -> u32 {
        self.top_k
    }

    /// The probability that the kept tokens reach together.
    pub fn top_p(&self) -> f32 {
        self.top_p
    }

    /// The least probability of a kept token, relative to the likeliest.
    pub fn min_p(&self) -> f32 {
        self.min_p
    }

    /// Key of the random numbers.
    pub fn seed(&self) -> u64 {
        self.seed
    }
}

impl TryFrom<grokpipe_proto::v1::Sampling> for Sampling {
    type Error = InvalidSampling;

    fn try_from(wire: grokpipe_proto::v1::Sampling) -> Result<Self, InvalidSampling> {
        Self::new(wire.temperature, wire.top_k, wire.top_p, wire.min_p, wire.seed)
    }
}
