//! The worker's side of membership: says hello, sends heartbeats and reports, passes orders on, and dials again when the
//! coordinator is gone. Layers stay loaded meanwhile.

use std::{ops::Range, sync::Arc, time::Duration};

use grokpipe_proto::{
    LOST_AFTER, PROTOCOL_VERSIONS, bounds,
    transport::{self, Keepalive, Net},
    v1::{
        FormatRate, Hello, JoinRequest, JoinResponse, ProbeOrder, StepOverhead, Welcome, join_request::Message,
        join_response, membership_service_client::MembershipServiceClient,
    },
};
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};
use tracing::{info, warn};

use crate::{Settings, WorkerError, address::OwnAddress, controller::Order, loader::DeviceFacts, stats::Stats};

const WELCOME_WITHIN: Duration = Duration::from_secs(5);
const REDIAL_FIRST: Duration = Duration::from_millis(100);
const REDIAL_LONGEST: Duration = Duration::from_secs(2);

/// What [`Membership`] works with.
pub struct Membership {
    /// What the worker was started with.
    pub settings: Settings,
    /// How connections are made.
    pub net: Arc<dyn Net>,
    /// The device.
    pub device: DeviceFacts,
    /// The model's digest.
    pub model_digest: String,
    /// Where other stages find this worker.
    pub own: OwnAddress,
    /// Counters.
    pub stats: Arc<Stats>,
    /// Layers on the device.
    pub held_layers: watch::Receiver<Option<Range<u32>>>,
    /// Where orders go.
    pub orders: watch::Sender<Order>,
    /// Where orders to measure something go.
    pub probes: mpsc::Sender<ProbeOrder>,
    /// What the coordinator is to be told.
    pub reports: mpsc::Receiver<Message>,
}

enum Ended {
    Shutdown,
    Lost(String),
    NameTaken,
    Fatal(WorkerError),
}

