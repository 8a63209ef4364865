//! The experts as dispatches: choice, grouping of pairs, the two halves, and the sum over a row's experts.
//!
//! The choice stays on the device: kernels read it, the host never knows it. For few rows a thread, or some that share its
//! sums, computes one pair of a row and an expert; for many, pairs are first grouped by expert, so that a weight read once serves four.
//! Gate and up are multiplied in one kernel, or, where files of mixed formats have the two held in different ways, gate before up.

use super::{
    GpuActivations, GpuBackend, GpuBuffer, GpuMatrix, GpuSelection,
    batch::grow,
    cooperative::{Cooperative, PLACES},
    format::Numbers,
    matrix::{LANES, Shape, Shard, WORKGROUPS_MAX},
    pipelines::{Kernel, Sharing, TILE_ROWS, TILES_PER_WORKGROUP},
    rounded::Rounding,
    shaders::{CombineParams, CooperativeExpertParams, ExpertParams, ExpertShard, TilesParams},
    shape, workgroups,
};
use crate::ops::{expert_down, gated_gelu, moe_router};

/// Experts that the router's kernel has room for.
const EXPERTS_MAX: usize = 64;
/// Rows from which pairs are grouped: with eight experts and two a row, four rows give an expert one pair on average.
const TILED_ROWS_MIN: usize = 8;

/// Tiles of `tile_rows` pairs that always suffice: full ones, and one that is not for each expert.
fn tiles(pairs: usize, experts: usize, tile_rows: usize) -> usize {
    pairs / tile_rows + experts
}

/// Bytes of the tiles of a selection, whichever there will be; each is an expert and its pairs.
pub(super) fn tiles_bytes(rows: usize, chosen: usize) -> Option<u64> {
    let pairs = rows.checked_mul(chosen)?;
    let bytes = |tile_rows| super::words(&[tiles(pairs, EXPERTS_MAX, tile_rows), 1 + tile_rows]);
    Some(bytes(TILE_ROWS)?.max(bytes(PLACES)?))
}

/// How a step's pairs are given to the expert kernels.
struct Pairs<'a> {
    choice: &'a GpuBuffer,
    /// Experts of a row.
    chosen: usize,
    /// Workgroups along the pairs.
    groups: u32,
    /// Pairs or tiles.
    items: usize,
    sharing: Sharing,
    count: usize,
}

impl GpuBackend {
    pub(super) fn route_impl(&mut self, x: &GpuActivations, router: &GpuMatrix, out: &GpuSelection) {
        let (rows, inputs, experts) = (self.rows, router.shape.inputs, router.shape.outputs);
        let fits = self.expect_rows("input of the router", rows, inputs, x)
            && self.expect_selection(rows, out)
            && self.expect(&format!("experts of {}", router.name), 1, router.shape.experts)
            && self.expect("shards of the router", 1, router.shards.len());
        if !fits {
            return;
        }
        let numbers = router.shape.held.numbers;
        if experts > EXPERTS_MAX || out.chosen > experts || numbers != Numbers::F32 {
            let what = format!("{} ({numbers:?}, chosen {})", router.name, out.chosen);
            let expected = format!("{:?} for at most {EXPERTS_MAX} experts", Numbers::F32);
            return self.recorder.refuse(shape(&what, &expected, experts));
        }
        let params = moe_router::Params {
            hidden_size: inputs as u32,
            num_experts: experts as u32,
            num_experts_per_tok: out.chosen as u32,
        };
        let buffers = [&x.buffer, &router.shards[0].chunks, &out.ids, &out.probabilities];
        let work = (rows * inputs * experts) as u64;
        self.recorder.dispatch(Kernel::MoeRouter, &params, &buffers, [rows as u32, 1, 1], work);
        if rows >= TILED_ROWS_MIN {
            let tile_rows = if self.cooperative().is_some() { PLACES } else { TILE_ROWS };
            self.group_pairs([&out.ids, &out.tiles], rows * out.chosen, experts, tile_rows);
        }
    }

