// matmul: out[t, n] = factor * sum_k x[t, k] * w[k, n], for the columns n of one shard of w.
// Shapes (row-major): x [rows, inputs] f32; out [rows, outputs] f32.
// Weights [blocks, groups, quads, 64] and the order of sums as in columns.wgsl, which is joined to this.
// Scales f32 [groups, outputs]; not read with FLOAT_WEIGHTS.
// Dispatch: (ceil(rows / (ROWS_PER_THREAD * ROW_TILES)), blocks, 1); a thread computes ROWS_PER_THREAD rows of COLUMNS_PER_THREAD columns.
// One row and column a thread suits a GPU in decode; four of each read less. CPU reference: cpu.rs.
struct Params {
    inputs: u32,
    outputs: u32,
    groups: u32,
    factor: f32,
    rows: u32,
    column_begin: u32, // first column of the shard, a multiple of 64
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;           // [rows, inputs]
@group(0) @binding(2) var<storage, read> weights: array<u32>;     // [blocks, groups, quads, 64]
@group(0) @binding(3) var<storage, read> scales: array<f32>;      // [groups, outputs]
@group(0) @binding(4) var<storage, read_write> out: array<f32>;   // [rows, outputs]
override ROWS_PER_THREAD: u32 = 1u;     // 1 or 4
override ROW_TILES: u32 = 1u;           // tiles of rows in a workgroup

fn quad_of_weights(word: u32) -> vec4<f32> {
    if FLOAT_WEIGHTS {
        return bitcast<vec4<f32>>(vec4<u32>(
            weights[word], weights[word + LANES], weights[word + 2u * LANES], weights[word + 3u * LANES]));
    }
    return vec4<f32>(unpack4xI8(weights[word]));
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
    return vec4<f32>(x[at], x[at + 1u], x[at + 2u], x[at + 3u]);
}

// The last `left` (1 to 3) inputs of a group; what is beyond them is not read, so that it may be infinite.
fn tail_of_x(at: u32, left: u32) -> vec4<f32> {
    var quad = vec4<f32>(x[at], 0.0, 0.0, 0.0);
    if left > 1u { quad.y = x[at + 1u]; }
    if left > 2u { quad.z = x[at + 2u]; }
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

fn store(row: u32, n: u32, sum: vec4<f32>) {
    let result = params.factor * sum;
    let at = row * params.outputs + n;
    out[at] = result.x;
    if COLUMNS_PER_THREAD > 1u {
        if n + 1u < params.outputs { out[at + 1u] = result.y; }
        if n + 2u < params.outputs { out[at + 2u] = result.z; }
        if n + 3u < params.outputs { out[at + 3u] = result.w; }
    }
}

@compute @workgroup_size(COLUMN_THREADS, ROW_TILES)
fn matmul(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let lane = local.x * COLUMNS_PER_THREAD;
    let n = params.column_begin + workgroup.y * LANES + lane;
    let row = (workgroup.x * ROW_TILES + local.y) * ROWS_PER_THREAD;
    if n >= params.outputs || row >= params.rows { return; }
    // Rows beyond the last one repeat it and are not stored.
    let last = params.rows - 1u;
    let x0 = row * params.inputs;
    let x1 = min(row + 1u, last) * params.inputs;
    let x2 = min(row + 2u, last) * params.inputs;
    let x3 = min(row + 3u, last) * params.inputs;

    let length = params.inputs / params.groups;
    let quads = length / 4u;
    let left = length % 4u;
    let step = select(LANES, 4u * LANES, FLOAT_WEIGHTS);
    var word = workgroup.y * params.groups * ((length + 3u) / 4u) * step + lane;
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
            a0 = add(a0, quad_of_x(x0 + k), w);
            if ROWS_PER_THREAD > 1u {
                a1 = add(a1, quad_of_x(x1 + k), w);
                a2 = add(a2, quad_of_x(x2 + k), w);
                a3 = add(a3, quad_of_x(x3 + k), w);
            }
            k += 4u;
            word += step;
        }
        if left > 0u {
            let w = columns_of_weights(word);
            a0 = add(a0, tail_of_x(x0 + k, left), w);
            if ROWS_PER_THREAD > 1u {
                a1 = add(a1, tail_of_x(x1 + k, left), w);
                a2 = add(a2, tail_of_x(x2 + k, left), w);
                a3 = add(a3, tail_of_x(x3 + k, left), w);
            }
            word += step;
        }
        let scale = scales_at(group, n);
        s0 = add_group(s0, a0, scale);
        if ROWS_PER_THREAD > 1u {
            s1 = add_group(s1, a1, scale);
            s2 = add_group(s2, a2, scale);
            s3 = add_group(s3, a3, scale);
        }
    }

    store(row, n, s0);
    if ROWS_PER_THREAD > 1u {
        if row + 1u <= last { store(row + 1u, n, s1); }
        if row + 2u <= last { store(row + 2u, n, s2); }
        if row + 3u <= last { store(row + 3u, n, s3); }
    }
}
