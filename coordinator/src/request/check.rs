//! What a request may ask for. Sizes are checked before text is looked at, ids against the vocabulary, numbers against their ranges.
//!
//! The one place that knows the limits of a request; protocols only translate.

use std::{sync::Arc, time::Duration};

use grokpipe_model::ModelConfig;

use super::{Field, Prompt, Request, RequestError, Sampling, SamplingSpec, Spec};
use crate::{deadline::Deadline, scheduler::ClientId, session::StopRules, text::TextDesk};

/// What the configuration allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLimits {
    /// Time of a request that names none.
    pub request_timeout: Duration,
    /// The most time that a request may name; no less than `request_timeout`.
    pub longest_request: Duration,
    /// Longest text.
    pub max_prompt_bytes: usize,
}

impl RequestLimits {
    /// Bytes of the largest request that is within these limits, for a context of this many tokens. The transport refuses no
    /// smaller one.
    pub fn max_request_bytes(&self, context: usize) -> usize {
        // An id takes at most five bytes; stop texts and all other fields take less than the rest.
        self.max_prompt_bytes.max(context.saturating_mul(5)).saturating_add(64 << 10)
    }
}

/// Tokens of a request that names no number.
const DEFAULT_MAX_TOKENS: u32 = 128;
pub(crate) const STOPS_MAX: usize = 16;
pub(crate) const STOP_BYTES_MAX: usize = 1024;
pub(crate) const LABEL_BYTES_MAX: usize = 256;

/// Checks requests. Cheap to clone.
#[derive(Clone)]
pub struct Checker {
    /// The model's sizes.
    pub config: Arc<ModelConfig>,
    /// Text to ids and back, if there is a tokenizer.
    pub text: Option<Arc<TextDesk>>,
    /// Tokens that the KV pool holds.
    pub pool_tokens: usize,
    /// What the configuration allows.
    pub limits: RequestLimits,
}

impl Checker {
    /// The request that a client asks for, with an id and, unless it names one, a seed of its own. `call` is the client's deadline
    /// for the whole call.
    ///
    /// # Errors
    /// [`RequestError`]: what is wrong with it.
    pub async fn check(&self, spec: Spec, client: ClientId, call: Option<Deadline>) -> Result<Request, RequestError> {
        let deadline = self.deadline(spec.timeout)?.or_earlier(call);
        if spec.label.len() > LABEL_BYTES_MAX {
            let problem = format!("expected at most {LABEL_BYTES_MAX} bytes, found {}", spec.label.len());
            return Err(RequestError::invalid(Field::Label, problem));
        }
        let stop = stops(spec.stop, self.text.is_some())?;
        let sampling = sampling(spec.sampling)?;
        let prompt = self.prompt(spec.prompt, deadline).await?;
        let context = self.config.max_position_embeddings;
        let max_tokens = max_tokens(spec.max_tokens, prompt.len(), context, self.pool_tokens)?;
        let eos_token_id = (!spec.ignore_eos).then_some(self.config.eos_token_id);
        Ok(Request {
            id: random_id()?,
            client,
            label: spec.label,
            prompt,
            sampling,
            rules: StopRules { max_tokens, stop, eos_token_id },
            deadline,
        })
    }

    fn deadline(&self, asked: Option<Duration>) -> Result<Deadline, RequestError> {
        let most = self.limits.longest_request;
        match asked {
            None => Ok(Deadline::after(self.limits.request_timeout)),
            Some(asked) if asked <= most => Ok(Deadline::after(asked)),
            Some(asked) => {
                let problem = format!("expected at most {} ms, found {}", most.as_millis(), asked.as_millis());
                Err(RequestError::invalid(Field::Timeout, problem))
            }
        }
    }

    async fn prompt(&self, prompt: Option<Prompt>, deadline: Deadline) -> Result<Vec<u32>, RequestError> {
        let ids = match prompt {
            None => return Err(RequestError::invalid(Field::Prompt, "expected text or token ids, found neither")),
            Some(Prompt::Text(text)) => self.text()?.encode(text, deadline).await?,
            Some(Prompt::Ids(ids)) => ids,
        };
        let limit = self.config.max_position_embeddings;
        if ids.is_empty() {
            return Err(RequestError::invalid(Field::Prompt, "expected at least one token, found none"));
        }
        if ids.len() > limit {
            return Err(RequestError::TooLong { limit, found: ids.len(), what: "the prompt must fit the context" });
        }
        self.check_ids(&ids)?;
        if ids[0] == self.config.pad_token_id {
            let problem = format!("expected no padding (id {}) at the start", self.config.pad_token_id);
            return Err(RequestError::invalid(Field::TokenIds, problem));
        }
        Ok(ids)
    }

    /// Whether all ids are in the vocabulary.
    ///
    /// # Errors
    /// [`RequestError::Invalid`] naming the first that is not.
    pub fn check_ids(&self, ids: &[u32]) -> Result<(), RequestError> {
        match ids.iter().position(|id| *id as usize >= self.config.vocab_size) {
            None => Ok(()),
            Some(at) => Err(RequestError::invalid(
                Field::TokenIds,
                format!("expected ids below {}, found {} at {at}", self.config.vocab_size, ids[at]),
            )),
        }
    }

