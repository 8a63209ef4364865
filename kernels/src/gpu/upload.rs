//! How matrices get to the device: read in pieces, put into the layout of `matrix.rs`, written.
//!
//! What is in host memory at a time does not depend on the matrix: a piece as stored, as packed, and the driver's copy.

use grokpipe_model::{BlockType, Format, Layout, MatrixSource, MatrixSpec, ModelError};

use super::{
    blocks::pack_column,
    format::{CHUNK_BYTES, Scales},
    matrix::{GpuMatrix, LANES, Shape, allocate},
    memory::{GpuBuffer, Memory},
    recorder::Recorder,
};
use crate::KernelError;

/// Stored bytes that are in host memory at a time, and packed ones that the driver keeps; of one block of columns at least.
const PIECE_BYTES: usize = 16 << 20;
/// Bytes of a block's chunks, one a column.
const ROW_OF_CHUNKS: usize = LANES * CHUNK_BYTES;

/// Copies a matrix to the device. See the module's page.
///
/// # Errors
/// As [`crate::Backend::load_matrix`].
pub(super) fn load(
    memory: &mut Memory,
    recorder: &mut Recorder,
    source: &dyn MatrixSource,
    progress: &mut dyn FnMut(u64),
) -> Result<GpuMatrix, KernelError> {
    let spec = source.spec();
    let matrix = allocate(memory, recorder, &spec.name, Shape::new(spec)?)?;
    let mut upload = Upload { matrix: &matrix, recorder, waiting: 0 };
    upload.scales_of_groups(source)?;
    match spec.layout {
        Layout::InOut => upload.in_out(source, progress)?,
        Layout::OutIn => upload.out_in(source, progress)?,
    }
    upload.flush()?;
    Ok(matrix)
}

struct Upload<'a> {
    matrix: &'a GpuMatrix,
    recorder: &'a mut Recorder,
    waiting: usize,
}

impl Upload<'_> {
    /// Writes, and waits whenever a piece's worth is on its way: the driver keeps a copy until then.
    fn write(&mut self, buffer: &GpuBuffer, offset: usize, bytes: &[u8]) -> Result<(), KernelError> {
        self.recorder.write(buffer, offset as u64, bytes);
        self.waiting += bytes.len();
        if self.waiting >= PIECE_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), KernelError> {
        self.waiting = 0;
        let recorder = &mut *self.recorder;
        recorder.failure.guard(|| recorder.queue.submit([]))?;
        recorder.submit_and_wait()
    }

    /// Writes chunks of a block from chunk `first` on, `[chunks, 64]`.
    fn write_chunks(&mut self, expert: usize, block: usize, first: usize, bytes: &[u8]) -> Result<(), KernelError> {
        let Some((shard, index)) = self.matrix.place(expert, block) else { return Ok(()) };
        self.write(&shard.chunks, (index * self.matrix.shape.chunks() + first) * ROW_OF_CHUNKS, bytes)
    }

    /// Writes all words of a block's scales, `[words, 64]`.
    fn write_scales(&mut self, expert: usize, block: usize, words: &[u32]) -> Result<(), KernelError> {
        let Some((shard, index)) = self.matrix.place(expert, block) else { return Ok(()) };
        self.write(shard.scales(), index * size_of_val(words), bytemuck::cast_slice(words))
    }

    /// The scales of int8, which lie apart in a model: `[experts, groups, outputs]`.
    fn scales_of_groups(&mut self, source: &dyn MatrixSource) -> Result<(), KernelError> {
        let (spec, Shape { outputs, groups, held, .. }) = (source.spec(), self.matrix.shape);
        let scales = source.scales()?;
        if scales.len() != spec.scale_count() {
            return Err(KernelError::Shape {
                what: format!("scales of {}", spec.name),
                expected: format!("{} numbers", spec.scale_count()),
                found: scales.len().to_string(),
            });
        }
        if held.scales != Scales::Groups {
            return Ok(());
        }
        for (expert, scales) in scales.chunks(groups * outputs).enumerate() {
            for block in 0..self.matrix.shape.blocks() {
                let mut words = vec![0; groups * LANES];
                for (scales, words) in scales.chunks(outputs).zip(words.chunks_mut(LANES)) {
                    words.iter_mut().zip(&scales[block * LANES..]).for_each(|(word, scale)| *word = scale.to_bits());
                }
                self.write_scales(expert, block, &words)?;
            }
        }
        Ok(())
    }

    /// Outputs run fastest: a piece is a range of chunks of all columns, and gives a stretch of every block.
    fn in_out(&mut self, source: &dyn MatrixSource, progress: &mut dyn FnMut(u64)) -> Result<(), KernelError> {
        let shape = self.matrix.shape;
        let number_bytes = CHUNK_BYTES / shape.held.numbers.in_a_chunk();
        let row_bytes = shape.outputs * number_bytes;
        let at_once = (PIECE_BYTES / (shape.held.numbers.in_a_chunk() * row_bytes)).max(1);
        let (mut stored, mut packed) = (Vec::new(), Vec::new());
        for expert in 0..shape.experts {
            for first in (0..shape.chunks()).step_by(at_once) {
                let chunks = first..(first + at_once).min(shape.chunks());
                let inputs = shape.inputs_of(chunks.start).start..shape.inputs_of(chunks.end - 1).end;
                stored.resize(inputs.len() * row_bytes, 0);
                source.read(((expert * shape.inputs + inputs.start) * row_bytes) as u64, &mut stored)?;
                for block in 0..shape.blocks() {
                    packed.clear();
                    packed.resize(chunks.len() * ROW_OF_CHUNKS, 0);
                    for (chunk, packed) in chunks.clone().zip(packed.chunks_mut(ROW_OF_CHUNKS)) {
                        let of = shape.inputs_of(chunk);
                        let rows = &stored[(of.start - inputs.start) * row_bytes..(of.end - inputs.start) * row_bytes];
                        match number_bytes {
                            1 => pack_rows::<1>(rows, row_bytes, block, packed),
                            _ => pack_rows::<4>(rows, row_bytes, block, packed),
                        }
                    }
                    self.write_chunks(expert, block, first, &packed)?;
                }
                progress(stored.len() as u64);
            }
        }
        Ok(())
    }

    /// Inputs run fastest: a piece is some whole blocks.
    fn out_in(&mut self, source: &dyn MatrixSource, progress: &mut dyn FnMut(u64)) -> Result<(), KernelError> {
        let (shape, format) = (self.matrix.shape, source.spec().format);
        // It was made sure that columns are whole.
        let column_bytes = format.row_bytes(shape.inputs).unwrap_or_default();
        let at_once = (PIECE_BYTES / (LANES * column_bytes)).max(1);
        let (mut stored, mut packed, mut words) = (Vec::new(), Vec::new(), Vec::new());
        let (mut chunks, mut column_words) = (Vec::new(), Vec::new());
        for expert in 0..shape.experts {
            for first in (0..shape.blocks()).step_by(at_once) {
                let columns = first * LANES..((first + at_once) * LANES).min(shape.outputs);
                stored.resize(columns.len() * column_bytes, 0);
                source.read(((expert * shape.outputs + columns.start) * column_bytes) as u64, &mut stored)?;
                for (index, block) in stored.chunks(LANES * column_bytes).enumerate() {
                    zeros(&mut packed, shape.chunks() * ROW_OF_CHUNKS);
                    zeros(&mut words, shape.scale_words() * LANES);
                    for (lane, column) in block.chunks(column_bytes).enumerate() {
                        zeros(&mut chunks, shape.chunks() * CHUNK_BYTES);
                        zeros(&mut column_words, shape.scale_words());
                        pack_column(format, shape.held, column, shape.groups, &mut chunks, &mut column_words);
                        for (row, chunk) in packed.chunks_mut(ROW_OF_CHUNKS).zip(chunks.chunks(CHUNK_BYTES)) {
                            row[lane * CHUNK_BYTES..][..CHUNK_BYTES].copy_from_slice(chunk);
                        }
                        for (row, word) in words.chunks_mut(LANES).zip(&column_words) {
                            row[lane] = *word;
                        }
                    }
                    self.write_chunks(expert, first + index, 0, &packed)?;
                    if matches!(shape.held.scales, Scales::Halves { .. } | Scales::Supers { .. }) {
                        self.write_scales(expert, first + index, &words)?;
                    }
                }
                progress(stored.len() as u64);
            }
        }
        Ok(())
    }
}

