//! The CPU as a device: int8 weights, f32 activations, fixed sums.
//!
//! Decides how the operations use caches, instructions and threads. Its bits depend on none of these: they are the same on every
//! CPU, for any number of threads and any other rows in the call. What has to hold for that is in [`simd`] (exactly defined
//! operations only), [`product`] and [`attention`] (one order for each sum), [`math`] (our own `exp` and `tanh`) and [`threads`]
//! (pieces own outputs).

mod attention;
mod experts;
mod fast;
mod math;
mod matrix;
mod measure;
mod memory;
mod norm;
mod packed;
mod prefetch;
mod product;
mod rope;
mod simd;
mod strips;
#[cfg(test)]
pub(crate) mod tests;
mod threads;

use std::mem::take;

use grokpipe_model::{Format, MatrixSource, MatrixSpec};

pub use self::matrix::CpuMatrix;
use self::{
    attention::{Attention, AttentionRow, Keys},
    experts::{Choose, Combine, Gelu, Groups, Piece, first_weights},
    matrix::Values,
    memory::{Arena, product as checked_product, zeroed},
    norm::Norm,
    product::{Product, Rows},
    rope::RopeStore,
    simd::Isa,
    strips::{FIELDS, Quantise, height},
    threads::{Stretch, Threads},
};
use crate::{
    AttentionParams, Backend, Batch, DeviceInfo, KV_BLOCK_TOKENS, KernelError, Precision,
    ops::{attention as attention_op, rms_norm, rope as rope_op},
};

/// Name of the kernels and their version: to be raised with every change that may change a bit.
const FINGERPRINTS: [&str; 2] = ["cpu-exact/2", "cpu-fast/3"];

/// What rounding a number takes, in multiply-adds.
const ROUNDING: usize = 4;

/// Activations in memory.
pub struct CpuActivations {
    width: usize,
    /// Rows in use.
    rows: usize,
    data: Vec<f32>,
}

impl CpuActivations {
    fn used(&self) -> &[f32] {
        &self.data[..self.rows * self.width]
    }

    fn take_rows(&mut self, rows: usize) -> &mut [f32] {
        self.rows = rows;
        &mut self.data[..rows * self.width]
    }
}

/// Chosen experts in memory.
pub struct CpuSelection {
    chosen: usize,
    rows: usize,
    ids: Vec<u32>,
    probabilities: Vec<f32>,
}

impl CpuSelection {
    /// The pairs of the rows in use.
    fn groups(&self, experts: usize) -> Groups {
        Groups::new(&self.ids[..self.rows * self.chosen], experts)
    }
}

/// Keys and values in memory.
pub struct CpuKvPool {
    slots: usize,
    width: usize,
    /// Keys `[blocks, kv_heads, head_dim, 16]` and values `[slots, width]`.
    layers: Vec<(Vec<f32>, Vec<f32>)>,
    attended: Vec<bool>,
}

/// The CPU.
pub struct CpuBackend {
    info: DeviceInfo,
    isa: Isa,
    threads: Threads,
    /// Where weights for 8-bit inputs lie.
    arena: Arena,
    batch: Batch,
    /// Slot of each row.
    slots: Vec<usize>,
    /// Cosines and sines of the batch's positions, with the base and head size that they are for.
    angles: Option<(f32, usize, Vec<f32>, Vec<f32>)>,
    /// A rotated key.
    key: Vec<f32>,
    /// Results on their way: of `up`, and of each chosen expert.
    results: Vec<f32>,
    precision: Precision,
    /// What each thread begins with when the next product is done.
    next: Vec<Stretch>,
    scratch: RowScratch,
    /// For a second matrix that the same rows meet, where it wants them otherwise.
    second_scratch: RowScratch,
}

/// Copies of rows as a matrix wants them.
#[derive(Default)]
struct RowScratch {
    /// With groups filled up.
    padded: Vec<f32>,
    /// In 8 bits.
    strips: Vec<i32>,
}

impl CpuBackend {
    /// The CPU with this many threads, at least one.
    ///
    /// # Errors
    /// [`KernelError::DeviceLost`] when the system refuses the threads.
    pub fn new(threads: usize, precision: Precision) -> Result<Self, KernelError> {
        Self::with_isa(threads, precision, Isa::best())
    }

