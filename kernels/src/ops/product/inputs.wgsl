// inputs: rows of f32; joined to every shader that multiplies them by weights.
// In a stretch, what it has of a group has four partial sums (k mod 4) by ascending k; groups ascending.
@group(0) @binding(1) var<storage, read> x: array<f32>;              // [rows, inputs]
@group(0) @binding(2) var<storage, read> x_quads: array<vec4<f32>>;  // the same

// Inputs `k..k + 4` of the row at `row`. Without WHOLE what is beyond the group's end is not read, so that it may be infinite.
fn quad_of_x(row: u32, k: u32, end: u32) -> vec4<f32> {
    let at = row + k;
    if WHOLE { return x_quads[at / 4u]; }
    var quad = vec4<f32>(x[at], 0.0, 0.0, 0.0);
    if k + 1u < end { quad.y = x[at + 1u]; }
    if k + 2u < end { quad.z = x[at + 2u]; }
    if k + 3u < end { quad.w = x[at + 3u]; }
    return quad;
}

// Sums of a group.
struct Tile {
    a: Columns,
    b: Columns,
    c: Columns,
    d: Columns,
    // Of the inputs alone, a row each.
    x: Columns,
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

fn add_quad(tile: ptr<function, Tile>, w: Columns, rows: vec4<u32>, k: u32, end: u32) {
    let a = quad_of_x(rows.x, k, end);
    (*tile).a = add((*tile).a, a, w);
    if MINIMA { (*tile).x.a += a; }
    if ROWS_PER_THREAD > 1u {
        let b = quad_of_x(rows.y, k, end);
        let c = quad_of_x(rows.z, k, end);
        let d = quad_of_x(rows.w, k, end);
        (*tile).b = add((*tile).b, b, w);
        (*tile).c = add((*tile).c, c, w);
        (*tile).d = add((*tile).d, d, w);
        if MINIMA {
            (*tile).x.b += b;
            (*tile).x.c += c;
            (*tile).x.d += d;
        }
    }
}

fn total(v: vec4<f32>) -> f32 {
    return (v.x + v.y) + (v.z + v.w);
}

fn add_group(sum: vec4<f32>, group: Columns, x: vec4<f32>, scales: Scales) -> vec4<f32> {
    let products = vec4<f32>(total(group.a), total(group.b), total(group.c), total(group.d));
    var next = fma(products, scales.scale, sum);
    if MINIMA { next = fma(vec4<f32>(-total(x)), scales.minimum, next); }
    return next;
}
