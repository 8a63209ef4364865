//! Over real sockets: what a client sees, byte by byte.

use std::{net::SocketAddr, time::Duration};

use grokpipe_proto::{
    ids::LayerRange,
    snapshot::{
        NodeState, SnapshotModel, SnapshotNode, SnapshotPlan, SnapshotRequests, SnapshotStage, VerdictInput, verdict,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::timeout,
};

use super::*;

const SOON: Duration = Duration::from_secs(20);

/// One node per state, 64 layers evenly spread.
fn snapshot(states: &[NodeState]) -> ClusterSnapshot {
    let each = 64 / states.len() as u32;
    let layers = |index: usize| {
        let start = index as u32 * each;
        Some(LayerRange::new(start, start + each).expect("at least one layer").into())
    };
    let node = |(index, state): (usize, &NodeState)| SnapshotNode {
        layers: layers(index),
        last_error: (*state == NodeState::Down).then(|| "connection reset".to_owned()),
        ..SnapshotNode::new(format!("w{index}"), *state)
    };
    let nodes: Vec<_> = states.iter().enumerate().map(node).collect();
    let stages =
        nodes.iter().enumerate().map(|(index, node)| SnapshotStage { node: node.name.clone(), layers: layers(index) });
    let plan = SnapshotPlan {
        epoch: 1,
        predicted_tokens_per_second: None,
        measured_tokens_per_second: None,
        predicted_stream_tokens_per_second: None,
        measured_stream_tokens_per_second: None,
        stages: stages.collect(),
    };
    let input = VerdictInput {
        layers: 64,
        plan: Some(&plan),
        nodes: &nodes,
        workers_expected: 4,
        refusal: None,
        serving: true,
        trouble: None,
    };
    ClusterSnapshot {
        cluster: "test".into(),
        verdict: Some(verdict(input)),
        model: Some(SnapshotModel { name: "grok-1".into(), layers: 64 }),
        plan: Some(plan.clone()),
        nodes,
        requests: Some(SnapshotRequests::default()),
        events: Vec::new(),
    }
}

pub(super) fn serving() -> ClusterSnapshot {
    snapshot(&[NodeState::Ready; 4])
}

fn one_down() -> ClusterSnapshot {
    snapshot(&[NodeState::Ready, NodeState::Ready, NodeState::Down, NodeState::Ready])
}

struct Server {
    address: SocketAddr,
    publish: watch::Sender<Arc<ClusterSnapshot>>,
    shutdown: CancellationToken,
    running: JoinHandle<std::io::Result<()>>,
}

impl Server {
    async fn start(first: ClusterSnapshot) -> Self {
        Self::start_within(ConnectionLimits::default(), first).await
    }

    async fn start_within(limits: ConnectionLimits, first: ClusterSnapshot) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (publish, snapshots) = watch::channel(Arc::new(first));
        let shutdown = CancellationToken::new();
        let state = HttpState::new(snapshots, AllowedHosts::bound_to(address).and(["head.example"]));
        let running = tokio::spawn(serve(listener, state, limits, shutdown.clone()));
        Self { address, publish, shutdown, running }
    }

    async fn send(&self, request: &str) -> TcpStream {
        let mut socket = TcpStream::connect(self.address).await.expect("listening");
        socket.write_all(request.as_bytes()).await.expect("sent");
        socket
    }

    /// One request with these lines after the request line, its whole answer.
    async fn ask(&self, method: &str, path: &str, lines: &[&str]) -> Answer {
        let host = if lines.iter().any(|line| line.starts_with("Host")) { "" } else { "Host: localhost\r\n" };
        let lines: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
        self.answer(&format!("{method} {path} HTTP/1.1\r\n{host}{lines}Connection: close\r\n\r\n")).await
    }

    /// The whole answer to a request that ends its connection.
    async fn answer(&self, request: &str) -> Answer {
        let mut socket = self.send(request).await;
        let mut bytes = Vec::new();
        timeout(SOON, socket.read_to_end(&mut bytes)).await.expect("in time").expect("read");
        Answer::parse(&String::from_utf8(bytes).expect("text"))
    }

    async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[]).await
    }

    async fn events(&self, lines: &str) -> TcpStream {
        self.send(&format!("GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n")).await
    }
}

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

