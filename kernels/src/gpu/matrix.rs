//! Matrices in device memory: their layout, and how they are cut into shards.
//!
//! **Layout.** Columns (outputs) stand in blocks of 64. A chunk is sixteen bytes of neighbouring inputs of one
//! column, and the chunks of a block's columns stand side by side, `[experts, blocks, chunks, 64]`: neighbouring threads read
//! neighbouring chunks, and those that share a slice of the inputs read one stretch of memory. Words of scales stand likewise in a buffer
//! of their own, `[experts, blocks, words, 64]`. `format.rs` says what chunks and words hold.
//!
//! **Shards.** A buffer holds whole experts, or a range of blocks of one expert where one expert alone exceeds the device's limit;
//! the scales are cut at the same places. A shard computes its columns as the whole would: no sum is ever split.

use std::ops::Range;

use grokpipe_model::{Format, Layout, MatrixSpec};

use super::{
    format::{CHUNK_BYTES, Held, Scales},
    memory::{GpuBuffer, Memory, product},
    recorder::Recorder,
};
use crate::{KernelError, Precision, ops::quantise::BLOCK};

/// Columns of a block, which one workgroup of the matrix kernels has, or two.
pub(super) const LANES: usize = 64;
/// Workgroups along one dimension of a dispatch.
pub(super) const WORKGROUPS_MAX: usize = 65_535;

/// A matrix, or a stack of them, on the device.
pub struct GpuMatrix {
    pub(super) name: String,
    pub(super) shape: Shape,
    pub(super) shards: Vec<Shard>,
    /// Power of two by which prefill `fast` multiplies weights that it rounds to halves; 1 where it was never in use.
    pub(super) factor: f32,
}

/// Some experts' columns.
pub(super) struct Shard {
    pub(super) experts: Range<usize>,
    pub(super) blocks: Range<usize>,
    pub(super) chunks: GpuBuffer,
    scales: Option<GpuBuffer>,
}

impl Shard {
    /// Columns of all its experts together.
    pub(super) fn columns(&self) -> usize {
        self.experts.len() * self.blocks.len() * LANES
    }

    /// The buffer of its scales. A matrix without any has its numbers bound there, which are not read as such.
    pub(super) fn scales(&self) -> &GpuBuffer {
        self.scales.as_ref().unwrap_or(&self.chunks)
    }
}

/// Experts and column blocks of a shard.
pub(super) type ShardPlan = (Range<usize>, Range<usize>);

/// Where the numbers of a matrix stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) experts: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    /// Groups of inputs that share a scale.
    pub(super) groups: usize,
    pub(super) held: Held,
}

impl Shape {
    pub(super) fn new(spec: &MatrixSpec) -> Result<Self, KernelError> {
        let held = Held::of(spec.format);
        let groups = held.groups(spec.format, spec.inputs);
        let bad = |expected: &str| KernelError::Shape {
            what: spec.name.clone(),
            expected: expected.into(),
            found: format!("[{}, {}, {}] of {}", spec.experts, spec.inputs, spec.outputs, spec.format),
        };
        if spec.experts == 0 || spec.inputs == 0 || spec.outputs == 0 {
            return Err(bad("sizes above 0"));
        }
        if matches!(spec.format, Format::Blocks(_))
            && (spec.layout, spec.format.row_bytes(spec.inputs).is_some()) != (Layout::OutIn, true)
        {
            return Err(bad("rows of whole blocks, inputs fastest"));
        }
        if groups == 0 || !spec.inputs.is_multiple_of(groups) {
            return Err(bad("inputs in equal groups"));
        }
        if [spec.experts, spec.inputs, spec.outputs].iter().any(|&size| u32::try_from(size).is_err()) {
            return Err(bad("sizes below 2^32"));
        }
        Ok(Self { experts: spec.experts, inputs: spec.inputs, outputs: spec.outputs, groups, held })
    }

    /// Whether another has the same sizes, however it is held.
    pub(super) fn is_as_large_as(self, other: Self) -> bool {
        (self.experts, self.inputs, self.outputs) == (other.experts, other.inputs, other.outputs)
    }

