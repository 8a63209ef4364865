//! Text to ids and back: how much of it, and how much at a time.
//!
//! Text comes from anybody, and to encode it takes memory and time in proportion. So it is bounded before it is looked at: by the
//! configuration, and by what could fit the context at all. The work is done by a few blocking threads; what does not find one waits
//! in a small room, and is refused when that is full. Short texts have threads of their own, so that no long one is in their way.

use std::sync::Arc;

use grokpipe_model::tokenizer::Tokenizer;
use tokio::sync::Semaphore;
use tracing::error;

use crate::{
    deadline::Deadline,
    request::{Field, RequestError},
};

/// Texts up to here are short: a few milliseconds of work.
const SHORT_BYTES: usize = 16 << 10;
/// Bytes of texts of each kind that may be at work or wait.
const SHORT_ROOM: usize = 4 << 20;
const LONG_ROOM: usize = 64 << 20;
/// What a text counts for at least, for everything around it.
const LEAST_BYTES: usize = 1 << 10;

/// Encodes and decodes for clients.
#[derive(Debug)]
pub struct TextDesk {
    tokenizer: Arc<Tokenizer>,
    /// Most tokens of a sequence.
    context: usize,
    /// Longest text that may be worth encoding, in bytes.
    longest_text: usize,
    /// What the configuration allows, in bytes.
    max_prompt_bytes: usize,
    short: Lane,
    long: Lane,
}

/// A few threads, and a room before them.
#[derive(Debug)]
struct Lane {
    /// Bytes.
    room: Arc<Semaphore>,
    bytes: usize,
    threads: Arc<Semaphore>,
}

impl Lane {
    fn new(bytes: usize, threads: usize) -> Self {
        let bytes = bytes.min(Semaphore::MAX_PERMITS).min(u32::MAX as usize);
        Self { room: Arc::new(Semaphore::new(bytes)), bytes, threads: Arc::new(Semaphore::new(threads)) }
    }

    async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        deadline: Deadline,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, RequestError> {
        let bytes = bytes.max(LEAST_BYTES);
        let full = RequestError::TextQueueFull { limit: self.bytes, found: bytes };
        let permits = u32::try_from(bytes).map_err(|_more| full.clone())?;
        let place = Arc::clone(&self.room).try_acquire_many_owned(permits).map_err(|_none| full)?;
        let thread = deadline.bounds(Arc::clone(&self.threads).acquire_owned()).await?;
        let thread = thread.map_err(|_closed| RequestError::ShuttingDown)?;
        let done = tokio::task::spawn_blocking(move || {
            // The work continues when its client leaves, and keeps its thread and place.
            let _held = (place, thread);
            work()
        });
        deadline.bounds(done).await?.map_err(|failed| {
            error!(%failed, "the tokenizer failed");
            RequestError::Internal("the tokenizer failed".into())
        })
    }
}

