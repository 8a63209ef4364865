// columns: what the shaders that multiply by weights have in common; it is joined to each of them.
// Weights lie in blocks of 64 neighbouring columns, [blocks, groups, quads, 64] words. A word holds four inputs of one column (int8,
// lowest byte first); with FLOAT_WEIGHTS a quad is four words, 64 columns apart. A group whose length is not a multiple of four
// is padded with zeros, and inputs are not read there; columns of the last block beyond the outputs are zeros too.
// Order of a sum, whatever the constants are: four partial sums (k mod 4) by ascending k within a group, groups ascending.
override FLOAT_WEIGHTS: bool = false;
override COLUMNS_PER_THREAD: u32 = 1u;  // 1 or 4
override COLUMN_THREADS: u32 = 64u;     // 64 / COLUMNS_PER_THREAD
const LANES: u32 = 64u;

// Four inputs each of up to four columns: weights, or partial sums.
struct Columns {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
}

fn add(sums: Columns, v: vec4<f32>, w: Columns) -> Columns {
    var next = sums;
    next.a = fma(v, w.a, sums.a);
    if COLUMNS_PER_THREAD > 1u {
        next.b = fma(v, w.b, sums.b);
        next.c = fma(v, w.c, sums.c);
        next.d = fma(v, w.d, sums.d);
    }
    return next;
}

fn total(v: vec4<f32>) -> f32 {
    return (v.x + v.y) + (v.z + v.w);
}

fn add_group(sum: vec4<f32>, group: Columns, scale: vec4<f32>) -> vec4<f32> {
    return fma(vec4<f32>(total(group.a), total(group.b), total(group.c), total(group.d)), scale, sum);
}
