//! A matrix in the CPU's memory: int8 stays int8, blocks stay as stored, outputs are rows, and every scale group begins at a
//! multiple of 16 inputs.
//!
//! A checkpoint's matrix has its outputs fastest; a dot product wants its inputs fastest. So loading transposes, piece by piece:
//! one bounded buffer of stored bytes beside the matrix itself, and for packed int8 one expert's numbers. Groups whose length is not a
//! multiple of 16 are filled with zeros, which add nothing to a sum, so that products need no special case for a rest.

use bytemuck::Pod;
use grokpipe_model::{BlockType, Format, Layout, MatrixSource, MatrixSpec};
use half::{bf16, f16};

use super::{
    memory::{Arena, ArenaPart, product, zeroed},
    packed::{BLOCK, Packed},
    simd::{LANES, Packing},
    threads::Threads,
};
use crate::KernelError;

/// Stored bytes read at a time.
const PIECE_BYTES: usize = 4 << 20;
/// Side of the square that is transposed in the first-level cache.
const TILE: usize = 64;
/// Side of the squares in it that are transposed in registers.
const SQUARE: usize = 8;

/// The numbers, `[experts, outputs, groups * padded_group]`.
pub(crate) enum Values {
    F32(ArenaPart<f32>),
    F16(ArenaPart<f16>),
    Bf16(ArenaPart<bf16>),
    I8(ArenaPart<i8>),
    /// Rows of blocks, without filling: that is added when they become numbers.
    Blocks(BlockType, ArenaPart<u8>),
    /// For 8-bit inputs.
    Packed(Packed),
}

/// One matrix, or one an expert.
pub struct CpuMatrix {
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) experts: usize,
    pub(super) groups: usize,
    /// Inputs of a group.
    pub(super) group: usize,
    /// Inputs of a group with its filling.
    pub(super) padded_group: usize,
    pub(super) values: Values,
    /// `[experts, outputs, groups]`; for floats a single 1.
    pub(super) scales: Vec<f32>,
}

impl CpuMatrix {
    /// Length of a padded row of inputs.
    pub(super) fn padded_inputs(&self) -> usize {
        self.groups * self.padded_group
    }

    /// Whether a row of inputs must be padded before a product.
    pub(super) fn is_padded(&self) -> bool {
        self.group != self.padded_group
    }

    /// Whether rows as this matrix wants them are those that `other` wants.
    pub(super) fn shares_rows_with(&self, other: &Self) -> bool {
        match (&self.values, &other.values) {
            (Values::Packed(_), Values::Packed(_)) => true,
            (Values::Packed(_), _) | (_, Values::Packed(_)) => false,
            _ => (self.group, self.padded_group) == (other.group, other.padded_group),
        }
    }

    /// Weights in memory of an expert's outputs from `output` on, more or less: to be asked for ahead.
    pub(super) fn bytes_from(&self, expert: usize, output: usize) -> &[u8] {
        let all: &[u8] = match &self.values {
            Values::F32(values) => bytemuck::cast_slice(values),
            Values::F16(values) => bytemuck::cast_slice(values),
            Values::Bf16(values) => bytemuck::cast_slice(values),
            Values::I8(values) => bytemuck::cast_slice(values),
            Values::Blocks(_, bytes) => bytes,
            Values::Packed(packed) => bytemuck::cast_slice(&packed.words),
        };
        let an_expert = all.len() / self.experts;
        &all[expert * an_expert..][..an_expert][an_expert * output / self.outputs..]
    }

    /// Multiply-adds of one row with one expert.
    pub(super) fn work(&self) -> usize {
        self.padded_inputs() * self.outputs
    }

