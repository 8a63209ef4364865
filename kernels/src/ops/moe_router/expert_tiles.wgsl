// expert_tiles: groups the pairs p = t * chosen + j by their expert, so that the expert kernels read a weight once for TILE_ROWS of them.
// A tile is {expert, TILE_ROWS pairs}; places without a pair, and all of an unused tile, hold NONE. Pairs keep their order.
// Shapes (row-major): ids u32 [pairs]; tiles u32 [tiles, 1 + TILE_ROWS], with tiles = pairs / TILE_ROWS + num_experts, which always
// suffices.
// Dispatch: one workgroup, (1, 1, 1); a thread an expert. At most 64 experts. Which tile a pair is in changes no result.
struct Params {
    pairs: u32,
    num_experts: u32,
    tiles: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> ids: array<u32>;          // [pairs]
@group(0) @binding(2) var<storage, read_write> tiles: array<u32>;  // [tiles, 1 + TILE_ROWS]
override TILE_ROWS: u32 = 4u;
const WORKGROUP: u32 = 64u;
const NONE: u32 = 0xffffffffu;
var<workgroup> tile_counts: array<u32, 64>;

@compute @workgroup_size(64)
fn expert_tiles(@builtin(local_invocation_index) expert: u32) {
    let words = 1u + TILE_ROWS;
    var count = 0u;
    for (var pair = 0u; pair < params.pairs; pair++) {
        if ids[pair] == expert { count++; }
    }
    tile_counts[expert] = (count + TILE_ROWS - 1u) / TILE_ROWS;
    for (var i = expert; i < params.tiles * words; i += WORKGROUP) { tiles[i] = NONE; }
    storageBarrier();
    workgroupBarrier();

    var tile = 0u;
    for (var e = 0u; e < expert; e++) { tile += tile_counts[e]; }
    var place = 0u;
    for (var pair = 0u; pair < params.pairs; pair++) {
        if ids[pair] == expert {
            if place == 0u { tiles[tile * words] = expert; }
            tiles[tile * words + 1u + place] = pair;
            place++;
            if place == TILE_ROWS {
                place = 0u;
                tile++;
            }
        }
    }
}
