//! A diagnosis of the cluster: every machine described, every link between two of them measured, one thing after the other.
//!
//! Decides the order and what is left out for the sake of running requests. Workers measure, `desk` asks them, and what the figures
//! mean is for those who asked. Nothing here changes the cluster: the engine does not know of it.

mod clocks;
mod desk;
mod links;

use std::{sync::Arc, time::Duration};

use grokpipe_proto::{
    PROTOCOL_VERSIONS,
    probe::{CALL_BYTES_MAX, DescribeMachine, MEASURE_TIMEOUT, clock_us, measure},
    secret::Secret,
    snapshot::ClusterSnapshot,
    transport::Net,
    v1::{
        DescribeMachine as Describe, DiagnoseResponse, DiagnosedLink, DiagnosedNode, DiagnosisDone, DiagnosisStarted,
        LinkReport, MachineReport, ProbeLink, diagnose_response::Finding, probe_order::Task,
        probe_report::Finding as Reported,
    },
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

pub use desk::{Desk, Member};
use links::{LinkEnd, links};

/// Longest that a whole diagnosis takes; what is not measured by then is said to be so.
const DIAGNOSIS_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest that a worker may take to describe its machine: a second of reading, and the way.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(5);
/// What a worker may take beyond its own deadline for a link.
const ANSWER_SLACK: Duration = Duration::from_secs(2);
/// Shortest pause after a diagnosis, so that nobody who asks again and again occupies the links.
const PAUSE: Duration = Duration::from_secs(1);
/// Findings that may wait for whoever asked.
const FINDINGS: usize = 64;

/// Findings on their way to whoever asked.
type Findings = mpsc::Sender<Result<DiagnoseResponse, Status>>;

/// Examines a cluster when asked.
#[derive(Clone)]
pub struct Diagnosis {
    /// The workers that are connected.
    pub desk: Desk,
    /// How connections are made.
    pub net: Arc<dyn Net>,
    /// The cluster's secret.
    pub secret: Secret,
    /// Whether requests run.
    pub snapshot: watch::Receiver<Arc<ClusterSnapshot>>,
    /// How to describe the coordinator's machine.
    pub machine: Option<DescribeMachine>,
    /// The coordinator ends.
    pub shutdown: CancellationToken,
    /// One at a time.
    pub one: Arc<Semaphore>,
}

impl Diagnosis {
    /// Starts one; what comes are its findings.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED while another one runs or has just ended.
    pub fn start(&self, gentle: bool) -> Result<mpsc::Receiver<Result<DiagnoseResponse, Status>>, Status> {
        let permit = Arc::clone(&self.one)
            .try_acquire_owned()
            .map_err(|_busy| Status::resource_exhausted("another diagnosis runs or has just ended"))?;
        let (findings, stream) = mpsc::channel(FINDINGS);
        // Ends with the last finding, with whoever asked, or with the coordinator.
        tokio::spawn(self.clone().run(gentle, findings, permit));
        Ok(stream)
    }

    async fn run(self, gentle: bool, findings: Findings, permit: OwnedSemaphorePermit) {
        let started = Instant::now();
        tokio::select! {
            () = self.shutdown.cancelled() => return,
            () = findings.closed() => {}
            _unread = self.examine(gentle, started + DIAGNOSIS_TIMEOUT, &findings) => {}
        }
        drop(findings);
        tokio::select! {
            () = self.shutdown.cancelled() => {}
            // As long as the work took: half of the time is the cluster's own.
            () = sleep(started.elapsed().max(PAUSE)) => {}
        }
        drop(permit);
    }

    async fn examine(&self, gentle: bool, deadline: Instant, findings: &Findings) -> Option<()> {
        let members = self.desk.members();
        let links = links(members.len());
        let started = DiagnosisStarted { clock_us: clock_us(), links: u32::try_from(links.len()).unwrap_or(u32::MAX) };
        tell(findings, Finding::Started(started)).await?;
        tell(findings, Finding::Node(self.coordinator(gentle || self.why_gentle().is_some()).await)).await?;
        for member in &members {
            tell(findings, Finding::Node(self.worker(member, gentle || self.why_gentle().is_some()).await)).await?;
        }
        for (from, to) in links {
            let (from, to) = (from.of(&members), to.of(&members));
            let left_out = if gentle { Some("not asked for".to_owned()) } else { self.why_gentle() };
            let most_bytes = if left_out.is_none() { CALL_BYTES_MAX } else { 0 };
            let report = timeout_at(deadline, self.link(from, to, most_bytes)).await.unwrap_or_else(|_late| {
                let error = format!("not measured: the whole diagnosis has taken {} s", DIAGNOSIS_TIMEOUT.as_secs());
                LinkReport { address: address(to), error, ..LinkReport::default() }
            });
            let link = DiagnosedLink {
                from: name(from),
                to: name(to),
                report: Some(report),
                left_out: left_out.unwrap_or_default(),
            };
            tell(findings, Finding::Link(link)).await?;
        }
        tell(findings, Finding::Done(DiagnosisDone {})).await
    }

    /// Why nothing may be done that takes the links or disks for itself now.
    fn why_gentle(&self) -> Option<String> {
        let requests = self.snapshot.borrow().requests();
        match requests.running + requests.waiting {
            0 => None,
            1 => Some("a request runs".to_owned()),
            count => Some(format!("{count} requests run")),
        }
    }

    async fn coordinator(&self, gentle: bool) -> DiagnosedNode {
        let described = match self.machine.clone() {
            Some(describe) => tokio::task::spawn_blocking(move || describe(!gentle)).await.unwrap_or_default(),
            None => MachineReport::default(),
        };
        let machine = MachineReport { clock_us: clock_us(), build: env!("CARGO_PKG_VERSION").into(), ..described };
        DiagnosedNode {
            machine: Some(machine),
            version_min: *PROTOCOL_VERSIONS.start(),
            version_max: *PROTOCOL_VERSIONS.end(),
            clock_ahead_seconds: Some(0.0),
            clock_uncertainty_seconds: Some(0.0),
            ..DiagnosedNode::default()
        }
    }

    async fn worker(&self, member: &Member, gentle: bool) -> DiagnosedNode {
        let mut node = DiagnosedNode {
            name: member.name.clone(),
            version_min: member.versions.0,
            version_max: member.versions.1,
            ..DiagnosedNode::default()
        };
        let sent_us = clock_us();
        let task = Task::Machine(Describe { disk_speed: !gentle });
        match self.desk.ask(&member.name, task, DESCRIBE_TIMEOUT).await {
            Ok(Reported::Machine(machine)) => {
                let clock = clocks::offset(sent_us, machine.asked_clock_us, machine.clock_us, clock_us());
                node.clock_ahead_seconds = clock.map(|clock| clock.ahead_seconds);
                node.clock_uncertainty_seconds = clock.map(|clock| clock.uncertainty_seconds);
                node.machine = Some(machine);
            }
            Ok(Reported::Link(_)) => node.error = "it answered something else".to_owned(),
            // What it said of itself when it joined is known all the same.
            Err(error) => {
                node.error = error;
                node.machine = Some(MachineReport { build: member.build.clone(), ..MachineReport::default() });
            }
        }
        node
    }

    async fn link(&self, from: Option<&Member>, to: Option<&Member>, most_bytes: u64) -> LinkReport {
        let address = address(to);
        let Some(from) = from else { return measure(&self.net, &address, &self.secret, most_bytes).await };
        let task = Task::Link(ProbeLink { address: address.clone(), most_bytes });
        let error = match self.desk.ask(&from.name, task, MEASURE_TIMEOUT + ANSWER_SLACK).await {
            Ok(Reported::Link(report)) => return report,
            Ok(Reported::Machine(_)) => "it answered something else".to_owned(),
            Err(error) => format!("not measured: {} {error}", from.name),
        };
        LinkReport { address, error, ..LinkReport::default() }
    }
}

/// `None` when nobody listens any more.
async fn tell(findings: &Findings, finding: Finding) -> Option<()> {
    findings.send(Ok(DiagnoseResponse { finding: Some(finding) })).await.ok()
}

impl LinkEnd {
    fn of(self, members: &[Member]) -> Option<&Member> {
        match self {
            Self::Coordinator => None,
            Self::Worker(index) => members.get(index),
        }
    }
}

fn name(end: Option<&Member>) -> String {
    end.map_or_else(String::new, |member| member.name.clone())
}

/// Where an end is dialled; the coordinator by each worker at an address of its own.
fn address(end: Option<&Member>) -> String {
    end.map_or_else(String::new, |member| member.address.clone())
}