    /// Reads a matrix, and packs it where it can be and `packing` says how; `progress` is told the stored bytes of each piece.
    pub(super) fn load(
        source: &dyn MatrixSource,
        packing: Option<Packing>,
        threads: &Threads,
        arena: &mut Arena,
        device: &str,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, KernelError> {
        let spec = source.spec();
        let groups = match spec.format {
            Format::F32 | Format::Blocks(BlockType::F16 | BlockType::Bf16) => None,
            Format::Int8 { groups } => Some(groups),
            Format::Blocks(kind) => return Self::load_blocks(source, kind, packing, threads, arena, device, progress),
        };
        let (is_float, groups) = (groups.is_none(), groups.unwrap_or(1));
        if groups == 0 || spec.inputs == 0 || spec.outputs == 0 || !spec.inputs.is_multiple_of(groups) {
            return Err(KernelError::Shape {
                what: spec.name.clone(),
                expected: "inputs that divide into scale groups".into(),
                found: format!("{} inputs, {} outputs, {groups} groups", spec.inputs, spec.outputs),
            });
        }
        let group = spec.inputs / groups;
        let padded_group = group.next_multiple_of(LANES);
        let count = product(&[spec.experts, spec.outputs, groups, padded_group], &spec.name, device)?;
        let shape = Shape { spec, group, padded_group };
        let MatrixSpec { inputs, outputs, experts, .. } = *spec;
        if let Some(packing) = packing
            && !is_float
            && group.is_multiple_of(BLOCK)
        {
            let scales = scales_by_output(source, groups)?;
            // Of one expert, filled up to whole bands. Taken first, so that the room that is found for the rest is there.
            let mut rows =
                zeroed(product(&[outputs.next_multiple_of(LANES), inputs], &spec.name, device)?, &spec.name, device)?;
            let mut packed = Packed::of_int8(spec, groups, arena, device)?;
            for (expert, scales) in scales.chunks(outputs * groups).enumerate() {
                shape.fill_expert(source, expert, &mut rows[..outputs * inputs], threads, progress)?;
                packed.pack_int8(expert, &rows, scales, groups, packing, threads);
            }
            let values = Values::Packed(packed);
            return Ok(Self { inputs, outputs, experts, groups, group, padded_group, values, scales: vec![1.0] });
        }
        let values = match spec.format {
            Format::Int8 { .. } => Values::I8(shape.filled(source, count, threads, arena, device, progress)?),
            Format::Blocks(BlockType::F16) => {
                Values::F16(shape.filled(source, count, threads, arena, device, progress)?)
            }
            Format::Blocks(BlockType::Bf16) => {
                Values::Bf16(shape.filled(source, count, threads, arena, device, progress)?)
            }
            Format::Blocks(_) => unreachable!("blocks of several numbers are loaded as blocks"),
            Format::F32 => Values::F32(shape.filled(source, count, threads, arena, device, progress)?),
        };
        let scales = if is_float { vec![1.0] } else { scales_by_output(source, groups)? };
        Ok(Self { inputs, outputs, experts, groups, group, padded_group, values, scales })
    }

    /// Blocks that are not packed are kept as they are in the file.
    fn load_blocks(
        source: &dyn MatrixSource,
        kind: BlockType,
        packing: Option<Packing>,
        threads: &Threads,
        arena: &mut Arena,
        device: &str,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, KernelError> {
        let MatrixSpec { inputs, outputs, experts, layout, ref name, format } = *source.spec();
        let row_bytes = format.row_bytes(inputs).filter(|_| layout == Layout::OutIn && inputs > 0 && outputs > 0);
        let Some(row_bytes) = row_bytes else {
            return Err(KernelError::Shape {
                what: name.clone(),
                expected: format!("rows of whole blocks of {}, inputs fastest", kind.weights()),
                found: format!("{inputs} inputs, {outputs} outputs, {layout:?}"),
            });
        };
        let padded_group = inputs.next_multiple_of(LANES);
        if let Some(packing) = packing
            && let Some(packed) = Packed::load(source, kind, packing, threads, arena, device, progress)?
        {
            let values = Values::Packed(packed);
            return Ok(Self {
                inputs,
                outputs,
                experts,
                groups: 1,
                group: inputs,
                padded_group,
                values,
                scales: vec![1.0],
            });
        }
        let mut bytes = arena.take(product(&[experts, outputs, row_bytes], name, device)?, name, device)?;
        for (index, piece) in bytes.chunks_mut(PIECE_BYTES).enumerate() {
            source.read((index * PIECE_BYTES) as u64, piece)?;
            progress(piece.len() as u64);
        }
        let (values, scales) = (Values::Blocks(kind, bytes), vec![1.0]);
        Ok(Self { inputs, outputs, experts, groups: 1, group: inputs, padded_group, values, scales })
    }
}

/// `[experts, groups, outputs]` to `[experts, outputs, groups]`.
fn scales_by_output(source: &dyn MatrixSource, groups: usize) -> Result<Vec<f32>, KernelError> {
    let spec = source.spec();
    let stored = source.scales()?;
    if stored.len() != spec.scale_count() {
        return Err(KernelError::Shape {
            what: format!("scales of {}", spec.name),
            expected: spec.scale_count().to_string(),
            found: stored.len().to_string(),
        });
    }
    let mut scales = Vec::with_capacity(stored.len());
    for expert in stored.chunks(groups * spec.outputs) {
        for n in 0..spec.outputs {
            scales.extend((0..groups).map(|g| expert[g * spec.outputs + n]));
        }
    }
    Ok(scales)
}

/// A stored number.
trait Number: Pod + Default + Send + Sync {
    const BYTES: usize;
    fn read(bytes: &[u8]) -> Self;

    /// Rows to columns.
    #[inline(always)]
    fn transpose(square: [[Self; SQUARE]; SQUARE]) -> [[Self; SQUARE]; SQUARE] {
        std::array::from_fn(|n| std::array::from_fn(|k| square[k][n]))
    }
}

impl Number for i8 {
    const BYTES: usize = 1;
    #[inline(always)]
    fn read(bytes: &[u8]) -> Self {
        bytes[0] as i8
    }

    /// Eight words of eight bytes: halves, quarters and single bytes are swapped across the diagonal. Several times as fast as
    /// moving byte by byte, which was most of the time that loading took.
    #[inline(always)]
    fn transpose(square: [[Self; SQUARE]; SQUARE]) -> [[Self; SQUARE]; SQUARE] {
        let mut words: [u64; SQUARE] = bytemuck::cast(square);
        words = words.map(u64::from_le);
        for (distance, mask) in [(4, 0x0000_0000_ffff_ffff), (2, 0x0000_ffff_0000_ffff), (1, 0x00ff_00ff_00ff_00ffu64)]
        {
            for low in (0..SQUARE).filter(|row| row & distance == 0) {
                let high = low + distance;
                let swapped = ((words[low] >> (8 * distance)) ^ words[high]) & mask;
                words[high] ^= swapped;
                words[low] ^= swapped << (8 * distance);
            }
        }
        bytemuck::cast(words.map(u64::to_le))
    }
}

impl Number for f32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn read(bytes: &[u8]) -> Self {
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
}

impl Number for f16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn read(bytes: &[u8]) -> Self {
        Self::from_le_bytes([bytes[0], bytes[1]])
    }
}

impl Number for bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn read(bytes: &[u8]) -> Self {
        Self::from_le_bytes([bytes[0], bytes[1]])
    }
}

