//! Measuring one direction of a link between two processes of a cluster: the end that asks and the end that answers.
//!
//! Decides how much a probe may take of a machine that serves. The end that asks sends growing amounts, each at most 4 MiB and half a
//! second long, together under 8 MiB. The end that answers takes one call at a time, for two seconds, and 64 MiB a second of all callers.
//! Does not decide who measures what, and when.

use std::{
    error::Error as _,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, timeout},
};
use tonic::{Code, Request, Response, Status, Streaming, service::Interceptor, transport::Channel};

use crate::{
    secret::Secret,
    transport::{self, Keepalive, Net},
    v1::{
        LinkReport, MachineReport, ProbeRequest, ProbeResponse,
        probe_service_client::ProbeServiceClient,
        probe_service_server::{ProbeService, ProbeServiceServer},
    },
};

/// Most bytes of one call.
pub const CALL_BYTES_MAX: u64 = 4 << 20;
/// Bytes of the first call: few enough for a link of 64 kB a second.
const FIRST_BYTES: u64 = 128 << 10;
/// A call that sends for less time says too little about the bandwidth.
const WORTH_SENDING: Duration = Duration::from_millis(300);
/// Longest time that a call sends.
const SEND_MAX: Duration = Duration::from_millis(500);
/// Time limit of a call, at either end.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of one message.
const CHUNK: usize = 64 << 10;
/// Calls without bytes whose shortest counts; the first one also opens the stream's state at both ends.
const ROUND_TRIPS: usize = 6;
/// A port that is busy with another probe is asked again after this time, this often.
const BUSY_PAUSE: Duration = Duration::from_millis(250);
const BUSY_TRIES: usize = 6;
/// Bytes that a port takes in a second, of all callers together.
const BUDGET_BYTES: u64 = 16 * CALL_BYTES_MAX;
/// Time limit of [`measure`]: connecting, round trips, bytes, and waiting for a busy port.
pub const MEASURE_TIMEOUT: Duration = Duration::from_secs(10);

/// Describes the machine of a process; with `true` it also reads some of the model's files. May block for a second.
pub type DescribeMachine = Arc<dyn Fn(bool) -> MachineReport + Send + Sync>;

/// This machine's clock, as reports tell it: microseconds since 1970.
pub fn clock_us() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Measures the way to the process at `address`: the round trip, and with `most_bytes` above 0 the bandwidth.
///
/// The bandwidth is one that was reached: what the link can carry may be more where the round trip is long, for TCP starts slowly.
pub async fn measure(net: &Arc<dyn Net>, address: &str, secret: &Secret, most_bytes: u64) -> LinkReport {
    let mut report = LinkReport { address: address.to_owned(), ..LinkReport::default() };
    let found = timeout(MEASURE_TIMEOUT, examine(net, address, secret, most_bytes, &mut report)).await;
    match found {
        Ok(Ok(())) => {}
        Ok(Err(error)) => report.error = error,
        Err(_late) => report.error = format!("no end within {} s", MEASURE_TIMEOUT.as_secs()),
    }
    report
}

async fn examine(
    net: &Arc<dyn Net>,
    address: &str,
    secret: &Secret,
    most_bytes: u64,
    report: &mut LinkReport,
) -> Result<(), String> {
    let channel =
        transport::connect(net, address, Keepalive::Cluster).await.map_err(|error| transport::root_cause(&error))?;
    let mut client = ProbeServiceClient::with_interceptor(channel, secret.attach());
    let mut shortest = Duration::MAX;
    for _ in 0..ROUND_TRIPS {
        let (answer, took) = call(&mut client, 0).await?;
        report.answered_by = answer.name;
        shortest = shortest.min(took);
    }
    report.round_trip_seconds = Some(shortest.as_secs_f64());
    let most_bytes = most_bytes.min(CALL_BYTES_MAX);
    let mut bytes = FIRST_BYTES.min(most_bytes);
    while bytes > 0 {
        let (answer, took) = call(&mut client, bytes).await?;
        // The answer's own way back is no time in which bytes went out.
        let sending = took.saturating_sub(shortest).max(Duration::from_micros(1));
        let rate = answer.bytes as f64 / sending.as_secs_f64();
        report.bytes_per_second = Some(report.bytes_per_second.map_or(rate, |best| best.max(rate)));
        let next = ((rate * WORTH_SENDING.as_secs_f64()) as u64).min(most_bytes);
        bytes = if next >= 2 * bytes { next } else { 0 };
    }
    Ok(())
}

