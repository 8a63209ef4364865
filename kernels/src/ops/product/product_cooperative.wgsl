// product_cooperative: sums over k of x[row, k] * MATRIX[k, column], for the rows at `places` and a block of columns; joined behind
// cooperative and matrix once for each matrix of a shader. All threads of a workgroup call it. `store_MATRIX` gets each
// sum, and where in the result it belongs.

// Sixteen inputs of a column a time.
fn stage_MATRIX(block: Block, held: u32, thread: u32) {
    let length = params.inputs / params.groups;
    let chunks = chunks_of_group();
    let first = block.index * chunks_of_column(params.groups, length) * LANES;
    let first_scale = block.index * scale_words(params.groups) * LANES;
    for (var task = thread; task < LANES * STEP_QUADS / TASK_QUADS; task += WORKGROUP) {
        let lane = task % LANES;
        let begin = task / LANES * TASK_QUADS;
        for (var quad = begin; quad < begin + TASK_QUADS; quad += min(QUADS, TASK_QUADS)) {
            let at = held + 4u * quad;
            let index = at / (4u * QUADS);
            var w = vec4<u32>();
            var scale = 0.0;
            var minimum = 0.0;
            if at < held_inputs() {
                w = chunks_of_MATRIX(first + select(index, index / 2u, HALVED) * LANES + lane).a;
                if HALVED && index % 2u == 1u { w = w.zwxy; }
                let scales = scales_of_MATRIX(first_scale + lane, index / chunks);
                scale = scales.scale.x;
                minimum = scales.minimum.x;
            }
            for (var i = 0u; i < min(QUADS, TASK_QUADS); i++) {
                let weights = (quad_of(w, at / 4u % QUADS + i) * scale - minimum) * block.factor;
                staged_w[lane * STRIDE + quad + i] = vec4<f16>(weights);
            }
        }
    }
}

// Gives each subgroup's tile at `offset` of its unit to `store_MATRIX`.
fn hand_out_MATRIX(sum: SumTile, offset: vec2<u32>, first: u32, block: Block, member: Member) {
    coopStoreT(sum, &results[member.subgroup * TILE], EDGE);
    workgroupBarrier();
    for (var i = member.thread; i < member.subgroups * TILE; i += WORKGROUP) {
        let at = corner_of(first + i / TILE) + offset + vec2<u32>(i % TILE / EDGE, i % EDGE);
        let row = places[at.x];
        if row == NO_ROW || block.column + at.y >= params.outputs { continue; }
        store_MATRIX(row * params.outputs + block.column + at.y, results[i] * inverse(block.factor) * x_factors[row_of_x(row)]);
    }
    workgroupBarrier();
}

fn product_of_MATRIX(block: Block, member: Member) {
    for (var first = 0u; first < UNITS; first += member.subgroups) {
        let corner = corner_of(first + member.subgroup) * STRIDE;
        var a = SumTile();
        var b = SumTile();
        var c = SumTile();
        var d = SumTile();
        for (var held = 0u; held < held_inputs(); held += STEP) {
            stage_rows(held, member.thread);
            stage_MATRIX(block, held, member.thread);
            workgroupBarrier();
            for (var quad = 0u; quad < STEP_QUADS; quad += EDGE / 4u) {
                let upper = coopLoadT<RowTile>(&staged_x[corner.x + quad], STRIDE);
                let lower = coopLoadT<RowTile>(&staged_x[corner.x + EDGE * STRIDE + quad], STRIDE);
                let left = coopLoad<WeightTile>(&staged_w[corner.y + quad], STRIDE);
                let right = coopLoad<WeightTile>(&staged_w[corner.y + EDGE * STRIDE + quad], STRIDE);
                a = coopMultiplyAdd(upper, left, a);
                b = coopMultiplyAdd(upper, right, b);
                c = coopMultiplyAdd(lower, left, c);
                d = coopMultiplyAdd(lower, right, d);
            }
            workgroupBarrier();
        }
        hand_out_MATRIX(a, vec2<u32>(0u, 0u), first, block, member);
        hand_out_MATRIX(b, vec2<u32>(0u, EDGE), first, block, member);
        hand_out_MATRIX(c, vec2<u32>(EDGE, 0u), first, block, member);
        hand_out_MATRIX(d, vec2<u32>(EDGE, EDGE), first, block, member);
    }
}
