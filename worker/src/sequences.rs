//! What a stage knows of the sequences that run through it, and the check of every frame against it.
//!
//! Pure: a frame goes in, a [`Step`] or a refusal comes out. The coordinator decides which blocks a sequence owns; a stage only
//! makes sure that no frame, however wrong, reaches outside the pool, another sequence's blocks, or the plan's limits.

use std::collections::HashMap;

use grokpipe_kernels::{Batch, KV_BLOCK_TOKENS, Row};
use grokpipe_proto::{
    hidden_states,
    v1::{Frame, RefusalReason, SequenceSlice},
};

use crate::sampler::Sampling;

/// What a stage may be asked, from its assignment and its model.
#[derive(Clone, Copy, Debug)]
pub struct StageLimits {
    /// The plan in force.
    pub plan_epoch: u64,
    /// Incarnation of the previous stage.
    pub previous_generation: u64,
    /// Blocks of the KV pool.
    pub kv_blocks: u32,
    /// Most tokens in a frame.
    pub max_batch_tokens: usize,
    /// Longest sequence.
    pub max_positions: usize,
    /// Ids below this exist.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Never attended to.
    pub pad_token_id: u32,
    /// Whether frames come without hidden states.
    pub is_first: bool,
    /// Whether this stage draws.
    pub is_last: bool,
}

/// Why a frame was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For programs.
    pub reason: RefusalReason,
    /// What was expected and what was found.
    pub message: String,
}

/// A position after which something is wanted of the last stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Which sequence.
    pub sequence_id: u64,
    /// Absolute position.
    pub position: u32,
    /// How to draw a token, if one is wanted.
    pub draw: Option<(Sampling, u32)>,
    /// Ids to score.
    pub target_ids: Vec<u32>,
}

/// A checked frame, ready for the device.
#[derive(Debug)]
pub struct Step {
    /// Rows and block tables.
    pub batch: Batch,
    /// One id a row.
    pub token_ids: Vec<u32>,
    /// `[rows, hidden_size]`; empty in the first stage.
    pub hidden: Vec<f32>,
    /// Rows whose logits are wanted, ascending; empty but in the last stage.
    pub wanted_rows: Vec<u32>,
    /// What is wanted of each of them.
    pub wanted: Vec<Wanted>,
}

#[derive(Clone, Debug)]
struct Sequence {
    blocks: Vec<u32>,
    /// Positions 0..length have keys and values in the pool.
    length: u32,
    sampling: Option<Sampling>,
    choice_index: u32,
}

/// All sequences of one stage under one epoch.
#[derive(Debug)]
pub struct Sequences {
    limits: StageLimits,
    open: HashMap<u64, Sequence>,
    /// Owner of each block.
    owners: HashMap<u32, u64>,
}

fn malformed(message: String) -> Refusal {
    Refusal { reason: RefusalReason::Malformed, message }
}

macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(malformed(format!($($message)+)));
        }
    };
}

impl Sequences {
    /// No sequences yet.
    pub fn new(limits: StageLimits) -> Self {
        Self { limits, open: HashMap::new(), owners: HashMap::new() }
    }

    /// Open sequences.
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Whether no sequence is open.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Checks a frame and, if it is good, takes note of what it opens, extends and closes. A refused frame changes nothing but
    /// what it closes.
    ///
    /// # Errors
    /// [`Refusal`], which the sender is told.
    pub fn accept(&mut self, frame: &Frame) -> Result<Step, Refusal> {
        self.check_origin(frame)?;
        for sequence in &frame.closed_sequences {
            self.close(*sequence);
        }
        let rows = self.check_sizes(frame)?;
        let hidden = self.hidden(frame, rows)?;
        let mut changed = Vec::with_capacity(frame.sequences.len());
        for slice in &frame.sequences {
            ensure!(
                !changed.iter().any(|(id, _): &(u64, Sequence)| *id == slice.sequence_id),
                "expected each sequence once in a frame, found sequence {} twice",
                slice.sequence_id
            );
            let sequence = self.extended(slice, &changed)?;
            changed.push((slice.sequence_id, sequence));
        }
        let step = self.step(frame, &changed, hidden)?;
        for (id, sequence) in changed {
            if let Some(previous) = self.open.get(&id) {
                previous.blocks.iter().for_each(|block| {
                    self.owners.remove(block);
                });
            }
            self.owners.extend(sequence.blocks.iter().map(|block| (*block, id)));
            self.open.insert(id, sequence);
        }
        Ok(step)
    }