    /// Makes tiles of the pairs whose experts these ids are.
    pub(super) fn group_pairs(
        &mut self,
        ids_and_tiles: [&GpuBuffer; 2],
        pairs: usize,
        experts: usize,
        tile_rows: usize,
    ) {
        let tiles = tiles(pairs, experts, tile_rows) as u32;
        let params = TilesParams { pairs: pairs as u32, num_experts: experts as u32, tiles };
        self.recorder.dispatch(Kernel::ExpertTiles { tile_rows }, &params, &ids_and_tiles, [1, 1, 1], 0);
    }

    pub(super) fn gate_up_impl(
        &mut self,
        x: &GpuActivations,
        selection: &GpuSelection,
        gate: &GpuMatrix,
        up: &GpuMatrix,
        out: &GpuActivations,
    ) {
        let rows = self.rows;
        if !gate.shape.is_as_large_as(up.shape) {
            let expected = format!("the size of {}, {:?}", gate.name, gate.shape);
            return self.recorder.refuse(shape(&format!("{} ({:?})", up.name, up.shape), &expected, up.shape.outputs));
        }
        let fits = self.expect_selection(rows, selection)
            && self.expect_rows(&format!("input of {}", gate.name), rows, gate.shape.inputs, x)
            && self.expect_rows(&format!("output of {}", gate.name), rows * selection.chosen, gate.shape.outputs, out);
        if !fits {
            return;
        }
        let op = gated_gelu::Params {
            inputs: up.shape.inputs as u32,
            outputs: up.shape.outputs as u32,
            groups: up.shape.groups as u32,
            chosen: selection.chosen as u32,
        };
        if let Some(cooperative) = self.cooperative() {
            return self.cooperative_gate_up(cooperative, x, selection, [gate, up], op, out);
        }
        let pairs = self.pairs(selection, up.shape.experts);
        let variant = self.variant(up, pairs.sharing);
        // A kernel knows one way to hold weights, and shards are cut by it.
        let alike = gate.shape == up.shape;
        let (kernel, gates) = match alike {
            true => (Kernel::GatedGelu(variant), gate),
            // In the places of gate, which this kernel does not read.
            false => (Kernel::GatedGeluOfGate(variant), up),
        };
        if !alike {
            self.expert_products(x, rows, &pairs, selection.chosen, gate, &out.buffer);
        }
        let rounding = Rounding::of(up.shape.precision(self.precision));
        self.rounded.make(&mut self.memory, &mut self.recorder, rounding, x, rows);
        let [x, factors] = self.rounded.bindings(rounding, x);
        for (gates, ups) in gates.shards.iter().zip(&up.shards) {
            let params = |block_begin| {
                let shard = expert_shard(ups, selection.chosen, block_begin);
                ExpertParams { op, items: pairs.items as u32, shard }.to_words()
            };
            let (choice, out) = (pairs.choice, &out.buffer);
            let buffers = [x, factors, choice, &gates.chunks, gates.scales(), &ups.chunks, ups.scales(), out];
            let groups = [pairs.groups, ups.blocks.len() as u32, variant.workgroups_a_block()];
            let work = if alike { 2 } else { 1 } * work(pairs.count, up.shape, ups.columns());
            self.recorder.dispatch_blocks(kernel, params, &buffers, groups, work);
        }
    }

