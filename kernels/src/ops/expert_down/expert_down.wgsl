// expert_down: products[p, n] = hidden[p] @ down[e] for every pair p = t * chosen + j of a row and its j-th expert e, for the columns
// n and the experts of one shard. expert_combine.wgsl adds a row's products, so that shards cannot change the order of that sum.
// Shapes (row-major): hidden [pairs, inputs] f32; products [pairs, outputs] f32. Weights and the order of sums as in columns.wgsl,
// one stretch of `blocks` blocks an expert; scales f32 [experts, groups, outputs].
// choice: with PAIRS_PER_THREAD = 1 the expert of each pair, [items]; with 4 the tiles of expert_tiles.wgsl, [items, 5].
// Dispatch: (ceil(items / TILES), blocks of the shard, 1); a thread computes PAIRS_PER_THREAD pairs of COLUMNS_PER_THREAD columns.
// CPU reference: cpu.rs.
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
@group(0) @binding(1) var<storage, read> hidden: array<f32>;          // [pairs, inputs]
@group(0) @binding(2) var<storage, read> choice: array<u32>;          // [items] or [items, 5]
@group(0) @binding(3) var<storage, read> down: array<u32>;            // [experts, blocks, groups, quads, 64]
@group(0) @binding(4) var<storage, read> scales: array<f32>;          // [experts, groups, outputs]
@group(0) @binding(5) var<storage, read_write> products: array<f32>;  // [pairs, outputs]
override PAIRS_PER_THREAD: u32 = 1u;    // 1 or 4
override TILES: u32 = 1u;               // items in a workgroup
const NONE: u32 = 0xffffffffu;

fn quad_of_weights(word: u32) -> vec4<f32> {
    if FLOAT_WEIGHTS {
        return bitcast<vec4<f32>>(vec4<u32>(down[word], down[word + LANES], down[word + 2u * LANES], down[word + 3u * LANES]));
    }
    return vec4<f32>(unpack4xI8(down[word]));
}

fn columns_of_weights(word: u32) -> Columns {
    var w = Columns();
    w.a = quad_of_weights(word);
    if COLUMNS_PER_THREAD > 1u {
        w.b = quad_of_weights(word + 1u);
        w.c = quad_of_weights(word + 2u);
        w.d = quad_of_weights(word + 3u);
    }
    return w;
}

fn quad_of_x(at: u32) -> vec4<f32> {
    return vec4<f32>(hidden[at], hidden[at + 1u], hidden[at + 2u], hidden[at + 3u]);
}

// The last `left` (1 to 3) inputs of a group; what is beyond them is not read, so that it may be infinite.
fn tail_of_x(at: u32, left: u32) -> vec4<f32> {
    var quad = vec4<f32>(hidden[at], 0.0, 0.0, 0.0);
    if left > 1u { quad.y = hidden[at + 1u]; }
    if left > 2u { quad.z = hidden[at + 2u]; }
    return quad;
}

// Columns beyond the last one repeat its scale; their weights are zeros.
fn scales_at(row: u32, n: u32) -> vec4<f32> {
    if FLOAT_WEIGHTS { return vec4<f32>(1.0); }
    let start = row * params.outputs;
    var scale = vec4<f32>(scales[start + n], 0.0, 0.0, 0.0);
    if COLUMNS_PER_THREAD > 1u {
        let last = params.outputs - 1u;
        scale.y = scales[start + min(n + 1u, last)];
        scale.z = scales[start + min(n + 2u, last)];
        scale.w = scales[start + min(n + 3u, last)];
    }
    return scale;
}

fn store(pair: u32, n: u32, sum: vec4<f32>) {
    if pair == NONE { return; }
    let at = pair * params.outputs + n;
    products[at] = sum.x;
    if COLUMNS_PER_THREAD > 1u {
        if n + 1u < params.outputs { products[at + 1u] = sum.y; }
        if n + 2u < params.outputs { products[at + 2u] = sum.z; }
        if n + 3u < params.outputs { products[at + 3u] = sum.w; }
    }
}

@compute @workgroup_size(COLUMN_THREADS, TILES)
fn expert_down(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
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
    let rows = select(pairs, vec4<u32>(pairs.x), pairs == vec4<u32>(NONE)) * params.inputs;
    let length = params.inputs / params.groups;
    let quads = length / 4u;
    let left = length % 4u;
    let step = select(LANES, 4u * LANES, FLOAT_WEIGHTS);
    let block = (expert - params.expert_begin) * params.blocks + workgroup.y;
    var word = block * params.groups * ((length + 3u) / 4u) * step + lane;
    var s0 = vec4<f32>();
    var s1 = vec4<f32>();
    var s2 = vec4<f32>();
    var s3 = vec4<f32>();
    for (var group = 0u; group < params.groups; group++) {
        var a0 = Columns();
        var a1 = Columns();
        var a2 = Columns();
        var a3 = Columns();
        var k = group * length;
        for (var quad = 0u; quad < quads; quad++) {
            let w = columns_of_weights(word);
            a0 = add(a0, quad_of_x(rows.x + k), w);
            if PAIRS_PER_THREAD > 1u {
                a1 = add(a1, quad_of_x(rows.y + k), w);
                a2 = add(a2, quad_of_x(rows.z + k), w);
                a3 = add(a3, quad_of_x(rows.w + k), w);
            }
            k += 4u;
            word += step;
        }
        if left > 0u {
            let w = columns_of_weights(word);
            a0 = add(a0, tail_of_x(rows.x + k, left), w);
            if PAIRS_PER_THREAD > 1u {
                a1 = add(a1, tail_of_x(rows.y + k, left), w);
                a2 = add(a2, tail_of_x(rows.z + k, left), w);
                a3 = add(a3, tail_of_x(rows.w + k, left), w);
            }
            word += step;
        }
        let scale = scales_at(expert * params.groups + group, n);
        s0 = add_group(s0, a0, scale);
        if PAIRS_PER_THREAD > 1u {
            s1 = add_group(s1, a1, scale);
            s2 = add_group(s2, a2, scale);
            s3 = add_group(s3, a3, scale);
        }
    }

    store(pairs.x, n, s0);
    if PAIRS_PER_THREAD > 1u {
        store(pairs.y, n, s1);
        store(pairs.z, n, s2);
        store(pairs.w, n, s3);
    }
}