    fn with_isa(threads: usize, precision: Precision, isa: Isa) -> Result<Self, KernelError> {
        let threads = Threads::new(threads)?;
        let count = threads.count();
        let plural = if count == 1 { "" } else { "s" };
        let info = DeviceInfo {
            name: format!("cpu ({}, {count} thread{plural})", isa.name()),
            is_gpu: false,
            fingerprint: FINGERPRINTS[precision as usize].to_owned(),
            memory_bytes: memory::available_bytes(),
            invariant_below: None,
        };
        Ok(Self {
            info,
            isa,
            threads,
            arena: Arena::default(),
            batch: Batch::default(),
            slots: Vec::new(),
            angles: None,
            key: Vec::new(),
            results: Vec::new(),
            precision,
            next: Vec::new(),
            scratch: RowScratch::default(),
            second_scratch: RowScratch::default(),
        })
    }

    /// Products of the rows of `x` with matrices that all want them alike, each to its `[rows, outputs]`.
    fn products(&mut self, x: &[f32], products: &mut [(&CpuMatrix, &mut [f32])]) {
        let Self { isa, threads, scratch, next, .. } = self;
        let Some(&mut (first, _)) = products.first_mut() else { return };
        let (isa, count) = (*isa, x.len() / first.inputs);
        let groups = Groups::all(count);
        let rows = scratch.rows(isa, threads, first, x, &groups, 1);
        let step = threads.outputs_a_piece(products.iter().map(|(w, _)| w.outputs).sum(), count);
        let work = products.iter().map(|(w, _)| count * w.work()).sum();
        let mut slices: Vec<_> = products.iter_mut().map(|(w, out)| (&**w, groups.cut(w.outputs, step, out))).collect();
        let pieces = slices
            .iter_mut()
            .flat_map(|(w, slices)| groups.pieces(w.outputs, step, slices).into_iter().map(|piece| (*w, piece)));
        let pieces = pieces.map(|(matrix, piece)| (piece.weights(matrix), (matrix, piece))).collect();
        threads.each_reading(pieces, &take(next), work, |(matrix, Piece { expert, pairs, outputs, out }), then| {
            Product { matrix, expert, outputs, rows: rows.of(pairs), out, then }.run_on(isa);
        });
    }

    fn norm(&mut self, epsilon: f32, x: &CpuActivations, weight: &[f32], add: bool, out: &mut CpuActivations) {
        let isa = self.isa;
        assert!(x.width == weight.len() && x.width == out.width, "a norm's operands have one width");
        let params = rms_norm::Params { hidden_size: x.width as u32, epsilon };
        let width = x.width;
        let rows: Vec<_> = x.used().chunks(width).zip(out.take_rows(x.rows).chunks_mut(width)).collect();
        self.threads.each(rows, x.rows * width, |(x, out)| isa.run(Norm { params, x, weight, add, out }));
    }
}

impl RowScratch {
    /// Rows for products with `w`: those of `x`, copies with their groups filled up, or in 8 bits. Each row of `x` has `chosen`
    /// of the pairs of `groups`; for each of them it is there once.
    fn rows<'a>(
        &'a mut self,
        isa: Isa,
        threads: &Threads,
        w: &CpuMatrix,
        x: &'a [f32],
        groups: &Groups,
        chosen: usize,
    ) -> Rows<'a> {
        if let Values::Packed(_) = w.values {
            let a_row = w.inputs / packed::BLOCK * FIELDS;
            self.strips.resize(groups.pairs.len() * a_row, 0);
            let (mut parts, mut strips) = (Vec::new(), self.strips.as_mut_slice());
            for (_, range) in &groups.experts {
                let mut pairs = &groups.pairs[range.clone()];
                while !pairs.is_empty() {
                    let (these, rest) = pairs.split_at(height(pairs.len(), isa.packing().strip));
                    let (strip, others) = strips.split_at_mut(these.len() * a_row);
                    let rows = these.iter().map(|pair| &x[pair / chosen * w.inputs..][..w.inputs]).collect();
                    parts.push(Quantise { rows, strip });
                    (pairs, strips) = (rest, others);
                }
            }
            threads.each(parts, groups.pairs.len() * w.inputs * ROUNDING, |part| isa.run(part));
            return Rows::Strips(&self.strips, a_row);
        }
        let picked = |rows: Vec<&'a [f32]>| groups.pairs.iter().map(|pair| rows[pair / chosen]).collect();
        if !w.is_padded() {
            return Rows::Floats(picked(x.chunks_exact(w.inputs).collect()));
        }
        let padded = &mut self.padded;
        let (from, to) = (w.group, w.padded_group);
        padded.clear();
        padded.resize(x.len() / from * to, 0.0);
        for (group, padded) in x.chunks_exact(from).zip(padded.chunks_exact_mut(to)) {
            padded[..from].copy_from_slice(group);
        }
        Rows::Floats(picked(padded.chunks_exact(w.padded_inputs()).collect()))
    }
}

