//! What `up` shows while it starts: a bar a node on a terminal, a line every ten seconds otherwise. All on standard error.

use std::{
    collections::HashMap,
    io::{self, IsTerminal},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use grokpipe_proto::snapshot::{ClusterSnapshot, SnapshotNode};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::picture::Canvas;
use crate::{config::ByteSize, stderr};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Shows progress and lines without mixing them up.
pub(crate) struct Screen {
    bars: Option<MultiProgress>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    by_node: HashMap<String, ProgressBar>,
    last_line: Option<Instant>,
}

impl Screen {
    /// Bars if standard error is a terminal.
    pub(crate) fn new() -> Self {
        let bars = || MultiProgress::with_draw_target(ProgressDrawTarget::term_like(Box::new(Canvas::new())));
        Self { bars: io::stderr().is_terminal().then(bars), state: Mutex::default() }
    }

    /// Whether people watch.
    pub(crate) fn is_terminal(&self) -> bool {
        self.bars.is_some()
    }

    /// Shows a line above the bars.
    pub(crate) fn say(&self, line: &str) {
        match &self.bars {
            Some(bars) => bars.suspend(|| stderr::line(line)),
            None => stderr::line(line),
        }
    }

    /// Shows how far loading is.
    pub(crate) fn progress(&self, snapshot: &ClusterSnapshot) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &self.bars {
            Some(bars) => {
                for node in &snapshot.nodes {
                    update(state.by_node.entry(node.name.clone()).or_insert_with(|| bars.add(bar(&node.name))), node);
                }
            }
            None => {
                if state.last_line.is_some_and(|last| last.elapsed() < LINE_INTERVAL) {
                    return;
                }
                // The first ten seconds need no line: most starts are over by then.
                let is_first = state.last_line.replace(Instant::now()).is_none();
                drop(state);
                if !is_first {
                    self.say(&line(snapshot));
                }
            }
        }
    }

    /// Takes the bars away.
    pub(crate) fn clear(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for (_name, bar) in state.by_node.drain() {
            bar.finish_and_clear();
        }
    }
}

/// How a node is shown before it says how much it has to read.
const WAITING: &str = "{prefix:<12} {msg}";
const READING: &str = "{prefix:<12} [{bar:24}] {bytes}/{total_bytes} {binary_bytes_per_sec} {msg}";

fn bar(name: &str) -> ProgressBar {
    style(ProgressBar::no_length().with_prefix(name.to_owned()), WAITING)
}

/// The templates are fixed, so that they cannot be wrong; the style as it is is good enough if one ever is.
fn style(bar: ProgressBar, template: &str) -> ProgressBar {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

fn update(bar: &ProgressBar, node: &SnapshotNode) {
    // An empty range has no progress to show, and indicatif would draw it as done.
    if let (Some(bytes), Some(total)) = (node.load().bytes, node.load().bytes_total.filter(|&total| total > 0)) {
        if bar.length() != Some(total) {
            style(bar.clone(), READING).set_length(total);
        }
        bar.set_position(bytes);
    }
    let layers = node.layers().map_or_else(String::new, |layers| format!(" {layers}"));
    bar.set_message(format!("{}{layers}", word(node)));
}

/// What a node does; one that never joined is not down, it is on its way.
fn word(node: &SnapshotNode) -> String {
    if node.joins == 0 { "starting".to_owned() } else { node.state().to_string() }
}

fn line(snapshot: &ClusterSnapshot) -> String {
    let node = |node: &SnapshotNode| {
        let loaded = match (node.load().bytes, node.load().bytes_total) {
            (Some(bytes), Some(total)) => format!(" {} of {}", ByteSize(bytes), ByteSize(total)),
            _ => String::new(),
        };
        format!("{} {}{loaded}", node.name, word(node))
    };
    let nodes: Vec<String> = snapshot.nodes.iter().map(node).collect();
    format!("{} [{}]", snapshot.verdict().text, nodes.join(", "))
}
