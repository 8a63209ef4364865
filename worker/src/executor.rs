//! Where a stage's computations run: one at a time, in order, with the device to themselves.
//!
//! In production that is a thread of its own, so that a long step never delays a heartbeat; in a simulated cluster it is the
//! caller's own thread, so that a run can be repeated.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc,
    thread,
};

use tokio::sync::oneshot;
use tracing::error;

/// A piece of work for the device.
pub type Work = Box<dyn FnOnce() + Send>;

/// Runs work in order, one at a time.
pub trait Executor: Send + Sync + 'static {
    /// Takes work; it may have run when this returns. Work that panics is dropped, and so is what it would have answered.
    fn execute(&self, work: Work);
}

/// The computation panicked or its thread is gone; whatever it held may be damaged.
#[derive(Debug, thiserror::Error)]
#[error("the device's thread failed; its log says how")]
pub struct ExecutorFailed;

/// Runs `work` on the executor and waits for its answer.
///
/// # Errors
/// [`ExecutorFailed`] when it panicked.
pub async fn compute<T: Send + 'static>(
    executor: &dyn Executor,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ExecutorFailed> {
    let (answer, answered) = oneshot::channel();
    executor.execute(Box::new(move || {
        // Nobody waits any more when the epoch has ended.
        let _ = answer.send(work());
    }));
    answered.await.map_err(|_dropped| ExecutorFailed)
}

/// A thread that runs what it is given.
#[derive(Debug)]
pub struct ThreadExecutor {
    queue: mpsc::SyncSender<Work>,
}

/// Steps of an old epoch and of the new one may wait together, and a load; more cannot, since each waits for its answer.
const QUEUE: usize = 16;

impl ThreadExecutor {
    /// Starts the thread; it ends when the executor is dropped.
    ///
    /// # Errors
    /// What the system says when it starts no thread.
    pub fn start() -> std::io::Result<Self> {
        let (queue, work) = mpsc::sync_channel::<Work>(QUEUE);
        thread::Builder::new().name("device".into()).spawn(move || {
            for work in work {
                if catch_unwind(AssertUnwindSafe(work)).is_err() {
                    error!("a computation panicked");
                }
            }
        })?;
        Ok(Self { queue })
    }
}

impl Executor for ThreadExecutor {
    fn execute(&self, work: Work) {
        if let Err(refused) = self.queue.try_send(work) {
            error!(%refused, "the device's queue takes no work");
        }
    }
}

/// Runs work at once, on the caller's thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct InlineExecutor;

impl Executor for InlineExecutor {
    fn execute(&self, work: Work) {
        if catch_unwind(AssertUnwindSafe(work)).is_err() {
            error!("a computation panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_error_and_the_next_work_runs() {
        let executor = ThreadExecutor::start().unwrap();
        let failed: Result<(), _> = compute(&executor, || panic!("on purpose")).await;
        assert!(failed.is_err());
        assert_eq!(compute(&executor, || 7).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn work_runs_in_order() {
        let executor = ThreadExecutor::start().unwrap();
        let (log, seen) = mpsc::channel();
        for number in 0..10 {
            let log = log.clone();
            executor.execute(Box::new(move || log.send(number).unwrap()));
        }
        compute(&executor, || ()).await.unwrap();
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
    }
}