type Client<I> = ProbeServiceClient<tonic::service::interceptor::InterceptedService<Channel, I>>;

/// One call with this many bytes, or as many as go out in time; what was answered and how long it took.
async fn call<I: Interceptor>(client: &mut Client<I>, bytes: u64) -> Result<(ProbeResponse, Duration), String> {
    let mut tries = 0;
    loop {
        let started = Instant::now();
        let payload = pattern();
        let chunks = bytes.div_ceil(CHUNK as u64) as usize;
        let requests = std::iter::repeat_n(payload, chunks)
            .take_while(move |_| started.elapsed() < SEND_MAX)
            .map(|payload| ProbeRequest { payload });
        match timeout(CALL_TIMEOUT, client.probe(tokio_stream::iter(requests))).await {
            Ok(Ok(answer)) => return Ok((answer.into_inner(), started.elapsed())),
            Ok(Err(status)) if status.code() == Code::ResourceExhausted && tries < BUSY_TRIES => {
                tries += 1;
                sleep(BUSY_PAUSE).await;
            }
            Ok(Err(status)) => return Err(refused(&status)),
            Err(_late) => return Err(format!("connected, but no answer within {} s", CALL_TIMEOUT.as_secs())),
        }
    }
}

fn refused(status: &Status) -> String {
    match status.code() {
        Code::Unimplemented => "a program answers there that knows no probes: an older grokpipe, or another one".into(),
        _ => match status.source() {
            Some(source) => transport::root_cause(source),
            None => status.message().to_owned(),
        },
    }
}

/// Bytes that no link on the way can make shorter.
fn pattern() -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(CHUNK);
    while bytes.len() < CHUNK {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    Bytes::from(bytes)
}

/// The end that answers.
#[derive(Clone, Debug)]
pub struct ProbePort {
    name: String,
    one: Arc<Semaphore>,
    taken: Arc<Mutex<Taken>>,
}

/// Bytes taken in the second that began then.
#[derive(Debug)]
struct Taken {
    since: Instant,
    bytes: u64,
}

impl ProbePort {
    /// The service of the worker of this name; of the coordinator, if it is empty.
    pub fn service(name: impl Into<String>) -> ProbeServiceServer<Self> {
        let port = Self {
            name: name.into(),
            one: Arc::new(Semaphore::new(1)),
            taken: Arc::new(Mutex::new(Taken { since: Instant::now(), bytes: 0 })),
        };
        ProbeServiceServer::new(port).max_decoding_message_size(CHUNK + 1024)
    }

    /// Whether `bytes` more are within the budget of a second.
    fn take(&self, bytes: u64) -> bool {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.since.elapsed() >= Duration::from_secs(1) {
            *taken = Taken { since: Instant::now(), bytes: 0 };
        }
        taken.bytes = taken.bytes.saturating_add(bytes);
        taken.bytes <= BUDGET_BYTES
    }

    async fn count(&self, mut requests: Streaming<ProbeRequest>) -> Result<u64, Status> {
        let mut bytes = 0;
        while let Some(request) = requests.message().await? {
            bytes += request.payload.len() as u64;
            if bytes > CALL_BYTES_MAX {
                return Err(Status::out_of_range(format!("expected at most {CALL_BYTES_MAX} bytes")));
            }
            if !self.take(request.payload.len() as u64) {
                return Err(Status::resource_exhausted("too many bytes of probes in this second"));
            }
        }
        Ok(bytes)
    }
}

