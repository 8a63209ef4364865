// inputs_fast: rows of 8-bit numbers, as quantise.wgsl makes them; joined in place of inputs to the shaders of precision `fast`.
// Sums of 32 inputs, or of each half of them, are exact as integers; what follows is f32, in a stretch by ascending inputs.
@group(0) @binding(1) var<storage, read> x: array<vec4<u32>>;          // [rows, inputs / 16]
@group(0) @binding(2) var<storage, read> x_factors: array<vec2<u32>>;  // [rows, inputs / 32]
const HALF: u32 = 16u;
const BLOCK: u32 = 32u;
const SUPER_BLOCKS: u32 = 8u;

// What a number of a block of inputs is worth, and what the sums of its halves and of all are.
struct Factors {
    one: f32,
    low: f32,
    high: f32,
    all: f32,
}

// Whether halves of a block are scaled apart: where groups have sixteen inputs, and in IQ4_XS, as the CPU does.
fn by_halves() -> bool {
    return SCALES == SUPERS && !(MINIMA && SUPER == SUPER_BLOCKS);
}

fn factors_of_x(row: u32, block: u32) -> Factors {
    let words = x_factors[row / BLOCK + block];
    let one = bitcast<f32>(words.x);
    let sums = vec2<i32>(bitcast<i32>(words.y << 16u), bitcast<i32>(words.y)) >> vec2<u32>(16u);
    return Factors(one, one * f32(sums.x), one * f32(sums.y), one * f32(sums.x + sums.y));
}

// Sums of a row with up to four columns: of a stretch of blocks that share a factor, of their minima, and of all before.
struct Sums {
    part: vec4<f32>,
    minimum: vec4<f32>,
    all: vec4<f32>,
}

// Sixteen numbers of four bits as signed bytes, in the order of the inputs.
fn bytes_of_nibbles(words: vec2<u32>) -> vec4<u32> {
    let codes = vec4<u32>(words.x, words.x >> 4u, words.y, words.y >> 4u) & vec4<u32>(0x0f0f0f0fu);
    if NUMBERS == CODES {
        return vec4<u32>(bytes_of_codes(codes.x), bytes_of_codes(codes.y), bytes_of_codes(codes.z), bytes_of_codes(codes.w));
    }
    // 8 less, without a borrow from one byte to the next.
    if OFFSET > 0.0 { return (codes + vec4<u32>(0x78787878u)) ^ vec4<u32>(0x80808080u); }
    return codes;
}

fn bytes_of_codes(codes: u32) -> u32 {
    return pack4xI8(iq4(unpack4xU8(codes)));
}

fn dot_of_bytes(w: vec4<u32>, v: vec4<u32>) -> i32 {
    return dot4I8Packed(w.x, v.x) + dot4I8Packed(w.y, v.y) + dot4I8Packed(w.z, v.z) + dot4I8Packed(w.w, v.w);
}

// Of half a block of a row with up to four columns.
fn dots(w: Chunks, v: vec4<u32>) -> vec4<i32> {
    var sums = vec4<i32>(dot_of_bytes(w.a, v), 0, 0, 0);
    if COLUMNS_PER_THREAD > 1u {
        sums.y = dot_of_bytes(w.b, v);
        sums.z = dot_of_bytes(w.c, v);
        sums.w = dot_of_bytes(w.d, v);
    }
    return sums;
}

fn add_dots(sums: Sums, dots: vec4<i32>, steps: Scales, factor: f32, inputs: f32) -> Sums {
    var next = sums;
    next.part = fma(vec4<f32>(dots), steps.scale * factor, sums.part);
    if MINIMA { next.minimum = fma(steps.minimum, vec4<f32>(-inputs), sums.minimum); }
    return next;
}

// Block `block` of the row at `row`, whose halves are `low` and `high`.
fn add_block(sums: Sums, low: Chunks, high: Chunks, of_low: Scales, of_high: Scales, row: u32, block: u32) -> Sums {
    let factors = factors_of_x(row, block);
    let at = row / HALF + 2u * block;
    let first = dots(low, x[at]);
    let second = dots(high, x[at + 1u]);
    if by_halves() {
        let next = add_dots(sums, first, of_low, factors.one, factors.low);
        return add_dots(next, second, of_high, factors.one, factors.high);
    }
    return add_dots(sums, first + second, of_low, factors.one, factors.all);
}

// Adds a stretch of blocks to what was before it.
fn add_part(sums: Sums, factors: Scales) -> Sums {
    var next = Sums();
    next.all = fma(factors.scale, sums.part, sums.all);
    if MINIMA { next.all = fma(factors.minimum, sums.minimum, next.all); }
    return next;
}
