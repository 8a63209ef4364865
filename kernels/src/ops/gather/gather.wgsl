// gather: out[i] = x[rows[begin + i]]. Bits are copied.
// Shapes (row-major): x [any, width] f32; rows u32, several gathers of a step one after the other; out [count, width] f32.
// Dispatch: (ceil(width / 64), count, 1). CPU reference: cpu.rs.
struct Params {
    width: u32,
    begin: u32, // where this gather's rows begin
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<u32>;          // [any, width], as bits
@group(0) @binding(2) var<storage, read> rows: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<u32>;  // [count, width], as bits

@compute @workgroup_size(64)
fn gather(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= params.width { return; }
    out[id.y * params.width + id.x] = x[rows[params.begin + id.y] * params.width + id.x];
}
