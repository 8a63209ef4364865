//! The client's own `grpc-timeout`.
//!
//! tonic looks at it only until a stream begins, and calls what is late CANCELLED. Here it holds over all of a call, and its name is
//! DEADLINE_EXCEEDED.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tonic::{
    Status,
    body::Body,
    codegen::{Service, http},
    server::NamedService,
};

use crate::deadline::Deadline;

/// The value of a `grpc-timeout` header: up to eight digits and a unit.
fn parse(value: &str) -> Option<Duration> {
    let (number, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if !(1..=8).contains(&number.len()) || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = number.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// A service whose calls end when their clients' time is up. A method that answers with a stream finds the [`Deadline`] among the
/// request's extensions: the time holds for its stream as well.
#[derive(Clone, Debug)]
pub struct Timed<S>(pub S);

impl<S: NamedService> NamedService for Timed<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Timed<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let header = request.headers().get("grpc-timeout").and_then(|value| value.to_str().ok());
        // One that makes no sense counts as none, as everywhere.
        let Some(deadline) = header.and_then(parse).map(Deadline::after) else {
            return Box::pin(self.0.call(request));
        };
        request.extensions_mut().insert(deadline);
        let answer = self.0.call(request);
        // tonic has begun to count after this, so it is not the one that ends the call.
        Box::pin(async move { deadline.bounds(answer).await.unwrap_or_else(|late| Ok(Status::from(late).into_http())) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_outs_are_read_as_the_protocol_writes_them() {
        let seconds = Duration::from_secs;
        let cases = [
            ("300m", Some(Duration::from_millis(300))),
            ("1S", Some(seconds(1))),
            ("2M", Some(seconds(120))),
            ("3H", Some(seconds(10_800))),
            ("5u", Some(Duration::from_micros(5))),
            ("7n", Some(Duration::from_nanos(7))),
            ("0S", Some(seconds(0))),
            ("99999999H", Some(seconds(99_999_999 * 3600))),
            ("100000000S", None),
            ("", None),
            ("S", None),
            ("12", None),
            ("-1S", None),
            ("1.5S", None),
            ("1é", None),
        ];
        for (value, expected) in cases {
            assert_eq!(parse(value), expected, "{value:?}");
        }
    }

    /// Answers after ten seconds, and says whether it received a deadline.
    #[derive(Clone)]
    struct Slow;

    impl Service<http::Request<Body>> for Slow {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

        fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            let told = request.extensions().get::<Deadline>().is_some();
            Box::pin(async move {
                tokio::time::sleep(Duration::from_secs(10)).await;
                Ok(http::Response::builder().header("told", told.to_string()).body(Body::default()).unwrap())
            })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_whose_time_is_up_ends_with_deadline_exceeded() {
        for (header, late, told) in [(Some("300m"), true, ""), (Some("20S"), false, "true"), (None, false, "false")] {
            let mut request = http::Request::builder();
            if let Some(header) = header {
                request = request.header("grpc-timeout", header);
            }
            let answer = Timed(Slow).call(request.body(Body::default()).unwrap()).await.unwrap();
            let text = |name: &str| answer.headers().get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
            if late {
                let status = Status::from_header_map(answer.headers()).unwrap();
                assert_eq!(status.code(), tonic::Code::DeadlineExceeded, "{header:?}");
                assert!(!status.details().is_empty(), "with typed details");
            } else {
                assert_eq!(text("told"), told, "{header:?}");
            }
        }
    }
}
