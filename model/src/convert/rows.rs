//! The numbers of one tensor, row by row: read in pieces, turned so that inputs run fastest, and written in another format.
//!
//! What is in the wanted format already is copied. Of an int8 matrix that becomes Q8_0, each block whose numbers share a scale that
//! a half can hold is that scale and those very integers; only the others are quantised anew. Rows do not depend on each other, so
//! that the bytes are the same for any number of threads and any size of the pieces.

use std::thread;

use super::plan::{Tensor, exact_half};
use crate::{BlockType, Format, Layout, MatrixSource, Model, ModelError, QuantizeError, TensorShape, WeightSource};

/// Bytes of a piece, as read or as written, whichever is more. An expert's matrix of Grok-1 is three of them.
pub(super) const PIECE: usize = 64 << 20;
/// Rows that are turned together: as many bytes lie side by side in the source, a cache line's worth.
const TILE: usize = 64;
/// Numbers below which a second thread does not pay.
const SINGLE: usize = 1 << 16;

/// Hands the bytes of this tensor to `sink`, in order; how many numbers became zero because they are too small for the format.
pub(super) fn write(
    model: &Model,
    tensor: &Tensor,
    threads: usize,
    sink: &mut dyn FnMut(&[u8]) -> Result<(), ModelError>,
) -> Result<usize, ModelError> {
    if let TensorShape::Vector(_) = tensor.name.shape(model.config()) {
        let bytes: Vec<u8> = model.vector(&tensor.name)?.iter().flat_map(|number| number.to_le_bytes()).collect();
        return sink(&bytes).map(|()| 0);
    }
    let matrix = model.matrix(&tensor.name)?;
    write_matrix(&*matrix, tensor.format, threads, PIECE, sink)
}

fn write_matrix(
    matrix: &dyn MatrixSource,
    target: Format,
    threads: usize,
    piece: usize,
    sink: &mut dyn FnMut(&[u8]) -> Result<(), ModelError>,
) -> Result<usize, ModelError> {
    let spec = matrix.spec();
    let lengths = (spec.format.row_bytes(spec.inputs), target.row_bytes(spec.inputs));
    let (Some(row_in), Some(row_out)) = lengths else {
        let expected = format!("rows of whole blocks, from {} to {target}", spec.format);
        return Err(ModelError::invalid(&*spec.name, expected, format!("rows of {}", spec.inputs)));
    };
    if spec.layout == Layout::InOut && matches!(spec.format, Format::Blocks(_)) {
        return Err(ModelError::invalid(&*spec.name, "blocks along the inputs", "across them"));
    }
    let scales = matrix.scales()?;
    let rows_at_once = (piece / row_in.max(row_out).max(1)).clamp(1, spec.outputs.max(1));
    let mut raw = vec![0; rows_at_once * row_in];
    let mut out = vec![0; rows_at_once * row_out];
    let mut lost = 0;
    for expert in 0..spec.experts {
        for first in (0..spec.outputs).step_by(rows_at_once) {
            let count = rows_at_once.min(spec.outputs - first);
            let (raw, out) = (&mut raw[..count * row_in], &mut out[..count * row_out]);
            read(matrix, expert, first, count, raw)?;
            let rows = Rows { matrix, target, scales: &scales, raw, expert, first, count };
            lost += rows.encode(threads, row_out, out)?;
            sink(out)?;
        }
    }
    Ok(lost)
}

/// Reads rows as they lie: side by side, or each input's outputs side by side.
fn read(
    matrix: &dyn MatrixSource,
    expert: usize,
    first: usize,
    count: usize,
    raw: &mut [u8],
) -> Result<(), ModelError> {
    let spec = matrix.spec();
    let (inputs, outputs) = (spec.inputs as u64, spec.outputs as u64);
    let (expert, first) = (expert as u64, first as u64);
    if spec.layout == Layout::OutIn || count == spec.outputs {
        let row = raw.len() as u64 / count.max(1) as u64;
        return matrix.read((expert * outputs + first) * row, raw);
    }
    let size = raw.len() / (count * spec.inputs);
    for (input, run) in (0..inputs).zip(raw.chunks_mut(count * size)) {
        matrix.read(((expert * inputs + input) * outputs + first) * size as u64, run)?;
    }
    Ok(())
}