#[tonic::async_trait]
impl ProbeService for ProbePort {
    async fn probe(&self, request: Request<Streaming<ProbeRequest>>) -> Result<Response<ProbeResponse>, Status> {
        let _alone = self.one.try_acquire().map_err(|_busy| Status::resource_exhausted("another probe runs here"))?;
        let bytes = timeout(CALL_TIMEOUT, self.count(request.into_inner()))
            .await
            .map_err(|_late| Status::deadline_exceeded("expected the end of a probe within 2 s"))??;
        Ok(Response::new(ProbeResponse { name: self.name.clone(), bytes }))
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::{CancellationToken, DropGuard};
    use tonic::service::interceptor::InterceptedService;

    use super::*;
    use crate::transport::Tcp;

    async fn port(secret: &Secret) -> (Arc<dyn Net>, String, ProbePort, DropGuard) {
        let net: Arc<dyn Net> = Arc::new(Tcp);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (stop, address) = (CancellationToken::new(), listener.local_addr().unwrap().to_string());
        let port = ProbePort {
            name: "w2".into(),
            one: Arc::new(Semaphore::new(1)),
            taken: Arc::new(Mutex::new(Taken { since: Instant::now(), bytes: 0 })),
        };
        let service = ProbeServiceServer::new(port.clone()).max_decoding_message_size(CHUNK + 1024);
        let serving = transport::server(Keepalive::Cluster)
            .add_service(InterceptedService::new(service, secret.require()))
            .serve_with_incoming_shutdown(
                tokio_stream::wrappers::TcpListenerStream::new(listener),
                stop.clone().cancelled_owned(),
            );
        tokio::spawn(serving);
        (net, address, port, stop.drop_guard())
    }

    #[tokio::test]
    async fn a_link_has_a_round_trip_a_bandwidth_and_the_name_of_its_other_end() {
        let (net, address, port, _stop) = port(&Secret::none()).await;
        let quick = measure(&net, &address, &Secret::none(), 0).await;
        assert_eq!((quick.error.as_str(), quick.answered_by.as_str(), quick.bytes_per_second), ("", "w2", None));
        assert!(quick.round_trip_seconds.unwrap() > 0.0);
        // More than is allowed is cut by the one that asks.
        let full = measure(&net, &address, &Secret::none(), u64::MAX).await;
        assert!(full.error.is_empty() && full.bytes_per_second.unwrap() > 0.0, "{full:?}");
        assert!((1..=2 * CALL_BYTES_MAX).contains(&port.taken.lock().unwrap().bytes));
    }

    #[tokio::test]
    async fn what_stands_in_the_way_is_told_in_the_systems_words() {
        let ours = Secret::new("0123456789abcdef").unwrap();
        let (net, address, _port, _stop) = port(&ours).await;
        let refused = measure(&net, &address, &Secret::none(), 0).await;
        assert!(refused.error.contains("expected the cluster's secret"), "{refused:?}");
        assert!(measure(&net, &address, &ours, 0).await.error.is_empty());

        let closed = net.bind("127.0.0.1:0".into()).await.unwrap().address.to_string();
        let report = measure(&net, &closed, &ours, 0).await;
        assert!(report.error.contains("refused") && report.address == closed, "{report:?}");
        assert!(report.round_trip_seconds.is_none());
        assert!(!measure(&net, "no-such-host.invalid:1", &ours, 0).await.error.is_empty());
    }

    #[tokio::test]
    async fn a_port_takes_one_probe_at_a_time_and_no_more_than_its_share() {
        let (net, address, port, _stop) = port(&Secret::none()).await;
        let channel = transport::connect(&net, &address, Keepalive::Cluster).await.unwrap();
        let client = ProbeServiceClient::new(channel);
        let send = |chunks: u64| {
            let mut client = client.clone();
            async move {
                let requests = std::iter::repeat_n(ProbeRequest { payload: pattern() }, chunks as usize);
                client.probe(tokio_stream::iter(requests)).await.map(|answer| answer.into_inner().bytes)
            }
        };
        let most = CALL_BYTES_MAX / CHUNK as u64;
        assert_eq!(send(most).await.unwrap(), CALL_BYTES_MAX);
        assert_eq!(send(most + 1).await.unwrap_err().code(), Code::OutOfRange);

        let alone = port.one.clone().acquire_owned().await.unwrap();
        assert_eq!(send(1).await.unwrap_err().code(), Code::ResourceExhausted);
        drop(alone);
        assert!(send(1).await.is_ok());

        *port.taken.lock().unwrap() = Taken { since: Instant::now() + Duration::from_secs(60), bytes: BUDGET_BYTES };
        assert_eq!(send(1).await.unwrap_err().code(), Code::ResourceExhausted);
        assert!(send(0).await.is_ok());
    }
}
