//! The faults, and how each comes to its end.

use std::{fs, thread, time::Duration};

use tokio::time::sleep;

use crate::{cluster::Cluster, hang, random::Random};

/// Which way of a worker: frames to it, or all between it and the coordinator.
#[derive(Clone, Copy, Debug)]
enum Way {
    Data,
    Control,
}

/// What goes wrong with a worker or, where it says so, with the coordinator.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Kill,
    KillCoordinator,
    Stop,
    Cut(Way),
    Silence(Way),
    Delay(Way),
    Damage(u32),
    Hang,
    FailReads,
}

/// One fault.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    kind: Kind,
    /// Index of the worker, from 0.
    worker: usize,
    lasts: Duration,
}

impl Fault {
    /// The next fault of a seed.
    pub(crate) fn random(random: &mut Random, workers: usize) -> Self {
        let way = *random.pick(&[Way::Data, Way::Control]);
        let frames = random.between(1, 6) as u32;
        let kinds = [
            Kind::Kill,
            Kind::KillCoordinator,
            Kind::Stop,
            Kind::Cut(way),
            Kind::Silence(way),
            Kind::Delay(way),
            Kind::Damage(frames),
            Kind::Hang,
            Kind::FailReads,
        ];
        Self {
            kind: *random.pick(&kinds),
            worker: random.between(0, workers as u64 - 1) as usize,
            lasts: Duration::from_millis(random.between(300, 6000)),
        }
    }

    /// Its kind, for counting.
    pub(crate) fn kind(&self) -> &'static str {
        match self.kind {
            Kind::Kill => "kill",
            Kind::KillCoordinator => "kill of the coordinator",
            Kind::Stop => "stop",
            Kind::Cut(_) => "cut",
            Kind::Silence(_) => "silence",
            Kind::Delay(_) => "delay",
            Kind::Damage(_) => "damage",
            Kind::Hang => "hang",
            Kind::FailReads => "read errors",
        }
    }

    /// Lets it strike, and waits until it is over. Its name, for people.
    pub(crate) async fn strike(&self, cluster: &Cluster) -> String {
        let (member, lasts) = (&cluster.members[1 + self.worker], self.lasts);
        let relay = |way| match way {
            Way::Data => &cluster.data[self.worker],
            Way::Control => &cluster.control[self.worker],
        };
        let name = |what: String| format!("{what} {}", member.name);
        let seconds = format!("{:.1} s", lasts.as_secs_f64());
        match self.kind {
            Kind::Kill => {
                member.signal("KILL").await;
                name("kill of".into())
            }
            Kind::KillCoordinator => {
                cluster.members[0].signal("KILL").await;
                "kill of the coordinator".into()
            }
            Kind::Stop => {
                member.signal("STOP").await;
                sleep(lasts).await;
                member.signal("CONT").await;
                name(format!("stop for {seconds} of"))
            }
            Kind::Cut(way) => {
                relay(way).cut();
                name(format!("cut of the {way:?} connections of"))
            }
            Kind::Silence(way) => {
                relay(way).silence(true);
                sleep(lasts).await;
                relay(way).silence(false);
                name(format!("silence for {seconds} on the {way:?} connections of"))
            }
            Kind::Delay(way) => {
                relay(way).delay(Duration::from_millis(50));
                sleep(lasts).await;
                relay(way).delay(Duration::ZERO);
                name(format!("50 ms for {seconds} on the {way:?} connections of"))
            }
            Kind::Damage(frames) => {
                relay(Way::Data).damage(frames);
                sleep(lasts).await;
                relay(Way::Data).damage(0);
                name(format!("{frames} damaged frames to"))
            }
            Kind::Hang => {
                let found = member.pid().and_then(|pid| hang::thread_of(pid, "device").ok());
                let held = tokio::task::spawn_blocking(move || {
                    found.map(|thread| hang::hold(thread, || thread::park_timeout(lasts)))
                });
                let note = match held.await {
                    Ok(Some(Ok(()))) => "",
                    // It was just starting, or the system does not allow it.
                    _other => " (not done)",
                };
                name(format!("hang for {seconds}{note} of the device of"))
            }
            Kind::FailReads => {
                let _ = fs::write(&member.fail_reads, "");
                // The first stage reads while it runs, the others when they load.
                if self.worker > 0 {
                    member.signal("KILL").await;
                }
                sleep(lasts).await;
                let _ = fs::remove_file(&member.fail_reads);
                name(format!("read errors for {seconds} at"))
            }
        }
    }
}
