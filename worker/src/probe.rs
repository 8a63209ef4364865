//! What the coordinator wants to know of this worker's machine and of its way to others, for a diagnosis of the cluster.
//!
//! Does one thing after the other, beside the stage and without its knowledge: whether that may disturb anybody is the coordinator's
//! decision. How much a probe may take is decided in [`grokpipe_proto::probe`].

use std::sync::Arc;

use grokpipe_proto::{
    probe::{DescribeMachine, clock_us, measure},
    secret::Secret,
    transport::Net,
    v1::{
        LinkReport, MachineReport, ProbeLink, ProbeOrder, ProbeReport, join_request::Message, probe_order::Task,
        probe_report::Finding,
    },
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Orders that may wait.
pub const MOST_WAITING: usize = 4;

/// Finds out what it is told to.
pub struct Prober {
    /// Where this worker joins the coordinator.
    pub coordinator: String,
    /// The cluster's secret.
    pub secret: Secret,
    /// How connections are made.
    pub net: Arc<dyn Net>,
    /// How to describe this machine.
    pub machine: Option<DescribeMachine>,
    /// What the coordinator is to be told.
    pub reports: mpsc::Sender<Message>,
}

impl Prober {
    /// Obeys `orders` until `shutdown`.
    pub async fn run(self, mut orders: mpsc::Receiver<ProbeOrder>, shutdown: CancellationToken) {
        let obey = async {
            while let Some(order) = orders.recv().await {
                let finding = match order.task {
                    Some(Task::Link(link)) => Finding::Link(self.link(link).await),
                    Some(Task::Machine(wanted)) => Finding::Machine(self.machine(wanted.disk_speed).await),
                    // An order of a newer coordinator.
                    None => continue,
                };
                let report = ProbeReport { id: order.id, finding: Some(finding) };
                if self.reports.send(Message::ProbeReport(report)).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = obey => {}
        }
    }

    async fn link(&self, link: ProbeLink) -> LinkReport {
        let address = if link.address.is_empty() { &self.coordinator } else { &link.address };
        measure(&self.net, address, &self.secret, link.most_bytes).await
    }

    async fn machine(&self, disk_speed: bool) -> MachineReport {
        let asked_clock_us = clock_us();
        let described = match self.machine.clone() {
            // Files are read: not on the thread that carries frames.
            Some(describe) => tokio::task::spawn_blocking(move || describe(disk_speed)).await.unwrap_or_default(),
            None => MachineReport::default(),
        };
        MachineReport { asked_clock_us, clock_us: clock_us(), build: env!("CARGO_PKG_VERSION").into(), ..described }
    }
}
