// subgroup_probe: whether lanes_subgroup.wgsl does on a device what it says. Lane l has the number (l * factor mod 128)^2 + 1; the
// thread with local index i leaves found[i] = (lane, sum, maximum, subgroup size). With an odd factor the numbers are the same in
// another order, and exact in f32, as all sums of them are. src/gpu/probe.rs says what must come out.
// Shapes: found [workgroups * 128] of vec4<u32>. Joined with lanes and lanes_subgroup. Dispatch: (workgroups, 1, 1).
struct Params {
    factor: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> found: array<vec4<u32>>;  // [workgroups * 128]

@compute @workgroup_size(128)
fn subgroup_probe(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
    thread: Thread,
) {
    let lane = lane_of(thread);
    let root = lane * params.factor % WORKGROUP;
    let x = f32(root * root + 1u);
    let sum = sum_of_lanes(lane, x);
    let maximum = maximum_of_lanes(lane, x);
    found[workgroup.x * WORKGROUP + index] = vec4<u32>(lane, u32(sum), u32(maximum), thread.subgroup_size);
}