/// Puts a block's columns of some rows, numbers of `B` bytes, side by side into the chunks of these columns.
fn pack_rows<const B: usize>(rows: &[u8], row_bytes: usize, block: usize, chunks: &mut [u8]) {
    for (j, row) in rows.chunks(row_bytes).enumerate() {
        let numbers = row.as_chunks::<B>().0[block * LANES..].iter();
        for (number, chunk) in numbers.zip(chunks.as_chunks_mut::<CHUNK_BYTES>().0) {
            chunk[j * B..(j + 1) * B].copy_from_slice(number);
        }
    }
}

fn zeros<T: Clone + Default>(values: &mut Vec<T>, count: usize) {
    values.clear();
    values.resize(count, T::default());
}

/// Blocks as f32, for what is not multiplied in their own format: the router. Whole columns can be read of it.
pub(super) struct Expanded<'a> {
    source: &'a dyn MatrixSource,
    kind: BlockType,
    spec: MatrixSpec,
}

impl<'a> Expanded<'a> {
    /// `None` where the source has no blocks.
    pub(super) fn new(source: &'a dyn MatrixSource) -> Option<Self> {
        let Format::Blocks(kind) = source.spec().format else { return None };
        Some(Self { source, kind, spec: MatrixSpec { format: Format::F32, ..source.spec().clone() } })
    }
}

impl MatrixSource for Expanded<'_> {
    fn spec(&self) -> &MatrixSpec {
        &self.spec
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ModelError> {
        let (weights, bytes) = (self.kind.weights(), self.kind.bytes());
        let mut blocks = vec![0; out.len() / 4 / weights * bytes];
        self.source.read(offset / 4 / weights as u64 * bytes as u64, &mut blocks)?;
        let mut numbers = vec![0.0; out.len() / 4];
        self.kind.dequantize(&blocks, &mut numbers);
        for (number, bytes) in numbers.iter().zip(out.as_chunks_mut::<4>().0) {
            *bytes = number.to_le_bytes();
        }
        Ok(())
    }

    fn scales(&self) -> Result<Vec<f32>, ModelError> {
        Ok(Vec::new())
    }
}
