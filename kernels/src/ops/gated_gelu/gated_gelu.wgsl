// gated_gelu: hidden[p, n] = gelu(x[t] @ gate[e]) * (x[t] @ up[e]) for every pair p = t * chosen + j of a row and its j-th expert e,
// for the columns n and the experts of one shard.
// Shapes (row-major): x [rows, inputs], hidden [pairs, outputs] f32. Weights, scales and the order of sums as in product/columns.wgsl,
// one stretch of `blocks` blocks an expert. With GATE_IS_THERE, where gate is held otherwise than up, hidden has the products with it
// already, of expert_down.wgsl, whose sums are the same; the bindings of gate are not read. Joined with columns, pairs, gelu, inputs, and
// matrix, product and sums for `gate` and `up`.
// Dispatch: (ceil(items / TILES), some blocks of the shard, 64 / (COLUMN_THREADS * COLUMNS_PER_THREAD)); a thread computes ROWS_PER_THREAD
// pairs of COLUMNS_PER_THREAD columns, or SLICE_THREADS threads do.
// CPU reference: cpu.rs.
@group(0) @binding(4) var<storage, read> gate: array<vec4<u32>>;    // [experts, blocks, chunks, 64]
@group(0) @binding(5) var<storage, read> gate_scales: array<u32>;   // [experts, blocks, words, 64]
@group(0) @binding(6) var<storage, read> up: array<vec4<u32>>;      // [experts, blocks, chunks, 64]
@group(0) @binding(7) var<storage, read> up_scales: array<u32>;     // [experts, blocks, words, 64]
@group(0) @binding(8) var<storage, read_write> hidden: array<f32>;  // [pairs, outputs]
override GATE_IS_THERE: bool = false;

fn store(pair: u32, n: u32, g: vec4<f32>, u: vec4<f32>) {
    if pair == NONE { return; }
    for (var i = 0u; i < COLUMNS_PER_THREAD; i++) {
        let column = n + i * COLUMN_THREADS;
        if column < params.outputs {
            let at = pair * params.outputs + column;
            var sum_of_gate = g[i];
            if GATE_IS_THERE { sum_of_gate = hidden[at]; }
            hidden[at] = gelu(sum_of_gate) * u[i];
        }
    }
}

@compute @workgroup_size(COLUMN_THREADS, TILES, SLICE_THREADS)
fn gated_gelu(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let item = item_at(workgroup.x * TILES + local.y);
    let place = place_of(workgroup, local, is_here(item));
    let rows = rows_of(item);
    let block = block_of(item, workgroup.y);
    // One after the other: fewer sums at a time, and the row is read from a cache.
    var g = Rows();
    if !GATE_IS_THERE { g = product_of_gate(rows, block, place); }
    let u = product_of_up(rows, block, place);
    if !place.is_here || place.slice > 0u { return; }
    let n = params.column_begin + (params.block_begin + workgroup.y) * LANES + place.lane;
    store(item.pairs.x, n, g.a, u.a);
    if ROWS_PER_THREAD > 1u {
        store(item.pairs.y, n, g.b, u.b);
        store(item.pairs.z, n, g.c, u.c);
        store(item.pairs.w, n, g.d, u.d);
    }
}
