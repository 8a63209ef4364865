//! Matrices in device memory: their layout, how they are cut into shards, and how they get there.
//!
//! **Layout.** Columns (outputs) stand in blocks of 64, a workgroup's width. Within a block the inputs follow in quads of four, and a
//! quad holds its 64 columns side by side: `[experts, blocks, groups, quads, 64]` words. An int8 word is four inputs of one column;
//! an f32 quad is four rows of 64 words. Neighbouring threads so read neighbouring words, and a workgroup reads one
//! stretch of memory from end to end. A group whose length is no multiple of four ends in a quad padded with zeros.
//!
//! **Shards.** A buffer holds whole experts, or a range of blocks of one expert where one expert alone exceeds the device's limit.
//! A shard computes its columns as the whole would: no sum is ever split.

use std::ops::Range;

use grokpipe_model::{Format, Layout, MatrixSource, MatrixSpec};

use super::{
    memory::{GpuBuffer, Memory, words},
    recorder::Recorder,
};
use crate::KernelError;

/// Columns of a block; the workgroup size of the matrix kernels.
pub(super) const LANES: usize = 64;
/// Workgroups along one dimension of a dispatch.
pub(super) const WORKGROUPS_MAX: usize = 65_535;
/// Stored bytes that are in host memory at a time. Their packed copy and the driver's are as large again.
const PIECE_BYTES: usize = 16 << 20;

/// A matrix, or a stack of them, on the device.
pub struct GpuMatrix {
    pub(super) name: String,
    pub(super) experts: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) groups: usize,
    pub(super) is_float: bool,
    pub(super) shards: Vec<Shard>,
    /// `[experts, groups, outputs]`; a few unused bytes for floats.
    pub(super) scales: GpuBuffer,
}

/// Some experts' columns in one buffer.
pub(super) struct Shard {
    pub(super) experts: Range<usize>,
    pub(super) blocks: Range<usize>,
    pub(super) buffer: GpuBuffer,
}

/// Experts and column blocks of a shard.
type ShardPlan = (Range<usize>, Range<usize>);

/// Where the words of a matrix stand.
#[derive(Clone, Copy)]
struct Shape {
    experts: usize,
    inputs: usize,
    outputs: usize,
    groups: usize,
    is_float: bool,
}

impl Shape {
    fn new(spec: &MatrixSpec) -> Result<Self, KernelError> {
        let (groups, is_float) = match spec.format {
            // Blocks become floats on their way to the device.
            Format::F32 | Format::Blocks(_) => (1, true),
            Format::Int8 { groups } => (groups, false),
        };
        let bad = |expected: &str| KernelError::Shape {
            what: spec.name.clone(),
            expected: expected.into(),
            found: format!("[{}, {}, {}] in {groups} groups", spec.experts, spec.inputs, spec.outputs),
        };
        if spec.experts == 0 || spec.inputs == 0 || spec.outputs == 0 {
            return Err(bad("sizes above 0"));
        }
        if groups == 0 || !spec.inputs.is_multiple_of(groups) {
            return Err(bad("inputs in equal groups"));
        }
        if matches!(spec.format, Format::Blocks(_))
            && (spec.layout, spec.format.row_bytes(spec.inputs).is_some()) != (Layout::OutIn, true)
        {
            return Err(bad("rows of whole blocks, inputs fastest"));
        }
        if [spec.experts, spec.inputs, spec.outputs].iter().any(|&size| u32::try_from(size).is_err()) {
            return Err(bad("sizes below 2^32"));
        }
        Ok(Self { experts: spec.experts, inputs: spec.inputs, outputs: spec.outputs, groups, is_float })
    }

    fn group_length(self) -> usize {
        self.inputs / self.groups
    }

    fn quads_per_group(self) -> usize {
        self.group_length().div_ceil(4)
    }

    fn quads(self) -> usize {
        self.groups * self.quads_per_group()
    }