/// Where stored numbers go.
struct Shape<'a> {
    spec: &'a MatrixSpec,
    group: usize,
    padded_group: usize,
}

impl Shape<'_> {
    /// Index of input `k` in a padded row.
    fn place(&self, k: usize) -> usize {
        k / self.group * self.padded_group + k % self.group
    }

    fn padded_inputs(&self) -> usize {
        self.spec.inputs / self.group * self.padded_group
    }

    /// Reads everything: `count` numbers with the filling.
    fn filled<T: Number>(
        &self,
        source: &dyn MatrixSource,
        count: usize,
        threads: &Threads,
        arena: &mut Arena,
        device: &str,
        progress: &mut dyn FnMut(u64),
    ) -> Result<ArenaPart<T>, KernelError> {
        let mut values = arena.take(count, &self.spec.name, device)?;
        for (expert, matrix) in values.chunks_mut(self.spec.outputs * self.padded_inputs()).enumerate() {
            self.fill_expert(source, expert, matrix, threads, progress)?;
        }
        Ok(values)
    }

    /// Reads an expert's matrix into `matrix`, whose filling is zero.
    fn fill_expert<T: Number>(
        &self,
        source: &dyn MatrixSource,
        expert: usize,
        matrix: &mut [T],
        threads: &Threads,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), KernelError> {
        let MatrixSpec { inputs, outputs, .. } = *self.spec;
        // A stored row is what is contiguous in the file: all outputs of an input, or all inputs of an output.
        let (stored_rows, stored_row) = match self.spec.layout {
            Layout::InOut => (inputs, outputs),
            Layout::OutIn => (outputs, inputs),
        };
        let row_bytes = stored_row * T::BYTES;
        let rows = stored_rows.min((PIECE_BYTES / row_bytes).max(1).next_multiple_of(TILE));
        let mut piece: Vec<u8> = zeroed(rows * row_bytes, &self.spec.name, "cpu")?;
        for first in (0..stored_rows).step_by(rows) {
            let count = rows.min(stored_rows - first);
            let piece = &mut piece[..count * row_bytes];
            let offset = (expert * stored_rows + first) as u64 * row_bytes as u64;
            source.read(offset, piece)?;
            match self.spec.layout {
                Layout::InOut => self.transpose(first, piece, matrix, threads),
                Layout::OutIn => self.copy(first, piece, matrix),
            }
            progress(piece.len() as u64);
        }
        Ok(())
    }

    /// Stored rows `first..` are inputs: puts each number at its output's row.
    fn transpose<T: Number>(&self, first: usize, piece: &[u8], matrix: &mut [T], threads: &Threads) {
        let (outputs, padded) = (self.spec.outputs, self.padded_inputs());
        let row_bytes = outputs * T::BYTES;
        let count = piece.len() / row_bytes;
        let bands: Vec<(usize, &mut [T])> = matrix.chunks_mut(TILE * padded).enumerate().collect();
        threads.each(bands, piece.len(), |(band, rows)| {
            let n0 = band * TILE;
            let width = TILE.min(outputs - n0);
            for k0 in (0..count).step_by(TILE) {
                let height = TILE.min(count - k0);
                let mut tile = [[T::default(); TILE]; TILE];
                for (k, line) in tile[..height].iter_mut().enumerate() {
                    let bytes = &piece[(k0 + k) * row_bytes + n0 * T::BYTES..][..width * T::BYTES];
                    for (value, bytes) in line.iter_mut().zip(bytes.chunks_exact(T::BYTES)) {
                        *value = T::read(bytes);
                    }
                }
                self.store_tile(&tile, first + k0, height, &mut rows[..width * padded]);
            }
        });
    }

    /// Writes a tile of inputs `k0..k0 + height` into rows of outputs.
    fn store_tile<T: Number>(&self, tile: &[[T; TILE]; TILE], k0: usize, height: usize, rows: &mut [T]) {
        let padded = self.padded_inputs();
        let start = self.place(k0);
        let contiguous = self.place(k0 + height - 1) == start + height - 1;
        if contiguous && height == TILE && rows.len() == TILE * padded {
            for (band, rows) in rows.chunks_mut(SQUARE * padded).enumerate() {
                for k in (0..TILE).step_by(SQUARE) {
                    let mut square = [[T::default(); SQUARE]; SQUARE];
                    for (line, stored) in square.iter_mut().zip(&tile[k..]) {
                        line.copy_from_slice(&stored[band * SQUARE..][..SQUARE]);
                    }
                    for (row, line) in rows.chunks_mut(padded).zip(T::transpose(square)) {
                        row[start + k..][..SQUARE].copy_from_slice(&line);
                    }
                }
            }
            return;
        }
        for (n, row) in rows.chunks_mut(padded).enumerate() {
            for (k, line) in tile[..height].iter().enumerate() {
                row[self.place(k0 + k)] = line[n];
            }
        }
    }

    /// Stored rows `first..` are outputs: they only need their filling.
    fn copy<T: Number>(&self, first: usize, piece: &[u8], matrix: &mut [T]) {
        let padded = self.padded_inputs();
        let rows = matrix[first * padded..].chunks_mut(padded);
        for (row, bytes) in rows.zip(piece.chunks(self.spec.inputs * T::BYTES)) {
            let groups = row.chunks_mut(self.padded_group).zip(bytes.chunks(self.group * T::BYTES));
            for (group, bytes) in groups {
                for (value, bytes) in group.iter_mut().zip(bytes.chunks_exact(T::BYTES)) {
                    *value = T::read(bytes);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Random, TestMatrix, seed};

    fn check(shape: (usize, usize, usize), format: Format, layout: Layout) {
        let matrix = TestMatrix::random(&mut Random::new(seed(3)), shape, format, layout);
        let mut bytes = 0;
        let threads = Threads::new(2).unwrap();
        let loaded =
            CpuMatrix::load(&matrix, None, &threads, &mut Arena::default(), "cpu", &mut |done| bytes += done).unwrap();
        assert_eq!(bytes, matrix.spec.weight_bytes(), "{shape:?} {format:?} {layout:?}");
        let (experts, inputs, outputs) = shape;
        for e in 0..experts {
            for n in 0..outputs {
                for k in 0..inputs {
                    let group = k / loaded.group;
                    let row = (e * outputs + n) * loaded.padded_inputs();
                    let index = row + group * loaded.padded_group + k % loaded.group;
                    let got = match &loaded.values {
                        Values::F32(v) => f64::from(v[index]),
                        Values::F16(v) => v[index].to_f64(),
                        Values::Bf16(v) => v[index].to_f64(),
                        Values::I8(v) => {
                            f64::from(v[index]) * f64::from(loaded.scales[(e * outputs + n) * loaded.groups + group])
                        }
                        Values::Blocks(..) | Values::Packed(_) => panic!("these have tests of their own"),
                    };
                    assert_eq!(got, matrix.at(e, k, n), "{shape:?} {format:?} {layout:?} at {e} {k} {n}");
                }
            }
        }
    }

    #[test]
    fn every_number_finds_its_place() {
        for layout in [Layout::InOut, Layout::OutIn] {
            for shape in [(1, 1, 1), (2, 88, 64), (3, 17, 5), (1, 130, 200), (2, 64, 129)] {
                check(shape, Format::F32, layout);
                check(shape, Format::Blocks(BlockType::F16), layout);
                check(shape, Format::Blocks(BlockType::Bf16), layout);
                check(shape, Format::Int8 { groups: 1 }, layout);
            }
            check((2, 88, 70), Format::Int8 { groups: 8 }, layout);
            check((1, 1024, 65), Format::Int8 { groups: 8 }, layout);
        }
    }

    #[test]
    fn groups_that_do_not_divide_the_inputs_are_refused() {
        let mut matrix = TestMatrix::random(&mut Random::new(1), (1, 16, 2), Format::Int8 { groups: 8 }, Layout::InOut);
        matrix.spec.format = Format::Int8 { groups: 3 };
        let refused =
            CpuMatrix::load(&matrix, None, &Threads::new(1).unwrap(), &mut Arena::default(), "cpu", &mut |_| ());
        assert!(matches!(refused, Err(KernelError::Shape { .. })));
    }
}
