// expert_down: products[p, n] = x[p / pairs_a_row] @ down[e] for every pair p = t * chosen + j of a row and its j-th expert e, for the
// columns n and the experts of one shard. expert_combine.wgsl adds a row's products, so that shards cannot change the order of that sum.
// With `gate` for `down`, and pairs that share the inputs of their row, it is the first step of gated_gelu.wgsl with GATE_IS_THERE.
// Shapes (row-major): x [pairs / pairs_a_row, inputs], products [pairs, outputs] f32. Weights, scales and the order of sums as in
// product/columns.wgsl, one stretch of `blocks` blocks an expert. Joined with columns, pairs, gelu, inputs, and matrix, product and sums
// for `down`.
// Dispatch: (ceil(items / TILES), some blocks of the shard, 64 / (COLUMN_THREADS * COLUMNS_PER_THREAD)); a thread computes ROWS_PER_THREAD
// pairs of COLUMNS_PER_THREAD columns, or SLICE_THREADS threads do.
// CPU reference: cpu.rs.
@group(0) @binding(4) var<storage, read> down: array<vec4<u32>>;      // [experts, blocks, chunks, 64]
@group(0) @binding(5) var<storage, read> down_scales: array<u32>;     // [experts, blocks, words, 64]
@group(0) @binding(6) var<storage, read_write> products: array<f32>;  // [pairs, outputs]

fn store(pair: u32, n: u32, sum: vec4<f32>) {
    if pair == NONE { return; }
    for (var i = 0u; i < COLUMNS_PER_THREAD; i++) {
        let column = n + i * COLUMN_THREADS;
        if column < params.outputs { products[pair * params.outputs + column] = sum[i]; }
    }
}

@compute @workgroup_size(COLUMN_THREADS, TILES, SLICE_THREADS)
fn expert_down(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let item = item_at(workgroup.x * TILES + local.y);
    let place = place_of(workgroup, local, is_here(item));
    let sums = product_of_down(rows_of(item), block_of(item, workgroup.y), place);
    if !place.is_here || place.slice > 0u { return; }
    let n = params.column_begin + (params.block_begin + workgroup.y) * LANES + place.lane;
    store(item.pairs.x, n, sums.a);
    if ROWS_PER_THREAD > 1u {
        store(item.pairs.y, n, sums.b);
        store(item.pairs.z, n, sums.c);
        store(item.pairs.w, n, sums.d);
    }
}
