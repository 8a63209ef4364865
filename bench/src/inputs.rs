//! What enters a step that is timed: different tokens each time and each row, so that different experts are chosen and no cache
//! helps more than it would.

/// One id a row; never 0, which is masked.
pub(crate) fn token_ids(seed: u32, rows: usize, vocab_size: usize) -> Vec<u32> {
    (0..rows).map(|row| 1 + (mix(seed, row, 0) % (vocab_size - 1)) as u32).collect()
}

/// `[rows, width]`, for layers that are not a model's first.
pub(crate) fn hidden_states(seed: u32, rows: usize, width: usize) -> Vec<f32> {
    let number = |at: usize| (mix(seed, at / width, at % width) % 2001) as f32 / 1000.0 - 1.0;
    (0..rows * width).map(number).collect()
}

fn mix(seed: u32, row: usize, i: usize) -> usize {
    (seed as usize + 1) * 7919 + row * 104_729 + i * 31
}
