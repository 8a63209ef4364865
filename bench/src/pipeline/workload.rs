//! The frames that are timed: decodes and prefills as the coordinator would send them to the first stage. Pure.

use std::ops::Range;

use grokpipe_coordinator::{
    frames::frame_of,
    scheduler::{MicroBatch, Slice},
};
use grokpipe_kernels::KV_BLOCK_TOKENS;
use grokpipe_model::ModelConfig;
use grokpipe_proto::{
    hidden_states,
    ids::{Generation, MicroBatchId, PlanEpoch},
    v1::Frame,
};

use crate::{CHUNK_ROWS, WARM_UP_STEPS, chunks, inputs};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// Sequences that decode together from their beginning on.
    Decode {
        /// How many.
        batch: u32,
        /// Tokens of each that count.
        tokens: u32,
    },
    /// A prompt, in chunks that follow one another through the stages.
    Prefill {
        /// Its tokens.
        prompt: u32,
    },
}

/// Frames that are under way together; the step is over when the last stage has handed on all of them.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// As they enter the first stage, but for epoch, sender and number of the micro-batch.
    pub(super) frames: Vec<Frame>,
    /// Whether its time counts.
    pub(super) counts: bool,
}

impl Test {
    /// As bench results name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Decode { .. } => "decode",
            Self::Prefill { .. } => "prefill",
        }
    }

    /// Sequences.
    pub fn batch(self) -> u32 {
        match self {
            Self::Decode { batch, .. } => batch,
            Self::Prefill { .. } => 1,
        }
    }

    /// Tokens of the prompt; 0 for decodes.
    pub fn prompt(self) -> u32 {
        match self {
            Self::Decode { .. } => 0,
            Self::Prefill { prompt } => prompt,
        }
    }

    /// Tokens of a run that count.
    pub(super) fn tokens(self) -> u32 {
        match self {
            Self::Decode { batch, tokens } => batch * tokens,
            Self::Prefill { prompt } => prompt,
        }
    }

    /// Most tokens in a frame.
    pub(super) fn rows(self) -> u32 {
        match self {
            Self::Decode { batch, .. } => batch,
            Self::Prefill { prompt } => prompt.min(CHUNK_ROWS),
        }
    }

    /// Rows of the frames that are under way together: of all sequences, or the chunks of a prompt.
    pub(super) fn step_rows(self) -> Vec<u32> {
        match self {
            Self::Decode { batch, .. } => vec![batch],
            Self::Prefill { prompt } => chunks(prompt).map(|positions| positions.end - positions.start).collect(),
        }
    }

    /// KV blocks of one sequence.
    fn table(self) -> u32 {
        let positions = match self {
            Self::Decode { tokens, .. } => WARM_UP_STEPS + tokens,
            Self::Prefill { prompt } => prompt,
        };
        positions.div_ceil(KV_BLOCK_TOKENS as u32)
    }

    /// KV blocks of all sequences.
    pub(super) fn kv_blocks(self) -> u32 {
        self.batch() * self.table()
    }

    /// One run from empty sequences on, of which the first has this number. The sequences in `closed` end with it.
    pub(super) fn run(self, config: &ModelConfig, is_first: bool, sequence: u64, closed: Range<u64>) -> Vec<Step> {
        let chunks: Vec<Range<u32>> = match self {
            Self::Decode { tokens, .. } => (0..WARM_UP_STEPS + tokens).map(|at| at..at + 1).collect(),
            Self::Prefill { prompt } => chunks(prompt).collect(),
        };
        let mut frames: Vec<Frame> =
            chunks.into_iter().map(|positions| self.frame(config, is_first, sequence, positions)).collect();
        if let Some(first) = frames.first_mut() {
            first.closed_sequences = closed.collect();
        }
        match self {
            Self::Decode { .. } => {
                let step = |(index, frame)| Step { frames: vec![frame], counts: index >= WARM_UP_STEPS };
                (0..).zip(frames).map(step).collect()
            }
            Self::Prefill { .. } => vec![Step { frames, counts: true }],
        }
    }

    fn frame(self, config: &ModelConfig, is_first: bool, sequence: u64, positions: Range<u32>) -> Frame {
        let a_sequence = positions.len();
        let rows = self.batch() as usize * a_sequence;
        let ids = inputs::token_ids(positions.start, rows, config.vocab_size);
        let tokens_a_block = KV_BLOCK_TOKENS as u32;
        let blocks = positions.start.div_ceil(tokens_a_block)..positions.end.div_ceil(tokens_a_block);
        let slice = |(index, ids): (u32, &[u32])| Slice {
            sequence: (sequence + u64::from(index)).into(),
            first_position: positions.start,
            token_ids: ids.to_vec(),
            new_blocks: blocks.clone().map(|block| index * self.table() + block).collect(),
            opens: positions.start == 0,
            wants_token: false,
        };
        let hidden = || {
            let values = inputs::hidden_states(positions.start, rows, config.hidden_size);
            hidden_states::encode(&values, config.hidden_size)
        };
        let slices = (0..).zip(ids.chunks(a_sequence)).map(slice).collect();
        // Epoch, sender and number are those of whoever sends it.
        let frame =
            frame_of(PlanEpoch(0), Generation(0), &MicroBatch { id: MicroBatchId(0), slices, closed: Vec::new() }, &[]);
        Frame { hidden_states: (!is_first).then(hidden), ..frame }
    }
}

