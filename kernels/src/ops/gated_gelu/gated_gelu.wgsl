// gated_gelu: hidden[p, n] = gelu(x[t] @ gate[e]) * (x[t] @ up[e]) for every pair p = t * chosen + j of a row and its j-th expert e,
// for the columns n and the experts of one shard. gelu(g) = 0.5 * g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3))).
// Shapes (row-major): x [rows, inputs] f32; hidden [pairs, outputs] f32. Weights and the order of sums as in columns.wgsl, one
// stretch of `blocks` blocks an expert; scales f32 [experts, groups, outputs].
// choice: with PAIRS_PER_THREAD = 1 the expert of each pair, [items]; with 4 the tiles of expert_tiles.wgsl, [items, 5].
// Dispatch: (ceil(items / TILES), blocks of the shard, 1); a thread computes PAIRS_PER_THREAD pairs of COLUMNS_PER_THREAD columns.
// tanh is given at most 15 in magnitude: beyond, it is 1 in f32, and some GPUs return NaN. CPU reference: cpu.rs.
struct Params {
    inputs: u32,
    outputs: u32,
    groups: u32,
    chosen: u32,
    items: u32,        // pairs or tiles
    expert_begin: u32, // experts of the shard
    expert_count: u32,
    column_begin: u32, // first column of the shard, a multiple of 64
    blocks: u32,       // blocks of 64 columns in the shard, an expert
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;             // [rows, inputs]
@group(0) @binding(2) var<storage, read> choice: array<u32>;        // [items] or [items, 5]
@group(0) @binding(3) var<storage, read> gate: array<u32>;          // [experts, blocks, groups, quads, 64]
@group(0) @binding(4) var<storage, read> gate_scales: array<f32>;   // [experts, groups, outputs]
@group(0) @binding(5) var<storage, read> up: array<u32>;            // [experts, blocks, groups, quads, 64]
@group(0) @binding(6) var<storage, read> up_scales: array<f32>;     // [experts, groups, outputs]
@group(0) @binding(7) var<storage, read_write> hidden: array<f32>;  // [pairs, outputs]
override PAIRS_PER_THREAD: u32 = 1u;    // 1 or 4
override TILES: u32 = 1u;               // items in a workgroup
const NONE: u32 = 0xffffffffu;

fn quad_of_gate(word: u32) -> vec4<f32> {
    if FLOAT_WEIGHTS {
        return bitcast<vec4<f32>>(vec4<u32>(gate[word], gate[word + LANES], gate[word + 2u * LANES], gate[word + 3u * LANES]));
    }
    return vec4<f32>(unpack4xI8(gate[word]));
}

fn quad_of_up(word: u32) -> vec4<f32> {
    if FLOAT_WEIGHTS {
        return bitcast<vec4<f32>>(vec4<u32>(up[word], up[word + LANES], up[word + 2u * LANES], up[word + 3u * LANES]));
    }
    return vec4<f32>(unpack4xI8(up[word]));
}

fn columns_of_gate(word: u32) -> Columns {
    var w = Columns();
    w.a = quad_of_gate(word);
    if COLUMNS_PER_THREAD > 1u {
        w.b = quad_of_gate(word + 1u);
        w.c = quad_of_gate(word + 2u);
        w.d = quad_of_gate(word + 3u);
    }
    return w;
}

fn columns_of_up(word: u32) -> Columns {
    var w = Columns();
    w.a = quad_of_up(word);
    if COLUMNS_PER_THREAD > 1u {
        w.b = quad_of_up(word + 1u);
        w.c = quad_of_up(word + 2u);
        w.d = quad_of_up(word + 3u);
    }
    return w;
}

fn quad_of_x(at: u32) -> vec4<f32> {
    return vec4<f32>(x[at], x[at + 1u], x[at + 2u], x[at + 3u]);
}

// The last `left` (1 to 3) inputs of a group; what is beyond them is not read, so that it may be infinite.
fn tail_of_x(at: u32, left: u32) -> vec4<f32> {
    var quad = vec4<f32>(x[at], 0.0, 0.0, 0.0);
    if left > 1u { quad.y = x[at + 1u]; }
    if left > 2u { quad.z = x[at + 2u]; }
    return quad;
}

// Where the scales of four columns stand; columns beyond the last one repeat it, their weights are zeros.
fn scale_places(row: u32, n: u32) -> vec4<u32> {
    return vec4<u32>(row * params.outputs) + min(vec4<u32>(n, n + 1u, n + 2u, n + 3u), vec4<u32>(params.outputs - 1u));
}

fn scales_of_gate(at: vec4<u32>) -> vec4<f32> {
    if FLOAT_WEIGHTS { return vec4<f32>(1.0); }
    if COLUMNS_PER_THREAD == 1u { return vec4<f32>(gate_scales[at.x], 0.0, 0.0, 0.0); }
    return vec4<f32>(gate_scales[at.x], gate_scales[at.y], gate_scales[at.z], gate_scales[at.w]);
}

fn scales_of_up(at: vec4<u32>) -> vec4<f32> {
    if FLOAT_WEIGHTS { return vec4<f32>(1.0); }
    if COLUMNS_PER_THREAD == 1u { return vec4<f32>(up_scales[at.x], 0.0, 0.0, 0.0); }
    return vec4<f32>(up_scales[at.x], up_scales[at.y], up_scales[at.z], up_scales[at.w]);
}

fn gelu(g: vec4<f32>) -> vec4<f32> {
    let inner = 0.7978846 * fma(0.044715 * g * g, g, g);
    return 0.5 * g * (1.0 + tanh(clamp(inner, vec4<f32>(-15.0), vec4<f32>(15.0))));
}

fn store(pair: u32, n: u32, g: vec4<f32>, u: vec4<f32>) {
    if pair == NONE { return; }
    let result = gelu(g) * u;
    let at = pair * params.outputs + n;
    hidden[at] = result.x;
    if COLUMNS_PER_THREAD > 1u {
        if n + 1u < params.outputs { hidden[at + 1u] = result.y; }
        if n + 2u < params.outputs { hidden[at + 2u] = result.z; }
        if n + 3u < params.outputs { hidden[at + 3u] = result.w; }
    }
}

@compute @workgroup_size(COLUMN_THREADS, TILES)
fn gated_gelu(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let lane = local.x * COLUMNS_PER_THREAD;
    let n = params.column_begin + workgroup.y * LANES + lane;
    let item = workgroup.x * TILES + local.y;
    if n >= params.outputs || item >= params.items { return; }
    var expert = NONE;
    var pairs = vec4<u32>(item, NONE, NONE, NONE);
    if PAIRS_PER_THREAD == 1u {
        expert = choice[item];
    } else {
        let tile = item * 5u;
        expert = choice[tile];
        pairs = vec4<u32>(choice[tile + 1u], choice[tile + 2u], choice[tile + 3u], choice[tile + 4u]);
    }
    // Also true for the tiles that hold nothing: NONE - expert_begin is large.
    if expert - params.expert_begin >= params.expert_count { return; }

    // Places without a pair repeat the first one and are not stored.
    let rows = select(pairs, vec4<u32>(pairs.x), pairs == vec4<u32>(NONE)) / params.chosen * params.inputs;
    let length = params.inputs / params.groups;
    let quads = length / 4u;
    let left = length % 4u;
    let step = select(LANES, 4u * LANES, FLOAT_WEIGHTS);
    let block = (expert - params.expert_begin) * params.blocks + workgroup.y;
    var word = block * params.groups * ((length + 3u) / 4u) * step + lane;
    var gs0 = vec4<f32>();
    var gs1 = vec4<f32>();
    var gs2 = vec4<f32>();
    var gs3 = vec4<f32>();
    var us0 = vec4<f32>();
    var us1 = vec4<f32>();
    var us2 = vec4<f32>();
    var us3 = vec4<f32>();
    for (var group = 0u; group < params.groups; group++) {
        var g0 = Columns();
        var g1 = Columns();
        var g2 = Columns();
        var g3 = Columns();
        var u0 = Columns();
        var u1 = Columns();
        var u2 = Columns();
        var u3 = Columns();
        var k = group * length;
        for (var quad = 0u; quad < quads; quad++) {
            let wg = columns_of_gate(word);
            let wu = columns_of_up(word);
            let v0 = quad_of_x(rows.x + k);
            g0 = add(g0, v0, wg);
            u0 = add(u0, v0, wu);
            if PAIRS_PER_THREAD > 1u {
                let v1 = quad_of_x(rows.y + k);
                let v2 = quad_of_x(rows.z + k);
                let v3 = quad_of_x(rows.w + k);
                g1 = add(g1, v1, wg);
                g2 = add(g2, v2, wg);
                g3 = add(g3, v3, wg);
                u1 = add(u1, v1, wu);
                u2 = add(u2, v2, wu);
                u3 = add(u3, v3, wu);
            }
            k += 4u;
            word += step;
        }
        if left > 0u {
            let wg = columns_of_gate(word);
            let wu = columns_of_up(word);
            let v0 = tail_of_x(rows.x + k, left);
            g0 = add(g0, v0, wg);
            u0 = add(u0, v0, wu);
            if PAIRS_PER_THREAD > 1u {
                let v1 = tail_of_x(rows.y + k, left);
                let v2 = tail_of_x(rows.z + k, left);
                let v3 = tail_of_x(rows.w + k, left);
                g1 = add(g1, v1, wg);
                g2 = add(g2, v2, wg);
                g3 = add(g3, v3, wg);
                u1 = add(u1, v1, wu);
                u2 = add(u2, v2, wu);
                u3 = add(u3, v3, wu);
            }
            word += step;
        }
        let places = scale_places(expert * params.groups + group, n);
        let gate_scale = scales_of_gate(places);
        let up_scale = scales_of_up(places);
        gs0 = add_group(gs0, g0, gate_scale);
        us0 = add_group(us0, u0, up_scale);
        if PAIRS_PER_THREAD > 1u {
            gs1 = add_group(gs1, g1, gate_scale);
            gs2 = add_group(gs2, g2, gate_scale);
            gs3 = add_group(gs3, g3, gate_scale);
            us1 = add_group(us1, u1, up_scale);
            us2 = add_group(us2, u2, up_scale);
            us3 = add_group(us3, u3, up_scale);
        }
    }

    store(pairs.x, n, gs0, us0);
    if PAIRS_PER_THREAD > 1u {
        store(pairs.y, n, gs1, us1);
        store(pairs.z, n, gs2, us2);
        store(pairs.w, n, gs3, us3);
    }
}
