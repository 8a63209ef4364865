//! The backend's threads: a job is cut into pieces that each own a part of the output, never a part of a sum.
//!
//! A step hands over some hundreds of jobs, each of some microseconds. So the threads spin for a little while before they sleep, and
//! the caller is one of them: handing over a job costs about a microsecond while jobs keep coming. Jobs too small to share run on the
//! caller alone. Meanwhile idle threads prefetch the weights of their first piece of the next job. Each piece is told what its thread
//! reads next, and prefetches that as it ends.

#![expect(unsafe_code, reason = "work borrows what the caller owns, and threads live longer than the borrow")]

use std::{
    cell::UnsafeCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{JoinHandle, Thread},
};

use super::prefetch::prefetch;
use crate::KernelError;

/// Multiply-adds below which handing work to other threads costs more than it saves.
const INLINE_BELOW_WORK: usize = 40_000;
/// Looks for work before a thread sleeps; some tens of microseconds.
const LOOKS: usize = 20_000;
/// Bytes that a thread asks for ahead at most: half of a common second-level cache, where they are to stay.
const AHEAD_BYTES: usize = 512 << 10;
/// Bytes that it asks for between two looks for work.
const ASKED_AT_ONCE: usize = 1024;
/// Looks for the end of work before the caller lets others have its core.
const LOOKS_FOR_THE_END: usize = 2_000;

/// A fixed number of threads.
#[derive(Clone)]
pub(crate) struct Threads {
    pool: Option<Arc<Pool>>,
    count: usize,
}

impl Threads {
    /// `count` threads, at least one. One thread means the caller's own.
    pub(crate) fn new(count: usize) -> Result<Self, KernelError> {
        let count = count.max(1);
        let pool = if count == 1 { None } else { Some(Arc::new(Pool::new(count - 1)?)) };
        Ok(Self { pool, count })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Calls `f` once for each piece, on any thread, in any order; on this one when all the work is small. Each thread begins with
    /// a run of neighbours, so that what follows in memory mostly is what it reads next, and helps the others when it is done.
    pub(crate) fn each<T: Send>(&self, pieces: Vec<T>, work: usize, f: impl Fn(T) + Send + Sync) {
        let pool = match &self.pool {
            Some(pool) if work >= INLINE_BELOW_WORK && pieces.len() > 1 => pool,
            _ => return pieces.into_iter().for_each(f),
        };
        let pieces: Vec<Mutex<Option<T>>> = pieces.into_iter().map(|piece| Mutex::new(Some(piece))).collect();
        let start = |share| self.first_piece(share, pieces.len());
        let next: Vec<_> = (0..self.count).map(|share| AtomicUsize::new(start(share))).collect();
        pool.run(&|thread| {
            for share in (thread..self.count).chain(0..thread) {
                loop {
                    let index = next[share].fetch_add(1, Ordering::Relaxed);
                    if index >= start(share + 1) {
                        break;
                    }
                    if let Some(piece) = pieces[index].lock().unwrap_or_else(PoisonError::into_inner).take() {
                        f(piece);
                    }
                }
            }
        });
    }

    /// The piece that a thread begins with.
    pub(crate) fn first_piece(&self, thread: usize, pieces: usize) -> usize {
        thread * pieces / self.count
    }

    /// Tells the threads, in their order, what each will read first of the next large work. All but the caller ask for it while they wait.
    /// A hint: nothing depends on it.
    pub(crate) fn ask_ahead(&self, first: &[Stretch]) {
        let Some(pool) = &self.pool else { return };
        for (ahead, stretch) in pool.shared.ahead.iter().zip(first.iter().skip(1)) {
            ahead.set(*stretch);
        }
    }

    /// As [`Threads::each`], for pieces that begin to read their weights there. `f` is told what its thread reads after the piece: another's
    /// weights, or what the thread begins with of the `next` large work.
    pub(crate) fn each_reading<T: Send>(
        &self,
        pieces: Vec<(Stretch, T)>,
        next: &[Stretch],
        work: usize,
        f: impl Fn(T, Stretch) + Send + Sync,
    ) {
        self.ask_ahead(next);
        let followers = self.followers(pieces.iter().map(|(weights, _)| *weights).collect(), next);
        self.each(pieces.into_iter().zip(followers).collect(), work, |((_, piece), then)| f(piece, then));
    }

    /// What each piece's thread reads after it, if pieces begin with `first` and threads with `next` of the work that follows.
    fn followers(&self, first: Vec<Stretch>, next: &[Stretch]) -> Vec<Stretch> {
        let pieces = first.len();
        let mut followers = first;
        followers.rotate_left(usize::from(pieces > 0));
        for thread in 0..self.count {
            let end = self.first_piece(thread + 1, pieces);
            if end > self.first_piece(thread, pieces) {
                followers[end - 1] = next.get(thread).copied().unwrap_or_default();
            }
        }
        followers
    }

    /// How many outputs a piece of a product of `rows` with `outputs` should have: a multiple of sixteen. Several pieces a thread, so that
    /// all end at about the same time. With few rows memory is what is waited for, and it is read at full speed only some way into a
    /// piece: two a thread. Many rows are to come into the cache for many outputs. Where nobody shares, a few rows pass 4096 outputs, whose
    /// results stay in the cache.
    pub(crate) fn outputs_a_piece(&self, outputs: usize, rows: usize) -> usize {
        let (pieces, most) = match (self.count, rows) {
            (1, ..=16) => return 4096,
            (1, _) => return 256,
            (_, ..64) => (2, 512),
            _ => (8, 256),
        };
        (outputs / (self.count * pieces)).next_multiple_of(16).clamp(16, most)
    }
}

/// Memory that is only asked for, and may be gone by then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stretch {
    begin: usize,
    bytes: usize,
}