    pub(super) fn down_impl(
        &mut self,
        hidden: &GpuActivations,
        selection: &GpuSelection,
        down: &GpuMatrix,
        out: &GpuActivations,
    ) {
        let rows = self.rows;
        let fits = self.expect_selection(rows, selection)
            && self.expect_rows(&format!("input of {}", down.name), rows * selection.chosen, down.shape.inputs, hidden)
            && self.expect_rows(&format!("output of {}", down.name), rows, down.shape.outputs, out);
        if !fits || rows == 0 {
            return;
        }
        // Sized by what the output has room for, so that it is made once.
        let count = out.rows * selection.chosen * down.shape.outputs;
        let what = format!("products of {}", down.name);
        if let Err(error) = grow(&mut self.products, &mut self.memory, &mut self.recorder, &what, count) {
            return self.recorder.refuse(error);
        }
        let Some(products) = self.products.take() else { return };
        match self.cooperative() {
            Some(cooperative) => self.cooperative_products(cooperative, hidden, selection, 1, down, &products),
            None => {
                let pairs = self.pairs(selection, down.shape.experts);
                self.expert_products(hidden, rows * selection.chosen, &pairs, 1, down, &products);
            }
        }
        let params = CombineParams { outputs: down.shape.outputs as u32, chosen: selection.chosen as u32 };
        let buffers = [&selection.probabilities, &products, &out.buffer];
        let groups = [workgroups(down.shape.outputs), rows as u32, 1];
        self.recorder.dispatch(Kernel::ExpertCombine, &params, &buffers, groups, 0);
        self.products = Some(products);
    }

    /// `out[p] = x[p / pairs_a_row] @ matrix[e]` for each pair; `x` has `rows` rows.
    fn expert_products(
        &mut self,
        x: &GpuActivations,
        rows: usize,
        pairs: &Pairs<'_>,
        pairs_a_row: usize,
        matrix: &GpuMatrix,
        out: &GpuBuffer,
    ) {
        let variant = self.variant(matrix, pairs.sharing);
        let op = expert_down::Params {
            inputs: matrix.shape.inputs as u32,
            outputs: matrix.shape.outputs as u32,
            groups: matrix.shape.groups as u32,
            chosen: pairs.chosen as u32,
        };
        let rounding = Rounding::of(matrix.shape.precision(self.precision));
        self.rounded.make(&mut self.memory, &mut self.recorder, rounding, x, rows);
        let [x, factors] = self.rounded.bindings(rounding, x);
        for shard in &matrix.shards {
            let params = |block_begin| {
                let shard = expert_shard(shard, pairs_a_row, block_begin);
                ExpertParams { op, items: pairs.items as u32, shard }.to_words()
            };
            let buffers = [x, factors, pairs.choice, &shard.chunks, shard.scales(), out];
            let groups = [pairs.groups, shard.blocks.len() as u32, variant.workgroups_a_block()];
            let work = work(pairs.count, matrix.shape, shard.columns());
            self.recorder.dispatch_blocks(Kernel::ExpertDown(variant), params, &buffers, groups, work);
        }
    }

    fn cooperative_gate_up(
        &mut self,
        cooperative: Cooperative,
        x: &GpuActivations,
        selection: &GpuSelection,
        [gate, up]: [&GpuMatrix; 2],
        op: gated_gelu::Params,
        out: &GpuActivations,
    ) {
        // A kernel knows one way to hold weights, and shards are cut by it.
        let alike = gate.shape == up.shape;
        let variant = Self::cooperative_variant(up, cooperative);
        let (kernel, gates) = match alike {
            true => (Kernel::GatedGeluCooperative(variant), gate),
            false => (Kernel::GatedGeluCooperativeOfGate(variant), up),
        };
        if !alike {
            self.cooperative_products(cooperative, x, selection, selection.chosen, gate, &out.buffer);
        }
        let (rows, pairs) = (self.rows, self.rows * selection.chosen);
        self.rounded.make(&mut self.memory, &mut self.recorder, Rounding::Halves, x, rows);
        let [halves, factors] = self.rounded.bindings(Rounding::Halves, x);
        for (gates, ups) in gates.shards.iter().zip(&up.shards) {
            let params = |block_begin| {
                let shard = expert_shard(ups, selection.chosen, block_begin);
                CooperativeExpertParams { op, shard, factors: [gate.factor, up.factor] }.to_words()
            };
            let (choice, out) = (&selection.tiles, &out.buffer);
            let buffers = [halves, factors, choice, &gates.chunks, gates.scales(), &ups.chunks, ups.scales(), out];
            let groups = cooperative_groups(pairs, up, ups);
            let work = if alike { 2 } else { 1 } * work(pairs, up.shape, ups.columns());
            self.recorder.dispatch_blocks(kernel, params, &buffers, groups, work);
        }
    }

