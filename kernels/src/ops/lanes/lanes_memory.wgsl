// lanes_memory: the first step of lanes.wgsl on any device. Sixteen threads reduce eight lanes each: a tree over all would need a barrier
// a level, which costs more than it saves.
struct Thread {
    @builtin(local_invocation_index) index: u32,
}
var<workgroup> of_lanes: array<f32, 128>;

fn lane_of(thread: Thread) -> u32 {
    return thread.index;
}

fn sum_eights(lane: u32, x: f32) {
    of_lanes[lane] = x;
    workgroupBarrier();
    if lane < EIGHTS {
        let i = 8u * lane;
        sums[lane] = ((of_lanes[i] + of_lanes[i + 1u]) + (of_lanes[i + 2u] + of_lanes[i + 3u]))
            + ((of_lanes[i + 4u] + of_lanes[i + 5u]) + (of_lanes[i + 6u] + of_lanes[i + 7u]));
    }
}

fn maximize_eights(lane: u32, x: f32) {
    of_lanes[lane] = x;
    workgroupBarrier();
    if lane < EIGHTS {
        let i = 8u * lane;
        var maximum = of_lanes[i];
        for (var j = 1u; j < 8u; j++) { maximum = max(maximum, of_lanes[i + j]); }
        maxima[lane] = maximum;
    }
}