impl Stretch {
    /// Null if there is none.
    pub(super) fn begin(self) -> *const u8 {
        std::ptr::without_provenance(self.begin)
    }
}

impl From<&[u8]> for Stretch {
    fn from(memory: &[u8]) -> Self {
        Self { begin: memory.as_ptr().addr(), bytes: memory.len() }
    }
}

/// What all threads are to call, each with its number; the caller's is 0.
type Work<'a> = dyn Fn(usize) + Sync + 'a;

/// Threads that wait for work.
struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// One caller at a time.
    turn: Mutex<()>,
}

struct Shared {
    /// Counts the works; the helpers look at it.
    number: AtomicUsize,
    /// The work of this number, valid while `busy` is not 0. Written by the caller alone, while it is 0.
    work: UnsafeCell<Option<*const Work<'static>>>,
    /// Helpers that have not finished the work of this number.
    busy: AtomicUsize,
    /// Some helper's call panicked.
    panicked: AtomicBool,
    /// Helpers are to end.
    ends: AtomicBool,
    /// Whether each helper sleeps.
    asleep: Vec<AtomicBool>,
    /// What each helper asks memory for while it waits.
    ahead: Vec<Ahead>,
}

/// A stretch that a helper is told. The caller writes it and the helper reads it, each whenever it likes: the helper may see the beginning
/// of one and the length of another, and then asks for something useless.
#[derive(Default)]
struct Ahead {
    begin: AtomicUsize,
    bytes: AtomicUsize,
}

impl Ahead {
    fn set(&self, stretch: Stretch) {
        self.begin.store(stretch.begin, Ordering::Relaxed);
        self.bytes.store(stretch.bytes.min(AHEAD_BYTES), Ordering::Relaxed);
    }
}

/// What a helper has asked for.
#[derive(Default)]
struct Asked {
    begin: usize,
    bytes: usize,
}

impl Asked {
    /// Asks for some more of a stretch; whether there was any.
    fn some_more(&mut self, ahead: &Ahead) -> bool {
        let begin = ahead.begin.load(Ordering::Relaxed);
        if begin != self.begin {
            *self = Self { begin, bytes: 0 };
        }
        if self.bytes >= ahead.bytes.load(Ordering::Relaxed) {
            return false;
        }
        for line in (self.bytes..self.bytes + ASKED_AT_ONCE).step_by(64) {
            prefetch::<2, u8>(std::ptr::without_provenance(begin.wrapping_add(line)));
        }
        self.bytes += ASKED_AT_ONCE;
        true
    }
}