impl Answer {
    fn parse(text: &str) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        let mut lines = head.lines();
        let status =
            lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|code| code.parse().ok()).expect("status");
        let header = |line: &str| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
        Self { status, headers: lines.filter_map(header).collect(), body: body.to_owned() }
    }

    fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(found, _)| found == name).map_or("", |(_, value)| value)
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).expect("JSON")
    }
}

/// Reads until the stream has brought `enough`; what came.
async fn read_until(socket: &mut TcpStream, enough: impl Fn(&str) -> bool) -> String {
    let mut text = String::new();
    let mut buffer = [0; 4096];
    while !enough(&text) {
        let count = timeout(SOON, socket.read(&mut buffer)).await.expect("in time").expect("read");
        assert_ne!(count, 0, "the stream ended after {text}");
        text.push_str(std::str::from_utf8(&buffer[..count]).expect("text"));
    }
    text
}

#[tokio::test]
async fn routes_answer_with_their_status() {
    let server = Server::start(serving()).await;
    let cases = [
        ("GET", "/", 200, ""),
        ("HEAD", "/", 200, ""),
        ("GET", "/app.js", 200, ""),
        ("GET", "/health", 200, ""),
        ("GET", "/readyz", 200, ""),
        ("GET", "/livez", 200, ""),
        ("GET", "/api/v1/cluster", 200, ""),
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/../etc/passwd", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("DELETE", "/", 405, "method_not_allowed"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("POST", "/v1/completions", 501, "not_built_yet"),
        ("POST", "/v1/chat/completions", 501, "not_built_yet"),
        ("POST", "/v1/cancel/7", 501, "not_built_yet"),
        ("POST", "/tokenize", 501, "not_built_yet"),
        ("GET", "/v1/models", 501, "not_built_yet"),
        ("GET", "/v1/models/grok-1", 501, "not_built_yet"),
        ("GET", "/metrics", 501, "not_built_yet"),
    ];
    for (method, path, status, code) in cases {
        let answer = server.ask(method, path, &[]).await;
        assert_eq!(answer.status, status, "{method} {path}");
        assert_eq!(answer.header("content-security-policy"), guard::CONTENT_SECURITY_POLICY, "{method} {path}");
        assert_eq!(answer.header("x-content-type-options"), "nosniff", "{method} {path}");
        assert_eq!(answer.header("referrer-policy"), "no-referrer", "{method} {path}");
        assert_eq!(answer.header("x-request-id").len(), 16, "{method} {path}");
        if !code.is_empty() {
            let error = &answer.json()["error"];
            assert_eq!(error["code"], code, "{method} {path}");
            assert!(error["message"].is_string() && error["type"].is_string() && error["param"].is_null());
            assert_eq!(answer.header("x-should-retry"), "false", "{method} {path}");
        }
        assert_eq!(status == 405, !answer.header("allow").is_empty(), "{method} {path} names the methods it has");
    }
    let hint = server.ask("POST", "/v1/completions", &[]).await.json();
    assert!(hint["error"]["message"].as_str().is_some_and(|text| text.contains("grokpipe generate")));
}

#[tokio::test]
async fn health_follows_the_snapshot_and_names_the_missing_layers() {
    let server = Server::start(serving()).await;
    let answer = server.get("/health").await;
    assert_eq!((answer.status, answer.json()["status"].as_str()), (200, Some("serving")));

    server.publish.send_replace(Arc::new(one_down()));
    for path in ["/health", "/readyz"] {
        let answer = server.get(path).await;
        assert_eq!((answer.status, answer.header("retry-after")), (503, "2"), "{path}");
        let body = answer.json();
        assert_eq!(body["status"], "down");
        assert_eq!(body["missing_layers"], serde_json::json!([[32, 48]]));
        let message = body["error"]["message"].as_str().expect("a message");
        assert_eq!(message, "Down: layers 32–47 have no live stage, w2 lost: connection reset");
    }
    assert_eq!(server.get("/livez").await.status, 200, "alive, though it does not serve");

    server.publish.send_replace(Arc::new(serving()));
    assert_eq!(server.get("/readyz").await.status, 200);
}

#[tokio::test]
async fn unchanged_snapshot_is_not_sent_again() {
    let server = Server::start(serving()).await;
    for path in ["/api/v1/cluster", "/"] {
        let first = server.get(path).await;
        let tag = format!("If-None-Match: {}", first.header("etag"));
        assert_eq!(first.header("cache-control"), "no-cache");
        let second = server.ask("GET", path, &[&tag]).await;
        assert_eq!((second.status, second.body.as_str()), (304, ""), "{path}");
        assert_eq!(second.header("etag"), first.header("etag"));
        server.publish.send_replace(Arc::new(one_down()));
        let third = server.ask("GET", path, &[&tag]).await;
        assert_eq!(third.status, if path == "/" { 304 } else { 200 }, "{path}");
    }
    let body = server.get("/api/v1/cluster").await.json();
    assert_eq!(body, serde_json::to_value(one_down()).expect("a snapshot"));
}

