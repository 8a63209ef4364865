// matmul: out[t, n] = factor * sum_k x[t, k] * w[k, n], for the columns n of one shard of w.
// Shapes (row-major): x [rows, inputs], out [rows, outputs] f32. Weights, scales and the order of sums as in product/columns.wgsl.
// Joined with columns, inputs, and matrix, product and sums for `weights`.
// Dispatch: (ceil(rows / (ROWS_PER_THREAD * TILES)), some blocks, 64 / (COLUMN_THREADS * COLUMNS_PER_THREAD)); a thread computes
// ROWS_PER_THREAD rows of COLUMNS_PER_THREAD columns, or SLICE_THREADS threads do. One row and column a thread suits a GPU in decode;
// four of each read less. CPU reference: cpu.rs.
struct Params {
    inputs: u32,
    outputs: u32,
    groups: u32,       // groups of inputs that share a scale
    factor: f32,
    rows: u32,
    column_begin: u32, // first column of the shard, a multiple of 64
    block_begin: u32,  // first block of this dispatch in the shard
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read> weights: array<vec4<u32>>;    // [blocks, chunks, 64]
@group(0) @binding(4) var<storage, read> weights_scales: array<u32>;   // [blocks, words, 64]
@group(0) @binding(5) var<storage, read_write> out: array<f32>;        // [rows, outputs]
override TILES: u32 = 1u;  // tiles of rows in a workgroup

fn store(row: u32, n: u32, sum: vec4<f32>) {
    if row >= params.rows { return; }
    let result = params.factor * sum;
    for (var i = 0u; i < COLUMNS_PER_THREAD; i++) {
        let column = n + i * COLUMN_THREADS;
        if column < params.outputs { out[row * params.outputs + column] = result[i]; }
    }
}

@compute @workgroup_size(COLUMN_THREADS, TILES, SLICE_THREADS)
fn matmul(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let row = (workgroup.x * TILES + local.y) * ROWS_PER_THREAD;
    let place = place_of(workgroup, local, row < params.rows);
    // Rows beyond the last one repeat it and are not stored.
    let rows = min(vec4<u32>(row, row + 1u, row + 2u, row + 3u), vec4<u32>(params.rows - 1u));
    let sums = product_of_weights(rows * params.inputs, params.block_begin + workgroup.y, place);
    if place.slice > 0u { return; }
    let n = params.column_begin + (params.block_begin + workgroup.y) * LANES + place.lane;
    store(row, n, sums.a);
    if ROWS_PER_THREAD > 1u {
        store(row + 1u, n, sums.b);
        store(row + 2u, n, sums.c);
        store(row + 3u, n, sums.d);
    }
}