/// Some rows of one expert, as read.
struct Rows<'a> {
    matrix: &'a dyn MatrixSource,
    target: Format,
    scales: &'a [f32],
    raw: &'a [u8],
    expert: usize,
    first: usize,
    count: usize,
}

impl Rows<'_> {
    /// Numbers that became zero.
    fn encode(&self, threads: usize, row_out: usize, out: &mut [u8]) -> Result<usize, ModelError> {
        let threads = if self.count * self.matrix.spec().inputs < SINGLE { 1 } else { threads.max(1) };
        // Whole tiles, but for the last.
        let share = self.count.div_ceil(threads).next_multiple_of(TILE);
        let work = |begin: usize, out: &mut [u8]| {
            let mut tile = Tile::default();
            let tiles = out.chunks_mut(TILE * row_out).enumerate();
            tiles.map(|(index, out)| tile.encode(self, begin + index * TILE, row_out, out)).sum()
        };
        if threads == 1 {
            return work(0, out);
        }
        thread::scope(|scope| {
            let shares = out.chunks_mut(share * row_out).enumerate();
            let start = |(index, out)| thread::Builder::new().spawn_scoped(scope, move || work(index * share, out));
            let failed = |source| ModelError::Io { path: self.matrix.spec().name.as_str().into(), source };
            let running: Vec<_> = shares.map(start).collect::<Result<_, _>>().map_err(failed)?;
            // All are joined by the scope; the first row that failed is the one that is named.
            let joined = running.into_iter().map(|thread| {
                let panicked = |_| ModelError::invalid(&*self.matrix.spec().name, "a conversion", "a panic in it");
                thread.join().map_err(panicked)?
            });
            joined.sum()
        })
    }

    fn error(&self, row: usize, index: usize, error: &QuantizeError) -> ModelError {
        let spec = self.matrix.spec();
        let output = self.first + row;
        let place = format!("{}: expert {}, output {output}, input {index}", spec.name, self.expert);
        let (expected, found) = match error {
            QuantizeError::NotFinite { value, .. } => ("finite numbers".to_owned(), value.to_string()),
            QuantizeError::TooLarge { kind, value, .. } => {
                (format!("numbers in the range of {}", kind.name()), value.to_string())
            }
            QuantizeError::OnlyRead(kind) => ("a format that is written".to_owned(), kind.name().to_owned()),
        };
        ModelError::invalid(place, expected, found)
    }
}

/// What a thread turns at a time.
#[derive(Default)]
struct Tile {
    numbers: Vec<f32>,
    integers: Vec<i8>,
}

impl Tile {
    /// Writes the rows from `begin` on that `out` has room for; numbers that became zero.
    fn encode(&mut self, rows: &Rows<'_>, begin: usize, row_out: usize, out: &mut [u8]) -> Result<usize, ModelError> {
        let spec = rows.matrix.spec();
        let (inputs, count) = (spec.inputs, out.len() / row_out);
        self.numbers.resize(count * inputs, 0.0);
        match spec.format {
            Format::Blocks(kind) => {
                let raw = &rows.raw[begin * out_of(rows)..(begin + count) * out_of(rows)];
                kind.dequantize(raw, &mut self.numbers);
            }
            Format::F32 => turned(rows, begin, count, &mut self.numbers, f32::from_le_bytes),
            Format::Int8 { .. } => {
                self.integers.resize(count * inputs, 0);
                turned(rows, begin, count, &mut self.integers, i8::from_le_bytes);
            }
        }
        let mut lost = 0;
        for (index, out) in out.chunks_mut(row_out).enumerate() {
            let (row, span) = (begin + index, index * inputs..(index + 1) * inputs);
            let numbers = &mut self.numbers[span.clone()];
            match spec.format {
                Format::Int8 { groups } => lost += int8_row(rows, row, groups, &self.integers[span], numbers, out)?,
                // Bytes as they are, once their numbers are known to be finite.
                format if format == rows.target && format != Format::F32 => {
                    check_finite(rows, row, numbers)?;
                    out.copy_from_slice(&rows.raw[row * row_out..(row + 1) * row_out]);
                }
                _ => lost += numbers_row(rows, row, numbers, out)?,
            }
        }
        Ok(lost)
    }
}