    /// Forgets a sequence.
    pub fn close(&mut self, id: u64) {
        if let Some(sequence) = self.open.remove(&id) {
            for block in sequence.blocks {
                self.owners.remove(&block);
            }
        }
    }

    fn check_origin(&self, frame: &Frame) -> Result<(), Refusal> {
        let limits = &self.limits;
        if frame.plan_epoch != limits.plan_epoch {
            return Err(Refusal {
                reason: RefusalReason::StaleEpoch,
                message: format!("expected a frame of plan epoch {}, found {}", limits.plan_epoch, frame.plan_epoch),
            });
        }
        if frame.sender_generation != limits.previous_generation {
            return Err(Refusal {
                reason: RefusalReason::StaleGeneration,
                message: format!(
                    "expected a frame of generation {}, found {}",
                    limits.previous_generation, frame.sender_generation
                ),
            });
        }
        Ok(())
    }

    fn check_sizes(&self, frame: &Frame) -> Result<usize, Refusal> {
        let limits = &self.limits;
        let rows: usize = frame.sequences.iter().map(|slice| slice.token_ids.len()).sum();
        ensure!(
            (1..=limits.max_batch_tokens).contains(&rows),
            "expected 1 to {} tokens in a frame, found {rows}",
            limits.max_batch_tokens
        );
        Ok(rows)
    }

    fn hidden(&self, frame: &Frame, rows: usize) -> Result<Vec<f32>, Refusal> {
        match (&frame.hidden_states, self.limits.is_first) {
            (None, true) => Ok(Vec::new()),
            (None, false) => {
                Err(malformed("expected hidden states in a frame from an earlier stage, found none".into()))
            }
            (Some(_), true) => Err(malformed("expected no hidden states on the way into the first stage".into())),
            (Some(hidden), false) => hidden_states::decode(hidden, rows, self.limits.hidden_size).map_err(|error| {
                let damaged = matches!(error, hidden_states::HiddenStatesError::Checksum { .. });
                let reason = if damaged { RefusalReason::Checksum } else { RefusalReason::Malformed };
                Refusal { reason, message: error.to_string() }
            }),
        }
    }

    /// The sequence as it stands after this slice.
    fn extended(&self, slice: &SequenceSlice, changed: &[(u64, Sequence)]) -> Result<Sequence, Refusal> {
        let limits = &self.limits;
        let id = slice.sequence_id;
        ensure!(!slice.token_ids.is_empty(), "expected tokens of sequence {id}, found none");
        if let Some(token) = slice.token_ids.iter().find(|token| **token as usize >= limits.vocab_size) {
            return Err(malformed(format!("expected token ids below {}, found {token}", limits.vocab_size)));
        }
        let mut sequence = self.opened(slice)?;
        if let Some(keep) = slice.truncate_to {
            ensure!(
                keep <= sequence.length,
                "expected sequence {id} cut within its {} tokens, found {keep}",
                sequence.length
            );
            sequence.length = keep;
        }
        ensure!(
            slice.first_position <= sequence.length,
            "expected sequence {id} to go on at position {} or before, found {}",
            sequence.length,
            slice.first_position
        );
        let end = slice.first_position as usize + slice.token_ids.len();
        ensure!(
            end <= limits.max_positions,
            "expected positions below {}, found {} in sequence {id}",
            limits.max_positions,
            end - 1
        );
        self.take_blocks(slice, end, &mut sequence, changed)?;
        sequence.length = end as u32;
        Ok(sequence)
    }