/// For people: `decode × 8`, `prefill 128`.
impl std::fmt::Display for Test {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Decode { batch, .. } => write!(f, "decode × {batch}"),
            Self::Prefill { prompt } => write!(f, "prefill {prompt}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every position of every sequence once and in order, each with a block of its own by the time it is needed.
    fn check(test: Test) {
        let config = ModelConfig::grok_1();
        let steps = test.run(&config, true, 7, 3..5);
        assert_eq!(steps[0].frames[0].closed_sequences, [3, 4]);
        let (mut positions, mut blocks) =
            (vec![0; test.batch() as usize], vec![Vec::<u32>::new(); test.batch() as usize]);
        for frame in steps.iter().flat_map(|step| &step.frames) {
            assert!(frame.sequences.iter().map(|slice| slice.token_ids.len()).sum::<usize>() <= test.rows() as usize);
            for slice in &frame.sequences {
                let at = (slice.sequence_id - 7) as usize;
                assert_eq!((slice.first_position, slice.open.is_some()), (positions[at], positions[at] == 0));
                positions[at] += slice.token_ids.len() as u32;
                blocks[at].extend(&slice.new_blocks);
                assert!(blocks[at].len() >= (positions[at] as usize).div_ceil(KV_BLOCK_TOKENS));
            }
        }
        let mut all = blocks.concat();
        all.sort_unstable();
        assert_eq!(all, (0..test.kv_blocks()).collect::<Vec<_>>(), "{test}");
        let counted = steps.iter().filter(|step| step.counts).flat_map(|step| &step.frames);
        let counted = counted.flat_map(|frame| &frame.sequences).map(|slice| slice.token_ids.len()).sum::<usize>();
        assert_eq!(counted as u32, test.tokens(), "{test}");
        let rows = |frame: &Frame| frame.sequences.iter().map(|slice| slice.token_ids.len() as u32).sum();
        let together = steps.last().map(|step| step.frames.iter().map(rows).collect());
        assert_eq!(together, Some(test.step_rows()), "{test}");
    }

    #[test]
    fn a_run_feeds_every_position_once_with_blocks_of_its_own() {
        for (batch, tokens) in [(1, 1), (1, 64), (3, 30), (8, 14)] {
            check(Test::Decode { batch, tokens });
        }
        for prompt in [1, 16, 17, 512, 513, 1500] {
            check(Test::Prefill { prompt });
        }
    }

    #[test]
    fn layers_in_the_middle_get_hidden_states() {
        let config = ModelConfig { hidden_size: 8, ..ModelConfig::grok_1() };
        let steps = Test::Decode { batch: 2, tokens: 1 }.run(&config, false, 1, 0..0);
        let hidden = steps[0].frames[0].hidden_states.as_ref().unwrap();
        assert_eq!((hidden.rows, hidden.width), (2, 8));
        assert!(hidden_states::decode(hidden, 2, 8).is_ok());
    }
}
