//! Crowds of connections that say nothing, before real processes with the 1,024 descriptors that most systems give them.

use std::{
    collections::VecDeque,
    fs,
    io::{Read, Write},
    time::{Duration, Instant},
};

use grokpipe_tests::processes::{Cluster, ClusterOptions, PATIENCE, runtime, token_ids, wait};
use tokio::{io::AsyncReadExt, net::TcpStream, sync::watch, task::JoinHandle};

/// Silent connections at the gRPC port.
const CROWD: usize = 5000;
/// At the other ports.
const SMALLER_CROWD: usize = 1000;

/// Holds `count` silent connections to a port, and dials new ones for as long as it stands, so that it stays full whatever is closed.
struct Crowd {
    stop: watch::Sender<bool>,
    standing: JoinHandle<()>,
}

impl Crowd {
    fn gather(address: &str, count: usize) -> Self {
        let (stop, mut stopped) = watch::channel(false);
        let (full, mut is_full) = watch::channel(0);
        let address = address.to_owned();
        let standing = runtime().spawn(async move {
            let mut held = VecDeque::new();
            while !*stopped.borrow_and_update() {
                held.push_back(TcpStream::connect(&address).await);
                full.send_replace(held.len());
                if held.len() > count {
                    held.pop_front();
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        });
        let gathered = async { tokio::time::timeout(PATIENCE, is_full.wait_for(|held| *held >= count)).await };
        runtime().block_on(gathered).expect("in time").expect("a crowd");
        Self { stop, standing }
    }

    fn disperse(self) {
        self.stop.send_replace(true);
        runtime().block_on(self.standing).expect("no panic");
    }
}

fn descriptors_of(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("Linux, and a process of ours").count()
}

/// What a probe on a connection of its own is told.
fn probe(http: &str, path: &str) -> String {
    let mut socket = std::net::TcpStream::connect(http).expect("the port takes connections");
    socket.set_read_timeout(Some(PATIENCE)).expect("a time");
    socket.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).expect("sent");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("an answer");
    answer.lines().next().unwrap_or_default().to_owned()
}

#[test]
fn five_thousand_silent_connections_harm_neither_clients_nor_probes_nor_a_rejoining_worker() {
    let wanted = (CROWD + 2 * SMALLER_CROWD + 256) as u64;
    let own = rlimit::increase_nofile_limit(u64::MAX).expect("a limit");
    if own < wanted {
        return println!("skipped: this process may have {own} descriptors, the crowds take {wanted}");
    }
    let mut cluster = Cluster::start(ClusterOptions { descriptors: Some(1024), ..ClusterOptions::demo() });
    let ask = ["The capital of France is", "--max-tokens", "8"];
    let alone = token_ids(&cluster.generated(ask), "output_token_ids");
    let before = descriptors_of(cluster.coordinator_pid());
    let snapshot = cluster.snapshot();
    let worker = snapshot.nodes.iter().find(|node| node.name == "w3").and_then(|node| node.address.clone());
    let crowds = [
        Crowd::gather(&cluster.grpc, CROWD),
        Crowd::gather(&cluster.http, SMALLER_CROWD),
        Crowd::gather(&worker.expect("an address"), SMALLER_CROWD),
    ];

    assert_eq!(token_ids(&cluster.generated(ask), "output_token_ids"), alone, "a new client among them");
    for path in ["/health", "/livez", "/readyz"] {
        let answer = probe(&cluster.http, path);
        assert!(answer.ends_with("200 OK"), "{path} among them: {answer}");
    }
    let epoch = snapshot.plan.expect("a plan").epoch;
    cluster.kill_worker(1);
    cluster.start_worker(1);
    let returned = cluster.wait_until("serving with the worker that came back", |snapshot| {
        snapshot.verdict().serving && snapshot.plan.as_ref().is_some_and(|plan| plan.epoch > epoch)
    });
    assert_eq!(token_ids(&cluster.generated(ask), "output_token_ids"), alone, "after the return");
    println!("serving again {:.1} s after w2 was killed and started among the crowds", returned.as_secs_f64());

    crowds.into_iter().for_each(Crowd::disperse);
    let started = Instant::now();
    while descriptors_of(cluster.coordinator_pid()) > before + 16 {
        assert!(started.elapsed() < PATIENCE, "the coordinator keeps descriptors of connections that are gone");
        wait(Duration::from_millis(50));
    }
}

#[test]
fn a_silent_connection_is_closed_at_every_port() {
    let cluster = Cluster::start(ClusterOptions::demo());
    let snapshot = cluster.snapshot();
    let worker = snapshot.nodes.iter().find_map(|node| node.address.clone()).expect("an address");
    for address in [&cluster.grpc, &cluster.http, &worker] {
        let began = Instant::now();
        let closed = runtime().block_on(async {
            let mut silent = TcpStream::connect(address).await.expect("the port takes connections");
            tokio::time::timeout(PATIENCE, silent.read_to_end(&mut Vec::new())).await
        });
        assert!(closed.is_ok(), "{address} keeps a silent connection");
        println!("{address} closed it after {:.1} s", began.elapsed().as_secs_f64());
    }
}

/// HTTP/2 frames of a type, with these flags, on a stream.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

#[test]
fn a_client_that_only_has_its_streams_reset_is_let_go() {
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const SETTINGS: u8 = 4;
    const WINDOW_UPDATE: u8 = 8;
    /// POST, http, "/", without an authority: all of them from HPACK's static table.
    const REQUEST: [u8; 3] = [0x83, 0x86, 0x84];
    let cluster = Cluster::start_coordinator(ClusterOptions { workers: 0, ..ClusterOptions::demo() });
    // By itself, and by an increment of nothing, for which the server resets.
    for (what, resets) in [
        ("rapid reset", frame(RST_STREAM, 0, 0, &8_u32.to_be_bytes())),
        ("made you reset", frame(WINDOW_UPDATE, 0, 0, &[0; 4])),
    ] {
        let mut socket = std::net::TcpStream::connect(&cluster.grpc).expect("the port takes connections");
        socket.set_read_timeout(Some(PATIENCE)).expect("a time");
        let mut reader = socket.try_clone().expect("a descriptor");
        let reading = std::thread::spawn(move || reader.read_to_end(&mut Vec::new()).is_ok());
        socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").expect("sent");
        socket.write_all(&frame(SETTINGS, 0, 0, &[])).expect("sent");
        let mut sent = 0;
        let let_go = (0..100_000_u32).any(|index| {
            let stream = (2 * index + 1).to_be_bytes();
            let mut reset = resets.clone();
            reset[5..9].copy_from_slice(&stream);
            let request = frame(HEADERS, 4, 2 * index + 1, &REQUEST);
            sent = index;
            socket.write_all(&[request, reset].concat()).is_err()
        });
        assert!(let_go, "{what}: {sent} streams were reset, and the connection stands");
        println!("{what}: let go after at most {sent} streams");
        reading.join().expect("no panic");
    }
}
