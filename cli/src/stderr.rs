//! Standard error, which nobody waits for: what is written goes into a bounded queue that a thread of its own empties.
//!
//! Whoever reads standard error may stop (a terminal after Ctrl-S, a paused pager, a log driver that hangs), and a process that serves must
//! then serve on. What does not fit into the queue is lost, and how much that was is said once there is room again.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crate::logging;

/// Most bytes that wait to be read.
const WAITING_BYTES_MAX: usize = 1 << 20;
/// How long a process that ends waits for its last lines to be read.
const FLUSH_WITHIN: Duration = Duration::from_millis(500);

/// Writes text and a line end, as one piece.
pub(crate) fn line(text: &str) {
    queue().offer(format!("{text}\n").into_bytes(), 1);
}

/// Writes what redraws the screen. Nobody misses a picture that is lost: the next one shows more.
pub(crate) fn picture(bytes: Vec<u8>) {
    queue().offer(bytes, 0);
}

/// Gives the last lines their time to be read.
pub(crate) fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush(FLUSH_WITHIN);
    }
}

/// For writers that want a handle; each `write` is one line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Handle;

impl Write for Handle {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        queue().offer(bytes.to_vec(), 1);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

static QUEUE: OnceLock<Queue> = OnceLock::new();

fn queue() -> &'static Queue {
    let mut is_new = false;
    let queue = QUEUE.get_or_init(|| {
        is_new = true;
        Queue::new(logging::lost_lines)
    });
    if is_new {
        let started = thread::Builder::new().name("stderr".to_owned()).spawn(|| queue.empty_into(&mut io::stderr()));
        if started.is_err() {
            queue.lock().is_direct = true;
        }
    }
    queue
}

/// Pieces that wait for their reader.
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    /// What says how many lines were lost.
    note: fn(u64) -> String,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Lines that found no room since the last one that did.
    lost: u64,
    /// A piece has been taken and is being written.
    is_writing: bool,
    /// There is no thread to empty the queue.
    is_direct: bool,
}

impl State {
    fn has_room(&self, bytes: usize) -> bool {
        self.bytes + bytes <= WAITING_BYTES_MAX
    }

    fn push(&mut self, piece: Vec<u8>) {
        self.bytes += piece.len();
        self.waiting.push_back(piece);
    }
}

impl Queue {
    fn new(note: fn(u64) -> String) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), note }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a piece of so many lines, or loses it.
    fn offer(&self, piece: Vec<u8>, lines: u64) {
        let mut state = self.lock();
        if state.is_direct {
            drop(state);
            // Nobody may read standard error any more; that is no reason to end.
            let _ = io::stderr().write_all(&piece);
            return;
        }
        if !state.has_room(piece.len()) {
            state.lost += lines;
            return;
        }
        if state.lost > 0 {
            let lost = std::mem::take(&mut state.lost);
            state.push((self.note)(lost).into_bytes());
        }
        state.push(piece);
        drop(state);
        self.changed.notify_all();
    }

    /// Writes the pieces as they come, for ever.
    fn empty_into(&self, sink: &mut impl Write) -> ! {
        loop {
            self.write_next(sink);
        }
    }

    /// Waits for a piece and writes it.
    fn write_next(&self, sink: &mut impl Write) {
        let mut state = self.lock();
        let piece = loop {
            if let Some(piece) = state.waiting.pop_front() {
                state.bytes -= piece.len();
                break piece;
            }
            if state.lost > 0 {
                break (self.note)(std::mem::take(&mut state.lost)).into_bytes();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        state.is_writing = true;
        drop(state);
        // As above: nobody may read it, or the disk behind it is full.
        let _ = sink.write_all(&piece).and_then(|()| sink.flush());
        self.lock().is_writing = false;
        self.changed.notify_all();
    }

    /// Waits until everything is written, but not longer than `within`.
    fn flush(&self, within: Duration) {
        let until = Instant::now() + within;
        let mut state = self.lock();
        while !state.is_direct && (state.is_writing || !state.waiting.is_empty() || state.lost > 0) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            (state, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(lost: u64) -> String {
        format!("({lost} lost)\n")
    }

    fn written(queue: &Queue, pieces: usize) -> String {
        let mut sink = Vec::new();
        for _ in 0..pieces {
            queue.write_next(&mut sink);
        }
        String::from_utf8(sink).unwrap()
    }

    #[test]
    fn lines_come_out_in_order_and_none_is_lost_while_there_is_room() {
        let queue = Queue::new(note);
        queue.offer(b"one\n".to_vec(), 1);
        queue.offer(b"two\n".to_vec(), 1);
        assert_eq!(written(&queue, 2), "one\ntwo\n");
    }

    #[test]
    fn what_nobody_reads_is_lost_and_counted_at_its_place() {
        let queue = Queue::new(note);
        let long = vec![b'x'; WAITING_BYTES_MAX / 2];
        for _ in 0..5 {
            queue.offer(long.clone(), 1);
        }
        queue.offer(long.clone(), 0);
        assert!(queue.lock().bytes <= WAITING_BYTES_MAX);
        assert_eq!(written(&queue, 1).len(), long.len());
        queue.offer(b"after\n".to_vec(), 1);
        assert_eq!(written(&queue, 3), format!("{}(3 lost)\nafter\n", String::from_utf8(long).unwrap()));
    }

    #[test]
    fn a_loss_is_told_also_when_nothing_follows() {
        let queue = Queue::new(note);
        queue.offer(vec![b'x'; WAITING_BYTES_MAX], 1);
        queue.offer(b"lost\n".to_vec(), 1);
        assert!(written(&queue, 2).ends_with("x(1 lost)\n"));
    }

    #[test]
    fn an_end_does_not_wait_for_a_reader_that_never_comes() {
        let queue = Queue::new(note);
        queue.flush(Duration::from_secs(3600));
        queue.offer(b"never read\n".to_vec(), 1);
        queue.flush(Duration::from_millis(1));
        assert_eq!(queue.lock().waiting.len(), 1);
    }
}
