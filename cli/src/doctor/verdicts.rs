//! What the figures of a diagnosis mean. Pure.

use grokpipe_proto::v1::{DiagnosedLink, DiagnosedNode, MachineReport};

use super::check::Check;
use crate::config::ByteSize;

/// Each token waits for every link once, so that longer round trips are felt.
const LONG_ROUND_TRIP_SECONDS: f64 = 0.02;
/// A chunk of 64 prompt tokens of Grok-1 has 1.5 MB.
const NARROW_BYTES_PER_SECOND: f64 = 10e6;
/// Nothing in the protocol needs equal clocks; logs beside each other do.
const CLOCK_SECONDS: f64 = 1.0;
/// A worker has few connections, a coordinator one for each client.
const FEW_DESCRIPTORS: u64 = 1024;
/// Logs need some room.
const LITTLE_DISK: u64 = 1 << 30;
/// Share of the memory below which the system begins to swap or to end programs.
const LITTLE_MEMORY: f64 = 0.03;

/// How an end of a link is called.
pub(super) fn name(end: &str) -> &str {
    if end.is_empty() { "coordinator" } else { end }
}

/// What is wrong with a link; `None` for one that is as it should be.
pub(super) fn link(link: &DiagnosedLink) -> Option<Check> {
    let report = link.report.clone().unwrap_or_default();
    let (from, to) = (name(&link.from), name(&link.to));
    let what = format!("{from} to {to}");
    if report.round_trip_seconds.is_none() {
        let place = if report.address.is_empty() { String::new() } else { format!(" at {}", report.address) };
        let advice =
            format!("see that a firewall lets {from} through to that port, and that the address is {to}'s own");
        return Some(Check::fail(what, format!("{from} cannot reach {to}{place}: {}", report.error)).advise(advice));
    }
    if report.answered_by != link.to {
        let found = format!("{from} finds {} at {}, where {to} should be", name(&report.answered_by), report.address);
        let advice = format!("give {to} an address of its own with [[worker]] advertise");
        return Some(Check::fail(what, found).advise(advice));
    }
    if !report.error.is_empty() {
        return Some(Check::warn(what, format!("its bandwidth was not measured: {}", report.error)));
    }
    let seconds = report.round_trip_seconds.unwrap_or_default();
    if seconds > LONG_ROUND_TRIP_SECONDS {
        let found = format!("the round trip takes {:.1} ms, and every token waits for it", seconds * 1e3);
        return Some(
            Check::warn(what, found).advise("use wires instead of wireless, or machines nearer to each other"),
        );
    }
    let rate = report.bytes_per_second.filter(|&rate| rate < NARROW_BYTES_PER_SECOND)?;
    let found = format!("carries {:.1} MB/s only; long prompts will be slow", rate / 1e6);
    Some(Check::warn(what, found).advise("look for a slow switch, cable or wireless link on the way"))
}

/// A link as a row of the table.
pub(super) fn link_row(link: &DiagnosedLink) -> Vec<String> {
    let report = link.report.clone().unwrap_or_default();
    let bandwidth = match report.bytes_per_second {
        Some(rate) => format!("{:.0} MB/s", rate / 1e6),
        None if !link.left_out.is_empty() => format!("- ({})", link.left_out),
        None => "-".to_owned(),
    };
    let round_trip = report.round_trip_seconds.map_or_else(|| "FAIL".to_owned(), |s| format!("{:.2} ms", s * 1e3));
    vec![name(&link.from).to_owned(), name(&link.to).to_owned(), round_trip, bandwidth]
}

/// The machine of the coordinator or of a worker.
pub(super) fn node(node: &DiagnosedNode) -> Vec<Check> {
    let (name, machine) = (name(&node.name), node.machine.clone().unwrap_or_default());
    let mut checks = Vec::new();
    if node.error.is_empty() {
        checks.push(Check::ok(name, described(&machine)));
        checks.extend(self::machine(name, &machine));
    } else {
        checks.push(Check::warn(name, format!("{name} {}", node.error)));
    }
    checks.extend(clock(name, node.clock_ahead_seconds, node.clock_uncertainty_seconds));
    checks
}

fn described(machine: &MachineReport) -> String {
    let mut parts = vec![format!("grokpipe {}", machine.build)];
    parts.extend(Some(machine.system.clone()).filter(|system| !system.is_empty()));
    parts.extend(machine.memory_available_bytes.map(|bytes| format!("{} memory available", ByteSize(bytes))));
    parts.extend(machine.disk_free_bytes.map(|bytes| format!("{} disk free", ByteSize(bytes))));
    parts.extend(machine.disk_bytes_per_second.map(|rate| format!("reads the model at {:.0} MB/s", rate / 1e6)));
    parts.join(", ")
}

