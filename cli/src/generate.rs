//! `grokpipe generate`: sends a prompt, streams the text as it comes, or prints one JSON object at the end.
//!
//! Decides how a generation looks on a terminal. Limits and values are the server's to check.

use std::{
    io::{self, Read},
    time::Duration,
};

use grokpipe_proto::v1::{
    Accepted, FinishReason, Finished, GenerateRequest, SamplingOptions, TokenIds, generate_request::Prompt,
    generate_response::Event,
};
use serde_json::{Value, json};

use crate::{
    client::{self, Client, ServerArgs},
    config,
    error::{CliError, Code},
    text::{print_aside, without_mark},
};

/// Longest prompt read from standard input; what the server takes is its own, smaller limit.
const STDIN_BYTES_MAX: u64 = 64 << 20;

/// How much longer than `--timeout` this side waits for the server to say that the time is over.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Arguments of `generate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The text to continue; - reads it from standard input
    #[arg(required_unless_present = "token_ids", conflicts_with = "token_ids")]
    prompt: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
    /// Most tokens to generate [the server's default: 128]
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// 0 takes the likeliest token each time
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Keep the likeliest tokens that together reach this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Keep the K likeliest tokens; 0 keeps all
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Keep tokens at least this fraction as likely as the likeliest
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Seed of the draws; without one the server draws it and tells
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Text that ends the generation; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Go on after the end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,
    /// The prompt as token ids, 1,2,3
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    token_ids: Option<Vec<u32>>,
    /// Time for the whole request, as 30s [the server's default: 10m]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    timeout: Option<Duration>,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

fn parse_time(text: &str) -> Result<Duration, String> {
    config::duration(text).filter(|time| !time.is_zero()).ok_or_else(|| "expected a time, as 30s or 5m".to_owned())
}