    /// `out[p] = x[p / pairs_a_row] @ matrix[e]` for each pair.
    fn cooperative_products(
        &mut self,
        cooperative: Cooperative,
        x: &GpuActivations,
        selection: &GpuSelection,
        pairs_a_row: usize,
        matrix: &GpuMatrix,
        out: &GpuBuffer,
    ) {
        let kernel = Kernel::ExpertDownCooperative(Self::cooperative_variant(matrix, cooperative));
        let pairs = self.rows * selection.chosen;
        self.rounded.make(&mut self.memory, &mut self.recorder, Rounding::Halves, x, pairs / pairs_a_row);
        let [halves, factors] = self.rounded.bindings(Rounding::Halves, x);
        let op = expert_down::Params {
            inputs: matrix.shape.inputs as u32,
            outputs: matrix.shape.outputs as u32,
            groups: matrix.shape.groups as u32,
            chosen: selection.chosen as u32,
        };
        for shard in &matrix.shards {
            let params = |block_begin| {
                let shard = expert_shard(shard, pairs_a_row, block_begin);
                CooperativeExpertParams { op, shard, factors: [matrix.factor; 2] }.to_words()
            };
            let buffers = [halves, factors, &selection.tiles, &shard.chunks, shard.scales(), out];
            let groups = cooperative_groups(pairs, matrix, shard);
            let work = work(pairs, matrix.shape, shard.columns());
            self.recorder.dispatch_blocks(kernel, params, &buffers, groups, work);
        }
    }

    fn expect_selection(&mut self, rows: usize, selection: &GpuSelection) -> bool {
        let most = selection.rows.min(WORKGROUPS_MAX / selection.chosen.max(1));
        if rows > most || selection.chosen == 0 {
            self.recorder.refuse(shape("rows of a selection", &format!("at most {most}"), rows));
            return false;
        }
        true
    }

    fn pairs<'a>(&self, selection: &'a GpuSelection, experts: usize) -> Pairs<'a> {
        let chosen = selection.chosen;
        let count = self.rows * chosen;
        if self.rows >= TILED_ROWS_MIN {
            // Unused ones say so themselves.
            let items = tiles(count, experts.min(EXPERTS_MAX), TILE_ROWS);
            let groups = items.div_ceil(TILES_PER_WORKGROUP) as u32;
            return Pairs { choice: &selection.tiles, chosen, groups, items, sharing: Sharing::Tiled, count };
        }
        let sharing = self.sharing_of_one();
        Pairs { choice: &selection.ids, chosen, groups: count as u32, items: count, sharing, count }
    }
}

fn expert_shard(shard: &Shard, pairs_a_row: usize, block_begin: u32) -> ExpertShard {
    ExpertShard {
        expert_begin: shard.experts.start as u32,
        expert_count: shard.experts.len() as u32,
        column_begin: (shard.blocks.start * LANES) as u32,
        blocks: shard.blocks.len() as u32,
        pairs_a_row: pairs_a_row as u32,
        block_begin,
    }
}

fn cooperative_groups(pairs: usize, matrix: &GpuMatrix, shard: &Shard) -> [u32; 3] {
    [tiles(pairs, matrix.shape.experts.min(EXPERTS_MAX), PLACES) as u32, shard.blocks.len() as u32, 1]
}

/// Multiply-adds of one matrix over so many columns of all experts together, if the pairs are spread evenly.
fn work(pairs: usize, shape: Shape, columns: usize) -> u64 {
    (pairs * shape.inputs) as u64 * columns as u64 / shape.experts as u64
}

#[cfg(test)]
mod tests {
    use grokpipe_model::{BlockType, Format, Layout, MatrixSpec, ModelConfig};

    use super::*;
    use crate::{
        gpu::{
            memory::words,
            recorder::{WORK_MAX, cut},
            tests::open,
        },
        ops::testing::{Random, seed},
    };

