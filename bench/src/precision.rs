//! What precision `fast` costs in quality on given texts, compared with `exact` on the same device.
//!
//! Both predict every token of every text after its first. Perplexity is `e` to the mean negative log probability of the tokens that
//! stand there; the divergence is Kullback and Leibler's, of `fast` from `exact`, in nats, mean over the tokens; agreement is how
//! often both hold the same token for the likeliest.

use std::{path::Path, sync::Arc};

use grokpipe_kernels::{
    Batch, KV_BLOCK_TOKENS, Precision, Prefill, Row, Stage, StageOptions, StepInput, StepOutput, select_device,
};
use grokpipe_model::{Model, ModelConfig};
use serde_json::{Value, json};

use crate::BenchError;

/// Tokens of a text at most; the rest is left out.
const MOST_TOKENS: usize = 512;

/// Compares both precisions on these texts, as [`parse_texts`] gives them, on the CPU. `progress` hears how many texts are done.
///
/// # Errors
/// What is wrong with the model or the device.
pub fn run(
    path: &Path,
    texts: &[Vec<u32>],
    threads: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Report, BenchError> {
    let config = Model::open(path)?.config().clone();
    let open = |precision| -> Result<Box<dyn Stage>, BenchError> {
        let options = StageOptions {
            kv_blocks: MOST_TOKENS.div_ceil(KV_BLOCK_TOKENS) as u32,
            max_rows: MOST_TOKENS,
            ..StageOptions::default()
        };
        let device = select_device("cpu", threads, precision, Prefill::Invariant)?;
        let model = Arc::new(Model::open(path)?);
        Ok(device.load(&config, model, 0..config.num_hidden_layers, options, &mut |_, _| ())?)
    };
    let (mut exact, mut fast) = (open(Precision::Exact)?, open(Precision::Fast)?);
    let mut report = Report::default();
    for (index, text) in texts.iter().enumerate() {
        let (exact, fast) = (logits(exact.as_mut(), &config, text)?, logits(fast.as_mut(), &config, text)?);
        let rows = exact.chunks_exact(config.vocab_size).zip(fast.chunks_exact(config.vocab_size));
        for ((exact, fast), &next) in rows.zip(&text[1..]) {
            report.add(exact, fast, next as usize);
        }
        progress(index + 1);
    }
    Ok(report)
}

/// Texts of at least two tokens, from a JSON list of lists of ids, or of objects with such a list as `ids`.
///
/// # Errors
/// In words: what is no text, or that none is left.
pub fn parse_texts(json: &str, vocab_size: usize) -> Result<Vec<Vec<u32>>, String> {
    let list: Vec<Value> = serde_json::from_str(json).map_err(|error| error.to_string())?;
    let mut texts = Vec::new();
    for (index, value) in list.into_iter().enumerate() {
        let ids = match value {
            Value::Object(mut fields) => fields.remove("ids").unwrap_or_default(),
            other => other,
        };
        let mut ids: Vec<u32> =
            serde_json::from_value(ids).map_err(|error| format!("text {}: expected token ids: {error}", index + 1))?;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(format!("text {}: expected ids below {vocab_size}, found {id}", index + 1));
        }
        ids.truncate(MOST_TOKENS);
        if ids.len() >= 2 {
            texts.push(ids);
        }
    }
    if texts.is_empty() { Err("expected texts of two tokens or more, found none".into()) } else { Ok(texts) }
}

/// Logits after each token but the last.
fn logits(stage: &mut dyn Stage, config: &ModelConfig, ids: &[u32]) -> Result<Vec<f32>, BenchError> {
    let ids = &ids[..ids.len() - 1];
    let row = |(position, &id): (usize, &u32)| Row {
        position: position as u32,
        table_offset: 0,
        attended: id != config.pad_token_id,
    };
    let batch = Batch {
        rows: ids.iter().enumerate().map(row).collect(),
        block_tables: (0..ids.len().div_ceil(KV_BLOCK_TOKENS) as u32).collect(),
    };
    let wanted: Vec<u32> = (0..ids.len() as u32).collect();
    let (StepOutput::Logits(logits) | StepOutput::HiddenStates(logits)) =
        stage.run(&batch, StepInput::TokenIds(ids), &wanted)?;
    Ok(logits)
}

