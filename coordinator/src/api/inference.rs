//! InferenceService: checks what clients ask for, and streams what they get.
//!
//! Everything is checked here, before it reaches the engine: sizes before text is looked at, ids against the vocabulary, sampling
//! values against their ranges.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::Stream;
use grokpipe_model::ModelConfig;
use grokpipe_proto::{
    status::RequestError,
    transport::Peer,
    v1::{
        DetokenizeRequest, DetokenizeResponse, GenerateRequest, GenerateResponse, ListModelsRequest,
        ListModelsResponse, ModelDescription, Sampling, SamplingOptions, TokenizeRequest, TokenizeResponse,
        generate_request::Prompt, inference_service_server::InferenceService,
    },
};
use tonic::{Request, Response, Status};

use super::text::TextDesk;
use crate::{
    deadline::Deadline,
    engine::{Handle, NewRequest},
    scheduler::ClientId,
    session::StopRules,
};

/// What a request may ask for.
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
const MOST_STOPS: usize = 16;
const LONGEST_STOP: usize = 1024;
const LONGEST_LABEL: usize = 256;
/// Time of a call that is no generation.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves clients.
#[derive(Clone)]
pub struct Inference {
    /// The engine.
    pub engine: Handle,
    /// The model's sizes.
    pub config: Arc<ModelConfig>,
    /// Text to ids and back, if there is a tokenizer.
    pub text: Option<Arc<TextDesk>>,
    /// Tokens that the KV pool holds.
    pub pool_tokens: usize,
    /// What a request may ask for.
    pub limits: RequestLimits,
}

impl Inference {
    async fn checked(
        &self,
        request: GenerateRequest,
        client: ClientId,
        call: Option<Deadline>,
    ) -> Result<NewRequest, RequestError> {
        let deadline = self.deadline(request.deadline_ms)?.or_earlier(call);
        if request.from_index != 0 {
            return Err(RequestError::NotBuilt("resuming a stream (from_index)"));
        }
        if !request.idempotency_key.is_empty() {
            return Err(RequestError::NotBuilt("idempotency_key"));
        }
        if request.request_id.len() > LONGEST_LABEL {
            let problem = format!("expected at most {LONGEST_LABEL} bytes, found {}", request.request_id.len());
            return Err(RequestError::invalid("request_id", problem));
        }
        let stop = checked_stops(request.stop, self.text.is_some())?;
        let sampling = checked_sampling(request.sampling.unwrap_or_default())?;
        let prompt = self.prompt(request.prompt, deadline).await?;
        let context = self.config.max_position_embeddings;
        let max_tokens = checked_max_tokens(request.max_tokens, prompt.len(), context, self.pool_tokens)?;
        let eos_token_id = (!request.ignore_eos).then_some(self.config.eos_token_id);
        Ok(NewRequest {
            id: random_id()?,
            client,
            request_id: request.request_id,
            prompt,
            sampling,
            rules: StopRules { max_tokens, stop, eos_token_id },
            deadline,
        })
    }

    fn deadline(&self, asked_ms: u64) -> Result<Deadline, RequestError> {
        let most = self.limits.longest_request;
        match asked_ms {
            0 => Ok(Deadline::after(self.limits.request_timeout)),
            asked if Duration::from_millis(asked) <= most => Ok(Deadline::after(Duration::from_millis(asked))),
            asked => {
                let problem = format!("expected at most {} ms, found {asked}", most.as_millis());
                Err(RequestError::invalid("deadline_ms", problem))
            }
        }
    }

    async fn prompt(&self, prompt: Option<Prompt>, deadline: Deadline) -> Result<Vec<u32>, RequestError> {
        let ids = match prompt {
            None => return Err(RequestError::invalid("prompt", "expected text or token ids, found neither")),
            Some(Prompt::Text(text)) => self.text()?.encode(text, "text", deadline).await?,
            Some(Prompt::TokenIds(ids)) => ids.ids,
        };
        let limit = self.config.max_position_embeddings;
        if ids.is_empty() {
            return Err(RequestError::invalid("prompt", "expected at least one token, found none"));
        }
        if ids.len() > limit {
            return Err(RequestError::TooLong { limit, found: ids.len(), what: "the prompt must fit the context" });
        }
        self.check_ids(&ids)?;
        if ids[0] == self.config.pad_token_id {
            let problem = format!("expected no padding (id {}) at the start", self.config.pad_token_id);
            return Err(RequestError::invalid("token_ids", problem));
        }
        Ok(ids)
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), RequestError> {
        match ids.iter().position(|id| *id as usize >= self.config.vocab_size) {
            None => Ok(()),
            Some(at) => Err(RequestError::invalid(
                "token_ids",
                format!("expected ids below {}, found {} at {at}", self.config.vocab_size, ids[at]),
            )),
        }
    }

    fn text(&self) -> Result<&TextDesk, RequestError> {
        self.text.as_deref().ok_or(RequestError::NoTokenizer)
    }
}

