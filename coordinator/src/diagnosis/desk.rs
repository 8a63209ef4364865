//! Asks connected workers for something, over the stream on which they have joined, and matches their answers.
//!
//! Beside the engine: what is asked here changes no plan. A worker that leaves while it is asked is known at once.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use grokpipe_proto::{
    probe::clock_us,
    v1::{Hello, JoinResponse, ProbeOrder, ProbeReport, join_response, probe_order::Task, probe_report::Finding},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tonic::Status;

/// The way to a worker.
type ProbeOutbox = mpsc::Sender<Result<JoinResponse, Status>>;

/// A connected worker, by its own hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Where the others find it.
    pub address: String,
    /// Version of its program.
    pub build: String,
    /// Protocol versions that it speaks, both inclusive.
    pub versions: (u32, u32),
}

impl Member {
    /// What a hello says.
    pub fn of(hello: &Hello) -> Self {
        Self {
            name: hello.name.clone(),
            address: hello.data_address.clone(),
            build: hello.build.clone(),
            versions: (hello.version_min, hello.version_max),
        }
    }
}

struct Present {
    connection: u64,
    member: Member,
    outbox: ProbeOutbox,
}

struct Asked {
    worker: String,
    answer: oneshot::Sender<Finding>,
}

#[derive(Default)]
struct State {
    present: BTreeMap<String, Present>,
    asked: HashMap<u64, Asked>,
    last_id: u64,
}

/// Who is connected, and what they were asked. Cheap to clone.
#[derive(Clone, Default)]
pub struct Desk(Arc<Mutex<State>>);

impl Desk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker was welcomed on this connection.
    pub fn joined(&self, connection: u64, member: Member, outbox: ProbeOutbox) {
        self.state().present.insert(member.name.clone(), Present { connection, member, outbox });
    }

    /// The connection has ended.
    pub fn left(&self, connection: u64, worker: &str) {
        let mut state = self.state();
        // It may have joined again before its old stream was seen to end.
        if state.present.get(worker).is_some_and(|present| present.connection == connection) {
            state.present.remove(worker);
            state.asked.retain(|_, asked| asked.worker != worker);
        }
    }

    /// A worker answers. What nobody asked for, or somebody else was asked for, is dropped.
    pub fn reported(&self, worker: &str, report: ProbeReport) {
        let mut state = self.state();
        let is_asked = state.asked.get(&report.id).is_some_and(|asked| asked.worker == worker);
        if let (true, Some(finding)) = (is_asked, report.finding)
            && let Some(asked) = state.asked.remove(&report.id)
        {
            let _ = asked.answer.send(finding);
        }
    }

    /// All that are connected, by name.
    pub fn members(&self) -> Vec<Member> {
        self.state().present.values().map(|present| present.member.clone()).collect()
    }

    /// Has a worker find something out.
    ///
    /// # Errors
    /// Why there is no answer, as what follows the worker's name.
    pub async fn ask(&self, worker: &str, task: Task, within: Duration) -> Result<Finding, String> {
        let (id, answer) = self.put(worker, task)?;
        let found = timeout(within, answer).await;
        self.state().asked.remove(&id);
        match found {
            Ok(Ok(finding)) => Ok(finding),
            Ok(Err(_gone)) => Err("has left meanwhile".to_owned()),
            Err(_late) => Err(format!("gave no answer within {} s; it may be an older grokpipe", within.as_secs())),
        }
    }

    fn put(&self, worker: &str, task: Task) -> Result<(u64, oneshot::Receiver<Finding>), String> {
        let mut state = self.state();
        // Of those who do not wait any more.
        state.asked.retain(|_, asked| !asked.answer.is_closed());
        // Later than all ids of a coordinator before this one, whose answers may still come.
        state.last_id = clock_us().max(state.last_id + 1);
        let id = state.last_id;
        let present = state.present.get(worker).ok_or_else(|| "has left".to_owned())?;
        let order = join_response::Message::ProbeOrder(ProbeOrder { id, task: Some(task) });
        let sent = present.outbox.try_send(Ok(JoinResponse { message: Some(order) }));
        sent.map_err(|_full_or_closed| "takes no messages".to_owned())?;
        let (reply, answer) = oneshot::channel();
        state.asked.insert(id, Asked { worker: worker.to_owned(), answer: reply });
        Ok((id, answer))
    }
}

#[cfg(test)]
mod tests {
    use grokpipe_proto::v1::{DescribeMachine, LinkReport};

    use super::*;

    fn member(name: &str) -> Member {
        Member { name: name.into(), address: "node:1".into(), build: "0".into(), versions: (1, 1) }
    }

    fn task() -> Task {
        Task::Machine(DescribeMachine { disk_speed: false })
    }

    fn order(response: Option<Result<JoinResponse, Status>>) -> u64 {
        match response.unwrap().unwrap().message.unwrap() {
            join_response::Message::ProbeOrder(order) => order.id,
            other => panic!("expected an order, found {other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_worker_that_was_asked_can_answer() {
        let desk = Desk::default();
        let (outbox, mut inbox) = mpsc::channel(4);
        desk.joined(1, member("w1"), outbox.clone());
        desk.joined(2, member("w2"), outbox);
        let asking = tokio::spawn({
            let desk = desk.clone();
            async move { desk.ask("w1", task(), Duration::from_secs(5)).await }
        });
        let id = order(inbox.recv().await);
        let answer = |error: &str| Finding::Link(LinkReport { error: error.into(), ..LinkReport::default() });
        desk.reported("w2", ProbeReport { id, finding: Some(answer("forged")) });
        desk.reported("w1", ProbeReport { id: id + 1, finding: Some(answer("another order's")) });
        desk.reported("w1", ProbeReport { id, finding: None });
        desk.reported("w1", ProbeReport { id, finding: Some(answer("its own")) });
        assert_eq!(asking.await.unwrap(), Ok(answer("its own")));
        assert!(desk.state().asked.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_leaves_or_is_silent_is_not_waited_for_in_vain() {
        let desk = Desk::default();
        assert_eq!(desk.ask("w1", task(), Duration::from_secs(5)).await, Err("has left".into()));
        let (outbox, mut inbox) = mpsc::channel(1);
        desk.joined(1, member("w1"), outbox.clone());
        let silent = desk.ask("w1", task(), Duration::from_secs(5)).await;
        assert!(silent.unwrap_err().contains("no answer within 5 s"));
        assert_eq!(desk.ask("w1", task(), Duration::from_secs(5)).await, Err("takes no messages".into()));
        order(inbox.recv().await);

        let asking = tokio::spawn({
            let desk = desk.clone();
            async move { desk.ask("w1", task(), Duration::from_secs(500)).await }
        });
        order(inbox.recv().await);
        // The end of the old stream says nothing about the new one.
        desk.left(0, "w1");
        assert_eq!(desk.members(), [member("w1")]);
        desk.left(1, "w1");
        assert_eq!(asking.await.unwrap(), Err("has left meanwhile".into()));
        assert!(desk.members().is_empty() && desk.state().asked.is_empty());
    }
}