impl Backend for CpuBackend {
    type Matrix = CpuMatrix;
    type Vector = Vec<f32>;
    type Activations = CpuActivations;
    type Selection = CpuSelection;
    type KvPool = CpuKvPool;

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn load_matrix(
        &mut self,
        source: &dyn MatrixSource,
        progress: &mut dyn FnMut(u64),
    ) -> Result<CpuMatrix, KernelError> {
        let packing = (self.precision == Precision::Fast).then(|| self.isa.packing());
        CpuMatrix::load(source, packing, &self.threads, &mut self.arena, &self.info.name, progress)
    }

    fn held_bytes(&self, spec: &MatrixSpec) -> u64 {
        match spec.format {
            Format::Blocks(kind) if self.precision == Precision::Fast => packed::held_bytes(spec, kind),
            _ => spec.weight_bytes(),
        }
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<Vec<f32>, KernelError> {
        Ok(values.to_vec())
    }

    fn activations(&mut self, rows: usize, width: usize) -> Result<CpuActivations, KernelError> {
        let what = format!("activations of {rows} rows");
        let count = checked_product(&[rows, width], &what, &self.info.name)?;
        let data = zeroed(count, &what, &self.info.name)?;
        // Results of this shape may pass through `results`: its memory is asked for here, where there may be none.
        let missing = count.saturating_sub(self.results.len());
        self.results.try_reserve_exact(missing).map_err(|_source| KernelError::OutOfMemory {
            what,
            needed_bytes: 4 * count as u64,
            available_bytes: memory::available_bytes(),
            device: self.info.name.clone(),
        })?;
        Ok(CpuActivations { width, rows: 0, data })
    }

    fn selection(&mut self, rows: usize, experts_per_token: usize) -> Result<CpuSelection, KernelError> {
        let what = format!("chosen experts of {rows} rows");
        let count = checked_product(&[rows, experts_per_token], &what, &self.info.name)?;
        Ok(CpuSelection {
            chosen: experts_per_token,
            rows: 0,
            ids: zeroed(count, &what, &self.info.name)?,
            probabilities: zeroed(count, &what, &self.info.name)?,
        })
    }

    fn kv_pool(&mut self, layers: usize, slots: usize, kv_width: usize) -> Result<CpuKvPool, KernelError> {
        let (what, device) = (format!("the KV pool of {slots} slots in {layers} layers"), self.info.name.clone());
        let slots = slots.checked_next_multiple_of(KV_BLOCK_TOKENS).unwrap_or(usize::MAX);
        let count = checked_product(&[slots, kv_width], &what, &device)?;
        // Asked for as a whole, so that a pool that cannot fit is refused before any of it is taken.
        let total = checked_product(&[count, layers, 2, size_of::<f32>()], &what, &device)? as u64;
        let available = memory::available_bytes();
        if available != 0 && total > available {
            return Err(KernelError::OutOfMemory { what, needed_bytes: total, available_bytes: available, device });
        }
        let layers = (0..layers)
            .map(|_| Ok((zeroed(count, &what, &device)?, zeroed(count, &what, &device)?)))
            .collect::<Result<_, KernelError>>()?;
        Ok(CpuKvPool { slots, width: kv_width, layers, attended: zeroed(slots, &what, &device)? })
    }

    fn begin(&mut self, batch: &Batch, kv: &mut CpuKvPool) -> Result<(), KernelError> {
        self.slots.clear();
        for (index, row) in batch.rows.iter().enumerate() {
            let slot = batch.slot(row.table_offset, row.position).map(|slot| slot as usize);
            let Some(slot) = slot.filter(|&slot| slot < kv.slots) else {
                return Err(KernelError::Shape {
                    what: format!("block table of row {index}"),
                    expected: format!("a slot below {} for position {}", kv.slots, row.position),
                    found: slot.map_or("no block".to_owned(), |slot| slot.to_string()),
                });
            };
            self.slots.push(slot);
            kv.attended[slot] = row.attended;
        }
        self.batch.clone_from(batch);
        self.angles = None;
        Ok(())
    }

    fn write(&mut self, values: &[f32], out: &mut CpuActivations) -> Result<(), KernelError> {
        let rows = self.batch.rows.len();
        if values.len() != rows * out.width || values.len() > out.data.len() {
            return Err(KernelError::Shape {
                what: "input of a step".into(),
                expected: format!("{rows} rows of {}, at most {} numbers", out.width, out.data.len()),
                found: format!("{} numbers", values.len()),
            });
        }
        out.take_rows(rows).copy_from_slice(values);
        Ok(())
    }

    fn rms_norm(&mut self, epsilon: f32, x: &CpuActivations, weight: &Vec<f32>, out: &mut CpuActivations) {
        self.norm(epsilon, x, weight, false, out);
    }

    fn rms_norm_add(&mut self, epsilon: f32, y: &CpuActivations, weight: &Vec<f32>, residual: &mut CpuActivations) {
        self.norm(epsilon, y, weight, true, residual);
    }

    fn matmul(&mut self, x: &CpuActivations, w: &CpuMatrix, factor: f32, out: &mut CpuActivations) {
        self.matmul_each(x, &mut [(w, &mut *out)]);
        if factor != 1.0 {
            out.take_rows(x.rows).iter_mut().for_each(|value| *value *= factor);
        }
    }

    fn matmul_each(&mut self, x: &CpuActivations, products: &mut [(&CpuMatrix, &mut CpuActivations)]) {
        let taken = products.iter_mut().map(|(w, out)| {
            assert!(x.width == w.inputs && out.width == w.outputs, "a product's operands fit");
            (*w, out.take_rows(x.rows))
        });
        let mut taken: Vec<_> = taken.collect();
        if taken.iter().all(|(w, _)| w.shares_rows_with(taken[0].0)) {
            return self.products(x.used(), &mut taken);
        }
        for product in &mut taken {
            self.products(x.used(), std::slice::from_mut(product));
        }
    }

    fn upcoming(&mut self, matrices: &[&CpuMatrix], selection: Option<&CpuSelection>) {
        let rows = self.batch.rows.len();
        let products: Vec<_> = matrices
            .iter()
            .flat_map(|&matrix| match selection {
                Some(selection) => selection.groups(matrix.experts).products(matrix),
                None => vec![(matrix, 0)],
            })
            .collect();
        let outputs = matrices.iter().map(|matrix| matrix.outputs).sum();
        let pairs = selection.map_or(rows, |selection| selection.rows * selection.chosen);
        self.next = first_weights(&products, self.threads.outputs_a_piece(outputs, pairs), &self.threads);
    }

    fn rope_store(
        &mut self,
        params: &AttentionParams,
        q: &mut CpuActivations,
        k: &CpuActivations,
        v: &CpuActivations,
        kv: &mut CpuKvPool,
        layer: usize,
    ) {
        let (theta, dim) = (params.rope_theta, params.head_dim);
        if !matches!(&self.angles, Some((t, d, ..)) if (*t, *d) == (theta, dim)) {
            let positions = self.batch.rows.iter().map(|row| row.position);
            let (cos, sin) = rope_op::tables(&rope_op::frequencies(theta, dim), positions);
            self.angles = Some((theta, dim, cos, sin));
        }
        let Some((_, _, cos, sin)) = &self.angles else { return };
        let half = dim / 2;
        let (keys, values) = &mut kv.layers[layer];
        for (t, &slot) in self.slots.iter().enumerate() {
            self.key.clear();
            self.key.extend_from_slice(&k.data[t * k.width..][..k.width]);
            let block = slot / KV_BLOCK_TOKENS * KV_BLOCK_TOKENS * kv.width;
            self.isa.run(RopeStore {
                angles: (&cos[t * half..][..half], &sin[t * half..][..half]),
                q: &mut q.data[t * q.width..][..q.width],
                key: &mut self.key,
                value: &v.data[t * v.width..][..v.width],
                keys: &mut keys[block..][..KV_BLOCK_TOKENS * kv.width],
                lane: slot % KV_BLOCK_TOKENS,
                values: &mut values[slot * kv.width..][..kv.width],
            });
        }
    }

    fn attention(
        &mut self,
        params: &AttentionParams,
        q: &CpuActivations,
        kv: &CpuKvPool,
        layer: usize,
        out: &mut CpuActivations,
    ) {
        let isa = self.isa;
        let (k, v) = &kv.layers[layer];
        let op = attention_op::Params::from(params);
        let (dim, a_group) = (params.head_dim, params.heads / params.kv_heads);
        let tiles = attention::tiles(&self.batch.rows, a_group);
        // A single row with few key heads: its query heads are shared out.
        let shares = self.threads.count().div_ceil(tiles.len().max(1) * params.kv_heads);
        let a_share = a_group.div_ceil(shares);
        let mut parts = Vec::new();
        let rows = q.used().chunks(a_group * params.kv_heads * dim);
        let mut rows =
            rows.zip(out.take_rows(q.rows).chunks_mut(a_group * params.kv_heads * dim)).zip(&self.batch.rows);
        let mut work = 0;
        for tile in tiles {
            let first = parts.len();
            for ((q, out), row) in rows.by_ref().take(tile) {
                let count = row.position as usize + 1;
                work += 2 * count * params.heads * dim;
                let groups = q.chunks(a_group * dim).zip(out.chunks_mut(a_group * dim)).enumerate();
                let shares = groups.flat_map(|(kv_head, (q, out))| {
                    let shares = q.chunks(a_share * dim).zip(out.chunks_mut(a_share * dim));
                    shares.map(move |(q, out)| (kv_head, AttentionRow { count, q, out }))
                });
                for (index, (kv_head, part)) in shares.enumerate() {
                    if parts.len() == first + index {
                        let table = &self.batch.block_tables[row.table_offset as usize..];
                        let keys = Keys { k, v, attended: &kv.attended, table };
                        parts.push(Attention { params: op, kv_head, keys, rows: Vec::with_capacity(tile) });
                    }
                    parts[first + index].rows.push(part);
                }
            }
        }
        self.threads.each(parts, work, |part| isa.run(part));
    }

    fn route(&mut self, x: &CpuActivations, router: &CpuMatrix, out: &mut CpuSelection) {
        let experts = router.outputs;
        let mut logits = vec![0.0; x.rows * experts];
        self.products(x.used(), &mut [(router, &mut logits)]);
        out.rows = x.rows;
        let chosen = out.chosen;
        let choices = out.ids.chunks_mut(chosen).zip(out.probabilities.chunks_mut(chosen));
        for (logits, (ids, probabilities)) in logits.chunks_mut(experts).zip(choices) {
            Choose { logits, ids, probabilities }.run_on(self.isa);
        }
    }

    fn expert_gate_up(
        &mut self,
        x: &CpuActivations,
        selection: &CpuSelection,
        gate: &CpuMatrix,
        up: &CpuMatrix,
        out: &mut CpuActivations,
    ) {
        let Self { isa, threads, results, scratch, second_scratch, next, .. } = self;
        let (isa, chosen, pairs) = (*isa, selection.chosen, selection.rows * selection.chosen);
        let groups = selection.groups(gate.experts);
        let step = threads.outputs_a_piece(gate.outputs, pairs);
        threads.ask_ahead(&first_weights(&groups.products(gate), step, threads));
        let rows = scratch.rows(isa, threads, gate, x.used(), &groups, chosen);
        // A file may mix formats.
        let others =
            (!gate.shares_rows_with(up)).then(|| second_scratch.rows(isa, threads, up, x.used(), &groups, chosen));
        let rows_of_up = others.as_ref().unwrap_or(&rows);
        results.resize(pairs * gate.outputs, 0.0);
        let mut of_gate = groups.cut(gate.outputs, step, out.take_rows(pairs));
        let mut of_up = groups.cut(gate.outputs, step, results);
        let (of_gate, of_up) =
            (groups.pieces(gate.outputs, step, &mut of_gate), groups.pieces(gate.outputs, step, &mut of_up));
        let pieces = of_gate.into_iter().zip(of_up).map(|pieces| (pieces.0.weights(gate), pieces)).collect();
        threads.each_reading(pieces, &take(next), 2 * pairs * gate.work(), |(of_gate, of_up), then| {
            let (rows, weights_of_up) = (rows.of(of_gate.pairs.clone()), of_up.weights(up));
            let Piece { expert, outputs, out, .. } = of_gate;
            Product { matrix: gate, expert, outputs, rows, out: &mut *out, then: weights_of_up }.run_on(isa);
            let Piece { pairs, outputs, .. } = of_up;
            let rows = rows_of_up.of(pairs);
            Product { matrix: up, expert, outputs, rows, out: &mut *of_up.out, then }.run_on(isa);
            isa.run(Gelu { gate: out, up: of_up.out });
        });
    }

    fn expert_down(
        &mut self,
        hidden: &CpuActivations,
        selection: &CpuSelection,
        down: &CpuMatrix,
        out: &mut CpuActivations,
    ) {
        let Self { isa, threads, results, scratch, next, .. } = self;
        let (isa, chosen, pairs) = (*isa, selection.chosen, selection.rows * selection.chosen);
        let groups = selection.groups(down.experts);
        let rows = scratch.rows(isa, threads, down, hidden.used(), &groups, 1);
        let step = threads.outputs_a_piece(down.outputs, pairs);
        results.resize(pairs * down.outputs, 0.0);
        let mut slices = groups.cut(down.outputs, step, results);
        let pieces = groups.pieces(down.outputs, step, &mut slices);
        let pieces = pieces.into_iter().map(|piece| (piece.weights(down), piece)).collect();
        threads.each_reading(
            pieces,
            &take(next),
            pairs * down.work(),
            |Piece { expert, pairs, outputs, out }, then| {
                Product { matrix: down, expert, outputs, rows: rows.of(pairs), out, then }.run_on(isa);
            },
        );
        let width = out.width;
        let of_rows = results.chunks(chosen * width).zip(selection.probabilities.chunks(chosen));
        let rows: Vec<_> = out.take_rows(selection.rows).chunks_mut(width).zip(of_rows).collect();
        threads.each(rows, pairs * width, |(out, (results, probabilities))| {
            isa.run(Combine { results, probabilities, out });
        });
    }

    fn gather(&mut self, x: &CpuActivations, rows: &[u32], out: &mut CpuActivations) {
        let width = x.width;
        for (out, &row) in out.take_rows(rows.len()).chunks_mut(width).zip(rows) {
            out.copy_from_slice(&x.data[row as usize * width..][..width]);
        }
    }

    fn layer_done(&mut self) {}

    fn finish(&mut self, reads: &[(&CpuActivations, usize)]) -> Result<Vec<Vec<f32>>, KernelError> {
        Ok(reads.iter().map(|(x, rows)| x.data[..rows * x.width].to_vec()).collect())
    }

    fn read_selection(&mut self, selection: &CpuSelection, rows: usize) -> Result<(Vec<u32>, Vec<f32>), KernelError> {
        let count = rows * selection.chosen;
        Ok((selection.ids[..count].to_vec(), selection.probabilities[..count].to_vec()))
    }

    fn measure_read_bandwidth(&mut self, most_bytes: u64) -> Result<f64, KernelError> {
        measure::read_bandwidth(self.isa, &self.threads, &self.info.name, most_bytes)
    }

    fn measure_flop_rate(&mut self) -> Result<f64, KernelError> {
        measure::flop_rate(self)
    }
}
