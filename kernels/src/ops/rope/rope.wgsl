// rope: rotates q in place and k on its way into the pool, and copies v into the pool; half-rotation layout: with (c, s) the cosine
// and sine of the row's angle j, out[j] = x[j] * c - x[j + h] * s, out[j + h] = x[j + h] * c + x[j] * s, h = head_dim / 2.
// Shapes (row-major): q [rows, heads * head_dim]; k, v [rows, kv_heads * head_dim]; angles (c, s) [rows, h], made on the host, because
// cos and sin of 8191 are imprecise on some GPUs; places [rows] of (position, start of the block table, slot, attended);
// keys, values [slots, kv_heads * head_dim].
// Dispatch: (ceil((heads + kv_heads) * h / 64), rows, 1); one thread a pair of components. CPU reference: cpu.rs.
struct Params {
    heads: u32,
    head_dim: u32,
    kv_heads: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> q: array<f32>;        // [rows, heads * head_dim]
@group(0) @binding(2) var<storage, read> k: array<f32>;              // [rows, kv_heads * head_dim]
@group(0) @binding(3) var<storage, read> v: array<f32>;              // [rows, kv_heads * head_dim]
@group(0) @binding(4) var<storage, read> angles: array<vec2<f32>>;   // [rows, head_dim / 2]
@group(0) @binding(5) var<storage, read> places: array<vec4<u32>>;   // [rows]
@group(0) @binding(6) var<storage, read_write> keys: array<f32>;     // [slots, kv_heads * head_dim]
@group(0) @binding(7) var<storage, read_write> values: array<f32>;   // [slots, kv_heads * head_dim]

fn rotate(low: f32, high: f32, angle: vec2<f32>) -> vec2<f32> {
    return vec2<f32>(fma(low, angle.x, -(high * angle.y)), fma(high, angle.x, low * angle.y));
}

@compute @workgroup_size(64)
fn rope(@builtin(global_invocation_id) id: vec3<u32>) {
    let row = id.y;
    let h = params.head_dim / 2u;
    let head = id.x / h;
    let j = id.x % h;
    if head >= params.heads + params.kv_heads { return; }
    let angle = angles[row * h + j];
    if head < params.heads {
        let at = (row * params.heads + head) * params.head_dim + j;
        let rotated = rotate(q[at], q[at + h], angle);
        q[at] = rotated.x;
        q[at + h] = rotated.y;
        return;
    }
    let kv_head = head - params.heads;
    let source = (row * params.kv_heads + kv_head) * params.head_dim + j;
    let target_at = (places[row].z * params.kv_heads + kv_head) * params.head_dim + j;
    let rotated = rotate(k[source], k[source + h], angle);
    keys[target_at] = rotated.x;
    keys[target_at + h] = rotated.y;
    values[target_at] = v[source];
    values[target_at + h] = v[source + h];
}