impl Membership {
    /// Belongs to the cluster until `shutdown`.
    ///
    /// # Errors
    /// [`WorkerError`] when the coordinator refuses this worker for good.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), WorkerError> {
        let mut wait = REDIAL_FIRST;
        let mut told = false;
        loop {
            let ended = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                ended = self.belong(&shutdown, &mut wait, &mut told) => ended,
            };
            // Without a coordinator no frame makes sense; the layers are kept.
            self.orders.send_replace(Order::Idle);
            match ended {
                Ended::Shutdown => return Ok(()),
                // It may be a process of ours that died a moment ago, or a stranger that will leave: this one tries on.
                Ended::NameTaken => {
                    if !told {
                        let name = &self.settings.name;
                        warn!(
                            name,
                            "another live worker has this name: end it, or give this one another name with --name"
                        );
                        told = true;
                    }
                }
                Ended::Fatal(error) => return Err(error),
                Ended::Lost(reason) => {
                    if !told {
                        warn!(coordinator = self.settings.coordinator, reason, "no coordinator, dialling again");
                        told = true;
                    }
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(wait) => {}
            }
            wait = (wait * 2).min(REDIAL_LONGEST);
        }
    }

    async fn belong(&mut self, shutdown: &CancellationToken, wait: &mut Duration, told: &mut bool) -> Ended {
        let coordinator = &self.settings.coordinator;
        let (channel, ends) = match transport::connect_between(&self.net, coordinator, Keepalive::Cluster).await {
            Ok(connected) => connected,
            Err(error) => return Ended::Lost(error.to_string()),
        };
        let data_address = match self.own.towards(ends) {
            Ok(address) => address.to_string(),
            Err(error) => return Ended::Fatal(error),
        };
        let mut client = MembershipServiceClient::with_interceptor(channel, self.settings.secret.attach());
        let (outgoing, stream) = mpsc::channel(64);
        if outgoing.send(request(Message::Hello(self.hello(&data_address)))).await.is_err() {
            return Ended::Lost("the stream was closed".into());
        }
        let answers = match timeout(WELCOME_WITHIN, client.join(ReceiverStream::new(stream))).await {
            Err(_late) => return Ended::Lost("no answer within 5 s".into()),
            Ok(Err(status)) => return self.refused(&status),
            Ok(Ok(response)) => response.into_inner(),
        };
        match self.welcome(answers).await {
            Ok((welcome, answers)) => {
                info!(cluster = welcome.cluster, data_address, "joined");
                *wait = REDIAL_FIRST;
                *told = false;
                self.serve(&welcome, answers, outgoing, shutdown).await
            }
            Err(ended) => ended,
        }
    }

    async fn welcome(&self, mut answers: Streaming<JoinResponse>) -> Result<(Welcome, Streaming<JoinResponse>), Ended> {
        let first = timeout(WELCOME_WITHIN, answers.message()).await;
        let first = first.map_err(|_late| Ended::Lost("no welcome within 5 s".into()))?;
        match first.map_err(|status| self.refused(&status))?.and_then(|response| response.message) {
            Some(join_response::Message::Welcome(welcome)) => Ok((welcome, answers)),
            other => Err(Ended::Lost(format!("expected a welcome, found {other:?}"))),
        }
    }

    fn refused(&self, status: &Status) -> Ended {
        let said = status.message().to_owned();
        match status.code() {
            Code::AlreadyExists => Ended::NameTaken,
            Code::Unauthenticated | Code::InvalidArgument | Code::FailedPrecondition => {
                Ended::Fatal(WorkerError::Refused { coordinator: self.settings.coordinator.clone(), said })
            }
            _ => Ended::Lost(said),
        }
    }

    async fn serve(
        &mut self,
        welcome: &Welcome,
        mut answers: Streaming<JoinResponse>,
        outgoing: mpsc::Sender<JoinRequest>,
        shutdown: &CancellationToken,
    ) -> Ended {
        let interval =
            Duration::from_millis(u64::from(welcome.heartbeat_interval_ms)).clamp(REDIAL_FIRST, LOST_AFTER / 2);
        let mut beat = tokio::time::interval(interval);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let message = tokio::select! {
                () = shutdown.cancelled() => return Ended::Shutdown,
                answer = answers.message() => match answer {
                    Ok(Some(JoinResponse { message: Some(message) })) => {
                        self.obey(message);
                        continue;
                    }
                    Ok(Some(JoinResponse { message: None })) => continue,
                    Ok(None) => return Ended::Lost("the coordinator closed the stream".into()),
                    Err(status) => return self.refused(&status),
                },
                _now = beat.tick() => {
                    let resident = grokpipe_kernels::resident_memory_bytes();
                    Message::Heartbeat(self.stats.heartbeat(self.device.memory_bytes, resident))
                }
                report = self.reports.recv() => match report {
                    Some(report) => report,
                    None => return Ended::Shutdown,
                },
            };
            if matches!(message, Message::StageReady(_)) {
                // What the stage weighs is told with it, not a heartbeat later.
                beat.reset_immediately();
            }
            // A coordinator that takes nothing for as long as a lost one is lost.
            match timeout(LOST_AFTER, outgoing.send(request(message))).await {
                Ok(Ok(())) => {}
                Ok(Err(_closed)) => return Ended::Lost("the coordinator closed the stream".into()),
                Err(_stuck) => return Ended::Lost("the coordinator takes no messages".into()),
            }
        }
    }

    fn obey(&self, message: join_response::Message) {
        match message {
            join_response::Message::Assignment(assignment) => {
                self.orders.send_replace(Order::Run(Box::new(assignment)));
            }
            join_response::Message::Release(_) => {
                self.orders.send_replace(Order::Idle);
            }
            // What does not fit is not done: the coordinator asks for one thing at a time and knows how long that takes.
            join_response::Message::ProbeOrder(order) => drop(self.probes.try_send(order)),
            join_response::Message::Welcome(_) => {}
        }
    }

    fn hello(&self, data_address: &str) -> Hello {
        let notes = self
            .device
            .notes
            .iter()
            .take(bounds::NOTES_MAX)
            .map(|note| bounds::cut(note.clone(), bounds::NOTE_BYTES_MAX));
        let held = self.held_layers.borrow().clone().unwrap_or(0..0);
        Hello {
            name: self.settings.name.clone(),
            generation: self.settings.generation,
            version_min: *PROTOCOL_VERSIONS.start(),
            version_max: *PROTOCOL_VERSIONS.end(),
            device: bounds::cut(self.device.name.clone(), bounds::DEVICE_BYTES_MAX),
            fingerprint: bounds::cut(self.device.fingerprint.clone(), bounds::FINGERPRINT),
            memory_bytes: self.device.memory_bytes,
            read_bandwidth: self.device.read_bandwidth,
            flop_rate: self.device.flop_rate,
            data_address: data_address.to_owned(),
            pid: std::process::id(),
            build: env!("CARGO_PKG_VERSION").into(),
            model_digest: self.model_digest.clone(),
            held_layer_start: held.start,
            held_layer_end: held.end,
            notes: notes.collect(),
            format_rates: self.device.format_rates.iter().map(format_rate).collect(),
            step_overhead: Some(StepOverhead {
                step_seconds: self.device.overhead.step_seconds,
                layer_seconds: self.device.overhead.layer_seconds,
                draw_seconds: self.device.draw_seconds,
            }),
        }
    }
}

fn format_rate((format, rate): (&String, &grokpipe_kernels::FormatRate)) -> FormatRate {
    FormatRate {
        format: format.clone(),
        decode_bytes_per_second: rate.decode_bytes_per_second,
        prefill_flops_per_second: rate.prefill_flops_per_second,
    }
}

fn request(message: Message) -> JoinRequest {
    JoinRequest { message: Some(message) }
}
