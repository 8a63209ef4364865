// read_words: adds up all words of a buffer, modulo 2^32, for how fast a device reads them. Each of a workgroup's threads takes every
// 128th of its chunks, so that neighbours load chunks side by side; their sums are halved through the workgroup's memory.
// Shapes: words [chunks] of vec4<u32>, sums [workgroups]. Dispatch: (chunks over 4096, rounded up, 1, 1). src/gpu/measure.rs times it.
struct Params {
    chunks: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> words: array<vec4<u32>>;     // [chunks]
@group(0) @binding(2) var<storage, read_write> sums: array<u32>;      // [workgroups]

const WORKGROUP = 128u;
// Chunks of a thread.
const CHUNKS = 32u;

var<workgroup> of_threads: array<u32, WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn read_words(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let first = workgroup.x * WORKGROUP * CHUNKS + thread;
    var sum = vec4<u32>();
    for (var index = 0u; index < CHUNKS; index++) {
        let chunk = first + index * WORKGROUP;
        if chunk < params.chunks { sum += words[chunk]; }
    }
    of_threads[thread] = sum.x + sum.y + sum.z + sum.w;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if thread < half { of_threads[thread] += of_threads[thread + half]; }
    }
    if thread == 0u { sums[workgroup.x] = of_threads[0]; }
}
