//! `grokpipe status`: the cluster's snapshot as a table, or as the JSON that `/api/v1/cluster` serves.
//!
//! Exit code 0 while the cluster serves, 1 while it does not, 3 when it cannot be reached.

use std::{
    fmt::Write as _,
    io::{self, Write},
};

use grokpipe_proto::snapshot::{ClusterSnapshot, SnapshotNode};

use crate::{
    client::{self, Client},
    config::ByteSize,
    error::{CliError, output},
    text::Table,
};

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// gRPC address of the cluster
    #[arg(long, value_name = "ADDR", default_value = client::DEFAULT_SERVER, env = "GROKPIPE_SERVER", value_parser = client::parse_server)]
    server: String,
    /// Print the snapshot as JSON
    #[arg(long)]
    json: bool,
}

/// Runs `status`; whether the cluster serves.
///
/// # Errors
/// [`CliError`] with the exit code of the failure.
pub(crate) fn run(args: &Args) -> Result<bool, CliError> {
    let snapshot = client::block_on(async { Client::connect(&args.server).await?.status().await })?;
    let text = if args.json {
        let json = serde_json::to_string_pretty(&snapshot)
            .map_err(|error| CliError::failed("the snapshot cannot be written as JSON").because(error))?;
        json + "\n"
    } else {
        render(&snapshot)
    };
    io::stdout().write_all(text.as_bytes()).map_err(|error| output(&error))?;
    Ok(snapshot.verdict.serving)
}

/// The snapshot for people.
fn render(snapshot: &ClusterSnapshot) -> String {
    let mut text = format!("{}\n", snapshot.verdict.text);
    let _ =
        writeln!(text, "cluster {}, model {}, {} layers", snapshot.cluster, snapshot.model.name, snapshot.model.layers);
    if let Some(plan) = &snapshot.plan {
        let predicted =
            plan.predicted_tokens_per_second.map_or_else(String::new, |t| format!(", predicted {t:.1} tokens/s"));
        let _ = writeln!(text, "plan {}{predicted}", plan.epoch);
    }
    let _ = writeln!(text, "requests: {} running, {} waiting\n", snapshot.requests.running, snapshot.requests.waiting);
    let mut table = Table::new(&[
        "node", "state", "layers", "loaded", "weights", "kv", "free", "tokens/s", "step", "heard", "device",
    ]);
    for node in &snapshot.nodes {
        table.row(row(node));
    }
    text.push_str(&table.to_string());
    for node in &snapshot.nodes {
        if let Some(error) = &node.last_error {
            let age = node.last_error_age_seconds.map_or_else(String::new, |age| format!(" {age:.0} s ago"));
            let _ = writeln!(text, "\n{}: last error{age}: {error}", node.name);
        }
    }
    text
}

fn row(node: &SnapshotNode) -> Vec<String> {
    let bytes = |value: Option<u64>| value.map_or_else(unknown, |bytes| ByteSize(bytes).to_string());
    vec![
        node.name.clone(),
        node.state.as_str().to_owned(),
        node.layers.map_or_else(unknown, |span| format!("{}..{}", span.start(), span.end())),
        node.load.ratio().map_or_else(unknown, |ratio| format!("{:.0} %", ratio * 100.0)),
        bytes(node.memory.weights_bytes),
        bytes(node.memory.kv_bytes),
        bytes(node.memory.free_bytes),
        node.tokens_per_second.map_or_else(unknown, |rate| format!("{rate:.1}")),
        node.step_seconds_p50.map_or_else(unknown, |step| format!("{:.2} ms", step * 1e3)),
        node.heartbeat_age_seconds.map_or_else(unknown, |age| format!("{age:.1} s")),
        node.device.clone().unwrap_or_else(unknown),
    ]
}

fn unknown() -> String {
    "-".to_owned()
}
