// columns: weights as the device holds them, and how a thread's sums are kept; joined to every shader that multiplies by weights.
// Columns (outputs) stand in blocks of 64. A chunk is 16 bytes of neighbouring inputs of one column, and the chunks of a block's 64
// columns stand side by side, [blocks, chunks, 64]: neighbouring threads read neighbouring chunks. NUMBERS selects what a chunk holds.
// A group of inputs shares a scale, and with MINIMA a minimum: w = scale * number - minimum. The last chunk of a group is padded with
// zeros, and inputs are not read there; the columns of the last block beyond the outputs are zeros too. With HALVED two groups share
// a chunk. Words of scales stand as chunks do, [blocks, words, 64]; SCALES selects what they hold.
// Order of a sum, whatever the other constants are: a column is cut into SLICES slices of (nearly) equal length, each of whole chunks,
// or of whole blocks with 8-bit inputs. Slice totals are added in ascending order; inputs*.wgsl defines the order within a slice.
override NUMBERS: u32 = 0u;
override OFFSET: f32 = 0.0;             // what NIBBLES are too large by
override QUADS: u32 = 1u;               // quads of inputs in a chunk; in half of one with HALVED
override HALVED: bool = false;
override SCALES: u32 = 0u;
override MINIMA: bool = false;
override SUPER: u32 = 8u;               // groups of a super-block
override WHOLE: bool = false;           // groups are whole chunks
override UNROLLED: bool = true;         // loops may be unrolled; a software adapter takes seconds to compile that
override COLUMNS_PER_THREAD: u32 = 1u;  // 1 or 4, COLUMN_THREADS apart
override COLUMN_THREADS: u32 = 64u;     // threads along a block's columns, 64 / COLUMNS_PER_THREAD or less
override ROWS_PER_THREAD: u32 = 1u;     // 1 or 4
override SLICE_THREADS: u32 = 1u;       // threads that share a sum: 1, 2, 4 or 8
const LANES: u32 = 64u;
const SLICES: u32 = 8u;

// NUMBERS: four f32, eight halves of either kind, sixteen signed bytes, or 32 numbers of four bits: word j has inputs 8 j..8 j + 4
// in the low halves of its bytes and the next four in the high ones. CODES stand for the values of IQ4_VALUES.
const F32: u32 = 0u;
const F16: u32 = 1u;
const BF16: u32 = 2u;
const BYTES: u32 = 3u;
const NIBBLES: u32 = 4u;
const CODES: u32 = 5u;

// SCALES: none; an f32 a group; a half a group, two groups a word; with MINIMA the half of the minimum beside it; or for SUPER
// groups a word of two halves (scale and minimum), then a signed byte a group for the scale, then one a group for the minimum.
const GROUPS: u32 = 1u;
const HALVES: u32 = 2u;
const SUPERS: u32 = 3u;

// Something of up to four columns.
struct Columns {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
}

struct Chunks {
    a: vec4<u32>,
    b: vec4<u32>,
    c: vec4<u32>,
    d: vec4<u32>,
}

// Of a group, a component for each column.
struct Scales {
    scale: vec4<f32>,
    minimum: vec4<f32>,
}

// Results of up to four rows, a component for each column.
struct Rows {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
}

// Sums that threads share; one place for each thread along columns and tiles, at most 64.
var<workgroup> shared_sums: array<Rows, 64>;

// A thread's place along the columns of a block, in its workgroup, and along the slices; and whether it has anything to sum up.
struct Place {
    lane: u32,
    shared_place: u32,
    slice: u32,
    is_here: bool,
}

fn place_of(workgroup: vec3<u32>, local: vec3<u32>, is_here: bool) -> Place {
    return Place(workgroup.z * COLUMN_THREADS + local.x, local.y * COLUMN_THREADS + local.x, local.z, is_here);
}

fn add_rows(sums: Rows, more: Rows) -> Rows {
    var next = sums;
    next.a += more.a;
    if ROWS_PER_THREAD > 1u {
        next.b += more.b;
        next.c += more.c;
        next.d += more.d;
    }
    return next;
}

