// matmul_cooperative: matmul.wgsl for steps of many rows in prefill `fast`, with cooperative matrices.
// Shapes (row-major): x [rows, inputs] as quantise_halves.wgsl makes it; out [rows, outputs] f32. Weights as in product/columns.wgsl, sums
// as in product/cooperative.wgsl. Joined with columns, tiles_8 or tiles_16, cooperative, and matrix and product_cooperative for `weights`.
// Dispatch: (ceil(rows / 64), some blocks, 1). CPU reference: cpu.rs.
enable f16;
enable wgpu_cooperative_matrix;
struct Params {
    inputs: u32,
    outputs: u32,
    groups: u32,          // groups of inputs that share a scale
    factor: f32,
    rows: u32,
    column_begin: u32,    // first column of the shard, a multiple of 64
    block_begin: u32,     // first block of this dispatch in the shard
    weights_factor: f32,  // power of two
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read> weights: array<vec4<u32>>;   // [blocks, chunks, 64]
@group(0) @binding(4) var<storage, read> weights_scales: array<u32>;  // [blocks, words, 64]
@group(0) @binding(5) var<storage, read_write> out: array<f32>;       // [rows, outputs]

fn row_of_x(row: u32) -> u32 {
    return row;
}

fn store_weights(at: u32, sum: f32) {
    out[at] = params.factor * sum;
}

@compute @workgroup_size(WORKGROUP)
fn matmul_cooperative(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
    for (var place = thread; place < ROWS; place += WORKGROUP) {
        let row = workgroup.x * ROWS + place;
        places[place] = select(NO_ROW, row, row < params.rows);
    }
    workgroupBarrier();
    let index = params.block_begin + workgroup.y;
    let block = Block(index, params.column_begin + index * LANES, params.weights_factor);
    product_of_weights(block, Member(thread, subgroup, subgroups));
}
