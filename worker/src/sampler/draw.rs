//! Drawing a token from one row of logits.
//!
//! The order: temperature, top-k, top-p, min-p, draw. Each works on what the one before left. Sums are in f64 and in the order of
//! ids (in top-p: of logits, ties by id), so the token depends on the logits and the key of the random number alone.

use std::cmp::Ordering;

use thiserror::Error;

use super::math::{exp_of_negative, ln};
use super::params::Sampling;
use super::philox::{Purpose, uniform};

/// Id of [PAD], which is never drawn.
const PAD: u32 = 0;

/// A token and how likely the model found it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// Its id; never 0.
    pub token_id: u32,
    /// Natural logarithm of its probability before temperature and filters, over the whole vocabulary.
    pub logprob: f32,
}

/// Why nothing could be drawn.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum DrawError {
    /// A logit that no model should give.
    #[error("expected finite logits, found {value} for token {token_id}")]
    NotFinite {
        /// Which token.
        token_id: u32,
        /// Its logit.
        value: f32,
    },
    /// No token but id 0 has a probability.
    #[error("expected a token other than 0 with a probability, found none among {vocab_size}")]
    NoCandidate {
        /// Length of the row.
        vocab_size: usize,
    },
}

/// A token that may be drawn. Never two with the same id.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) token_id: u32,
    logit: f32,
    /// Probability relative to the likeliest candidate, at the temperature.
    weight: f64,
}

/// Draws the token after `position` from `logits` (`[vocab_size]`). Minus infinity stands for a token that cannot come.
///
/// At temperature 0 it is the largest logit, the lowest id on a tie. Otherwise the random number is keyed by the seed, the choice
/// and the position.
///
/// # Errors
/// [`DrawError`] when a logit is NaN or infinite, or no token can come.
pub fn draw(logits: &[f32], sampling: &Sampling, choice_index: u32, position: u32) -> Result<Drawn, DrawError> {
    let total = log_sum_exp(logits)?;
    let best = argmax(logits).ok_or(DrawError::NoCandidate { vocab_size: logits.len() })?;
    let token_id = if sampling.temperature() == 0.0 {
        best
    } else {
        let kept = kept_candidates(logits, logits[best as usize], sampling);
        pick(&kept, uniform(sampling.seed(), choice_index, position, Purpose::Draw)).unwrap_or(best)
    };
    Ok(Drawn { token_id, logprob: (f64::from(logits[token_id as usize]) - total) as f32 })
}

/// Natural logarithms of the probabilities of `ids`, before temperature and filters. Minus infinity for an id outside the
/// vocabulary, and for every id when a logit is NaN or infinite: a score is never a guess.
pub fn log_probability(logits: &[f32], ids: &[u32]) -> Vec<f32> {
    let total = log_sum_exp(logits);
    let score = |&id: &u32| match (&total, logits.get(id as usize)) {
        (Ok(total), Some(&logit)) => (f64::from(logit) - total) as f32,
        _ => f32::NEG_INFINITY,
    };
    ids.iter().map(score).collect()
}

/// `ln(sum(exp(logits)))` over the whole row.
fn log_sum_exp(logits: &[f32]) -> Result<f64, DrawError> {
    let mut largest = f32::NEG_INFINITY;
    for (id, &value) in logits.iter().enumerate() {
        if value.is_nan() || value == f32::INFINITY {
            return Err(DrawError::NotFinite { token_id: id as u32, value });
        }
        largest = largest.max(value);
    }
    if largest == f32::NEG_INFINITY {
        return Err(DrawError::NoCandidate { vocab_size: logits.len() });
    }
    let sum: f64 = logits.iter().map(|&logit| exp_of_negative(f64::from(logit) - f64::from(largest))).sum();
    Ok(f64::from(largest) + ln(sum))
}

/// The id of the largest logit but [`PAD`]'s, the lowest id on a tie.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best: Option<usize> = None;
    for (id, &logit) in logits.iter().enumerate().skip(PAD as usize + 1) {
        if logit > best.map_or(f32::NEG_INFINITY, |best| logits[best]) {
            best = Some(id);
        }
    }
    best.map(|id| id as u32)
}

/// What temperature and filters leave, in the order of ids. `largest` is the largest logit that may be drawn.
pub(super) fn kept_candidates(logits: &[f32], largest: f32, sampling: &Sampling) -> Vec<Candidate> {
    let temperature = f64::from(sampling.temperature());
    let candidate = |(id, &logit): (usize, &f32)| {
        let weight = exp_of_negative((f64::from(logit) - f64::from(largest)) / temperature);
        Candidate { token_id: id as u32, logit, weight }
    };
    let all = logits.iter().enumerate().skip(PAD as usize + 1).map(candidate);
    let mut kept: Vec<Candidate> = all.filter(|candidate| candidate.weight > 0.0).collect();
    keep_top_k(&mut kept, sampling.top_k() as usize);
    keep_top_p(&mut kept, f64::from(sampling.top_p()));
    let min_p = f64::from(sampling.min_p());
    kept.retain(|candidate| candidate.weight >= min_p);
    kept.sort_unstable_by_key(|candidate| candidate.token_id);
    kept
}

/// Likelier first, ties by id. No logit is NaN here, and the two zeros are a tie.
fn likelier(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.token_id.cmp(&b.token_id))
}

/// Keeps exactly the `k` likeliest, the lower ids on a tie, so that `k = 1` is the greedy token; 0 keeps all.
fn keep_top_k(kept: &mut Vec<Candidate>, k: usize) {
    if k > 0 && k < kept.len() {
        kept.select_nth_unstable_by(k - 1, likelier);
        kept.truncate(k);
    }
}

/// Keeps the smallest set of likeliest tokens whose probabilities together reach `p`, and all that tie with its last.
fn keep_top_p(kept: &mut Vec<Candidate>, p: f64) {
    if p >= 1.0 || kept.is_empty() {
        return;
    }
    kept.sort_unstable_by_key(|candidate| candidate.token_id);
    let enough = p * kept.iter().map(|candidate| candidate.weight).sum::<f64>();
    // The set is nearly always small: sort only as much of the head as is needed.
    let (mut sorted, mut block, mut reached) = (0, 64, 0.0);
    while sorted < kept.len() {
        let end = (sorted + block).min(kept.len());
        if end < kept.len() {
            kept[sorted..].select_nth_unstable_by(end - sorted, likelier);
        }
        kept[sorted..end].sort_unstable_by(likelier);
        for index in sorted..end {
            reached += kept[index].weight;
            if reached >= enough {
                let threshold = kept[index].logit;
                kept.retain(|candidate| candidate.logit >= threshold);
                return;
            }
        }
        (sorted, block) = (end, block * 8);
    }
}

/// Inverts the cumulative distribution at `number`, in `[0, 1)`.
fn pick(kept: &[Candidate], number: f64) -> Option<u32> {
    let target = number * kept.iter().map(|candidate| candidate.weight).sum::<f64>();
    let mut reached = 0.0;
    for candidate in kept {
        reached += candidate.weight;
        if reached > target {
            return Some(candidate.token_id);
        }
    }
    // Only if rounding made the target reach the sum itself.
    kept.last().map(|candidate| candidate.token_id)
}
