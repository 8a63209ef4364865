//! What a step computes: its rows, where each stands in its sequence, and which KV slots the sequence owns.

/// Tokens in a KV block.
pub const KV_BLOCK_TOKENS: usize = grokpipe_model::footprint::KV_BLOCK_TOKENS as usize;

/// One token of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Absolute position in its sequence.
    pub position: u32,
    /// Where the sequence's block table begins in [`Batch::block_tables`].
    pub table_offset: u32,
    /// Whether this token may be attended to; false for id 0.
    pub attended: bool,
}

/// The rows of a step. Rows of one sequence stand in order of position and share a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The rows.
    pub rows: Vec<Row>,
    /// Block numbers of all sequences, one table after the other; entry `table_offset + position / KV_BLOCK_TOKENS` is the block
    /// of a position.
    pub block_tables: Vec<u32>,
}

/// `count` sequences of one token each, at position 0, a block each: what checks and measurements run.
pub(crate) fn single_tokens(count: usize) -> Batch {
    Batch {
        rows: (0..count).map(|i| Row { position: 0, table_offset: i as u32, attended: true }).collect(),
        block_tables: (0..count as u32).collect(),
    }
}

impl Batch {
    /// Slot in the pool of `position` for a sequence whose table begins at `table_offset`; `None` when the table is too short.
    pub fn slot(&self, table_offset: u32, position: u32) -> Option<u32> {
        let block = self.block_tables.get(table_offset as usize + position as usize / KV_BLOCK_TOKENS)?;
        block.checked_mul(KV_BLOCK_TOKENS as u32)?.checked_add(position % KV_BLOCK_TOKENS as u32)
    }
}
