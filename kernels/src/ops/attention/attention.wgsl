// attention: for row t at position p and query head i, over the keys s of one block of 128 absolute positions, s <= p:
// a[s] = cap * tanh(multiplier * (q . k[s]) / cap), or -1e30 where the key may not be attended to; m = max a, w[s] = exp(a[s] - m),
// and sum_s w[s] * v[s] with sum_s w[s]. A row within the first block is finished here; others leave m and both sums in `partials` for
// attention_combine.wgsl. Which of the two depends on the position alone.
// Shapes (row-major): q, out [rows, heads * head_dim]; keys, values [slots, kv_heads * head_dim]; attended [slots];
// places [rows] of (position, start of the block table, slot, attended); tables: block numbers, 16 positions a block;
// partials [rows of this dispatch, heads, blocks, 2 + head_dim]: m, sum of w, weighted sum of v.
// Order of sums: of q . k, components even and odd apart, ascending; of w, eight partial sums (s mod 8) by ascending s; of w * v, by
// ascending s.
// Dispatch: (heads, blocks of the longest row, rows of this dispatch); one workgroup a block. tanh is given at most 15 in
// magnitude: beyond, some GPUs return NaN. CPU reference: cpu.rs.
struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    multiplier: f32,
    logit_cap: f32,
    row_begin: u32, // first row of this dispatch
    blocks: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<f32>;                // [rows, heads * head_dim]
@group(0) @binding(2) var<storage, read> keys: array<f32>;             // [slots, kv_heads * head_dim]
@group(0) @binding(3) var<storage, read> values: array<f32>;           // [slots, kv_heads * head_dim]
@group(0) @binding(4) var<storage, read> attended: array<u32>;         // [slots]
@group(0) @binding(5) var<storage, read> places: array<vec4<u32>>;     // [rows]
@group(0) @binding(6) var<storage, read> tables: array<u32>;
@group(0) @binding(7) var<storage, read_write> out: array<f32>;        // [rows, heads * head_dim]
@group(0) @binding(8) var<storage, read_write> partials: array<f32>;   // [rows, heads, blocks, 2 + head_dim]
const WORKGROUP: u32 = 64u;
const REDUCERS: u32 = 8u;  // threads that reduce the block's keys; the others then read eight numbers instead of 128
const BLOCK: u32 = 128u;
const TABLE_BLOCK: u32 = 16u;
const MASKED_LOGIT: f32 = -1e30;
var<workgroup> weights: array<f32, 128>;
var<workgroup> maxima: array<f32, 8>;
var<workgroup> totals: array<f32, 8>;

// exp without the driver's idea of what very negative arguments give.
fn weight_of(difference: f32) -> f32 {
    return select(0.0, exp(max(difference, -87.0)), difference >= -87.0);
}

@compute @workgroup_size(64)
fn attention(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let head = workgroup.x;
    let row = params.row_begin + workgroup.z;
    let place = places[row];
    let first = workgroup.y * BLOCK;
    if first > place.x { return; }
    let count = min(BLOCK, place.x + 1u - first);
    let dim = params.head_dim;
    let query = (row * params.heads + head) * dim;
    let kv_head = head / (params.heads / params.kv_heads);

    for (var i = lane; i < count; i += WORKGROUP) {
        let position = first + i;
        let slot = tables[place.y + position / TABLE_BLOCK] * TABLE_BLOCK + position % TABLE_BLOCK;
        let start = (slot * params.kv_heads + kv_head) * dim;
        var dot = vec2<f32>();
        for (var j = 0u; j < dim; j += 2u) {
            dot = fma(vec2<f32>(q[query + j], q[query + j + 1u]), vec2<f32>(keys[start + j], keys[start + j + 1u]), dot);
        }
        let scaled = params.multiplier * (dot.x + dot.y) / params.logit_cap;
        let capped = params.logit_cap * tanh(clamp(scaled, -15.0, 15.0));
        weights[i] = select(MASKED_LOGIT, capped, attended[slot] != 0u);
    }
    workgroupBarrier();
    if lane < REDUCERS {
        var largest = weights[0];
        for (var i = lane; i < count; i += REDUCERS) { largest = max(largest, weights[i]); }
        maxima[lane] = largest;
    }
    workgroupBarrier();
    let largest = max(max(max(maxima[0], maxima[1]), max(maxima[2], maxima[3])),
        max(max(maxima[4], maxima[5]), max(maxima[6], maxima[7])));
    if lane < REDUCERS {
        var total = 0.0;
        for (var i = lane; i < count; i += REDUCERS) {
            let weight = weight_of(weights[i] - largest);
            weights[i] = weight;
            total += weight;
        }
        totals[lane] = total;
    }
    workgroupBarrier();
    let total = ((totals[0] + totals[1]) + (totals[2] + totals[3])) + ((totals[4] + totals[5]) + (totals[6] + totals[7]));

    let partial = ((workgroup.z * params.heads + head) * params.blocks + workgroup.y) * (2u + dim);
    let stride = params.kv_heads * dim;
    for (var j = lane; j < dim; j += WORKGROUP) {
        var sum = 0.0;
        // Keys of one block of the table lie one after the other.
        for (var begin = 0u; begin < count; begin += TABLE_BLOCK) {
            let slot = tables[place.y + (first + begin) / TABLE_BLOCK] * TABLE_BLOCK;
            var at = slot * stride + kv_head * dim + j;
            for (var i = begin; i < min(begin + TABLE_BLOCK, count); i++) {
                sum = fma(weights[i], values[at], sum);
                at += stride;
            }
        }
        if place.x < BLOCK {
            out[query + j] = sum / total;
        } else {
            partials[partial + 2u + j] = sum;
            if j == 0u {
                partials[partial] = largest;
                partials[partial + 1u] = total;
            }
        }
    }
}
