// expert_combine: out[t, n] = sum_j probabilities[t, j] * products[t * chosen + j, n], best expert (j = 0) first.
// Shapes (row-major): probabilities [rows, chosen] f32; products [rows * chosen, outputs] f32; out [rows, outputs] f32.
// Dispatch: (ceil(outputs / 64), rows, 1). CPU reference: cpu.rs, which does both halves.
struct Params {
    outputs: u32,
    chosen: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> probabilities: array<f32>;  // [rows, chosen]
@group(0) @binding(2) var<storage, read> products: array<f32>;       // [rows * chosen, outputs]
@group(0) @binding(3) var<storage, read_write> out: array<f32>;      // [rows, outputs]

@compute @workgroup_size(64)
fn expert_combine(@builtin(global_invocation_id) id: vec3<u32>) {
    let n = id.x;
    if n >= params.outputs { return; }
    var sum = 0.0;
    for (var j = 0u; j < params.chosen; j++) {
        let pair = id.y * params.chosen + j;
        sum = fma(probabilities[pair], products[pair * params.outputs + n], sum);
    }
    out[id.y * params.outputs + n] = sum;
}