    fn blocks(self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    fn words_per_quad(self) -> usize {
        if self.is_float { 4 * LANES } else { LANES }
    }

    fn bytes_per_value(self) -> usize {
        if self.is_float { 4 } else { 1 }
    }

    fn block_bytes(self) -> Option<u64> {
        words(&[self.quads(), self.words_per_quad()])
    }

    /// Inputs of a quad; fewer than four at the end of a group.
    fn inputs_of(self, quad: usize) -> Range<usize> {
        let (group, within) = (quad / self.quads_per_group(), quad % self.quads_per_group());
        let begin = group * self.group_length() + within * 4;
        begin..(begin + 4).min((group + 1) * self.group_length())
    }

    /// Experts and blocks of each shard. Depends on the shape and the limit alone, so that gate and up are cut alike.
    fn plan(self, name: &str, memory: &Memory) -> Result<Vec<ShardPlan>, KernelError> {
        let limit = memory.shard_bytes();
        let block_bytes = self.block_bytes().unwrap_or(u64::MAX);
        let fitting = usize::try_from(limit / block_bytes).unwrap_or(usize::MAX);
        if fitting == 0 {
            return Err(memory.too_large(&format!("a block of {LANES} columns of {name}"), block_bytes, limit));
        }
        let blocks = self.blocks();
        if blocks <= fitting.min(WORKGROUPS_MAX) {
            let together = fitting / blocks;
            let cut = |first: usize| (first..(first + together).min(self.experts), 0..blocks);
            return Ok((0..self.experts).step_by(together).map(cut).collect());
        }
        let count = blocks.div_ceil(fitting.min(WORKGROUPS_MAX));
        let cut = |expert: usize, part: usize| (expert..expert + 1, blocks * part / count..blocks * (part + 1) / count);
        Ok((0..self.experts).flat_map(|expert| (0..count).map(move |part| cut(expert, part))).collect())
    }
}

/// A matrix of zeros, for measurements.
pub(super) fn zeros(memory: &mut Memory, recorder: &mut Recorder, spec: &MatrixSpec) -> Result<GpuMatrix, KernelError> {
    let shape = Shape::new(spec)?;
    allocate(memory, recorder, spec, shape)
}

/// Copies a matrix to the device. See the module's page; at most about 50 MB of host memory.
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
    let shape = Shape::new(spec)?;
    let matrix = allocate(memory, recorder, spec, shape)?;
    let scales = source.scales()?;
    if scales.len() != spec.scale_count() {
        return Err(KernelError::Shape {
            what: format!("scales of {}", spec.name),
            expected: format!("{} numbers", spec.scale_count()),
            found: scales.len().to_string(),
        });
    }
    let mut upload = Upload { recorder, waiting: 0 };
    for (index, piece) in scales.chunks(PIECE_BYTES / 4).enumerate() {
        upload.write(&matrix.scales, (index * PIECE_BYTES) as u64, bytemuck::cast_slice(piece))?;
    }
    match spec.layout {
        Layout::InOut => load_in_out(shape, source, &matrix, &mut upload, progress)?,
        Layout::OutIn => load_out_in(shape, source, &matrix, &mut upload, progress)?,
    }
    upload.flush()?;
    Ok(matrix)
}

fn allocate(
    memory: &mut Memory,
    recorder: &mut Recorder,
    spec: &MatrixSpec,
    shape: Shape,
) -> Result<GpuMatrix, KernelError> {
    recorder.forget_bind_groups();
    let plan = shape.plan(&spec.name, memory)?;
    let scales = memory.allocate(&format!("scales of {}", spec.name), words(&[spec.scale_count()]))?;
    let mut shards = Vec::with_capacity(plan.len());
    for (experts, blocks) in plan {
        let bytes = words(&[experts.len(), blocks.len(), shape.quads(), shape.words_per_quad()]);
        shards.push(Shard { buffer: memory.allocate(&spec.name, bytes)?, experts, blocks });
    }
    Ok(GpuMatrix {
        name: spec.name.clone(),
        experts: shape.experts,
        inputs: shape.inputs,
        outputs: shape.outputs,
        groups: shape.groups,
        is_float: shape.is_float,
        shards,
        scales,
    })
}

/// Writes to the device and waits whenever a piece's worth is on its way: the driver keeps a copy until then.
struct Upload<'a> {
    recorder: &'a mut Recorder,
    waiting: usize,
}

impl Upload<'_> {
    fn write(&mut self, buffer: &GpuBuffer, offset: u64, bytes: &[u8]) -> Result<(), KernelError> {
        self.recorder.write(buffer, offset, bytes);
        self.waiting += bytes.len();
        if self.waiting >= PIECE_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), KernelError> {
        self.waiting = 0;
        let recorder = &mut *self.recorder;
        recorder.failure.guard(|| recorder.queue.submit([]))?;
        recorder.submit_and_wait()
    }
}

impl GpuMatrix {
    /// Every (shard, first word of the block in it) that holds a block of an expert: one, always.
    fn place(&self, shape: Shape, expert: usize, block: usize) -> Option<(&Shard, u64)> {
        let shard =
            self.shards.iter().find(|shard| shard.experts.contains(&expert) && shard.blocks.contains(&block))?;
        let local = (expert - shard.experts.start) * shard.blocks.len() + block - shard.blocks.start;
        Some((shard, (local * shape.quads() * shape.words_per_quad()) as u64))
    }
}

