//! A client's request and what becomes of it, in no protocol's words.
//!
//! A protocol (`api/` for gRPC, `http/` for HTTP) makes a [`Spec`] of what it received; [`check::Checker`] makes a [`Request`] of that,
//! or says why not; the engine takes the request and sends [`RequestEvent`]s, which the protocol words again. So every protocol has the same
//! limits, and the engine knows none of them.

pub mod check;
mod error;

use std::time::Duration;

pub use error::RequestError;

use crate::{deadline::Deadline, scheduler::ClientId, session::StopRules};

/// What a client asks for, unchecked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spec {
    /// What is to be continued.
    pub prompt: Option<Prompt>,
    /// A label of the client's own, returned as it is.
    pub label: String,
    /// Time for all of it; the server's default if absent.
    pub timeout: Option<Duration>,
    /// Most tokens to generate.
    pub max_tokens: Option<u32>,
    /// How to draw.
    pub sampling: SamplingSpec,
    /// Texts that end the generation.
    pub stop: Vec<String>,
    /// Whether to continue after the end-of-sequence id.
    pub ignore_eos: bool,
}

/// What is to be continued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Text, for which there must be a tokenizer.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
}

/// How a client wants tokens drawn; what is absent takes its default.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingSpec {
    /// 0 by default: greedy.
    pub temperature: Option<f32>,
    /// 0 by default: all.
    pub top_k: Option<u32>,
    /// 1 by default: all.
    pub top_p: Option<f32>,
    /// 0 by default: all.
    pub min_p: Option<f32>,
    /// Random by default.
    pub seed: Option<u64>,
}

/// A part of a [`Spec`] that may be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// [`Spec::prompt`].
    Prompt,
    /// [`Prompt::Text`].
    Text,
    /// [`Prompt::Ids`].
    TokenIds,
    /// [`Spec::label`].
    Label,
    /// [`Spec::timeout`].
    Timeout,
    /// [`Spec::max_tokens`].
    MaxTokens,
    /// [`Spec::stop`].
    Stop,
    /// [`SamplingSpec::temperature`].
    Temperature,
    /// [`SamplingSpec::top_p`].
    TopP,
    /// [`SamplingSpec::min_p`].
    MinP,
}

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// In [0, 100]; 0 is greedy.
    pub temperature: f32,
    /// Keep the k likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of likeliest tokens whose probabilities reach this; in (0, 1].
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the likeliest; in [0, 1].
    pub min_p: f32,
    /// Key of the counter-based random numbers.
    pub seed: u64,
}

impl Sampling {
    /// Always the likeliest token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 };
}

/// A checked request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Made by the server, unique.
    pub id: String,
    /// Whose it is.
    pub client: ClientId,
    /// The client's label.
    pub label: String,
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// How to draw.
    pub sampling: Sampling,
    /// When to end.
    pub rules: StopRules,
    /// When it has to be over.
    pub deadline: Deadline,
}

/// What a client receives for its request: once [`RequestEvent::Accepted`], then tokens, then [`RequestEvent::Finished`]; or an error at any time.
#[derive(Clone, Debug, PartialEq)]
pub enum RequestEvent {
    /// The request will run.
    Accepted(Accepted),
    /// One token.
    Token(Token),
    /// The generation is over.
    Finished(Finished),
}

/// What runs, as it was understood.
#[derive(Clone, Debug, PartialEq)]
pub struct Accepted {
    /// [`Request::id`].
    pub id: String,
    /// [`Request::label`].
    pub label: String,
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// The seed in use, given or drawn.
    pub seed: u64,
    /// Name of the model.
    pub model: String,
}

/// One token of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Token {
    /// [`Request::id`].
    pub id: String,
    /// From 0, without gaps.
    pub index: u32,
    /// The token.
    pub token_id: u32,
    /// What it adds to the text; empty while a character is incomplete or a stop text may be beginning.
    pub text: String,
    /// Natural logarithm of its probability before temperature and filters.
    pub logprob: f32,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// [`Request::id`].
    pub id: String,
    /// Why.
    pub reason: FinishReason,
    /// The stop text that matched; empty otherwise.
    pub stop_text: String,
    /// Text held back until now.
    pub text: String,
    /// How long it took.
    pub timings: Timings,
    /// What each stage did for it, in stage order.
    pub stages: Vec<StageUse>,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// End-of-sequence id or a stop text.
    Stop,
    /// Most tokens, or the context's end.
    Length,
}

/// How long a request took, by the coordinator's monotonic clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// From acceptance to the first frame.
    pub queued: Duration,
    /// From acceptance to the first token.
    pub first_token: Duration,
    /// From acceptance to the end.
    pub total: Duration,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub output_tokens: u32,
}

/// What a stage did for a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StageUse {
    /// Name of the worker.
    pub worker: String,
    /// First of its layers.
    pub layer_start: u32,
    /// The layer after the last one.
    pub layer_end: u32,
    /// Frames of this request that the stage ran.
    pub frames: u32,
    /// In the executor, over those frames.
    pub compute: Duration,
    /// In the stage's queue, over those frames.
    pub queue: Duration,
}
