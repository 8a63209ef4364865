//! A step's rows on the device: where each stands, its sequence's blocks, its angles, and the rows that are gathered.

use bytemuck::cast_slice;

use super::{
    GpuKvPool,
    matrix::WORKGROUPS_MAX,
    memory::{GpuBuffer, Memory, words},
    pipelines::Kernel,
    recorder::Recorder,
    shaders::MarkParams,
    shape, workgroups,
};
use crate::{Batch, KV_BLOCK_TOKENS, KernelError, ops::rope};

/// See the module's page. Buffers grow when a step needs more and are kept.
#[derive(Default)]
pub(super) struct StepBatch {
    /// `[rows]` of (position, start of the block table, slot, attended).
    places: Option<GpuBuffer>,
    tables: Option<GpuBuffer>,
    angles: Option<GpuBuffer>,
    /// Head width and bits of theta of the angles that are there.
    angles_of: Option<(usize, u32)>,
    gathered: Option<GpuBuffer>,
    gathered_count: usize,
    /// Position of each row.
    pub(super) positions: Vec<u32>,
}

impl StepBatch {
    /// Checks the batch against the pool, uploads it and marks its slots.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when a row has no slot in the pool; those of an allocation.
    pub(super) fn upload(
        &mut self,
        memory: &mut Memory,
        recorder: &mut Recorder,
        batch: &Batch,
        kv: &GpuKvPool,
    ) -> Result<(), KernelError> {
        if batch.rows.len() > WORKGROUPS_MAX {
            return Err(shape("rows of a step", &format!("at most {WORKGROUPS_MAX}"), batch.rows.len()));
        }
        let places = places(batch, kv.slots)?;
        self.positions.clear();
        self.positions.extend(batch.rows.iter().map(|row| row.position));
        self.angles_of = None;
        self.gathered_count = 0;
        let place_buffer = grow(&mut self.places, memory, recorder, "rows of a step", places.len() * 4)?;
        recorder.write(place_buffer, 0, cast_slice(&places));
        let params = MarkParams { rows: places.len() as u32 };
        recorder.dispatch(
            Kernel::MarkSlots,
            &params,
            &[place_buffer, &kv.attended],
            [workgroups(places.len()), 1, 1],
            0,
        );
        let tables = grow(&mut self.tables, memory, recorder, "block tables of a step", batch.block_tables.len())?;
        recorder.write(tables, 0, cast_slice(&batch.block_tables));
        Ok(())
    }

    /// Rows and block tables, once a step has begun.
    pub(super) fn places_and_tables(&self) -> Option<(&GpuBuffer, &GpuBuffer)> {
        Some((self.places.as_ref()?, self.tables.as_ref()?))
    }

    /// Cosines and sines of the step's positions, uploaded when first asked for.
    ///
    /// # Errors
    /// Those of an allocation.
    pub(super) fn upload_angles(
        &mut self,
        memory: &mut Memory,
        recorder: &mut Recorder,
        theta: f32,
        head_dim: usize,
    ) -> Result<(), KernelError> {
        if self.angles_of == Some((head_dim, theta.to_bits())) {
            return Ok(());
        }
        let (cos, sin) = rope::tables(&rope::frequencies(theta, head_dim), self.positions.iter().copied());
        let angles: Vec<[f32; 2]> = cos.into_iter().zip(sin).map(|(cos, sin)| [cos, sin]).collect();
        let buffer = grow(&mut self.angles, memory, recorder, "angles of a step", angles.len() * 2)?;
        recorder.write(buffer, 0, cast_slice(&angles));
        self.angles_of = Some((head_dim, theta.to_bits()));
        Ok(())
    }

    /// See [`StepBatch::upload_angles`].
    pub(super) fn angles(&self) -> Option<&GpuBuffer> {
        self.angles.as_ref()
    }

    /// Uploads rows to gather behind those of the step's earlier gathers; the buffer and where they begin in it.
    ///
    /// # Errors
    /// Those of an allocation.
    pub(super) fn upload_gather(
        &mut self,
        memory: &mut Memory,
        recorder: &mut Recorder,
        rows: &[u32],
    ) -> Result<(&GpuBuffer, u32), KernelError> {
        let needed = (self.gathered_count + rows.len()) * 4;
        if self.gathered.as_ref().is_none_or(|buffer| buffer.bytes() < needed as u64) {
            // Earlier gathers keep the buffer that they were recorded with.
            self.gathered_count = 0;
        }
        let begin = self.gathered_count;
        let buffer = grow(&mut self.gathered, memory, recorder, "rows to gather", begin + rows.len())?;
        // Not through the recorder: earlier gathers use the buffer, but not this part of it.
        recorder.failure.guard(|| recorder.queue.write_buffer(&buffer.buffer, begin as u64 * 4, cast_slice(rows)))?;
        self.gathered_count += rows.len();
        Ok((buffer, begin as u32))
    }
}

/// A buffer of at least `count` words in `held`. What used the old one keeps it until it is done.
pub(super) fn grow<'a>(
    held: &'a mut Option<GpuBuffer>,
    memory: &mut Memory,
    recorder: &mut Recorder,
    what: &str,
    count: usize,
) -> Result<&'a GpuBuffer, KernelError> {
    let bytes = words(&[count]).unwrap_or(u64::MAX);
    let fits = held.as_ref().is_some_and(|buffer| buffer.bytes() >= bytes);
    if !fits {
        recorder.forget_bind_groups();
        *held = None;
        // Powers of two, so that a growing sequence does not allocate at every step; the exact size near the limit.
        let rounded = bytes.max(256).checked_next_power_of_two().filter(|&size| size <= memory.binding_bytes());
        *held = Some(memory.allocate(what, Some(rounded.unwrap_or(bytes)))?);
    }
    Ok(held.as_ref().expect("it was made above"))
}

fn places(batch: &Batch, slots: usize) -> Result<Vec<[u32; 4]>, KernelError> {
    let blocks = slots / KV_BLOCK_TOKENS;
    let bad = |row: usize, expected: &str, found: usize| shape(&format!("block table of row {row}"), expected, found);
    let mut places = Vec::with_capacity(batch.rows.len());
    // Rows of one sequence share a table; a part of it is checked once.
    let (mut table, mut checked) = (None, 0);
    for (index, row) in batch.rows.iter().enumerate() {
        let start = row.table_offset as usize;
        let count = row.position as usize / KV_BLOCK_TOKENS + 1;
        if table != Some(start) {
            (table, checked) = (Some(start), 0);
        }
        let entries = batch
            .block_tables
            .get(start..start.saturating_add(count))
            .ok_or_else(|| bad(index, &format!("{count} entries"), batch.block_tables.len().saturating_sub(start)))?;
        if let Some(&block) = entries.iter().skip(checked).find(|&&block| block as usize >= blocks) {
            return Err(bad(index, &format!("block numbers less than {blocks}"), block as usize));
        }
        checked = checked.max(count);
        let slot = entries[count - 1] * KV_BLOCK_TOKENS as u32 + row.position % KV_BLOCK_TOKENS as u32;
        places.push([row.position, row.table_offset, slot, u32::from(row.attended)]);
    }
    Ok(places)
}
