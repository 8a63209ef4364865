// pairs_cooperative: what pairs is, for the shaders of prefill `fast`: a workgroup has a tile of expert_tiles.wgsl of up to 64 pairs.
struct Params {
    inputs: u32,
    outputs: u32,
    groups: u32,       // groups of inputs that share a scale
    chosen: u32,
    expert_begin: u32, // experts of the shard
    expert_count: u32,
    column_begin: u32, // first column of the shard, a multiple of 64
    blocks: u32,       // blocks of 64 columns in the shard, an expert
    pairs_a_row: u32,  // pairs that share a row of x
    block_begin: u32,  // first block of this dispatch in the shard, an expert
    factor: f32,       // power of two of the weights; in gated_gelu of the gate's
    up_factor: f32,    // of the other matrix that gated_gelu has
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read> choice: array<u32>;  // [tiles, 1 + ROWS]

fn row_of_x(pair: u32) -> u32 {
    return pair / params.pairs_a_row;
}

// Which of the shard's experts a tile has; what is no less than `expert_count` where the shard does not have it.
fn expert_of(tile: u32) -> u32 {
    return choice[tile * (1u + ROWS)] - params.expert_begin;
}

fn take_places(tile: u32, thread: u32) {
    for (var place = thread; place < ROWS; place += WORKGROUP) { places[place] = choice[tile * (1u + ROWS) + 1u + place]; }
    workgroupBarrier();
}

fn block_of(expert: u32, block: u32, factor: f32) -> Block {
    let index = params.block_begin + block;
    return Block(expert * params.blocks + index, params.column_begin + index * LANES, factor);
}
