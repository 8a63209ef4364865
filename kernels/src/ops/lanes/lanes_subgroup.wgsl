// lanes_subgroup: the first step of lanes.wgsl on devices whose subgroups have eight threads or more, a power of two. A shuffle's partner
// adds the same two numbers the other way round, so that all eight have the sum.
// Lanes are counted by subgroups, so it does not matter how threads are dealt out to these; all of them must be full, which
// subgroup_probe.wgsl tries when a device is opened. A barrier comes before shuffles: threads that left a loop or a branch at different
// times are together again.
struct Thread {
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) place: u32,
}

fn lane_of(thread: Thread) -> u32 {
    return thread.subgroup * thread.subgroup_size + thread.place;
}

fn sum_eights(lane: u32, x: f32) {
    workgroupBarrier();
    var sum = x;
    sum += subgroupShuffleXor(sum, 1u);
    sum += subgroupShuffleXor(sum, 2u);
    sum += subgroupShuffleXor(sum, 4u);
    if lane % 8u == 0u { sums[lane / 8u] = sum; }
}

fn maximize_eights(lane: u32, x: f32) {
    workgroupBarrier();
    var maximum = x;
    maximum = max(maximum, subgroupShuffleXor(maximum, 1u));
    maximum = max(maximum, subgroupShuffleXor(maximum, 2u));
    maximum = max(maximum, subgroupShuffleXor(maximum, 4u));
    if lane % 8u == 0u { maxima[lane / 8u] = maximum; }
}