/// What is wrong with a machine's memory, disk and limits.
pub(super) fn machine(name: &str, machine: &MachineReport) -> Vec<Check> {
    let mut checks = Vec::new();
    if let Some(limit) = machine.open_files_limit.filter(|&limit| limit < FEW_DESCRIPTORS) {
        let found = format!("a process may have {limit} files and connections only");
        checks.push(Check::warn(format!("files of {name}"), found).advise("raise it: ulimit -n 65536"));
    }
    if let Some(free) = machine.disk_free_bytes.filter(|&free| free < LITTLE_DISK) {
        let found = format!("{} are left where the model lies", ByteSize(free));
        checks.push(Check::warn(format!("disk of {name}"), found).advise("make room"));
    }
    if let (Some(free), Some(all)) = (machine.memory_available_bytes, machine.memory_bytes)
        && (free as f64) < all as f64 * LITTLE_MEMORY
    {
        let found = format!("{} of {} are left", ByteSize(free), ByteSize(all));
        checks.push(Check::warn(format!("memory of {name}"), found).advise("end other programs, or lower its memory"));
    }
    checks
}

/// A clock that is surely wrong by more than a second.
pub(super) fn clock(name: &str, ahead: Option<f64>, uncertainty: Option<f64>) -> Option<Check> {
    let (ahead, uncertainty) = (ahead?, uncertainty?);
    (ahead.abs() - uncertainty > CLOCK_SECONDS).then(|| {
        let word = if ahead > 0.0 { "ahead of" } else { "behind" };
        let found = format!("{:.1} s {word} the coordinator's, ± {uncertainty:.3} s", ahead.abs());
        Check::warn(format!("clock of {name}"), found)
            .advise("let both follow a time server, or their logs do not match")
    })
}

/// Whether all run the same program.
pub(super) fn builds(nodes: &[DiagnosedNode]) -> Check {
    let build = |node: &DiagnosedNode| node.machine.as_ref().map(|machine| machine.build.clone()).unwrap_or_default();
    let ours = env!("CARGO_PKG_VERSION");
    let others: Vec<String> = nodes
        .iter()
        .filter(|node| build(node) != ours)
        .map(|node| format!("{} has {:?}", name(&node.name), build(node)))
        .collect();
    if others.is_empty() {
        return Check::ok("versions", format!("{ours} everywhere"));
    }
    let advice = "install the same version everywhere";
    Check::warn("versions", format!("this is {ours}, but {}", others.join(", "))).advise(advice)
}

#[cfg(test)]
mod tests {
    use grokpipe_proto::v1::LinkReport;

    use super::*;
    use crate::doctor::check::Status;

    fn measured(seconds: f64, rate: f64) -> LinkReport {
        LinkReport {
            address: "10.0.0.2:43197".into(),
            answered_by: "w2".into(),
            round_trip_seconds: Some(seconds),
            bytes_per_second: Some(rate),
            ..LinkReport::default()
        }
    }

    #[test]
    fn links_are_judged_by_what_they_do_to_tokens() {
        let cut = LinkReport {
            address: "10.0.0.2:43197".into(),
            error: "connection timed out".into(),
            ..LinkReport::default()
        };
        let cases = [
            (measured(1e-4, 1e9), None),
            (LinkReport { bytes_per_second: None, ..measured(1e-4, 1e9) }, None),
            (measured(0.08, 1e9), Some((Status::Warn, "80.0 ms"))),
            (measured(1e-4, 2e6), Some((Status::Warn, "2.0 MB/s"))),
            (LinkReport { answered_by: "w3".into(), ..measured(1e-4, 1e9) }, Some((Status::Fail, "finds w3"))),
            (cut, Some((Status::Fail, "w1 cannot reach w2 at 10.0.0.2:43197: connection timed out"))),
        ];
        for (report, expected) in cases {
            let found = link(&DiagnosedLink {
                from: "w1".into(),
                to: "w2".into(),
                report: Some(report.clone()),
                left_out: String::new(),
            });
            assert_eq!(found.as_ref().map(|check| check.status), expected.map(|(status, _)| status), "{report:?}");
            if let (Some(found), Some((_, words))) = (found, expected) {
                assert!(found.found.contains(words), "{found:?}");
            }
        }
    }

    #[test]
    fn a_clock_is_wrong_only_beyond_doubt() {
        for (ahead, doubt, is_wrong) in [(0.5, 0.0, false), (3.0, 0.01, true), (-90.0, 0.1, true), (3.0, 2.5, false)] {
            assert_eq!(clock("w1", Some(ahead), Some(doubt)).is_some(), is_wrong, "{ahead} ± {doubt}");
        }
        assert_eq!(clock("w1", None, None), None);
    }

    #[test]
    fn machines_that_are_short_of_something_are_named() {
        let good = MachineReport {
            memory_bytes: Some(64 << 30),
            memory_available_bytes: Some(32 << 30),
            disk_free_bytes: Some(9 << 30),
            open_files_limit: Some(65_536),
            ..MachineReport::default()
        };
        assert_eq!(machine("w1", &good), []);
        assert_eq!(machine("w1", &MachineReport::default()), []);
        let bad = MachineReport {
            memory_available_bytes: Some(1 << 20),
            disk_free_bytes: Some(0),
            open_files_limit: Some(256),
            ..good
        };
        assert_eq!(machine("w1", &bad).len(), 3);
    }
}
