// product_fast: what product is, of 8-bit inputs; joined in its place to the shaders of precision `fast`.

// Sixteen weights of up to four columns, as bytes: half `index` of the blocks of a column.
fn halves_of_MATRIX(first: u32, index: u32) -> Chunks {
    if NUMBERS == BYTES { return chunks_of_MATRIX(first + index * LANES); }
    let w = chunks_of_MATRIX(first + index / 2u * LANES);
    var bytes = Chunks();
    let high = index % 2u == 1u;
    bytes.a = bytes_of_nibbles(select(w.a.xy, w.a.zw, high));
    if COLUMNS_PER_THREAD > 1u {
        bytes.b = bytes_of_nibbles(select(w.b.xy, w.b.zw, high));
        bytes.c = bytes_of_nibbles(select(w.c.xy, w.c.zw, high));
        bytes.d = bytes_of_nibbles(select(w.d.xy, w.d.zw, high));
    }
    return bytes;
}

// Scales of half `half` of a column's blocks, but for what all blocks of a part are multiplied by in the end.
fn steps_of_block_of_MATRIX(first: u32, half: u32) -> Scales {
    if SCALES == HALVES { return scales_of_MATRIX(first, half / 2u); }
    if SCALES == SUPERS { return steps_of_MATRIX(first, select(half / 2u, half, SUPER == 16u)); }
    return Scales(vec4<f32>(1.0), vec4<f32>());
}

fn slice_of_MATRIX(rows: vec4<u32>, block: u32, lane: u32, slice: u32) -> Rows {
    let blocks = params.inputs / BLOCK;
    let length = params.inputs / params.groups;
    let first = block * chunks_of_column(params.groups, length) * LANES + lane;
    let first_scale = block * scale_words(params.groups) * LANES + lane;
    // Blocks of inputs that are added up before they are scaled.
    var part = blocks;
    if SCALES == GROUPS { part = length / BLOCK; }
    if SCALES == SUPERS { part = SUPER_BLOCKS; }
    let stop = (slice + 1u) * blocks / SLICES;
    var index = slice * blocks / SLICES;
    var a = Sums();
    var b = Sums();
    var c = Sums();
    var d = Sums();
    while index < stop {
        let part_index = index / part;
        let part_stop = min((part_index + 1u) * part, stop);
        for (; index < part_stop; index++) {
            let low = halves_of_MATRIX(first, 2u * index);
            let high = halves_of_MATRIX(first, 2u * index + 1u);
            let of_low = steps_of_block_of_MATRIX(first_scale, 2u * index);
            var of_high = of_low;
            if by_halves() { of_high = steps_of_block_of_MATRIX(first_scale, 2u * index + 1u); }
            a = add_block(a, low, high, of_low, of_high, rows.x, index);
            if ROWS_PER_THREAD > 1u {
                b = add_block(b, low, high, of_low, of_high, rows.y, index);
                c = add_block(c, low, high, of_low, of_high, rows.z, index);
                d = add_block(d, low, high, of_low, of_high, rows.w, index);
            }
        }
        var factors = Scales(vec4<f32>(1.0), vec4<f32>(1.0));
        if SCALES == GROUPS { factors = scales_of_MATRIX(first_scale, part_index); }
        if SCALES == SUPERS { factors = factors_of_MATRIX(first_scale, part_index); }
        a = add_part(a, factors);
        if ROWS_PER_THREAD > 1u {
            b = add_part(b, factors);
            c = add_part(c, factors);
            d = add_part(d, factors);
        }
    }
    return Rows(a.all, b.all, c.all, d.all);
}