/// Bytes of a row as read.
fn out_of(rows: &Rows<'_>) -> usize {
    rows.raw.len() / rows.count.max(1)
}

/// Rows from `begin` on with inputs running fastest, whichever way they lie.
fn turned<const SIZE: usize, T>(
    rows: &Rows<'_>,
    begin: usize,
    count: usize,
    out: &mut [T],
    value: impl Fn([u8; SIZE]) -> T,
) {
    let (inputs, raw) = (rows.matrix.spec().inputs, rows.raw.as_chunks::<SIZE>().0);
    if rows.matrix.spec().layout == Layout::OutIn {
        let raw = &raw[begin * inputs..(begin + count) * inputs];
        out.iter_mut().zip(raw).for_each(|(out, raw)| *out = value(*raw));
        return;
    }
    // Square by square, so that what was fetched for one row is still there for the next.
    for from in (0..inputs).step_by(TILE) {
        let to = (from + TILE).min(inputs);
        for row in 0..count {
            for (input, out) in (from..to).zip(&mut out[row * inputs + from..row * inputs + to]) {
                *out = value(raw[input * rows.count + begin + row]);
            }
        }
    }
}

fn check_finite(rows: &Rows<'_>, row: usize, numbers: &[f32]) -> Result<(), ModelError> {
    match numbers.iter().position(|number| !number.is_finite()) {
        None => Ok(()),
        Some(index) => Err(rows.error(row, index, &QuantizeError::NotFinite { index, value: numbers[index] })),
    }
}

fn numbers_row(rows: &Rows<'_>, row: usize, numbers: &[f32], out: &mut [u8]) -> Result<usize, ModelError> {
    let Format::Blocks(kind) = rows.target else {
        check_finite(rows, row, numbers)?;
        let words = out.as_chunks_mut::<4>().0;
        words.iter_mut().zip(numbers).for_each(|(word, number)| *word = number.to_le_bytes());
        return Ok(0);
    };
    quantized(rows, row, 0, kind, numbers, out)
}

/// Writes the numbers of a row from `input` on; how many became zero.
fn quantized(
    rows: &Rows<'_>,
    row: usize,
    input: usize,
    kind: BlockType,
    numbers: &[f32],
    out: &mut [u8],
) -> Result<usize, ModelError> {
    kind.quantize(numbers, out).map_err(|error| {
        let index = match error {
            QuantizeError::NotFinite { index, .. } | QuantizeError::TooLarge { index, .. } => input + index,
            QuantizeError::OnlyRead(_) => input,
        };
        rows.error(row, index, &error)
    })
}

fn int8_row(
    rows: &Rows<'_>,
    row: usize,
    groups: usize,
    integers: &[i8],
    numbers: &mut [f32],
    out: &mut [u8],
) -> Result<usize, ModelError> {
    let group = (integers.len() / groups.max(1)).max(1);
    let outputs = rows.matrix.spec().outputs;
    let scale = |input: usize| rows.scales[(rows.expert * groups + input / group) * outputs + rows.first + row];
    for (index, (integers, numbers)) in integers.chunks(group).zip(numbers.chunks_mut(group)).enumerate() {
        let scale = scale(index * group);
        numbers.iter_mut().zip(integers).for_each(|(number, integer)| *number = f32::from(*integer) * scale);
    }
    if rows.target != Format::Blocks(BlockType::Q8_0) {
        return numbers_row(rows, row, numbers, out);
    }
    let blocks = integers.as_chunks::<32>().0.iter().zip(numbers.as_chunks::<32>().0).zip(out.as_chunks_mut::<34>().0);
    let mut lost = 0;
    for (block, ((integers, numbers), out)) in blocks.enumerate() {
        let (first, last) = (32 * block, 32 * block + 31);
        match exact_half(scale(first)) {
            Some(half) if first / group == last / group => {
                out[..2].copy_from_slice(&half.to_le_bytes());
                out[2..].iter_mut().zip(integers).for_each(|(out, integer)| *out = *integer as u8);
            }
            _ => lost += quantized(rows, row, first, BlockType::Q8_0, numbers, out)?,
        }
    }
    Ok(lost)
}

#[cfg(test)]
mod tests;
