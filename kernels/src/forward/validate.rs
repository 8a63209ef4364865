//! Is a step's input what this stage can run? Checked before the device sees any of it.

use grokpipe_model::ModelConfig;

use super::StageOptions;
use crate::{Batch, KV_BLOCK_TOKENS, KernelError};

fn shape(what: String, expected: String, found: impl ToString) -> KernelError {
    KernelError::Shape { what, expected, found: found.to_string() }
}

/// Rows, positions, tables and slots of a batch.
pub(super) fn batch(config: &ModelConfig, options: StageOptions, batch: &Batch) -> Result<(), KernelError> {
    let rows = &batch.rows;
    if rows.is_empty() || rows.len() > options.max_rows {
        return Err(shape("rows of a step".into(), format!("1 to {}", options.max_rows), rows.len()));
    }
    let mut slots = Vec::with_capacity(rows.len());
    // Tables of one sequence's rows are the same table: what was checked for the row before need not be checked again.
    let (mut table, mut checked) = (None, 0);
    for (index, row) in rows.iter().enumerate() {
        if row.position as usize >= config.max_position_embeddings {
            let expected = format!("less than {}", config.max_position_embeddings);
            return Err(shape(format!("position of row {index}"), expected, row.position));
        }
        if table != Some(row.table_offset) {
            (table, checked) = (Some(row.table_offset), 0);
        }
        let offset = row.table_offset as usize;
        let needed = row.position as usize / KV_BLOCK_TOKENS + 1;
        let Some(blocks) = batch.block_tables.get(offset..offset.saturating_add(needed)) else {
            let found = batch.block_tables.len().saturating_sub(offset);
            return Err(shape(format!("block table of row {index}"), format!("at least {needed} blocks"), found));
        };
        for &block in blocks.get(checked..).unwrap_or_default() {
            if block >= options.kv_blocks {
                let expected = format!("block numbers less than {}", options.kv_blocks);
                return Err(shape(format!("block table of row {index}"), expected, block));
            }
        }
        checked = checked.max(needed);
        slots.extend(batch.slot(row.table_offset, row.position));
    }
    slots.sort_unstable();
    match slots.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => {
            Err(shape("KV slots of a step's rows".into(), "each once".into(), format!("slot {} twice", pair[0])))
        }
        None => order(batch),
    }
}

/// Rows of one sequence stand in order of position.
fn order(batch: &Batch) -> Result<(), KernelError> {
    let wrong = batch
        .rows
        .windows(2)
        .position(|pair| pair[0].table_offset == pair[1].table_offset && pair[0].position >= pair[1].position);
    match wrong {
        Some(index) => Err(shape(
            format!("position of row {}", index + 1),
            format!("more than {}, the position before it", batch.rows[index].position),
            batch.rows[index + 1].position,
        )),
        None => Ok(()),
    }
}

/// Rows whose logits are wanted.
pub(super) fn wanted(rows: usize, wanted: &[u32]) -> Result<(), KernelError> {
    let mut least = 0;
    for &row in wanted {
        if (row as usize) < least || row as usize >= rows {
            let expected = format!("ascending rows less than {rows}");
            return Err(shape("rows whose logits are wanted".into(), expected, row));
        }
        least = row as usize + 1;
    }
    Ok(())
}

/// Length of an operand.
pub(super) fn length(what: &str, expected: usize, found: usize) -> Result<(), KernelError> {
    if expected == found { Ok(()) } else { Err(shape(what.to_owned(), expected.to_string(), found)) }
}

/// Every number of `values`, rows of `width`; `rows` names the batch's rows where they are not 0, 1, ….
pub(super) fn finite(
    what: &'static str,
    values: &[f32],
    width: usize,
    rows: Option<&[u32]>,
) -> Result<(), KernelError> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => {
            let row = index / width;
            let row = rows.and_then(|rows| rows.get(row)).map_or(row, |&row| row as usize);
            Err(KernelError::NotFinite { what, row })
        }
    }
}