/// Outputs run fastest: a piece is a range of quads of all columns, and gives a stretch of every block.
fn load_in_out(
    shape: Shape,
    source: &dyn MatrixSource,
    matrix: &GpuMatrix,
    upload: &mut Upload<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<(), KernelError> {
    let row_bytes = shape.outputs * shape.bytes_per_value();
    let quads_at_once = (PIECE_BYTES / (4 * row_bytes)).max(1);
    let mut stored = Vec::new();
    let mut packed = Vec::new();
    for expert in 0..shape.experts {
        for first in (0..shape.quads()).step_by(quads_at_once) {
            let quads = first..(first + quads_at_once).min(shape.quads());
            let inputs = shape.inputs_of(quads.start).start..shape.inputs_of(quads.end - 1).end;
            stored.resize(inputs.len() * row_bytes, 0);
            source.read(((expert * shape.inputs + inputs.start) * row_bytes) as u64, &mut stored)?;
            for block in 0..shape.blocks() {
                packed.clear();
                for quad in quads.clone() {
                    let rows = shape.inputs_of(quad).map(|k| &stored[(k - inputs.start) * row_bytes..][..row_bytes]);
                    if shape.is_float {
                        pack_float_rows(rows, block, &mut packed)
                    } else {
                        pack_rows(rows, block, &mut packed)
                    }
                }
                if let Some((shard, word)) = matrix.place(shape, expert, block) {
                    let at = word + (first * shape.words_per_quad()) as u64;
                    upload.write(&shard.buffer, at * 4, bytemuck::cast_slice(&packed))?;
                }
            }
            progress(stored.len() as u64);
        }
    }
    Ok(())
}

/// Appends a quad of int8: up to four rows, of which it takes the block's columns.
fn pack_rows<'a>(rows: impl Iterator<Item = &'a [u8]>, block: usize, packed: &mut Vec<u32>) {
    let start = packed.len();
    packed.resize(start + LANES, 0);
    for (j, row) in rows.enumerate() {
        let columns = &row[block * LANES..row.len().min((block + 1) * LANES)];
        for (word, &value) in packed[start..].iter_mut().zip(columns) {
            *word |= u32::from(value) << (8 * j);
        }
    }
}

/// Appends a quad of f32.
fn pack_float_rows<'a>(rows: impl Iterator<Item = &'a [u8]>, block: usize, packed: &mut Vec<u32>) {
    let start = packed.len();
    packed.resize(start + 4 * LANES, 0);
    for (j, row) in rows.enumerate() {
        let columns = &row[block * LANES * 4..row.len().min((block + 1) * LANES * 4)];
        for (word, value) in packed[start + j * LANES..].iter_mut().zip(columns.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*value);
        }
    }
}

/// Inputs run fastest: a piece is some whole blocks.
fn load_out_in(
    shape: Shape,
    source: &dyn MatrixSource,
    matrix: &GpuMatrix,
    upload: &mut Upload<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<(), KernelError> {
    let column_bytes = shape.inputs * shape.bytes_per_value();
    let blocks_at_once = (PIECE_BYTES / (LANES * column_bytes)).max(1);
    let mut stored = Vec::new();
    let mut packed = Vec::new();
    for expert in 0..shape.experts {
        for first in (0..shape.blocks()).step_by(blocks_at_once) {
            let columns = first * LANES..((first + blocks_at_once) * LANES).min(shape.outputs);
            stored.resize(columns.len() * column_bytes, 0);
            let read = read_columns(source, expert * shape.outputs + columns.start, columns.len(), &mut stored)?;
            for (index, block) in stored.chunks(LANES * column_bytes).enumerate() {
                packed.clear();
                packed.resize(shape.quads() * shape.words_per_quad(), 0);
                for (lane, column) in block.chunks(column_bytes).enumerate() {
                    pack_column(shape, column, lane, &mut packed);
                }
                if let Some((shard, word)) = matrix.place(shape, expert, first + index) {
                    upload.write(&shard.buffer, word * 4, bytemuck::cast_slice(&packed))?;
                }
            }
            progress(read);
        }
    }
    Ok(())
}

/// Reads whole columns as f32 or int8; the bytes that were stored.
fn read_columns(source: &dyn MatrixSource, first: usize, count: usize, out: &mut [u8]) -> Result<u64, KernelError> {
    let spec = source.spec();
    let stored_bytes = spec.format.row_bytes(spec.inputs).unwrap_or_default();
    let offset = (first * stored_bytes) as u64;
    let Format::Blocks(kind) = spec.format else {
        source.read(offset, out)?;
        return Ok(out.len() as u64);
    };
    let mut blocks = vec![0; count * stored_bytes];
    source.read(offset, &mut blocks)?;
    let mut numbers = vec![0.0; spec.inputs];
    for (blocks, column) in blocks.chunks(stored_bytes).zip(out.chunks_mut(4 * spec.inputs)) {
        kind.dequantize(blocks, &mut numbers);
        for (number, bytes) in numbers.iter().zip(column.as_chunks_mut::<4>().0) {
            *bytes = number.to_le_bytes();
        }
    }
    Ok(blocks.len() as u64)
}

/// Puts one column into its lane of a packed block.
fn pack_column(shape: Shape, column: &[u8], lane: usize, packed: &mut [u32]) {
    for quad in 0..shape.quads() {
        let at = quad * shape.words_per_quad() + lane;
        for (j, k) in shape.inputs_of(quad).enumerate() {
            if shape.is_float {
                let bytes = &column[k * 4..k * 4 + 4];
                packed[at + j * LANES] = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            } else {
                packed[at] |= u32::from(column[k]) << (8 * j);
            }
        }
    }
}