/// What the tokens of all texts come to.
#[derive(Default)]
pub struct Report {
    tokens: u64,
    agreed: u64,
    divergence: f64,
    /// Negative log probabilities of the tokens that stand there.
    exact: f64,
    fast: f64,
}

impl Report {
    /// One place of a text, where `next` stands.
    fn add(&mut self, exact: &[f32], fast: &[f32], next: usize) {
        let (e, f) = (Logits::of(exact), Logits::of(fast));
        self.tokens += 1;
        self.agreed += u64::from(e.best == f.best);
        self.exact += e.log_total - f64::from(exact[next]);
        self.fast += f.log_total - f64::from(fast[next]);
        let differences = exact.iter().zip(fast).map(|(&a, &b)| {
            let log_p = f64::from(a) - e.log_total;
            log_p.exp() * (log_p - (f64::from(b) - f.log_total))
        });
        self.divergence += differences.sum::<f64>();
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.tokens as f64
    }

    fn agreement(&self) -> f64 {
        self.agreed as f64 / self.tokens as f64
    }

    /// As one JSON object.
    pub fn to_json(&self) -> Value {
        json!({
            "tokens": self.tokens,
            "perplexity_exact": self.mean(self.exact).exp(),
            "perplexity_fast": self.mean(self.fast).exp(),
            "mean_divergence_nats": self.mean(self.divergence),
            "top_1_agreement": self.agreement(),
        })
    }

    /// For people.
    pub fn render(&self) -> String {
        format!(
            "{} tokens\nperplexity       exact {:.4}, fast {:.4}\nmean divergence  {:.6} nats\ntop-1 agreement  {:.2} %\n",
            self.tokens,
            self.mean(self.exact).exp(),
            self.mean(self.fast).exp(),
            self.mean(self.divergence),
            100.0 * self.agreement()
        )
    }
}

/// What a row of logits comes to.
struct Logits {
    best: usize,
    /// Logarithm of the sum of their exponentials.
    log_total: f64,
}

impl Logits {
    fn of(logits: &[f32]) -> Self {
        let (mut best, mut largest) = (0, f32::NEG_INFINITY);
        for (index, &logit) in logits.iter().enumerate() {
            if logit > largest {
                (best, largest) = (index, logit);
            }
        }
        let total: f64 = logits.iter().map(|&logit| f64::from((logit - largest).exp())).sum();
        Self { best, log_total: f64::from(largest) + total.ln() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_agree_and_diverge_by_nothing() {
        let mut sums = Report::default();
        sums.add(&[0.0, 1.0, 2.0, 3.0], &[0.5, 1.5, 2.5, 3.5], 3);
        assert_eq!(sums.agreement(), 1.0);
        assert!(sums.divergence.abs() < 1e-7 && (sums.exact - sums.fast).abs() < 1e-7);
    }

    #[test]
    fn two_even_choices_have_perplexity_two_and_known_divergence() {
        let mut sums = Report::default();
        // Probabilities 1/2, 1/2 against 3/4, 1/4.
        sums.add(&[0.0, 0.0], &[3f32.ln(), 0.0], 1);
        assert!((sums.mean(sums.exact).exp() - 2.0).abs() < 1e-6);
        assert!((sums.mean(sums.fast).exp() - 4.0).abs() < 1e-5);
        let want = 0.5 * (2f64 / 3.0).ln() + 0.5 * 2f64.ln();
        assert!((sums.divergence - want).abs() < 1e-6, "{}", sums.divergence);
        assert!(sums.render().contains("top-1 agreement  100.00 %"));
    }

    #[test]
    fn texts_are_lists_or_objects_of_known_ids() {
        assert_eq!(parse_texts("[[1,2],{\"ids\":[3,4,5]},[6]]", 10), Ok(vec![vec![1, 2], vec![3, 4, 5]]));
        for (wrong, named) in
            [("[[1,10]]", "below 10"), ("[[1]]", "none"), ("{}", "sequence"), ("[{\"a\":1}]", "text 1")]
        {
            let error = parse_texts(wrong, 10).unwrap_err();
            assert!(error.contains(named), "{wrong}: {error}");
        }
    }
}