// Adds what the threads of a place have of neighbouring slices to the place's sums, ascending. All threads of the workgroup call it.
fn share(place: Place, round: u32, mine: Rows) {
    for (var slice = 0u; slice < SLICE_THREADS; slice++) {
        if place.slice == slice {
            if round + slice == 0u {
                shared_sums[place.shared_place] = mine;
            } else {
                shared_sums[place.shared_place] = add_rows(shared_sums[place.shared_place], mine);
            }
        }
        workgroupBarrier();
    }
}

// What the codes -127, -104, ... 113 of IQ4_NL and IQ4_XS stand for, four a word.
fn iq4(codes: vec4<u32>) -> vec4<i32> {
    let low = select(vec4<u32>(0xbfad9881u), vec4<u32>(0xf6eaddcfu), (codes & vec4<u32>(4u)) != vec4<u32>());
    let high = select(vec4<u32>(0x26190d01u), vec4<u32>(0x71594535u), (codes & vec4<u32>(4u)) != vec4<u32>());
    let word = select(low, high, (codes & vec4<u32>(8u)) != vec4<u32>());
    return bitcast<vec4<i32>>(word << (vec4<u32>(24u) - 8u * (codes & vec4<u32>(3u)))) >> vec4<u32>(24u);
}

// Quad `quad` of a chunk of four-bit numbers.
fn nibbles_of(chunk: vec4<u32>, quad: u32) -> vec4<u32> {
    return unpack4xU8((chunk[quad / 2u] >> (4u * (quad % 2u))) & 0x0f0f0f0fu);
}

fn quad_of(chunk: vec4<u32>, quad: u32) -> vec4<f32> {
    if NUMBERS == F32 { return bitcast<vec4<f32>>(chunk); }
    if NUMBERS == F16 {
        return vec4<f32>(unpack2x16float(chunk[2u * quad]), unpack2x16float(chunk[2u * quad + 1u]));
    }
    if NUMBERS == BF16 {
        let pairs = vec2<u32>(chunk[2u * quad], chunk[2u * quad + 1u]);
        return bitcast<vec4<f32>>(pairs.xxyy << vec4<u32>(16u, 0u, 16u, 0u) & vec4<u32>(0xffff0000u));
    }
    if NUMBERS == BYTES { return vec4<f32>(unpack4xI8(chunk[quad])); }
    if NUMBERS == CODES { return vec4<f32>(iq4(nibbles_of(chunk, quad))); }
    return vec4<f32>(nibbles_of(chunk, quad)) - OFFSET;
}

fn quads_of(chunks: Chunks, quad: u32) -> Columns {
    var w = Columns();
    w.a = quad_of(chunks.a, quad);
    if COLUMNS_PER_THREAD > 1u {
        w.b = quad_of(chunks.b, quad);
        w.c = quad_of(chunks.c, quad);
        w.d = quad_of(chunks.d, quad);
    }
    return w;
}

// With HALVED a chunk's second half, so that it can be read as the first one.
fn second_half(chunks: Chunks) -> Chunks {
    return Chunks(chunks.a.zwxy, chunks.b.zwxy, chunks.c.zwxy, chunks.d.zwxy);
}

fn chunks_of_column(groups: u32, length: u32) -> u32 {
    if HALVED { return groups / 2u; }
    return groups * ((length + 4u * QUADS - 1u) / (4u * QUADS));
}

// Words of scales that a column has.
fn scale_words(groups: u32) -> u32 {
    if SCALES == GROUPS || (SCALES == HALVES && MINIMA) { return groups; }
    if SCALES == HALVES { return (groups + 1u) / 2u; }
    if SCALES == SUPERS { return groups / SUPER * words_of_super(); }
    return 0u;
}

fn words_of_super() -> u32 {
    return 1u + select(1u, 2u, MINIMA) * SUPER / 4u;
}

// The low (0) or high (1) halves of words.
fn halves(words: vec4<u32>, high: u32) -> vec4<f32> {
    let bits = words >> vec4<u32>(16u * high);
    return vec4<f32>(
        unpack2x16float(bits.x).x, unpack2x16float(bits.y).x, unpack2x16float(bits.z).x, unpack2x16float(bits.w).x);
}

fn signed_bytes(words: vec4<u32>, index: u32) -> vec4<f32> {
    return vec4<f32>(bitcast<vec4<i32>>(words << vec4<u32>(24u - 8u * index)) >> vec4<u32>(24u));
}
