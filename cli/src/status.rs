//! `grokpipe status`: the cluster's snapshot as a table, or as the JSON that `/api/v1/cluster` serves, and what the plan's predictions
//! came to.
//!
//! Exit code 0 while the cluster serves, 1 while it does not, 3 when it cannot be reached.

use std::fmt::Write as _;

use grokpipe_proto::{
    ids::LayerRange,
    snapshot::{ClusterSnapshot, Prediction, SnapshotNode},
};
use serde_json::{Value, json};

use crate::{
    client::{self, Client, ServerArgs},
    config::ByteSize,
    error::CliError,
    text::{Table, print},
};

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Print the snapshot as JSON
    #[arg(long)]
    json: bool,
}

/// Runs `status`; whether the cluster serves.
///
/// # Errors
/// [`CliError`] with the exit code of the failure.
pub(crate) fn run(args: &Args) -> Result<bool, CliError> {
    let server = args.server.address()?;
    let snapshot = client::block_on(async { Client::connect(&server).await?.status().await })?;
    let text = if args.json { format!("{:#}\n", to_json(&snapshot)?) } else { render(&snapshot) };
    // Whether it serves is answered also when `head` has read enough.
    print(&text).or_else(|error| if error.is_closed_output() { Ok(()) } else { Err(error) })?;
    Ok(snapshot.verdict().serving)
}

/// The snapshot as the page's route serves it, and by how much measured figures differ from predicted ones.
fn to_json(snapshot: &ClusterSnapshot) -> Result<Value, CliError> {
    let mut json = serde_json::to_value(snapshot)
        .map_err(|error| CliError::failed("the snapshot cannot be written as JSON").because(error))?;
    if let Some(plan) = &snapshot.plan {
        let percent = |prediction: Option<Prediction>| json!(prediction.and_then(Prediction::difference_percent));
        json["plan"]["difference_percent"] = percent(plan.prediction());
        json["plan"]["stream_difference_percent"] = percent(plan.stream_prediction());
    }
    Ok(json)
}

/// The snapshot for people.
fn render(snapshot: &ClusterSnapshot) -> String {
    let mut text = format!("{}\n", snapshot.verdict().text);
    let _ = writeln!(
        text,
        "cluster {}, model {}, {} layers",
        snapshot.cluster,
        snapshot.model().name,
        snapshot.model().layers
    );
    if let Some(plan) = &snapshot.plan {
        let _ = writeln!(text, "plan {}", plan.epoch);
        for (prediction, what) in
            [(plan.prediction(), "every stage busy"), (plan.stream_prediction(), "one stream alone")]
        {
            if let Some(prediction) = prediction {
                let _ = writeln!(text, "{what}: {prediction}");
            }
        }
    }
    let _ =
        writeln!(text, "requests: {} running, {} waiting\n", snapshot.requests().running, snapshot.requests().waiting);
    let mut table = Table::new(&[
        "node", "state", "layers", "loaded", "weights", "kv", "free", "tokens/s", "step", "heard", "up", "device",
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
    let stats = node.stats();
    let memory = stats.memory();
    let bytes = |value: Option<u64>| value.map_or_else(unknown, |bytes| ByteSize(bytes).to_string());
    vec![
        node.name.clone(),
        node.state().to_string(),
        node.layers().map_or_else(unknown, LayerRange::numbers),
        node.load().ratio().map_or_else(unknown, |ratio| format!("{:.0} %", ratio * 100.0)),
        bytes(memory.weights_bytes),
        bytes(memory.kv_bytes),
        bytes(memory.free_bytes),
        stats.tokens_per_second.map_or_else(unknown, |rate| format!("{rate:.1}")),
        stats.step_seconds_p50.map_or_else(unknown, |step| format!("{:.2} ms", step * 1e3)),
        node.heartbeat_age_seconds.map_or_else(unknown, |age| format!("{age:.1} s")),
        stats.uptime_seconds.map_or_else(unknown, |up| format!("{}:{:02}:{:02}", up / 3600, up / 60 % 60, up % 60)),
        node.device.clone().unwrap_or_else(unknown),
    ]
}

fn unknown() -> String {
    "-".to_owned()
}

#[cfg(test)]
mod tests {
    use grokpipe_proto::snapshot::{SnapshotModel, SnapshotPlan, SnapshotRequests, Verdict, VerdictPhase};

    use super::*;

    fn snapshot(measured: Option<f64>) -> ClusterSnapshot {
        let verdict = Verdict::new(VerdictPhase::Serving, "Serving".into(), None);
        let plan = SnapshotPlan {
            epoch: 3,
            predicted_tokens_per_second: Some(800.0),
            measured_tokens_per_second: measured,
            predicted_stream_tokens_per_second: Some(500.0),
            measured_stream_tokens_per_second: measured.map(|measured| measured / 2.0),
            stages: Vec::new(),
        };
        ClusterSnapshot {
            cluster: "demo".into(),
            verdict: Some(verdict),
            model: Some(SnapshotModel { name: "m".into(), layers: 64 }),
            plan: Some(plan),
            nodes: Vec::new(),
            requests: Some(SnapshotRequests::default()),
            events: Vec::new(),
        }
    }

    #[test]
    fn a_prediction_is_shown_with_what_it_came_to() {
        let text = render(&snapshot(Some(760.0)));
        for line in [
            "every stage busy: predicted 800.0 tokens/s, measured 760.0, −5 %\n",
            "one stream alone: predicted 500.0 tokens/s, measured 380.0, −24 %\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
        let plan = &to_json(&snapshot(Some(760.0))).unwrap()["plan"];
        assert!((plan["difference_percent"].as_f64().unwrap() + 5.0).abs() < 1e-9, "{plan}");
        assert_eq!(plan["measured_tokens_per_second"], 760.0);
    }

    #[test]
    fn nothing_is_said_of_what_was_not_measured() {
        let text = render(&snapshot(None));
        assert!(text.contains("every stage busy: predicted 800.0 tokens/s\n") && !text.contains("measured"), "{text}");
        assert_eq!(to_json(&snapshot(None)).unwrap()["plan"]["difference_percent"], Value::Null);
    }
}
