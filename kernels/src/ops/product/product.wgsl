// product: sums over k of x[row, k] * MATRIX[k, column], for the rows at `rows` and the columns from the place's lane on of a block;
// joined with sums once for each matrix of a shader. This is what a slice has of them.
fn slice_of_MATRIX(rows: vec4<u32>, block: u32, lane: u32, slice: u32) -> Rows {
    let length = params.inputs / params.groups;
    // Of a group, and of a column.
    let chunks = (length + 4u * QUADS - 1u) / (4u * QUADS);
    let all = params.groups * chunks;
    let first = block * chunks_of_column(params.groups, length) * LANES + lane;
    let first_scale = block * scale_words(params.groups) * LANES + lane;
    // The same quads, but a number that compilers do not know.
    let quads = select(min(QUADS, (length + 3u) / 4u), QUADS, UNROLLED);
    let stop = (slice + 1u) * all / SLICES;
    var index = slice * all / SLICES;
    var sums = Rows();
    while index < stop {
        let group = index / chunks;
        let end = (group + 1u) * length;
        let group_stop = min((group + 1u) * chunks, stop);
        var tile = Tile();
        for (; index < group_stop; index++) {
            var w = chunks_of_MATRIX(first + select(index, index / 2u, HALVED) * LANES);
            if HALVED && index % 2u == 1u { w = second_half(w); }
            let k = group * length + (index - group * chunks) * 4u * QUADS;
            for (var quad = 0u; quad < quads; quad++) {
                if !WHOLE && k + 4u * quad >= end { break; }
                add_quad(&tile, quads_of(w, quad), rows, k + 4u * quad, end);
            }
        }
        let scales = scales_of_MATRIX(first_scale, group);
        sums.a = add_group(sums.a, tile.a, tile.x.a, scales);
        if ROWS_PER_THREAD > 1u {
            sums.b = add_group(sums.b, tile.b, tile.x.b, scales);
            sums.c = add_group(sums.c, tile.c, tile.x.c, scales);
            sums.d = add_group(sums.d, tile.d, tile.x.d, scales);
        }
    }
    return sums;
}
