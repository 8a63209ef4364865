// cooperative: how a workgroup multiplies up to 64 rows by a block of 64 columns with cooperative matrices; joined to the shaders of
// prefill `fast`. STEP inputs at a time lie in the workgroup's memory as halves: rows as quantise_halves.wgsl made them, weights
// decoded and multiplied by their matrix's power of two. A subgroup has two by two tiles of the sum, a unit, so that each tile of
// rows and of weights that it loads is used twice. Products are added in f32, in the order that the device has: rows and weights
// alone do not say how, so nothing here is batch-invariant.
// Whatever the size of a subgroup is, WORKGROUP is a multiple of it, and there are no more subgroups than units; with fewer,
// each has one unit after the other.
@group(0) @binding(1) var<storage, read> x: array<vec4<f16>>;    // [rows, ceil(inputs / 4)]
@group(0) @binding(2) var<storage, read> x_factors: array<f32>;  // [rows], what 1 in a row is worth
override WORKGROUP: u32 = 128u;  // threads
const ROWS: u32 = 64u;           // places for rows in a workgroup
const STEP: u32 = 32u;           // inputs that are staged at a time
const STEP_QUADS: u32 = STEP / 4u;
// Quads from a staged row, or column, to the next: two more than it has, which keeps neighbours out of the same banks. Rows, tiles and
// the arrays below begin at multiples of 16 bytes, as cooperative loads and stores want it.
const STRIDE: u32 = STEP_QUADS + 2u;
const TASK_QUADS: u32 = 4u;      // quads of a column that a thread stages at once
const UNIT: u32 = 2u * EDGE;     // rows and columns of a unit
const UNITS: u32 = (ROWS / UNIT) * (LANES / UNIT);
const TILE: u32 = EDGE * EDGE;
const NO_ROW: u32 = 0xffffffffu;

var<workgroup> places: array<u32, ROWS>;  // the result's row at each place, NO_ROW where there is none
var<workgroup> staged_x: array<vec4<f16>, ROWS * STRIDE>;
var<workgroup> staged_w: array<vec4<f16>, LANES * STRIDE>;
var<workgroup> results: array<f32, UNITS * TILE>;  // a tile a subgroup

// A block of columns: which of the shard's it is, its first column, and what its weights are multiplied by.
struct Block {
    index: u32,
    column: u32,
    factor: f32,
}

// A thread's place in its workgroup.
struct Member {
    thread: u32,
    subgroup: u32,
    subgroups: u32,
}

// Row and column of a unit's first tile.
fn corner_of(unit: u32) -> vec2<u32> {
    return vec2<u32>(unit / (LANES / UNIT), unit % (LANES / UNIT)) * UNIT;
}

// Chunks of a group, halves of them with HALVED.
fn chunks_of_group() -> u32 {
    return (params.inputs / params.groups + 4u * QUADS - 1u) / (4u * QUADS);
}

// Inputs of a column as chunks hold them: what fills a group's last chunk counts. Places of inputs below are among these.
fn held_inputs() -> u32 {
    return params.groups * chunks_of_group() * 4u * QUADS;
}

fn quad_of_row(row: u32, held: u32) -> vec4<f16> {
    if row == NO_ROW || held >= held_inputs() { return vec4<f16>(); }
    let first = row_of_x(row) * ((params.inputs + 3u) / 4u);
    if WHOLE { return x[first + held / 4u]; }
    let chunk = held / (4u * QUADS);
    let group = chunk / chunks_of_group();
    let length = params.inputs / params.groups;
    let k = group * length + held - group * chunks_of_group() * 4u * QUADS;
    var quad = vec4<f16>();
    for (var i = 0u; i < 4u && k + i < (group + 1u) * length; i++) { quad[i] = x[first + (k + i) / 4u][(k + i) % 4u]; }
    return quad;
}

fn stage_rows(held: u32, thread: u32) {
    for (var task = thread; task < ROWS * STEP_QUADS; task += WORKGROUP) {
        let place = task / STEP_QUADS;
        let quad = task % STEP_QUADS;
        staged_x[place * STRIDE + quad] = quad_of_row(places[place], held + 4u * quad);
    }
}

// What undoes a power of two.
fn inverse(power: f32) -> f32 {
    return bitcast<f32>((254u << 23u) - bitcast<u32>(power));
}