/// Runs `generate`.
///
/// # Errors
/// [`CliError`] with the exit code of the failure.
pub(crate) fn run(args: Args) -> Result<(), CliError> {
    let json = args.json;
    let patience = args.timeout.map(|time| time + ANSWER_WITHIN);
    let server = args.server.address()?;
    let request = request(args)?;
    client::block_on(async {
        let client = Client::connect(&server).await?;
        let work = async {
            if json {
                let generation = generate(&client, request, async |_text| Ok(())).await?;
                print_aside(format!("{}\n", generation.to_json())).await
            } else {
                generate(&client, request, async |text| print_aside(text).await).await?;
                print_aside("\n".to_owned()).await
            }
        };
        let too_late = async {
            match patience {
                Some(patience) => tokio::time::sleep(patience).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            done = work => done,
            () = too_late => {
                Err(CliError::no_answer(&server, "the time of --timeout is over, and the server has not said so"))
            }
            // Dropping the call cancels the request on the server.
            interrupted = tokio::signal::ctrl_c() => Err(match interrupted {
                Ok(()) => CliError::failed("cancelled"),
                Err(error) => CliError::failed("signals cannot be received").because(error),
            }),
        }
    })
}

fn request(args: Args) -> Result<GenerateRequest, CliError> {
    let prompt = match (args.token_ids, args.prompt.as_deref()) {
        (Some(ids), _) => Prompt::TokenIds(TokenIds { ids }),
        (None, Some("-")) => Prompt::Text(read_stdin()?),
        (None, text) => Prompt::Text(text.unwrap_or_default().to_owned()),
    };
    Ok(GenerateRequest {
        prompt: Some(prompt),
        deadline_ms: args.timeout.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        max_tokens: args.max_tokens,
        sampling: Some(SamplingOptions {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            seed: args.seed,
        }),
        stop: args.stop,
        ignore_eos: args.ignore_eos,
        ..GenerateRequest::default()
    })
}

/// The whole of standard input as a prompt.
fn read_stdin() -> Result<String, CliError> {
    let refuse = || CliError::usage("the prompt cannot be read").at("standard input");
    let mut text = String::new();
    let read = io::stdin().lock().take(STDIN_BYTES_MAX + 1).read_to_string(&mut text);
    let bytes = read.map_err(|error| refuse().because(error))?;
    if bytes as u64 > STDIN_BYTES_MAX {
        return Err(refuse().because(format!("expected at most {STDIN_BYTES_MAX} bytes")));
    }
    Ok(prompt_of(&text).to_owned())
}

/// The prompt that a file or a pipe holds: without a byte order mark at its start, and without the one line end that editors and `echo`
/// add. Every other line end is the user's.
fn prompt_of(text: &str) -> &str {
    let text = without_mark(text);
    let line = text.strip_suffix('\n').map(|line| line.strip_suffix('\r').unwrap_or(line));
    line.unwrap_or(text)
}

/// A generation that has ended.
#[derive(Debug, Default)]
pub(crate) struct Generation {
    accepted: Accepted,
    output_token_ids: Vec<u32>,
    logprobs: Vec<f32>,
    /// All of the output.
    pub(crate) text: String,
    finished: Finished,
}

impl Generation {
    /// The object that `--json` prints. Layer ranges are half-open, times in microseconds.
    fn to_json(&self) -> Value {
        let finished = &self.finished;
        let reason = match finished.reason() {
            FinishReason::Stop => Some("stop"),
            FinishReason::Length => Some("length"),
            FinishReason::Unspecified => None,
        };
        let timings = finished.timings.unwrap_or_default();
        let stages: Vec<Value> = finished
            .stages
            .iter()
            .map(|stage| {
                json!({
                    "worker": stage.worker,
                    "layers": [stage.layer_start, stage.layer_end],
                    "frames": stage.frames,
                    "compute_us": stage.compute_us,
                    "queue_us": stage.queue_us,
                })
            })
            .collect();
        json!({
            "id": self.accepted.id,
            "model": self.accepted.model,
            "prompt_token_ids": self.accepted.prompt_token_ids,
            "output_token_ids": self.output_token_ids,
            "logprobs": self.logprobs,
            "text": self.text,
            "finish_reason": reason,
            "stop_text": Some(&finished.stop_text).filter(|text| !text.is_empty()),
            "seed": self.accepted.seed,
            "timings": {
                "queued_us": timings.queued_us,
                "first_token_us": timings.first_token_us,
                "total_us": timings.total_us,
                "prompt_tokens": timings.prompt_tokens,
                "output_tokens": timings.output_tokens,
            },
            "stages": stages,
        })
    }
}

/// Runs a request to its end; `on_text` is told each piece of text as it comes.
///
/// # Errors
/// What the server said, or what `on_text` fails with, which cancels the request.
pub(crate) async fn generate(
    client: &Client,
    request: GenerateRequest,
    mut on_text: impl AsyncFnMut(String) -> Result<(), CliError>,
) -> Result<Generation, CliError> {
    let failed = |status: tonic::Status| CliError::from_status(client.server(), &status);
    let mut events = client.inference().generate(request).await.map_err(failed)?.into_inner();
    let mut generation = Generation::default();
    while let Some(answer) = events.message().await.map_err(failed)? {
        match answer.event {
            Some(Event::Accepted(accepted)) => generation.accepted = accepted,
            Some(Event::Token(token)) => {
                let expected = generation.output_token_ids.len();
                if token.index as usize != expected {
                    return Err(CliError::failed("the server's stream has a gap")
                        .at(client.server())
                        .because(format!("expected token {expected}, found token {}", token.index)));
                }
                generation.output_token_ids.push(token.token_id);
                generation.logprobs.push(token.logprob);
                generation.text.push_str(&token.text);
                on_text(token.text).await?;
            }
            Some(Event::Finished(finished)) => {
                generation.text.push_str(&finished.text);
                on_text(finished.text.clone()).await?;
                generation.finished = finished;
                return Ok(generation);
            }
            None => {}
        }
    }
    Err(CliError::new(Code::Unreachable, "the server's stream ended early")
        .at(client.server())
        .because(format!("expected an end after {} tokens", generation.output_token_ids.len()))
        .advise("try again once `grokpipe status` says that the cluster serves"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_piped_prompt_keeps_its_line_ends_but_one_and_loses_its_byte_order_mark() {
        let cases = [
            ("", ""),
            ("Q: x\nA:", "Q: x\nA:"),
            ("Q: x\nA:\n", "Q: x\nA:"),
            ("Q: x\nA:\n\n", "Q: x\nA:\n"),
            ("Q: x\r\nA:\r\n", "Q: x\r\nA:"),
            ("tail\r", "tail\r"),
            ("  tail \n", "  tail "),
            ("\u{feff}Q", "Q"),
            ("\u{feff}\u{feff}Q", "\u{feff}Q"),
            ("\n", ""),
        ];
        for (text, prompt) in cases {
            assert_eq!(super::prompt_of(text), prompt, "{text:?}");
        }
    }

    use super::*;

    #[test]
    fn json_has_ids_text_reason_timings_and_stages() {
        let generation = Generation {
            accepted: Accepted { id: "a".into(), prompt_token_ids: vec![5, 6], seed: u64::MAX, ..Accepted::default() },
            output_token_ids: vec![7],
            logprobs: vec![-0.5],
            text: " Paris".into(),
            finished: Finished {
                reason: FinishReason::Stop.into(),
                stop_text: ".".into(),
                stages: vec![grokpipe_proto::v1::StageUse {
                    worker: "w1".into(),
                    layer_start: 0,
                    layer_end: 16,
                    frames: 2,
                    compute_us: 9,
                    queue_us: 1,
                }],
                ..Finished::default()
            },
        };
        let value = generation.to_json();
        assert_eq!(value["prompt_token_ids"], json!([5, 6]));
        assert_eq!(value["output_token_ids"], json!([7]));
        assert_eq!((&value["text"], &value["finish_reason"]), (&json!(" Paris"), &json!("stop")));
        assert_eq!((&value["stop_text"], &value["seed"]), (&json!("."), &json!(u64::MAX)));
        assert_eq!(value["stages"][0]["layers"], json!([0, 16]));
        assert_eq!(value["stages"][0]["worker"], "w1");
        assert!(value["timings"]["first_token_us"].is_u64());
        assert_eq!(Generation::default().to_json()["finish_reason"], Value::Null);
    }
}
