// attention_combine: out[t, i] = sum_b e^(m[b] - m) * sums[b, i] / sum_b e^(m[b] - m) * totals[b], over the blocks of 128 keys that
// attention.wgsl left in `partials`, by ascending position; m = max_b m[b]. Rows within the first block are already done.
// Shapes (row-major): partials [rows of this dispatch, heads, blocks, 2 + head_dim]; out [rows, heads * head_dim];
// places [rows] of (position, start of the block table, slot, attended).
// Dispatch: (ceil(heads * head_dim / 64), rows of this dispatch, 1). CPU reference: cpu.rs, which does both halves.
struct Params {
    heads: u32,
    head_dim: u32,
    row_begin: u32, // first row of this dispatch
    blocks: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> places: array<vec4<u32>>;  // [rows]
@group(0) @binding(2) var<storage, read> partials: array<f32>;      // [rows, heads, blocks, 2 + head_dim]
@group(0) @binding(3) var<storage, read_write> out: array<f32>;     // [rows, heads * head_dim]
const BLOCK: u32 = 128u;

fn weight_of(difference: f32) -> f32 {
    return select(0.0, exp(max(difference, -87.0)), difference >= -87.0);
}

@compute @workgroup_size(64)
fn attention_combine(@builtin(global_invocation_id) id: vec3<u32>) {
    let width = params.heads * params.head_dim;
    if id.x >= width { return; }
    let row = params.row_begin + id.y;
    let position = places[row].x;
    if position < BLOCK { return; }
    let blocks = position / BLOCK + 1u;
    let head = id.x / params.head_dim;
    let stride = 2u + params.head_dim;
    let start = (id.y * params.heads + head) * params.blocks * stride;
    var largest = partials[start];
    for (var b = 1u; b < blocks; b++) { largest = max(largest, partials[start + b * stride]); }
    var total = 0.0;
    var sum = 0.0;
    for (var b = 0u; b < blocks; b++) {
        let at = start + b * stride;
        let weight = weight_of(partials[at] - largest);
        total = fma(weight, partials[at + 1u], total);
        sum = fma(weight, partials[at + 2u + id.x % params.head_dim], sum);
    }
    out[row * width + id.x] = sum / total;
}