#[tokio::test]
async fn foreign_host_is_refused() {
    let server = Server::start(serving()).await;
    for (host, status) in [
        ("Host: localhost:8080", 200),
        ("Host: [::1]:8080", 200),
        ("Host: head.example", 200),
        ("Host: evil.example", 421),
        ("Host: 10.0.0.1", 421),
        ("Host: localhost\r\nHost: localhost", 400),
        ("Host: a b", 400),
        ("Host: ", 400),
    ] {
        let answer = server.ask("GET", "/api/v1/cluster", &[host]).await;
        assert_eq!(answer.status, status, "{host:?}");
        assert!(status == 200 || answer.json()["error"]["code"].is_string(), "{host:?}");
    }
}

#[tokio::test]
async fn large_body_is_refused() {
    let server = Server::start(serving()).await;
    for (length, status) in [("1048576", 501), ("1048577", 413), ("999999999999999999", 413)] {
        let request = format!("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n");
        let mut socket = server.send(&request).await;
        let head = read_until(&mut socket, |text| text.contains("\r\n\r\n")).await;
        assert_eq!(Answer::parse(&head).status, status, "{length}");
    }
}

#[tokio::test]
async fn short_request_id_is_echoed_and_others_replaced() {
    let server = Server::start(serving()).await;
    let long = "x".repeat(129);
    for (id, kept) in [("abc-7", true), (long.as_str(), false), ("a b", false)] {
        let answer = server.ask("GET", "/livez", &[&format!("X-Request-Id: {id}")]).await;
        assert_eq!(answer.header("x-request-id") == id, kept, "{id}");
    }
}

#[tokio::test]
async fn stream_begins_at_once_and_brings_changes() {
    let server = Server::start(serving()).await;
    let mut socket = server.events("").await;
    let first = read_until(&mut socket, |text| text.contains("\n\n") && text.contains("data:")).await;
    let head = Answer::parse(&first);
    assert_eq!(head.status, 200);
    assert_eq!(head.header("content-type"), "text/event-stream");
    assert_eq!(head.header("cache-control"), "no-cache");
    assert_eq!(head.header("x-accel-buffering"), "no");
    assert!(head.body.contains("event: snapshot\nid: 1\ndata: {"), "{}", head.body);

    server.publish.send_replace(Arc::new(one_down()));
    let second = read_until(&mut socket, |text| text.contains("\n\n")).await;
    assert!(second.contains("id: 2\n") && second.contains("layers 32–47 have no live stage"), "{second}");
}

#[tokio::test]
async fn stream_goes_on_from_the_last_id() {
    let server = Server::start(serving()).await;
    let mut socket = server.events("Last-Event-ID: 41\r\n").await;
    read_until(&mut socket, |text| text.contains("id: 42\n")).await;
}

#[tokio::test]
async fn streams_are_counted_and_their_places_return() {
    let server = Server::start(serving()).await;
    let mut open = Vec::new();
    for _ in 0..STREAMS.total {
        let mut socket = server.events("").await;
        read_until(&mut socket, |text| text.contains("id: 1\n")).await;
        open.push(socket);
    }
    let refused = server.ask("GET", "/api/v1/events", &[]).await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, "5"));
    assert_eq!(server.get("/livez").await.status, 200, "other routes are not concerned");

    drop(open);
    let returned = async {
        loop {
            let mut socket = server.events("").await;
            if read_until(&mut socket, |text| text.contains("\r\n\r\n")).await.starts_with("HTTP/1.1 200") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, returned).await.expect("a place is free again");
}

#[tokio::test]
async fn shutdown_ends_streams_and_idle_connections() {
    let server = Server::start(serving()).await;
    let mut stream = server.events("").await;
    read_until(&mut stream, |text| text.contains("id: 1\n")).await;
    let _idle = server.send("").await;
    let _half = server.send("GET / HT").await;
    server.shutdown.cancel();
    timeout(SOON, server.running).await.expect("in time").expect("no panic").expect("no error");
    let mut rest = String::new();
    timeout(SOON, stream.read_to_string(&mut rest)).await.expect("in time").expect("ended in good order");
}

