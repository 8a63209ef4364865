// attention: for row t at position p and query head i, over the keys s of one block of 128 absolute positions, s <= p:
// a[s] = cap * tanh(multiplier * (q . k[s]) / cap), or -1e30 where the key may not be attended to; m = max a, w[s] = exp(a[s] - m),
// and sum_s w[s] * v[s] with sum_s w[s]. A row within the first block is finished here; others leave m and both sums in `partials` for
// attention_combine.wgsl. Which of the two depends on the position alone.
// Shapes (row-major): q, out [rows, heads * head_dim]; keys, values [slots, kv_heads * head_dim]; attended [slots];
// places [rows] of (position, start of the block table, slot, attended); tables: block numbers, 16 positions a block;
// partials [rows of this dispatch, heads, blocks, 2 + head_dim]: m, sum of w, weighted sum of v.
// Order of sums: of q . k, components even and odd apart, ascending; of w, as in lanes.wgsl, which this is joined with; of w * v, by
// ascending s.
// Dispatch: (heads, blocks of the longest row, rows of this dispatch); one workgroup a block, a thread a key. tanh is given at most 15
// in magnitude: beyond, some GPUs return NaN. CPU reference: cpu.rs.
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
@group(0) @binding(1) var<storage, read> q: array<vec2<f32>>;          // [rows, heads * head_dim / 2]
@group(0) @binding(2) var<storage, read> keys: array<vec2<f32>>;       // [slots, kv_heads * head_dim / 2]
@group(0) @binding(3) var<storage, read> values: array<f32>;           // [slots, kv_heads * head_dim]
@group(0) @binding(4) var<storage, read> attended: array<u32>;         // [slots]
@group(0) @binding(5) var<storage, read> places: array<vec4<u32>>;     // [rows]
@group(0) @binding(6) var<storage, read> tables: array<u32>;
@group(0) @binding(7) var<storage, read_write> out: array<f32>;        // [rows, heads * head_dim]
@group(0) @binding(8) var<storage, read_write> partials: array<f32>;   // [rows, heads, blocks, 2 + head_dim]
const BLOCK: u32 = 128u;
const TABLE_BLOCK: u32 = 16u;
const MASKED_LOGIT: f32 = -1e30;
const NO_KEY: f32 = -3e38;  // beside a masked key's logit, too, its weight is 0
var<workgroup> weights: array<f32, 128>;

// exp without the driver's idea of what very negative arguments give.
fn weight_of(difference: f32) -> f32 {
    return select(0.0, exp(max(difference, -87.0)), difference >= -87.0);
}

@compute @workgroup_size(128)
fn attention(@builtin(workgroup_id) workgroup: vec3<u32>, thread: Thread) {
    let lane = lane_of(thread);
    let head = workgroup.x;
    let row = params.row_begin + workgroup.z;
    let place = places[row];
    let first = workgroup.y * BLOCK;
    if first > place.x { return; }
    let count = min(BLOCK, place.x + 1u - first);
    let dim = params.head_dim;
    let query = (row * params.heads + head) * dim;
    let kv_head = head / (params.heads / params.kv_heads);

    var logit = NO_KEY;
    if lane < count {
        let position = first + lane;
        let slot = tables[place.y + position / TABLE_BLOCK] * TABLE_BLOCK + position % TABLE_BLOCK;
        // A head's width is even.
        let pairs = dim / 2u;
        let start = (slot * params.kv_heads + kv_head) * pairs;
        var dot = vec2<f32>();
        for (var j = 0u; j < pairs; j++) { dot = fma(q[query / 2u + j], keys[start + j], dot); }
        let scaled = params.multiplier * (dot.x + dot.y) / params.logit_cap;
        let capped = params.logit_cap * tanh(clamp(scaled, -15.0, 15.0));
        logit = select(MASKED_LOGIT, capped, attended[slot] != 0u);
    }
    let largest = maximum_of_lanes(lane, logit);
    let weight = weight_of(logit - largest);
    weights[lane] = weight;
    // Behind its barrier the weights of all are there.
    let total = sum_of_lanes(lane, weight);

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
