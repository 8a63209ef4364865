//! What a check found, and the report that all of them make, for people and for programs.

use std::fmt::Write as _;

use grokpipe_proto::v1::DiagnosedLink;
use serde_json::{Value, json};

use super::verdicts;
use crate::text::Table;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// As it should be.
    Ok,
    /// Not looked at, for the reason found.
    Skipped,
    /// It works, but somebody should know.
    Warn,
    /// It does not work, or will not.
    Fail,
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Skipped => "-",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Check {
    pub(super) status: Status,
    pub(super) what: String,
    pub(super) found: String,
    pub(super) advice: Option<String>,
}

impl Check {
    pub(super) fn new(status: Status, what: impl Into<String>, found: impl Into<String>) -> Self {
        Self { status, what: what.into(), found: found.into(), advice: None }
    }

    pub(super) fn ok(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Status::Ok, what, found)
    }

    pub(super) fn skipped(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Status::Skipped, what, found)
    }

    pub(super) fn warn(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Status::Warn, what, found)
    }

    pub(super) fn fail(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Status::Fail, what, found)
    }

    pub(super) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

/// Everything that was looked at.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) checks: Vec<Check>,
    pub(super) links: Vec<DiagnosedLink>,
}

impl Report {
    pub(super) fn push(&mut self, check: Check) {
        self.checks.push(check);
    }

    /// Whether nothing failed.
    pub(super) fn is_sound(&self) -> bool {
        self.count(Status::Fail) == 0
    }

    fn count(&self, status: Status) -> usize {
        self.checks.iter().filter(|check| check.status == status).count()
    }

    pub(super) fn render(&self) -> String {
        let mut text = String::new();
        let width = self.checks.iter().map(|check| check.what.chars().count()).max().unwrap_or(0);
        for check in &self.checks {
            let _ = writeln!(text, "{:<5} {:<width$}  {}", check.status.word(), check.what, check.found);
            if let Some(advice) = &check.advice {
                let _ = writeln!(text, "{:<5} {:<width$}  do: {advice}", "", "");
            }
        }
        if !self.links.is_empty() {
            let mut table = Table::new(&["from", "to", "round trip", "bandwidth"]);
            for link in &self.links {
                table.row(verdicts::link_row(link));
            }
            let _ = write!(text, "\n{table}");
        }
        let _ = writeln!(
            text,
            "\n{} ok, {} warnings, {} failed",
            self.count(Status::Ok),
            self.count(Status::Warn),
            self.count(Status::Fail)
        );
        text
    }

    pub(super) fn to_json(&self) -> Value {
        let check = |check: &Check| {
            json!({
                "status": check.status.word().to_lowercase().replace('-', "skipped"),
                "check": check.what,
                "found": check.found,
                "do": check.advice,
            })
        };
        let link = |link: &DiagnosedLink| {
            let report = link.report.clone().unwrap_or_default();
            json!({
                "from": verdicts::name(&link.from),
                "to": verdicts::name(&link.to),
                "address": report.address,
                "error": Some(report.error).filter(|error| !error.is_empty()),
                "round_trip_seconds": report.round_trip_seconds,
                "bytes_per_second": report.bytes_per_second,
                "bandwidth_left_out": Some(&link.left_out).filter(|why| !why.is_empty()),
            })
        };
        json!({
            "ok": self.is_sound(),
            "checks": self.checks.iter().map(check).collect::<Vec<_>>(),
            "links": self.links.iter().map(link).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_a_line_a_check_and_fails_with_one_of_them() {
        let mut report = Report::default();
        report.push(Check::ok("model", "here"));
        report.push(Check::warn("clock of w1", "3 s ahead").advise("set it"));
        assert!(report.is_sound());
        report.push(Check::fail("w1 -> w2", "refused"));
        assert!(!report.is_sound());
        let text = report.render();
        for line in ["ok    model        here\n", "warn  clock of w1  3 s ahead\n", "do: set it\n", "FAIL  w1 -> w2"] {
            assert!(text.contains(line), "{text}");
        }
        assert!(text.ends_with("1 ok, 1 warnings, 1 failed\n"), "{text}");
        assert_eq!(report.to_json()["checks"][2]["status"], "fail");
    }
}