// SAFETY: `work` is written while no helper reads it (`busy` is 0 and the number is old) and read after the number was seen to
// change; what it points to is `Sync`, and outlives `busy`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Pool {
    fn new(helpers: usize) -> Result<Self, KernelError> {
        let shared = Arc::new(Shared {
            number: AtomicUsize::new(0),
            work: UnsafeCell::new(None),
            busy: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            ends: AtomicBool::new(false),
            asleep: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
            ahead: (0..helpers).map(|_| Ahead::default()).collect(),
        });
        let mut pool = Self { shared, helpers: Vec::with_capacity(helpers), turn: Mutex::new(()) };
        for index in 0..helpers {
            let shared = Arc::clone(&pool.shared);
            let helper =
                std::thread::Builder::new().name(format!("cpu-{}", index + 1)).spawn(move || shared.help(index));
            // The helpers that did start end with the pool.
            let helper =
                helper.map_err(|error| KernelError::DeviceLost { device: "cpu".into(), reason: error.to_string() })?;
            pool.helpers.push(helper);
        }
        Ok(pool)
    }

    /// Has every thread, this one too, call `work` once; returns when all have.
    fn run(&self, work: &Work<'_>) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The pointer is read by helpers alone, before they lower `busy`, and this function
        // does not end, nor unwinds, before `busy` is 0.
        let erased = unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(std::ptr::from_ref(work)) };
        // SAFETY: `busy` is 0, so that no helper reads; `turn` keeps other callers away.
        unsafe { *shared.work.get() = Some(erased) };
        shared.busy.store(self.helpers.len(), Ordering::Relaxed);
        shared.number.fetch_add(1, Ordering::SeqCst);
        self.wake();
        let own = catch_unwind(AssertUnwindSafe(|| work(0)));
        let mut looks = 0;
        while shared.busy.load(Ordering::Acquire) != 0 {
            looks += 1;
            if looks < LOOKS_FOR_THE_END { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let helpers_panicked = shared.panicked.swap(false, Ordering::Relaxed);
        match own {
            Err(panic) => resume_unwind(panic),
            Ok(()) => assert!(!helpers_panicked, "a thread of the CPU backend panicked"),
        }
    }

    fn wake(&self) {
        for (asleep, helper) in self.shared.asleep.iter().zip(&self.helpers) {
            if asleep.load(Ordering::SeqCst) {
                Thread::unpark(helper.thread());
            }
        }
    }
}