#[tokio::test(start_paused = true)]
async fn client_that_sends_no_head_is_let_go() {
    let server = Server::start(serving()).await;
    for sent in ["", "GET / HTTP/1.1\r\nHost: loc"] {
        let mut socket = server.send(sent).await;
        let mut rest = Vec::new();
        // Time is simulated, and jumps as soon as all tasks wait.
        let ended = timeout(Duration::from_secs(60), socket.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "a client that sent {sent:?} is still connected");
    }
}

#[tokio::test]
async fn health_answers_any_host_or_none_and_old_protocols() {
    let server = Server::start(serving()).await;
    let hosts = [
        "",
        "Host: localhost\r\n",
        "Host: node0:8080\r\n",
        "Host: grok.default.svc.cluster.local\r\n",
        "Host: 10.1.2.3\r\n",
        "Host: a\r\nHost: b\r\n",
    ];
    for version in ["1.0", "1.1"] {
        for host in hosts {
            for path in ["/health", "/livez", "/readyz"] {
                for method in ["GET", "HEAD", "OPTIONS"] {
                    let request = format!("{method} {path} HTTP/{version}\r\n{host}Connection: close\r\n\r\n");
                    assert_eq!(server.answer(&request).await.status, 200, "{request:?}");
                }
            }
        }
    }
    for (request, status) in [
        ("OPTIONS / HTTP/1.0\r\n\r\n", 204),
        ("OPTIONS / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 204),
        ("GET / HTTP/1.0\r\n\r\n", 400),
        ("GET /api/v1/cluster HTTP/1.0\r\n\r\n", 400),
    ] {
        assert_eq!(server.answer(request).await.status, status, "{request:?}");
    }
    server.publish.send_replace(Arc::new(one_down()));
    assert_eq!(server.answer("OPTIONS /readyz HTTP/1.0\r\n\r\n").await.status, 503, "a probe that asks so is told too");
    let refused = server.ask("GET", "/", &["Host: node0"]).await;
    assert!(refused.body.contains("http_names under [coordinator]"), "{}", refused.body);
}

#[tokio::test]
async fn pages_of_other_sites_get_health_alone() {
    let server = Server::start(serving()).await;
    for (path, lines, status) in [
        ("/api/v1/events", vec!["Sec-Fetch-Site: cross-site"], 403),
        ("/api/v1/events", vec!["Host: grok.localhost", "Origin: https://evil.example"], 403),
        ("/api/v1/cluster", vec!["Origin: https://evil.example"], 403),
        ("/", vec!["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"], 200),
        ("/api/v1/cluster", vec!["Sec-Fetch-Site: same-origin"], 200),
        ("/api/v1/cluster", vec!["Origin: http://head.example"], 200),
        ("/readyz", vec!["Sec-Fetch-Site: cross-site", "Origin: https://evil.example"], 200),
    ] {
        let answer = server.ask("GET", path, &lines).await;
        assert_eq!(answer.status, status, "{path} {lines:?}");
        assert!(status != 403 || answer.json()["error"]["code"] == "foreign_origin", "{path} {lines:?}");
    }
}

#[tokio::test]
async fn no_crowd_keeps_a_probe_out() {
    let limits = ConnectionLimits { total: 8, per_address: 8 };
    let server = Server::start_within(limits, serving()).await;
    // Silent ones make room for anything else.
    let mut crowd = Vec::new();
    for sent in ["", "GET / HT"].repeat(50) {
        crowd.push(server.send(sent).await);
    }
    assert_eq!(server.get("/readyz").await.status, 200, "among silent connections");
    assert_eq!(server.get("/").await.status, 200, "among silent connections");
    // Streams hold every ordinary place.
    let mut streams = Vec::new();
    for _ in 0..limits.total {
        let mut stream = server.events("").await;
        read_until(&mut stream, |text| text.contains("id: 1\n")).await;
        streams.push(stream);
    }
    for _ in 0..50 {
        crowd.push(server.send("").await);
    }
    for path in ["/health", "/livez", "/readyz"] {
        assert_eq!(server.get(path).await.status, 200, "{path} among streams and silent connections");
    }
    let refused = server.get("/api/v1/cluster").await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, "5"));
    assert_eq!(refused.json()["error"]["code"], "too_many_connections");
}