    /// Whether groups are whole chunks, so that rows need not be read number by number.
    pub(super) fn is_whole(self) -> bool {
        self.held.halved() || (self.inputs / self.groups).is_multiple_of(self.held.numbers.in_a_chunk())
    }

    /// How it can be multiplied where `wanted` is: with 8-bit inputs if groups are whole blocks of these.
    pub(super) fn precision(self, wanted: Precision) -> Precision {
        let blocks_share_scales =
            self.held.scales != Scales::Groups || (self.inputs / self.groups).is_multiple_of(BLOCK);
        if self.held.has_fast() && blocks_share_scales { wanted } else { Precision::Exact }
    }

    pub(super) fn blocks(self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    /// Chunks of a column.
    pub(super) fn chunks(self) -> usize {
        self.held.chunks(self.inputs, self.groups)
    }

    /// Words of scales of a column.
    pub(super) fn scale_words(self) -> usize {
        self.held.scale_words(self.groups)
    }

    /// Inputs of a chunk; fewer than it has room for at the end of a group.
    pub(super) fn inputs_of(self, chunk: usize) -> Range<usize> {
        let (length, in_a_chunk) = (self.inputs / self.groups, self.held.numbers.in_a_chunk());
        let a_group = length.div_ceil(in_a_chunk);
        let (group, within) = (chunk / a_group, chunk % a_group);
        let begin = group * length + within * in_a_chunk;
        begin..(begin + in_a_chunk).min((group + 1) * length)
    }

    /// Bytes of chunks, and of scales, that so many blocks take.
    fn bytes(self, blocks: usize) -> [Option<u64>; 2] {
        [
            product(&[blocks, self.chunks(), LANES, CHUNK_BYTES]),
            product(&[blocks, self.scale_words(), LANES, size_of::<u32>()]),
        ]
    }

    /// Bytes that all of it takes.
    pub(super) fn held_bytes(self) -> Option<u64> {
        let [chunks, scales] = self.bytes(self.experts.checked_mul(self.blocks())?);
        chunks?.checked_add(scales?)
    }

    /// Experts and blocks of each shard. Depends on the shape and the limit alone, so that gate and up are cut alike. Scales take less
    /// than numbers and so have room wherever these do.
    /// The bytes of a block where one alone exceeds the limit.
    pub(super) fn plan(self, limit: u64) -> Result<Vec<ShardPlan>, u64> {
        let block_bytes = self.bytes(1)[0].unwrap_or(u64::MAX);
        let fitting = usize::try_from(limit / block_bytes).unwrap_or(usize::MAX);
        if fitting == 0 {
            return Err(block_bytes);
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

/// A matrix of zeros of this shape.
///
/// # Errors
/// [`KernelError::Limit`] when a block of columns exceeds a binding; those of an allocation.
pub(super) fn allocate(
    memory: &mut Memory,
    recorder: &mut Recorder,
    name: &str,
    shape: Shape,
) -> Result<GpuMatrix, KernelError> {
    recorder.forget_bind_groups();
    let limit = memory.shard_bytes();
    let too_large = |needed| memory.too_large(&format!("a block of {LANES} columns of {name}"), needed, limit);
    let plan = shape.plan(limit).map_err(too_large)?;
    let mut shards = Vec::with_capacity(plan.len());
    for (experts, blocks) in plan {
        let [chunks, scales] = shape.bytes(experts.len() * blocks.len());
        let chunks = memory.allocate(name, chunks)?;
        let scales = match scales {
            Some(0) => None,
            bytes => Some(memory.allocate(&format!("scales of {name}"), bytes)?),
        };
        shards.push(Shard { experts, blocks, chunks, scales });
    }
    Ok(GpuMatrix { name: name.to_string(), shape, shards, factor: 1.0 })
}

impl GpuMatrix {
    /// The shard that holds a block of an expert, and which of its blocks that is: one, always.
    pub(super) fn place(&self, expert: usize, block: usize) -> Option<(&Shard, usize)> {
        let shard =
            self.shards.iter().find(|shard| shard.experts.contains(&expert) && shard.blocks.contains(&block))?;
        Some((shard, (expert - shard.experts.start) * shard.blocks.len() + block - shard.blocks.start))
    }
}
