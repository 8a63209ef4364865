// sums: all slices of a product; joined behind product or product_fast once for each matrix of a shader. All threads of a workgroup
// call it, those too that are not here; the sums are those of the threads of slice 0.
fn product_of_MATRIX(rows: vec4<u32>, block: u32, place: Place) -> Rows {
    var sums = Rows();
    if SLICE_THREADS == 1u {
        if place.is_here {
            sums = slice_of_MATRIX(rows, block, place.lane, 0u);
            for (var slice = 1u; slice < SLICES; slice++) {
                sums = add_rows(sums, slice_of_MATRIX(rows, block, place.lane, slice));
            }
        }
        return sums;
    }
    for (var round = 0u; round < SLICES; round += SLICE_THREADS) {
        var mine = Rows();
        if place.is_here { mine = slice_of_MATRIX(rows, block, place.lane, round + place.slice); }
        share(place, round, mine);
    }
    if place.slice == 0u { sums = shared_sums[place.shared_place]; }
    return sums;
}
