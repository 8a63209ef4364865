// moe_router: p = softmax(x[t] @ router); the `num_experts_per_tok` largest are chosen, best first, the lower index on a tie.
// Shapes (row-major): x [rows, hidden_size] f32; router f32 as in product/columns.wgsl, one block: [hidden_size / 4, 64, 4];
// ids u32 and probabilities f32 [rows, num_experts_per_tok].
// Order of a logit's sum: PARTS parts (k / 4 mod PARTS) of four partial sums (k mod 4) each, by ascending k; the four as (a + b) + (c + d),
// then the parts ascending. Of the softmax's: experts ascending.
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
var<workgroup> weights: array<f32, 64>;

// Components `k..k + 4` of a row. The router is 0 beyond its inputs, but what follows the row may be infinite and is not read.
fn quad_of_x(row: u32, k: u32) -> vec4<f32> {
    let at = row * params.hidden_size + k;
    var quad = vec4<f32>(x[at], 0.0, 0.0, 0.0);
    if k + 1u < params.hidden_size { quad.y = x[at + 1u]; }
    if k + 2u < params.hidden_size { quad.z = x[at + 2u]; }
    if k + 3u < params.hidden_size { quad.w = x[at + 3u]; }
    return quad;
}

@compute @workgroup_size(128)
fn moe_router(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = workgroup.x;
    let experts = params.num_experts;
    let quads = (params.hidden_size + 3u) / 4u;
    for (var task = lane; task < PARTS * experts; task += WORKGROUP) {
        let expert = task % experts;
        var sum = vec4<f32>();
        for (var quad = task / experts; quad < quads; quad += PARTS) {
            sum = fma(quad_of_x(row, 4u * quad), router[quad * LANES + expert], sum);
        }
        partial[task] = (sum.x + sum.y) + (sum.z + sum.w);
    }
    workgroupBarrier();
    if lane < experts {
        var sum = 0.0;
        for (var part = 0u; part < PARTS; part++) { sum += partial[part * experts + lane]; }
        logits[lane] = sum;
    }
    workgroupBarrier();
    if lane < experts {
        var largest = logits[0];
        for (var e = 1u; e < experts; e++) { largest = max(largest, logits[e]); }
        weights[lane] = exp(logits[lane] - largest);
    }
    workgroupBarrier();
    if lane < experts {
        let weight = weights[lane];
        var total = 0.0;
        // How many go before this one. Weights are not negative, so that their bits have their order, and one even without being numbers.
        var place = 0u;
        for (var e = 0u; e < experts; e++) {
            total += weights[e];
            let bits = bitcast<u32>(weights[e]);
            if bits > bitcast<u32>(weight) || (bits == bitcast<u32>(weight) && e < lane) { place++; }
        }
        if place < params.num_experts_per_tok {
            ids[row * params.num_experts_per_tok + place] = lane;
            probabilities[row * params.num_experts_per_tok + place] = weight / total;
        }
    }
}
