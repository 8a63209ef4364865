//! Clients that ask questions whose answers are known, one after the other, and count what becomes of them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use grokpipe_proto::{
    transport::{self, Keepalive, Net, Tcp},
    v1::{GenerateRequest, SamplingOptions, inference_service_client::InferenceServiceClient},
};
use grokpipe_tests::{
    demo_model,
    processes::token_ids,
    simulated::{request, token_of},
};
use serde_json::Value;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tonic::Status;

use crate::random::Random;

/// How long a request may run before the coordinator ends it.
const DEADLINE: Duration = Duration::from_secs(20);
/// A request without an end by then hangs.
const HUNG_AFTER: Duration = Duration::from_secs(40);

/// A prompt and what follows it, token for token.
pub(crate) struct Question {
    prompt_ids: Vec<u32>,
    answer_ids: Vec<u32>,
}

/// The questions of the demo model's quiz, with the answers of another implementation.
pub(crate) fn questions() -> Vec<Question> {
    let text = std::fs::read_to_string(demo_model().join("quiz.json")).expect("the quiz lies beside the demo model");
    let items: Vec<Value> = serde_json::from_str(&text).expect("the quiz is JSON");
    let question = |item: &Value| Question {
        prompt_ids: token_ids(item, "prompt_ids"),
        answer_ids: token_ids(item, "answer_ids"),
    };
    items.iter().map(question).collect()
}

impl Question {
    fn request(&self) -> GenerateRequest {
        let request = request(&self.prompt_ids, self.answer_ids.len() as u32, SamplingOptions::default());
        GenerateRequest { deadline_ms: DEADLINE.as_millis() as u64, ..request }
    }
}

/// What became of a request.
pub(crate) enum Outcome {
    /// All its tokens.
    Exact,
    /// A typed error, and no wrong token before it.
    Error(Status),
    /// Another token than expected, or too few without an error.
    Wrong(String),
    /// No end.
    Hung,
}

/// Asks once, over a connection of its own.
pub(crate) async fn ask(grpc: &str, question: &Question) -> Outcome {
    let asked = async {
        let net: Arc<dyn Net> = Arc::new(Tcp);
        let channel = transport::connect(&net, grpc, Keepalive::Client).await;
        let channel = channel.map_err(|error| Outcome::Error(Status::unavailable(error.to_string())))?;
        let stream = InferenceServiceClient::new(channel).generate(question.request()).await;
        let mut stream = stream.map_err(Outcome::Error)?.into_inner();
        let mut count = 0;
        while let Some(response) = stream.message().await.map_err(Outcome::Error)? {
            let Some(token) = token_of(response, count) else { continue };
            if question.answer_ids.get(count) != Some(&token) {
                let expected = &question.answer_ids;
                return Err(Outcome::Wrong(format!("expected {expected:?}, found {token} at {count}")));
            }
            count += 1;
        }
        if count < question.answer_ids.len() {
            return Err(Outcome::Wrong(format!(
                "the stream ended well after {count} of {}",
                question.answer_ids.len()
            )));
        }
        Ok(())
    };
    match timeout(HUNG_AFTER, asked).await {
        Err(_elapsed) => Outcome::Hung,
        Ok(Ok(())) => Outcome::Exact,
        Ok(Err(outcome)) => outcome,
    }
}

/// Counts.
#[derive(Default)]
pub(crate) struct Tally {
    /// Requests that got their tokens.
    pub(crate) exact: u64,
    /// Errors by their code.
    pub(crate) errors: BTreeMap<String, u64>,
    /// What was wrong, and of what nature.
    pub(crate) wrong: Vec<String>,
    /// Requests without an end.
    pub(crate) hung: u64,
}

impl Tally {
    /// Requests in all.
    pub(crate) fn requests(&self) -> u64 {
        self.exact + self.errors.values().sum::<u64>() + self.wrong.len() as u64 + self.hung
    }

    fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Exact => self.exact += 1,
            Outcome::Error(status) => *self.errors.entry(format!("{:?}", status.code())).or_default() += 1,
            Outcome::Wrong(what) => {
                eprintln!("WRONG TOKENS: {what}");
                self.wrong.push(what);
            }
            Outcome::Hung => {
                eprintln!("HUNG: a request had no end after {HUNG_AFTER:?}");
                self.hung += 1;
            }
        }
    }
}

/// Asks one question after the other until the end.
pub(crate) async fn client(
    grpc: String,
    questions: Arc<Vec<Question>>,
    mut random: Random,
    tally: Arc<Mutex<Tally>>,
    over: watch::Receiver<bool>,
) {
    while !*over.borrow() {
        let question = random.pick(&questions);
        let outcome = ask(&grpc, question).await;
        if matches!(outcome, Outcome::Error(_)) {
            sleep(Duration::from_millis(200)).await;
        }
        tally.lock().expect("no panic").count(outcome);
    }
}
