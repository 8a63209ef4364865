//! The backend's threads: work is cut into pieces that each own a part of the output, never a part of a sum.

use std::sync::Arc;

use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};

use crate::KernelError;

/// Multiply-adds below which handing work to other threads costs more than it saves: waking them takes some microseconds, in
/// which one thread does about this much.
const INLINE_BELOW_WORK: usize = 200_000;

/// A fixed number of threads.
#[derive(Clone)]
pub(crate) struct Threads {
    pool: Option<Arc<rayon::ThreadPool>>,
    count: usize,
}

impl Threads {
    /// `count` threads, at least one. One thread means the caller's own.
    pub(crate) fn new(count: usize) -> Result<Self, KernelError> {
        let count = count.max(1);
        if count == 1 {
            return Ok(Self { pool: None, count });
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(count)
            .thread_name(|index| format!("cpu-{index}"))
            .build()
            .map_err(|error| KernelError::DeviceLost { device: "cpu".into(), reason: error.to_string() })?;
        Ok(Self { pool: Some(Arc::new(pool)), count })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Calls `f` once for each piece, on any thread, in any order; on this one when all the work is small.
    pub(crate) fn each<T: Send>(&self, pieces: Vec<T>, work: usize, f: impl Fn(T) + Send + Sync) {
        match &self.pool {
            Some(pool) if work >= INLINE_BELOW_WORK && pieces.len() > 1 => {
                pool.install(|| pieces.into_par_iter().with_max_len(1).for_each(f));
            }
            _ => pieces.into_iter().for_each(f),
        }
    }

    /// How many outputs a piece of a product with `outputs` should have: a multiple of sixteen, several pieces a thread.
    pub(crate) fn outputs_a_piece(&self, outputs: usize) -> usize {
        if self.count == 1 {
            return 64;
        }
        (outputs / (self.count * 8)).next_multiple_of(16).clamp(16, 64)
    }
}
