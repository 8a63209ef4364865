//! InferenceService: gRPC's words for requests and answers.

use std::{pin::Pin, time::Duration};

use futures_util::{Stream, StreamExt};
use grokpipe_proto::{
    transport::Peer,
    v1::{
        self, DetokenizeRequest, DetokenizeResponse, GenerateRequest, GenerateResponse, ListModelsRequest,
        ListModelsResponse, ModelDescription, TokenizeRequest, TokenizeResponse,
        inference_service_server::InferenceService,
    },
};
use tonic::{Request, Response, Status};

use crate::{
    deadline::Deadline,
    engine::Handle,
    request::{self, Prompt, RequestError, RequestEvent, SamplingSpec, Spec, check::Checker},
    scheduler::ClientId,
};

/// Time of a call that is no generation.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves clients.
#[derive(Clone)]
pub struct Inference {
    /// The engine.
    pub engine: Handle,
    /// What may be asked for.
    pub checker: Checker,
}

fn spec(request: GenerateRequest) -> Result<Spec, RequestError> {
    if request.from_index != 0 {
        return Err(RequestError::NotBuilt("resuming a stream (from_index)"));
    }
    if !request.idempotency_key.is_empty() {
        return Err(RequestError::NotBuilt("idempotency_key"));
    }
    let sampling = request.sampling.unwrap_or_default();
    Ok(Spec {
        prompt: request.prompt.map(|prompt| match prompt {
            v1::generate_request::Prompt::Text(text) => Prompt::Text(text),
            v1::generate_request::Prompt::TokenIds(ids) => Prompt::Ids(ids.ids),
        }),
        label: request.request_id,
        timeout: (request.deadline_ms != 0).then(|| Duration::from_millis(request.deadline_ms)),
        max_tokens: request.max_tokens,
        sampling: SamplingSpec {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            seed: sampling.seed,
        },
        stop: request.stop,
        ignore_eos: request.ignore_eos,
    })
}

fn response(event: RequestEvent) -> GenerateResponse {
    use v1::generate_response::Event as Wire;
    let event = match event {
        RequestEvent::Accepted(accepted) => Wire::Accepted(v1::Accepted {
            id: accepted.id,
            request_id: accepted.label,
            prompt_token_ids: accepted.prompt,
            seed: accepted.seed,
            model: accepted.model,
        }),
        RequestEvent::Token(token) => Wire::Token(v1::GeneratedToken {
            id: token.id,
            index: token.index,
            token_id: token.token_id,
            text: token.text,
            logprob: token.logprob,
        }),
        RequestEvent::Finished(finished) => Wire::Finished(v1::Finished {
            id: finished.id,
            reason: match finished.reason {
                request::FinishReason::Stop => v1::FinishReason::Stop,
                request::FinishReason::Length => v1::FinishReason::Length,
            } as i32,
            stop_text: finished.stop_text,
            text: finished.text,
            timings: Some(v1::Timings {
                queued_us: micros(finished.timings.queued),
                first_token_us: micros(finished.timings.first_token),
                total_us: micros(finished.timings.total),
                prompt_tokens: finished.timings.prompt_tokens,
                output_tokens: finished.timings.output_tokens,
            }),
            stages: finished.stages.into_iter().map(stage_use).collect(),
        }),
    };
    GenerateResponse { event: Some(event) }
}

fn stage_use(stage: request::StageUse) -> v1::StageUse {
    v1::StageUse {
        worker: stage.worker,
        layer_start: stage.layer_start,
        layer_end: stage.layer_end,
        frames: stage.frames,
        compute_us: micros(stage.compute),
        queue_us: micros(stage.queue),
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The client's own deadline for a call, if it has one.
fn call_deadline<T>(request: &Request<T>) -> Option<Deadline> {
    request.extensions().get().copied()
}

/// Who sends a request.
fn client_of<T>(request: &Request<T>) -> ClientId {
    request.extensions().get().map_or(0, Peer::client)
}

#[tonic::async_trait]
impl InferenceService for Inference {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let (client, call) = (client_of(&request), call_deadline(&request));
        let request = self.checker.check(spec(request.into_inner())?, client, call).await?;
        let events = self.engine.submit(request).await?;
        Ok(Response::new(Box::pin(events.map(|event| Ok(response(event?))))))
    }

    async fn tokenize(&self, request: Request<TokenizeRequest>) -> Result<Response<TokenizeResponse>, Status> {
        let deadline = Deadline::after(CALL_TIMEOUT).or_earlier(call_deadline(&request));
        let token_ids = self.checker.text()?.encode(request.into_inner().text, deadline).await?;
        Ok(Response::new(TokenizeResponse { token_ids }))
    }

    async fn detokenize(&self, request: Request<DetokenizeRequest>) -> Result<Response<DetokenizeResponse>, Status> {
        let deadline = Deadline::after(CALL_TIMEOUT).or_earlier(call_deadline(&request));
        let ids = request.into_inner().token_ids;
        let desk = self.checker.text()?;
        self.checker.check_ids(&ids)?;
        Ok(Response::new(DetokenizeResponse { text: desk.decode(ids, deadline).await? }))
    }

    async fn list_models(&self, _request: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        let config = &self.checker.config;
        let model = ModelDescription {
            name: config.name.clone(),
            vocab_size: config.vocab_size as u32,
            context_length: config.max_position_embeddings as u32,
            num_layers: config.num_hidden_layers,
            parameters: config.parameters(),
            has_tokenizer: self.checker.text.is_some(),
        };
        Ok(Response::new(ListModelsResponse { models: vec![model] }))
    }
}

#[cfg(test)]
mod tests {
    use grokpipe_proto::v1::{TokenIds, generate_request::Prompt};
    use prost::Message;

    use super::*;
    use crate::request::check::{LABEL_BYTES_MAX, RequestLimits, STOP_BYTES_MAX, STOPS_MAX};

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
                    stop: vec!["x".repeat(STOP_BYTES_MAX); STOPS_MAX],
                    request_id: "x".repeat(LABEL_BYTES_MAX),
                    ..GenerateRequest::default()
                };
                assert!(request.encoded_len() <= limits.max_request_bytes(context), "{max_prompt_bytes}, {context}");
            }
        }
    }
}
