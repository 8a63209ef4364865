//! Who a request comes from, and what may be asked over its connection.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    task::{Context, Poll},
};

use axum::{Router, body::Body, extract::Request, response::Response};
use grokpipe_proto::transport::{Answer, BoxFuture, places::Place};
use tower_service::Service;

/// A connection, as an extension of its requests.
#[derive(Clone, Debug)]
pub(super) struct Visitor {
    address: IpAddr,
    /// All ordinary places are taken: only health is answered.
    pub(super) only_health: bool,
    place: Option<Arc<Place>>,
}

impl Visitor {
    pub(super) fn new(address: SocketAddr, place: Place, only_health: bool) -> Self {
        Self { address: address.ip(), only_health, place: Some(Arc::new(place)) }
    }

    /// The visitor of a request; one of loopback where the router is used without [`super::serve`].
    pub(super) fn of(request: &Request) -> Self {
        let unknown = || Self { address: Ipv4Addr::LOCALHOST.into(), only_health: false, place: None };
        request.extensions().get().cloned().unwrap_or_else(unknown)
    }

    /// Where the connection comes from.
    pub(super) fn address(&self) -> IpAddr {
        self.address
    }
}

/// The routes, for one connection.
#[derive(Clone)]
pub(super) struct Visited {
    pub(super) router: Router,
    pub(super) visitor: Visitor,
}

impl<B> Service<axum::http::Request<B>> for Visited
where
    B: axum::body::HttpBody<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<axum::BoxError>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = BoxFuture<Result<Response, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: axum::http::Request<B>) -> Self::Future {
        let call = self.visitor.place.as_ref().map(|place| place.begin());
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(self.visitor.clone());
        let answer = self.router.call(request);
        Box::pin(async move { Ok(answer.await?.map(|body| Body::new(Answer::new(body, call)))) })
    }
}