impl Shared {
    /// A helper's life.
    fn help(&self, index: usize) {
        let (mut seen, mut asked) = (0, Asked::default());
        loop {
            self.await_work(index, seen, &mut asked);
            seen = self.number.load(Ordering::Acquire);
            if self.ends.load(Ordering::Relaxed) {
                return;
            }
            // SAFETY: the number has changed, so that the work was written before; it stays while `busy` counts this helper.
            let work = unsafe { (*self.work.get()).map(|work| &*work) };
            if let Some(work) = work
                && catch_unwind(AssertUnwindSafe(|| work(index + 1))).is_err()
            {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }

    /// Returns when the number is not `seen` any more.
    fn await_work(&self, index: usize, seen: usize, asked: &mut Asked) {
        for _ in 0..LOOKS {
            if self.number.load(Ordering::Acquire) != seen {
                return;
            }
            if !asked.some_more(&self.ahead[index]) {
                std::hint::spin_loop();
            }
        }
        self.asleep[index].store(true, Ordering::SeqCst);
        // Looked at once more after the flag stands: whoever changes the number later sees the flag and wakes this thread.
        while self.number.load(Ordering::SeqCst) == seen {
            std::thread::park();
        }
        self.asleep[index].store(false, Ordering::SeqCst);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        self.shared.number.fetch_add(1, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // A helper catches every panic of its work; there is nothing to report.
            let _ = helper.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_piece_is_done_once_however_long_the_threads_slept() {
        for count in [1, 2, 3, 7] {
            let threads = Threads::new(count).unwrap();
            for round in 0..2_000 {
                let mut done = vec![0; 37];
                threads
                    .each(done.iter_mut().enumerate().collect(), usize::MAX, |(index, place)| *place += index + round);
                assert!(done.iter().enumerate().all(|(index, &place)| place == index + round), "{count} threads");
                if round % 500 == 0 {
                    std::thread::park_timeout(Duration::from_millis(5));
                }
            }
        }
    }

    #[test]
    fn memory_that_is_gone_may_be_asked_for() {
        let threads = Threads::new(3).unwrap();
        for begin in [0, 8, usize::MAX - 100] {
            threads.ask_ahead(&[Stretch { begin, bytes: usize::MAX }; 2]);
            std::thread::park_timeout(Duration::from_millis(1));
            let done = AtomicUsize::new(0);
            threads.each((0..10).collect(), usize::MAX, |value: usize| {
                done.fetch_add(value, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 45);
        }
    }

    #[test]
    fn a_piece_is_followed_by_its_threads_next_and_the_last_by_the_next_work() {
        let at = |begin| Stretch { begin, bytes: 64 };
        for (count, pieces, next, want) in [
            (1, 3, vec![9], vec![2, 3, 9]),
            (2, 4, vec![8, 9], vec![2, 8, 4, 9]),
            (3, 2, vec![7, 8, 9], vec![8, 9]),
            (2, 3, vec![], vec![0, 3, 0]),
            (2, 0, vec![8, 9], vec![]),
        ] {
            let followers = |list: Vec<usize>| list.into_iter().map(at).collect::<Vec<_>>();
            let found = Threads::new(count).unwrap().followers(followers((1..=pieces).collect()), &followers(next));
            let found: Vec<usize> = found.into_iter().map(|stretch| stretch.begin).collect();
            assert_eq!(found, want, "{count} threads, {pieces} pieces");
        }
    }

    #[test]
    fn a_stretch_is_asked_for_once_and_no_more_than_stays_in_the_cache() {
        let pool = Pool::new(1).unwrap();
        let (ahead, mut asked) = (&pool.shared.ahead[0], Asked::default());
        assert!(!asked.some_more(ahead), "nothing was told");
        for (begin, bytes, times) in [(4096, 3000, 3), (8192, usize::MAX, AHEAD_BYTES / ASKED_AT_ONCE)] {
            ahead.set(Stretch { begin, bytes });
            assert_eq!((0..10_000).filter(|_| asked.some_more(ahead)).count(), times, "{bytes} bytes");
        }
    }

    #[test]
    fn pieces_begin_with_whole_columns_and_all_threads_have_some() {
        for count in [1, 2, 3, 16] {
            let threads = Threads::new(count).unwrap();
            for (outputs, rows) in
                (1..5000).step_by(7).flat_map(|outputs| [1, 16, 63, 64, 512].map(|rows| (outputs, rows)))
            {
                let step = threads.outputs_a_piece(outputs, rows);
                assert!(step > 0 && step.is_multiple_of(16), "{count} threads, {outputs} outputs, {rows} rows: {step}");
                let enough = outputs.div_ceil(step) >= count || outputs < 32 * count;
                assert!(count == 1 || enough, "{count} threads, {outputs} outputs, {rows} rows: {step}");
            }
        }
    }

    #[test]
    fn callers_take_turns() {
        let threads = Threads::new(3).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let sum = AtomicUsize::new(0);
                        threads.each((0..10).collect(), usize::MAX, |value: usize| {
                            sum.fetch_add(value, Ordering::Relaxed);
                        });
                        assert_eq!(sum.into_inner(), 45);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_threads_go_on() {
        let threads = Threads::new(3).unwrap();
        for bad in 0..20 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                threads.each((0..20).collect(), usize::MAX, |value: usize| assert!(value != bad, "as asked"));
            }));
            assert!(outcome.is_err());
        }
        let done = AtomicUsize::new(0);
        threads.each((0..20).collect(), usize::MAX, |_: usize| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 20);
    }

    #[test]
    fn threads_that_never_worked_end() {
        for _ in 0..50 {
            drop(Threads::new(4).unwrap());
        }
    }
}
