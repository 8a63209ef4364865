// expert_tiles: groups the pairs p = t * chosen + j by their expert, so that a thread of the expert kernels reads a weight once for
// four pairs. A tile is {expert, four pairs}; places without a pair, and all of an unused tile, hold NONE. Pairs keep their order.
// Shapes (row-major): ids u32 [pairs]; tiles u32 [tiles, 5], with tiles = pairs / 4 + num_experts, which always suffices.
// Dispatch: one workgroup, (1, 1, 1); a thread an expert. At most 64 experts. Which tile a pair is in changes no result.
struct Params {
    pairs: u32,
    num_experts: u32,
    tiles: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> ids: array<u32>;          // [pairs]
@group(0) @binding(2) var<storage, read_write> tiles: array<u32>;  // [tiles, 5]
const WORKGROUP: u32 = 64u;
const NONE: u32 = 0xffffffffu;
var<workgroup> tile_counts: array<u32, 64>;

@compute @workgroup_size(64)
fn expert_tiles(@builtin(local_invocation_index) expert: u32) {
    var count = 0u;
    for (var pair = 0u; pair < params.pairs; pair++) {
        if ids[pair] == expert { count++; }
    }
    tile_counts[expert] = (count + 3u) / 4u;
    for (var i = expert; i < params.tiles * 5u; i += WORKGROUP) { tiles[i] = NONE; }
    storageBarrier();
    workgroupBarrier();

    var tile = 0u;
    for (var e = 0u; e < expert; e++) { tile += tile_counts[e]; }
    var place = 0u;
    for (var pair = 0u; pair < params.pairs; pair++) {
        if ids[pair] == expert {
            if place == 0u { tiles[tile * 5u] = expert; }
            tiles[tile * 5u + 1u + place] = pair;
            place++;
            if place == 4u {
                place = 0u;
                tile++;
            }
        }
    }
}
