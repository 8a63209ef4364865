// rms_norm: y[t, i] = x[t, i] * weight[i] / sqrt(mean_i(x[t, i]^2) + epsilon); with ADD: y[t, i] += that.
// Shapes (row-major): x, y [rows, hidden_size] f32; weight [hidden_size] f32.
// Order of the sum: 128 partial sums (i mod 128) by ascending i, then these as in lanes.wgsl, which this is joined with.
// Dispatch: one workgroup a row, (rows, 1, 1). Any hidden_size >= 1. Source: Zhang & Sennrich 2019, eq. 4. CPU reference: cpu.rs.
struct Params {
    hidden_size: u32,
    epsilon: f32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;        // [rows, hidden_size]
@group(0) @binding(2) var<storage, read> weight: array<f32>;   // [hidden_size]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;  // [rows, hidden_size]
override ADD: bool = false;

@compute @workgroup_size(128)
fn rms_norm(@builtin(workgroup_id) workgroup: vec3<u32>, thread: Thread) {
    let lane = lane_of(thread);
    let start = workgroup.x * params.hidden_size;
    var sum = 0.0;
    for (var i = lane; i < params.hidden_size; i += WORKGROUP) {
        sum = fma(x[start + i], x[start + i], sum);
    }
    let factor = 1.0 / sqrt(sum_of_lanes(lane, sum) / f32(params.hidden_size) + params.epsilon);
    for (var i = lane; i < params.hidden_size; i += WORKGROUP) {
        let normed = x[start + i] * factor;
        if ADD {
            y[start + i] = fma(normed, weight[i], y[start + i]);
        } else {
            y[start + i] = normed * weight[i];
        }
    }
}
