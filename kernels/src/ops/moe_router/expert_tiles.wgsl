// expert_tiles: groups the pairs p = t * chosen + j by their expert, so that the expert kernels read a weight once for TILE_ROWS of them.
// A tile is {expert, TILE_ROWS pairs}; places without a pair, and all of an unused tile, hold NONE. Pairs keep their order.
// Shapes (row-major): ids u32 [pairs]; tiles u32 [tiles, 1 + TILE_ROWS], with tiles = pairs / TILE_ROWS + num_experts, which always
// suffices.
// Dispatch: one workgroup, (1, 1, 1); a thread a run of neighbouring pairs, as many runs as there is room to count experts for. At most
// 64 experts. Which tile a pair is in changes no result. CPU reference: cpu.rs.
struct Params {
    pairs: u32,
    num_experts: u32,
    tiles: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> ids: array<u32>;          // [pairs]
@group(0) @binding(2) var<storage, read_write> tiles: array<u32>;  // [tiles, 1 + TILE_ROWS]
override TILE_ROWS: u32 = 4u;
const WORKGROUP: u32 = 128u;
const COUNTS: u32 = 1024u;
const NONE: u32 = 0xffffffffu;
var<workgroup> counts: array<u32, COUNTS>;    // [runs, num_experts]: pairs of an expert in a run, then in the runs before it
var<workgroup> tile_counts: array<u32, 64>;   // [num_experts]
var<workgroup> first_tiles: array<u32, 64>;   // [num_experts]

@compute @workgroup_size(WORKGROUP)
fn expert_tiles(@builtin(local_invocation_index) thread: u32) {
    let words = 1u + TILE_ROWS;
    let experts = params.num_experts;
    let runs = min(WORKGROUP, COUNTS / experts);
    let length = (params.pairs + runs - 1u) / runs;
    // None for threads beyond the runs.
    let begin = min(thread * length, params.pairs);
    let end = min(begin + length, params.pairs);
    let first_count = thread * experts;

    for (var i = thread; i < params.tiles * words; i += WORKGROUP) { tiles[i] = NONE; }
    for (var i = thread; i < runs * experts; i += WORKGROUP) { counts[i] = 0u; }
    workgroupBarrier();
    for (var pair = begin; pair < end; pair++) { counts[first_count + ids[pair]]++; }
    workgroupBarrier();
    if thread < experts {
        var sum = 0u;
        for (var i = thread; i < runs * experts; i += experts) {
            let count = counts[i];
            counts[i] = sum;
            sum += count;
        }
        tile_counts[thread] = (sum + TILE_ROWS - 1u) / TILE_ROWS;
    }
    workgroupBarrier();
    if thread < experts {
        var first = 0u;
        for (var e = 0u; e < thread; e++) { first += tile_counts[e]; }
        first_tiles[thread] = first;
    }
    storageBarrier();
    workgroupBarrier();
    for (var pair = begin; pair < end; pair++) {
        let expert = ids[pair];
        let place = counts[first_count + expert];
        counts[first_count + expert]++;
        let tile = (first_tiles[expert] + place / TILE_ROWS) * words;
        if place % TILE_ROWS == 0u { tiles[tile] = expert; }
        tiles[tile + 1u + place % TILE_ROWS] = pair;
    }
}