impl TextDesk {
    /// For sequences of up to `context` tokens and texts of up to `max_prompt_bytes`.
    pub fn new(tokenizer: Arc<Tokenizer>, context: usize, max_prompt_bytes: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            longest_text: context.saturating_mul(tokenizer.longest_piece()),
            tokenizer,
            context,
            max_prompt_bytes,
            short: Lane::new(SHORT_ROOM, cores),
            // Long texts leave half of the machine to other work.
            long: Lane::new(LONG_ROOM.max(max_prompt_bytes), cores.div_ceil(2)),
        }
    }

    fn lane(&self, bytes: usize) -> &Lane {
        if bytes <= SHORT_BYTES { &self.short } else { &self.long }
    }

    /// The ids of a text.
    ///
    /// # Errors
    /// [`RequestError`]: too long, no place, or too late.
    pub async fn encode(&self, text: String, deadline: Deadline) -> Result<Vec<u32>, RequestError> {
        let (found, most) = (text.len(), self.max_prompt_bytes);
        if found > most {
            return Err(RequestError::invalid(
                Field::Text,
                format!("expected at most {most} bytes of text, found {found}"),
            ));
        }
        if found > self.longest_text {
            return Err(RequestError::TooLong {
                limit: self.context,
                // No token has more bytes than the longest piece.
                found: found.div_ceil(self.tokenizer.longest_piece()),
                what: "so many at least for this text, and it must fit the context",
            });
        }
        let tokenizer = Arc::clone(&self.tokenizer);
        self.lane(found).run(found, deadline, move || tokenizer.encode(&text)).await
    }

    /// The text of ids, which are in the vocabulary.
    ///
    /// # Errors
    /// As [`TextDesk::encode`].
    pub async fn decode(&self, ids: Vec<u32>, deadline: Deadline) -> Result<String, RequestError> {
        let (limit, found) = (self.context, ids.len());
        if found > limit {
            return Err(RequestError::TooLong { limit, found, what: "ids must fit the context" });
        }
        let tokenizer = Arc::clone(&self.tokenizer);
        let about = found.saturating_mul(size_of::<u32>());
        self.lane(about).run(about, deadline, move || tokenizer.decode(&ids)).await
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::mpsc, time::Duration};

    use super::*;

    const SOON: Duration = Duration::from_secs(60);

    fn kind(error: &RequestError) -> &'static str {
        match error {
            RequestError::TooLong { .. } => "too long",
            RequestError::Invalid { field: Field::Text, .. } => "invalid",
            RequestError::CallDeadline { .. } => "late",
            RequestError::TextQueueFull { .. } => "full",
            _ => "another error",
        }
    }

    fn desk(context: usize, max_prompt_bytes: usize) -> TextDesk {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/demo/tokenizer.model");
        TextDesk::new(Arc::new(Tokenizer::open(&demo).unwrap()), context, max_prompt_bytes)
    }

    #[tokio::test]
    async fn text_is_bounded_by_the_configuration_and_by_the_context_before_it_is_encoded() {
        let desk = desk(10, 1 << 20);
        let longest = 10 * desk.tokenizer.longest_piece();
        for (bytes, expected) in [
            (longest, None),
            (longest + 1, Some("too long")),
            (1 << 20, Some("too long")),
            ((1 << 20) + 1, Some("invalid")),
        ] {
            let answer = desk.encode("a".repeat(bytes), Deadline::after(SOON)).await;
            assert_eq!(answer.err().map(|error| kind(&error)), expected, "{bytes} bytes");
        }
    }

    #[tokio::test]
    async fn ids_are_bounded_by_the_context_before_they_are_decoded() {
        let desk = desk(10, 1 << 20);
        for (count, expected) in [(10, None), (11, Some("too long"))] {
            let answer = desk.decode(vec![500; count], Deadline::after(SOON)).await;
            assert_eq!(answer.err().map(|error| kind(&error)), expected, "{count} ids");
        }
    }

    #[tokio::test]
    async fn work_beyond_threads_and_room_is_refused_and_a_wait_has_a_deadline() {
        const EACH: usize = 2 * LEAST_BYTES;
        let lane = Arc::new(Lane::new(3 * EACH, 1));
        let (finish, finished) = mpsc::channel::<()>();
        let first = tokio::spawn({
            let lane = Arc::clone(&lane);
            async move { lane.run(EACH, Deadline::after(SOON), move || finished.recv().is_ok()).await }
        });
        while lane.threads.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let waits = tokio::spawn({
            let lane = Arc::clone(&lane);
            async move { lane.run(EACH, Deadline::after(SOON), || true).await }
        });
        while lane.room.available_permits() > EACH {
            tokio::task::yield_now().await;
        }
        let late = lane.run(EACH, Deadline::after(Duration::from_millis(1)), || true).await;
        assert_eq!(late.map_err(|error| kind(&error)), Err("late"));
        let third = tokio::spawn({
            let lane = Arc::clone(&lane);
            async move { lane.run(EACH, Deadline::after(SOON), || true).await }
        });
        while lane.room.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let refused = lane.run(0, Deadline::after(SOON), || true).await;
        assert_eq!(refused, Err(RequestError::TextQueueFull { limit: 3 * EACH, found: LEAST_BYTES }));
        finish.send(()).unwrap();
        for each in [first, waits, third] {
            assert_eq!(each.await.unwrap(), Ok(true));
        }
        assert_eq!(lane.room.available_permits(), 3 * EACH);
    }

    #[tokio::test]
    async fn work_whose_client_left_keeps_its_thread_until_it_is_done() {
        let lane = Lane::new(3 * LEAST_BYTES, 1);
        let (finish, finished) = mpsc::channel::<()>();
        let answer = lane.run(0, Deadline::after(Duration::from_millis(5)), move || finished.recv().is_ok()).await;
        assert_eq!(answer.map_err(|error| kind(&error)), Err("late"));
        assert_eq!((lane.threads.available_permits(), lane.room.available_permits()), (0, 2 * LEAST_BYTES));
        finish.send(()).unwrap();
        while lane.room.available_permits() < 3 * LEAST_BYTES {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_long_text_is_not_in_the_way_of_short_ones() {
        let desk = desk(8192, 1 << 20);
        let long = Arc::clone(&desk.long.room).try_acquire_many_owned(LONG_ROOM as u32).unwrap();
        let long_text = || desk.encode("a".repeat(SHORT_BYTES + 1), Deadline::after(SOON));
        assert_eq!(kind(&long_text().await.unwrap_err()), "full");
        assert!(desk.encode("a".into(), Deadline::after(SOON)).await.is_ok());
        drop(long);
        assert!(long_text().await.is_ok());
    }
}
