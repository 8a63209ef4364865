//! Foreign clients: Python's grpcio with stubs made from `proto/`, and buf with server reflection.

use std::process::{Command, Output};

use grokpipe_tests::{
    command,
    processes::{Cluster, ClusterOptions},
    root,
};

const PROMPT: &str = "The capital of France is";

fn output(mut command: Command) -> Output {
    command.current_dir(root()).output().expect("a command of this machine runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

#[test]
fn grpcio_streams_a_generation() {
    let Some(python) = command("python3") else { return };
    let mut has_grpc = Command::new(&python);
    has_grpc.args(["-c", "import grpc, grpc_tools"]);
    if !output(has_grpc).status.success() {
        return println!("skipped: no grpcio and grpcio-tools in {}", python.display());
    }
    let cluster = Cluster::start(ClusterOptions::demo());
    let mut client = Command::new(python);
    client.args(["examples/client.py", PROMPT, "--server", &cluster.grpc, "--max-tokens", "8"]);
    let found = output(client);
    assert!(found.status.success(), "{}", said(&found));
    assert!(String::from_utf8_lossy(&found.stdout).contains("Paris"), "{}", said(&found));
    let mut wrong = Command::new(command("python3").expect("it was there"));
    wrong.args(["examples/client.py", PROMPT, "--server", &cluster.grpc, "--temperature=-1"]);
    let found = output(wrong);
    assert!(!found.status.success() && said(&found).contains("INVALID_ARGUMENT"), "{}", said(&found));
}

fn buf_curl(cluster: &Cluster, method: &str, data: &str) -> Option<Output> {
    let mut buf = Command::new(command("buf")?);
    let url = format!("http://{}/{method}", cluster.grpc);
    buf.args(["curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", data, &url]);
    Some(output(buf))
}

#[test]
fn buf_curl_streams_a_generation_and_asks_for_health() {
    if command("buf").is_none() {
        return;
    }
    let mut cluster = Cluster::start(ClusterOptions::demo());
    let data = format!(r#"{{"text": "{PROMPT}", "maxTokens": 8}}"#);
    let found = buf_curl(&cluster, "grokpipe.v1.InferenceService/Generate", &data).expect("buf was there");
    assert!(found.status.success(), "{}", said(&found));
    let text = said(&found);
    assert!(text.contains("Paris") && text.contains("FINISH_REASON"), "{text}");
    assert!(text.matches("tokenId").count() > 1, "expected a message a token: {text}");

    let health = |cluster: &Cluster| {
        let asked = buf_curl(cluster, "grpc.health.v1.Health/Check", "{}").expect("buf was there");
        said(&asked)
    };
    assert!(health(&cluster).contains("\"SERVING\""), "{}", health(&cluster));
    cluster.kill_worker(2);
    cluster.wait_until("not serving", |snapshot| !snapshot.verdict().serving);
    assert!(health(&cluster).contains("NOT_SERVING"), "{}", health(&cluster));
}

#[test]
fn buf_finds_nothing_to_complain_of_in_the_protocol() {
    let Some(buf) = command("buf") else { return };
    let mut lint = Command::new(buf);
    lint.args(["lint", "proto"]);
    let found = output(lint);
    assert!(found.status.success(), "{}", said(&found));
}
