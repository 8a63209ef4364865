// moe_router: p = softmax(x[t] @ router); the `num_experts_per_tok` largest are chosen, best first, the lower index on a tie.
// Shapes (row-major): x [rows, hidden_size] f32; router f32 as in product/columns.wgsl, one block: [hidden_size / 4, 64, 4];
// ids u32 and probabilities f32 [rows, num_experts_per_tok].
// Order of a logit's sum: PARTS partial sums (k mod PARTS) by ascending k, then the parts ascending.
// Dispatch: one workgroup a row, (rows, 1, 1). At most 64 experts. CPU reference: cpu.rs.
struct Params {
    hidden_size: u32,
    num_experts: u32,
    num_experts_per_tok: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;                    // [rows, hidden_size]
@group(0) @binding(2) var<storage, read> router: array<vec4<f32>>;         // [hidden_size / 4, 64]
@group(0) @binding(3) var<storage, read_write> ids: array<u32>;            // [rows, num_experts_per_tok]
@group(0) @binding(4) var<storage, read_write> probabilities: array<f32>;  // [rows, num_experts_per_tok]
const WORKGROUP: u32 = 128u;
const PARTS: u32 = 16u;
const LANES: u32 = 64u;
var<workgroup> partial: array<f32, 1024>;  // [PARTS, num_experts]
var<workgroup> logits: array<f32, 64>;

@compute @workgroup_size(128)
fn moe_router(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = workgroup.x;
    let experts = params.num_experts;
    for (var task = lane; task < PARTS * experts; task += WORKGROUP) {
        let expert = task % experts;
        var sum = 0.0;
        for (var k = task / experts; k < params.hidden_size; k += PARTS) {
            sum = fma(x[row * params.hidden_size + k], router[k / 4u * LANES + expert][k % 4u], sum);
        }
        partial[task] = sum;
    }
    workgroupBarrier();
    if lane < experts {
        var sum = 0.0;
        for (var part = 0u; part < PARTS; part++) { sum += partial[part * experts + lane]; }
        logits[lane] = sum;
    }
    workgroupBarrier();
    if lane == 0u {
        var largest = logits[0];
        for (var e = 1u; e < experts; e++) { largest = max(largest, logits[e]); }
        var total = 0.0;
        for (var e = 0u; e < experts; e++) {
            let weight = exp(logits[e] - largest);
            logits[e] = weight;
            total += weight;
        }
        for (var j = 0u; j < params.num_experts_per_tok; j++) {
            var best = 0u;
            for (var e = 1u; e < experts; e++) {
                if logits[e] > logits[best] { best = e; }
            }
            ids[row * params.num_experts_per_tok + j] = best;
            probabilities[row * params.num_experts_per_tok + j] = logits[best] / total;
            logits[best] = -1.0;  // weights are not negative: never chosen again
        }
    }
}