    /// Up to eight times the rows that a step has unless it is told otherwise; a block of columns is never cut.
    #[test]
    fn no_dispatch_of_grok_1_is_more_work_than_one_may_be_however_large_bindings_are() {
        let config = ModelConfig::grok_1();
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        let (query, key) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        let matrices = [
            ("q", 1, hidden, query, 1),
            ("k", 1, hidden, key, 1),
            ("o", 1, query, hidden, 1),
            ("gate and up", config.num_experts, hidden, ffn, 2),
            ("down", config.num_experts, ffn, hidden, 1),
            ("head", 1, hidden, config.vocab_size, 1),
        ];
        let formats = [Format::F32, Format::Int8 { groups: 1 }, Format::Blocks(BlockType::Q4K)];
        let mut most = 0;
        for (name, experts, inputs, outputs, at_once) in matrices {
            for format in formats {
                let layout = Layout::OutIn;
                let spec = MatrixSpec { name: name.to_owned(), experts, inputs, outputs, format, layout };
                let shape = Shape::new(&spec).unwrap();
                for limit in [128 << 20, (1 << 31) - 16, u64::from(u32::MAX) & !15] {
                    for rows in [1, 32, 33, 64, 512, 2048, 4096] {
                        let pairs = if experts == 1 { rows } else { rows * config.num_experts_per_tok };
                        for (of, blocks) in shape.plan(limit).unwrap() {
                            let all = at_once * work(pairs, shape, of.len() * blocks.len() * LANES);
                            for (_, part) in cut(blocks.len() as u32, all, WORK_MAX) {
                                assert!(part <= WORK_MAX, "{name} of {format}, {rows} rows, {limit}: {part}");
                                most = most.max(all);
                            }
                        }
                    }
                }
            }
        }
        assert!(most > 20 * WORK_MAX, "the test means nothing where nothing would be cut: {most}");
    }

    /// Pairs that make no run, one, runs of different lengths, and as many as a step may have; with all experts of the model, and with
    /// so many that there are fewer runs than threads.
    #[test]
    fn pairs_are_grouped_as_the_reference_groups_them() {
        let Some(mut backend) = open(None) else { return };
        let seed = seed(47);
        let random = &mut Random::new(seed);
        // All of the experts, two of them, and one.
        let spreads: [fn(&mut Random, usize) -> usize; 3] = [
            |random, experts| random.below(experts),
            |random, experts| random.below(2) * (experts - 1),
            |_, experts| experts - 1,
        ];
        for pairs in [1, 2, 16, 127, 128, 129, 1000, 1024, 5003, WORKGROUPS_MAX] {
            for (experts, tile_rows) in
                [1, 8, 9, EXPERTS_MAX].into_iter().flat_map(|experts| [(experts, TILE_ROWS), (experts, PLACES)])
            {
                for spread in spreads {
                    let ids: Vec<_> = (0..pairs).map(|_| spread(random, experts) as u32).collect();
                    let found = group(&mut backend, &ids, experts, tile_rows);
                    let want = moe_router::cpu::tiles(&ids, experts, tile_rows);
                    assert!(found == want, "{pairs} pairs, {experts} experts, {tile_rows} a tile, seed {seed}");
                }
            }
        }
    }

    fn group(backend: &mut GpuBackend, ids: &[u32], experts: usize, tile_rows: usize) -> Vec<Option<u32>> {
        let count = tiles(ids.len(), experts, tile_rows) * (1 + tile_rows);
        let [held, made] = [ids.len(), count].map(|count| backend.memory.allocate("test", words(&[count])).unwrap());
        backend.recorder.begin(false);
        backend.recorder.write(&held, 0, bytemuck::cast_slice(ids));
        backend.group_pairs([&held, &made], ids.len(), experts, tile_rows);
        let read = backend.recorder.read_back::<u32>(&[(&made, count)]).unwrap();
        read[0].iter().map(|&word| (word != u32::MAX).then_some(word)).collect()
    }
}
