// pairs: what the two expert shaders have in common; a pair is a row and one of its experts, pair t * chosen + j the j-th of row t.
// Its inputs are row p / pairs_a_row of x: where that is `chosen`, those of t, where it is 1, its own.
// choice: with ROWS_PER_THREAD = 1 the expert of each pair, [items]; with 4 the tiles of expert_tiles.wgsl, [items, 5].
struct Params {
    inputs: u32,
    outputs: u32,
    groups: u32,       // groups of inputs that share a scale
    chosen: u32,
    items: u32,        // pairs or tiles
    expert_begin: u32, // experts of the shard
    expert_count: u32,
    column_begin: u32, // first column of the shard, a multiple of 64
    blocks: u32,       // blocks of 64 columns in the shard, an expert
    pairs_a_row: u32,  // pairs that share a row of x
    block_begin: u32,  // first block of this dispatch in the shard, an expert
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read> choice: array<u32>;  // [items] or [items, 5]
override TILES: u32 = 1u;  // items in a workgroup
const NONE: u32 = 0xffffffffu;

// The pairs of an item, NONE where it has fewer than four, and their expert.
struct Item {
    expert: u32,
    pairs: vec4<u32>,
}

fn item_at(index: u32) -> Item {
    if index >= params.items { return Item(NONE, vec4<u32>()); }
    if ROWS_PER_THREAD == 1u { return Item(choice[index], vec4<u32>(index, NONE, NONE, NONE)); }
    let tile = index * 5u;
    return Item(choice[tile], vec4<u32>(choice[tile + 1u], choice[tile + 2u], choice[tile + 3u], choice[tile + 4u]));
}

// Whether the shard has its expert. It has not that of an item that holds nothing: NONE - expert_begin is large.
fn is_here(item: Item) -> bool {
    return item.expert - params.expert_begin < params.expert_count;
}

// Places without a pair repeat the first one and are not stored.
fn filled(item: Item) -> vec4<u32> {
    return select(item.pairs, vec4<u32>(item.pairs.x), item.pairs == vec4<u32>(NONE));
}

// Where the rows of an item's pairs begin in x.
fn rows_of(item: Item) -> vec4<u32> {
    return filled(item) / params.pairs_a_row * params.inputs;
}

// Where in the shard a block of this dispatch is, for an item's expert.
fn block_of(item: Item, block: u32) -> u32 {
    return (item.expert - params.expert_begin) * params.blocks + params.block_begin + block;
}