/// Most tokens of an answer to a prompt of this length, where sequences have at most `context` tokens and the KV pool holds `pool`.
fn checked_max_tokens(asked: Option<u32>, prompt: usize, context: usize, pool: usize) -> Result<u32, RequestError> {
    let room = context.saturating_sub(prompt);
    match asked {
        Some(0) => Err(RequestError::invalid("max_tokens", "expected at least 1, found 0")),
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

fn checked_stops(stop: Vec<String>, has_tokenizer: bool) -> Result<Vec<String>, RequestError> {
    if stop.len() > MOST_STOPS {
        return Err(RequestError::invalid(
            "stop",
            format!("expected at most {MOST_STOPS} texts, found {}", stop.len()),
        ));
    }
    if let Some(bad) = stop.iter().find(|text| text.is_empty() || text.len() > LONGEST_STOP) {
        let problem = format!("expected texts of 1 to {LONGEST_STOP} bytes, found one of {}", bad.len());
        return Err(RequestError::invalid("stop", problem));
    }
    if !stop.is_empty() && !has_tokenizer {
        return Err(RequestError::NoTokenizer);
    }
    Ok(stop)
}

fn checked_sampling(options: SamplingOptions) -> Result<Sampling, RequestError> {
    let sampling = Sampling {
        temperature: options.temperature.unwrap_or(0.0),
        top_k: options.top_k.unwrap_or(0),
        top_p: options.top_p.unwrap_or(1.0),
        min_p: options.min_p.unwrap_or(0.0),
        seed: match options.seed {
            Some(seed) => seed,
            None => random_u64()?,
        },
    };
    // Written so that a value that is not a number is refused as well.
    let fields = [
        ("temperature", sampling.temperature, (0.0..=100.0).contains(&sampling.temperature), "in [0, 100]"),
        ("top_p", sampling.top_p, sampling.top_p > 0.0 && sampling.top_p <= 1.0, "in (0, 1]"),
        ("min_p", sampling.min_p, (0.0..=1.0).contains(&sampling.min_p), "in [0, 1]"),
    ];
    for (name, value, good, range) in fields {
        if !good {
            return Err(RequestError::invalid(
                format!("sampling.{name}"),
                format!("expected a number {range}, found {value}"),
            ));
        }
    }
    Ok(sampling)
}

/// The client's own deadline for a call, if it has one.
fn call_deadline<T>(request: &Request<T>) -> Option<Deadline> {
    request.extensions().get().copied()
}

/// Who sends a request.
fn client_of<T>(request: &Request<T>) -> ClientId {
    request.extensions().get().map_or(0, Peer::client)
}

fn random_u64() -> Result<u64, RequestError> {
    getrandom::u64().map_err(|error| RequestError::Internal(format!("the system gives no random numbers: {error}")))
}

fn random_id() -> Result<String, RequestError> {
    Ok(format!("gen-{:016x}{:016x}", random_u64()?, random_u64()?))
}

#[tonic::async_trait]
impl InferenceService for Inference {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let (client, call) = (client_of(&request), call_deadline(&request));
        let request = self.checked(request.into_inner(), client, call).await?;
        let stream = self.engine.submit(request).await?;
        Ok(Response::new(Box::pin(stream)))
    }

    async fn tokenize(&self, request: Request<TokenizeRequest>) -> Result<Response<TokenizeResponse>, Status> {
        let deadline = Deadline::after(CALL_TIMEOUT).or_earlier(call_deadline(&request));
        let token_ids = self.text()?.encode(request.into_inner().text, "text", deadline).await?;
        Ok(Response::new(TokenizeResponse { token_ids }))
    }

    async fn detokenize(&self, request: Request<DetokenizeRequest>) -> Result<Response<DetokenizeResponse>, Status> {
        let deadline = Deadline::after(CALL_TIMEOUT).or_earlier(call_deadline(&request));
        let ids = request.into_inner().token_ids;
        let desk = self.text()?;
        self.check_ids(&ids)?;
        Ok(Response::new(DetokenizeResponse { text: desk.decode(ids, deadline).await? }))
    }

    async fn list_models(&self, _request: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        let config = &self.config;
        let model = ModelDescription {
            name: config.name.clone(),
            vocab_size: config.vocab_size as u32,
            context_length: config.max_position_embeddings as u32,
            num_layers: config.num_hidden_layers,
            parameters: config.parameters(),
            has_tokenizer: self.text.is_some(),
        };
        Ok(Response::new(ListModelsResponse { models: vec![model] }))
    }
}

#[cfg(test)]
mod tests {
    use grokpipe_proto::v1::TokenIds;
    use prost::Message;
    use tonic::Code;

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
            (Some(8188), 5, 8192, 8192, Err(Code::OutOfRange)),
            (Some(u32::MAX), 5, 8192, 8192, Err(Code::OutOfRange)),
            (None, 8192, 8192, 8192, Err(Code::OutOfRange)),
            (Some(0), 5, 8192, 8192, Err(Code::InvalidArgument)),
        ];
        for (asked, prompt, context, pool, expected) in cases {
            let found = checked_max_tokens(asked, prompt, context, pool).map_err(|error| error.code());
            assert_eq!(found, expected, "{asked:?} after {prompt} of {context}, pool {pool}");
        }
    }

    #[test]
    fn the_transport_takes_every_request_that_is_within_the_limits() {
        for (max_prompt_bytes, context) in [(1 << 20, 8192), (16, 131_072), (1 << 10, 16)] {
            let limits = RequestLimits {
                request_timeout: Duration::from_secs(1),
                longest_request: Duration::from_secs(1),
                max_prompt_bytes,
            };
            let ids = TokenIds { ids: vec![u32::MAX; context] };
            for prompt in [Prompt::Text("x".repeat(max_prompt_bytes)), Prompt::TokenIds(ids)] {
                let request = GenerateRequest {
                    prompt: Some(prompt),
                    stop: vec!["x".repeat(LONGEST_STOP); MOST_STOPS],
                    request_id: "x".repeat(LONGEST_LABEL),
                    ..GenerateRequest::default()
                };
                assert!(request.encoded_len() <= limits.max_request_bytes(context), "{max_prompt_bytes}, {context}");
            }
        }
    }
}
