// expert_down_cooperative: expert_down.wgsl for steps of many rows in prefill `fast`, with cooperative matrices.
// Shapes (row-major): x [pairs / pairs_a_row, inputs] as quantise_halves.wgsl makes it; products [pairs, outputs] f32. Weights as in
// product/columns.wgsl, one stretch of `blocks` blocks an expert, sums as in product/cooperative.wgsl. Joined with columns,
// pairs_cooperative, gelu, tiles_8 or tiles_16, cooperative, and matrix and product_cooperative for `down`.
// Dispatch: (tiles, some blocks of the shard, 1). CPU reference: cpu.rs.
enable f16;
enable wgpu_cooperative_matrix;
@group(0) @binding(4) var<storage, read> down: array<vec4<u32>>;      // [experts, blocks, chunks, 64]
@group(0) @binding(5) var<storage, read> down_scales: array<u32>;     // [experts, blocks, words, 64]
@group(0) @binding(6) var<storage, read_write> products: array<f32>;  // [pairs, outputs]

fn store_down(at: u32, sum: f32) {
    products[at] = sum;
}

@compute @workgroup_size(WORKGROUP)
fn expert_down_cooperative(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
    let expert = expert_of(workgroup.x);
    if expert >= params.expert_count { return; }
    take_places(workgroup.x, thread);
    product_of_down(block_of(expert, workgroup.y, params.factor), Member(thread, subgroup, subgroups));
}
