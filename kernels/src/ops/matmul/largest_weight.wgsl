// largest_weight: the largest magnitude of a shard's weights, as bits of f32, which are ordered as magnitudes are; infinity and NaN are
// the largest. Prefill `fast` asks for it when a matrix is loaded, to choose the power of two that keeps its weights in the range of halves.
// Joined with columns and with matrix for `weights`. Dispatch: (blocks, experts, 1) of the shard, a thread a column.
struct Params {
    inputs: u32,
    groups: u32,
    blocks: u32,  // of the shard, an expert
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>;           // [experts, blocks, chunks, 64]
@group(0) @binding(2) var<storage, read> weights_scales: array<u32>;          // [experts, blocks, words, 64]
@group(0) @binding(3) var<storage, read_write> largest: array<atomic<u32>>;   // [1]

@compute @workgroup_size(64)
fn largest_weight(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let block = workgroup.y * params.blocks + workgroup.x;
    let length = params.inputs / params.groups;
    // Of a group; halves of chunks with HALVED.
    let chunks = (length + 4u * QUADS - 1u) / (4u * QUADS);
    let first = block * chunks_of_column(params.groups, length) * LANES + lane;
    let first_scale = block * scale_words(params.groups) * LANES + lane;
    var most = vec4<u32>();
    for (var index = 0u; index < params.groups * chunks; index++) {
        var w = chunks_of_weights(first + select(index, index / 2u, HALVED) * LANES).a;
        if HALVED && index % 2u == 1u { w = w.zwxy; }
        let scales = scales_of_weights(first_scale, index / chunks);
        for (var quad = 0u; quad < QUADS; quad++) {
            let values = quad_of(w, quad) * scales.scale.x - scales.minimum.x;
            most = max(most, bitcast<vec4<u32>>(abs(values)));
        }
    }
    atomicMax(&largest[0], max(max(most.x, most.y), max(most.z, most.w)));
}