    fn opened(&self, slice: &SequenceSlice) -> Result<Sequence, Refusal> {
        let id = slice.sequence_id;
        let Some(open) = &slice.open else {
            let known = self.open.get(&id).cloned();
            return known.ok_or_else(|| malformed(format!("expected sequence {id} to be open, found it unknown")));
        };
        ensure!(
            slice.first_position == 0,
            "expected a new sequence to start at position 0, found {} in sequence {id}",
            slice.first_position
        );
        let sampling = match open.sampling {
            None => None,
            Some(sampling) => Some(Sampling::try_from(sampling).map_err(|error| malformed(error.to_string()))?),
        };
        Ok(Sequence { blocks: Vec::new(), length: 0, sampling, choice_index: open.choice_index })
    }

    fn take_blocks(
        &self,
        slice: &SequenceSlice,
        end: usize,
        sequence: &mut Sequence,
        changed: &[(u64, Sequence)],
    ) -> Result<(), Refusal> {
        let id = slice.sequence_id;
        // A frame that comes twice brings its blocks twice; the second time they are there already.
        let repeated = !slice.new_blocks.is_empty() && sequence.blocks.ends_with(&slice.new_blocks);
        if !repeated {
            for &block in &slice.new_blocks {
                ensure!(
                    block < self.limits.kv_blocks,
                    "expected KV blocks below {}, found {block} in sequence {id}",
                    self.limits.kv_blocks
                );
                let owner = self.owners.get(&block).copied().filter(|owner| *owner != id);
                let owner =
                    owner.or_else(|| changed.iter().find(|(_, other)| other.blocks.contains(&block)).map(|c| c.0));
                if let Some(owner) = owner {
                    return Err(malformed(format!(
                        "expected a free KV block, found block {block} of sequence {owner}"
                    )));
                }
                ensure!(
                    !sequence.blocks.contains(&block),
                    "expected each KV block once, found block {block} twice in sequence {id}"
                );
                sequence.blocks.push(block);
            }
        }
        let needed = end.div_ceil(KV_BLOCK_TOKENS);
        ensure!(
            sequence.blocks.len() >= needed,
            "expected {needed} KV blocks for {end} tokens of sequence {id}, found {}",
            sequence.blocks.len()
        );
        Ok(())
    }

    fn step(&self, frame: &Frame, changed: &[(u64, Sequence)], hidden: Vec<f32>) -> Result<Step, Refusal> {
        let mut step = Step {
            batch: Batch::default(),
            token_ids: Vec::new(),
            hidden,
            wanted_rows: Vec::new(),
            wanted: Vec::new(),
        };
        for (slice, (_, sequence)) in frame.sequences.iter().zip(changed) {
            let first_row = step.batch.rows.len() as u32;
            let table_offset = step.batch.block_tables.len() as u32;
            step.batch.block_tables.extend(&sequence.blocks);
            step.batch.rows.extend(slice.token_ids.iter().zip(slice.first_position..).map(|(token, position)| Row {
                position,
                table_offset,
                attended: *token != self.limits.pad_token_id,
            }));
            step.token_ids.extend(&slice.token_ids);
            if self.limits.is_last {
                self.want(slice, sequence, first_row, &mut step)?;
            }
        }
        Ok(step)
    }

    fn want(&self, slice: &SequenceSlice, sequence: &Sequence, first_row: u32, step: &mut Step) -> Result<(), Refusal> {
        let id = slice.sequence_id;
        let mut next = slice.first_position;
        let end = slice.first_position + slice.token_ids.len() as u32;
        for wanted in &slice.wanted {
            let position = wanted.position;
            ensure!(
                (next..end).contains(&position),
                "expected wanted positions of sequence {id} ascending within {}..{end}, found {position}",
                slice.first_position
            );
            next = position + 1;
            if let Some(target) = wanted.target_ids.iter().find(|target| **target as usize >= self.limits.vocab_size) {
                return Err(malformed(format!("expected target ids below {}, found {target}", self.limits.vocab_size)));
            }
            let draw = match (wanted.draw, &sequence.sampling) {
                (false, _) => None,
                (true, Some(sampling)) => Some((*sampling, sequence.choice_index)),
                (true, None) => {
                    return Err(malformed(format!("expected sampling parameters with sequence {id}, found none")));
                }
            };
            step.wanted_rows.push(first_row + position - slice.first_position);
            step.wanted.push(Wanted { sequence_id: id, position, draw, target_ids: wanted.target_ids.clone() });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
