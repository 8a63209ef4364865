//! Tells a connection when calls begin and end on it, so that it keeps its place meanwhile.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::{
    body::Body,
    codegen::{Service, http},
};
use tower_layer::Layer;

use super::{BoxFuture, Peer, places::Call};

/// Around all services of a port.
#[derive(Clone, Copy, Debug, Default)]
pub struct CountCalls;

impl<S> Layer<S> for CountCalls {
    type Service = Counted<S>;
    fn layer(&self, service: S) -> Counted<S> {
        Counted(service)
    }
}

/// A service whose calls are counted, from their heads to the ends of their answers.
#[derive(Clone, Debug)]
pub struct Counted<S>(S);

impl<S, B> Service<http::Request<B>> for Counted<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<Result<Self::Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        // Absent where a test serves without connections of ours.
        let call = request.extensions().get::<Peer>().map(Peer::begin);
        let answer = self.0.call(request);
        Box::pin(async move { Ok(answer.await?.map(|body| Body::new(Answer::new(body, call)))) })
    }
}

/// The body of an answer; its end ends the call.
#[derive(Debug)]
pub struct Answer<B> {
    body: B,
    _call: Option<Call>,
}

impl<B> Answer<B> {
    /// `call`, if there is one, runs until this answer has been sent or dropped.
    pub fn new(body: B, call: Option<Call>) -> Self {
        Self { body, _call: call }
    }
}

impl<B: HttpBody + Unpin> HttpBody for Answer<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