    /// Who encodes and decodes.
    ///
    /// # Errors
    /// [`RequestError::NoTokenizer`].
    pub fn text(&self) -> Result<&TextDesk, RequestError> {
        self.text.as_deref().ok_or(RequestError::NoTokenizer)
    }
}

/// Most tokens of an answer to a prompt of this length, where sequences have at most `context` tokens and the KV pool holds `pool`.
fn max_tokens(asked: Option<u32>, prompt: usize, context: usize, pool: usize) -> Result<u32, RequestError> {
    let room = context.saturating_sub(prompt);
    match asked {
        Some(0) => Err(RequestError::invalid(Field::MaxTokens, "expected at least 1, found 0")),
        _ if room == 0 => Err(RequestError::TooLong {
            limit: context,
            found: prompt + 1,
            what: "prompt and output share the context",
        }),
        Some(asked) if asked as usize > room => Err(RequestError::TooLong {
            limit: context,
            found: prompt.saturating_add(asked as usize),
            what: "prompt and max_tokens share the context",
        }),
        Some(asked) => Ok(asked),
        None => {
            // A number that nobody asked for is no reason to refuse: what the pool can hold will do.
            let room = room.min(pool.saturating_sub(prompt)).max(1);
            Ok(DEFAULT_MAX_TOKENS.min(u32::try_from(room).unwrap_or(u32::MAX)))
        }
    }
}

fn stops(stop: Vec<String>, has_tokenizer: bool) -> Result<Vec<String>, RequestError> {
    if stop.len() > STOPS_MAX {
        return Err(RequestError::invalid(
            Field::Stop,
            format!("expected at most {STOPS_MAX} texts, found {}", stop.len()),
        ));
    }
    if let Some(bad) = stop.iter().find(|text| text.is_empty() || text.len() > STOP_BYTES_MAX) {
        let problem = format!("expected texts of 1 to {STOP_BYTES_MAX} bytes, found one of {}", bad.len());
        return Err(RequestError::invalid(Field::Stop, problem));
    }
    if !stop.is_empty() && !has_tokenizer {
        return Err(RequestError::NoTokenizer);
    }
    Ok(stop)
}

fn sampling(spec: SamplingSpec) -> Result<Sampling, RequestError> {
    let sampling = Sampling {
        temperature: spec.temperature.unwrap_or(0.0),
        top_k: spec.top_k.unwrap_or(0),
        top_p: spec.top_p.unwrap_or(1.0),
        min_p: spec.min_p.unwrap_or(0.0),
        seed: match spec.seed {
            Some(seed) => seed,
            None => random_u64()?,
        },
    };
    // Written so that a value that is not a number is refused as well.
    let fields = [
        (Field::Temperature, sampling.temperature, (0.0..=100.0).contains(&sampling.temperature), "in [0, 100]"),
        (Field::TopP, sampling.top_p, sampling.top_p > 0.0 && sampling.top_p <= 1.0, "in (0, 1]"),
        (Field::MinP, sampling.min_p, (0.0..=1.0).contains(&sampling.min_p), "in [0, 1]"),
    ];
    for (field, value, good, range) in fields {
        if !good {
            return Err(RequestError::invalid(field, format!("expected a number {range}, found {value}")));
        }
    }
    Ok(sampling)
}

fn random_u64() -> Result<u64, RequestError> {
    getrandom::u64().map_err(|error| RequestError::Internal(format!("the system gives no random numbers: {error}")))
}

fn random_id() -> Result<String, RequestError> {
    Ok(format!("gen-{:016x}{:016x}", random_u64()?, random_u64()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_tokens_that_nobody_asked_for_is_cut_to_what_there_is_room_for() {
        // Asked for, prompt, context, pool; what comes of it.
        let cases = [
            (None, 5, 8192, 8192, Ok(128)),
            (None, 8100, 8192, 8192, Ok(92)),
            (None, 5, 8192, 64, Ok(59)),
            // The prompt alone fills the pool: the scheduler says so.
            (None, 64, 8192, 64, Ok(1)),
            (Some(200), 5, 8192, 64, Ok(200)),
            (Some(8187), 5, 8192, 8192, Ok(8187)),
            (Some(8188), 5, 8192, 8192, Err("too long")),
            (Some(u32::MAX), 5, 8192, 8192, Err("too long")),
            (None, 8192, 8192, 8192, Err("too long")),
            (Some(0), 5, 8192, 8192, Err("invalid")),
        ];
        for (asked, prompt, context, pool, expected) in cases {
            let found = max_tokens(asked, prompt, context, pool).map_err(|error| match error {
                RequestError::TooLong { .. } => "too long",
                RequestError::Invalid { field: Field::MaxTokens, .. } => "invalid",
                _ => "another error",
            });
            assert_eq!(found, expected, "{asked:?} after {prompt} of {context}, pool {pool}");
        }
    }
}
