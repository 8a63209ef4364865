// gated_gelu_cooperative: gated_gelu.wgsl for steps of many rows in prefill `fast`, with cooperative matrices.
// Shapes (row-major): x [rows, inputs] as quantise_halves.wgsl makes it; hidden [pairs, outputs] f32. Weights as in product/columns.wgsl,
// one stretch of `blocks` blocks an expert, sums as in product/cooperative.wgsl. With GATE_IS_THERE, where gate is held otherwise than
// up, hidden has the products with it already, of expert_down_cooperative.wgsl; the bindings of gate are not read. Joined with columns,
// pairs_cooperative, gelu, tiles_8 or tiles_16, cooperative, and matrix and product_cooperative for `gate` and `up`.
// Dispatch: (tiles, some blocks of the shard, 1). CPU reference: cpu.rs.
enable f16;
enable wgpu_cooperative_matrix;
@group(0) @binding(4) var<storage, read> gate: array<vec4<u32>>;    // [experts, blocks, chunks, 64]
@group(0) @binding(5) var<storage, read> gate_scales: array<u32>;   // [experts, blocks, words, 64]
@group(0) @binding(6) var<storage, read> up: array<vec4<u32>>;      // [experts, blocks, chunks, 64]
@group(0) @binding(7) var<storage, read> up_scales: array<u32>;     // [experts, blocks, words, 64]
@group(0) @binding(8) var<storage, read_write> hidden: array<f32>;  // [pairs, outputs]
override GATE_IS_THERE: bool = false;

// The gate's sums wait in the result for those of `up`, which the same thread gets: fewer sums at a time.
fn store_gate(at: u32, sum: f32) {
    hidden[at] = sum;
}

fn store_up(at: u32, sum: f32) {
    hidden[at] = gelu(hidden[at]) * sum;
}

@compute @workgroup_size(WORKGROUP)
fn gated_gelu_cooperative(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
    let expert = expert_of(workgroup.x);
    if expert >= params.expert_count { return; }
    take_places(workgroup.x, thread);
    let member = Member(thread, subgroup, subgroups);
    if !GATE_IS_THERE { product_of_gate(block_of(expert, workgroup.y, params.factor), member); }
    product_of_up(block_of(expert, workgroup.y, params.up_factor), member);
}
