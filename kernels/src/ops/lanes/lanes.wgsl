// lanes: the sum and the maximum over the 128 threads of a workgroup, a lane each; joined to kernels that need them. So is
// lanes_memory.wgsl or, where a device has subgroups, lanes_subgroup.wgsl, which say what lane a thread is, and do the first step, through
// workgroup memory or by shuffles: the bits are the same.
// Order of a sum: sixteen sums of eight neighbours, ((a + b) + (c + d)) + ((e + f) + (g + h)), then these ascending.
// All threads call these functions, each of them once in a kernel. Barriers are passed in either, and all get the result.
const WORKGROUP: u32 = 128u;
const EIGHTS: u32 = 16u;
var<workgroup> sums: array<f32, 16>;
var<workgroup> maxima: array<f32, 16>;

fn sum_of_lanes(lane: u32, x: f32) -> f32 {
    sum_eights(lane, x);
    workgroupBarrier();
    var sum = 0.0;
    for (var i = 0u; i < EIGHTS; i++) { sum += sums[i]; }
    return sum;
}

fn maximum_of_lanes(lane: u32, x: f32) -> f32 {
    maximize_eights(lane, x);
    workgroupBarrier();
    var maximum = maxima[0];
    for (var i = 1u; i < EIGHTS; i++) { maximum = max(maximum, maxima[i]); }
    return maximum;
}
