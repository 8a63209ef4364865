//! What happened last, for people: the events of the snapshot.

use std::time::Duration;

use grokpipe_proto::snapshot::EVENTS_MAX;

use super::Cluster;

#[derive(Clone, Debug)]
pub(super) struct LogEntry {
    pub(super) id: u64,
    pub(super) at: Duration,
    pub(super) code: &'static str,
    pub(super) node: Option<String>,
    pub(super) text: String,
}

impl Cluster {
    /// As `record`, but for what is remembered already: refused workers ask again and again.
    pub(super) fn record_once(&mut self, at: Duration, code: &'static str, text: String) {
        if self.events.iter().all(|event| event.text != text) {
            self.record(at, code, None, text);
        }
    }

    pub(super) fn record(&mut self, at: Duration, code: &'static str, node: Option<&str>, text: String) {
        tracing::info!(code, node, "{text}");
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(LogEntry { id: self.next_event, at, code, node: node.map(str::to_owned), text });
        self.next_event += 1;
    }
}
