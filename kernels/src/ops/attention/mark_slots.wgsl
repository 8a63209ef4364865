// mark_slots: attended[slot of row t] = whether the token of row t may be attended to. Once a step, before anything reads the pool.
// Shapes: places [rows] of (position, start of the block table, slot, attended); attended u32 [slots].
// Dispatch: (ceil(rows / 64), 1, 1).
struct Params {
    rows: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> places: array<vec4<u32>>;    // [rows]
@group(0) @binding(2) var<storage, read_write> attended: array<u32>;  // [slots]

@compute @workgroup_size(64)
fn mark_slots(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= params.rows { return; }
    let place = places[id.x];
    attended[place.z] = place.w;
}
