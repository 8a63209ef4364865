// matrix: what is read of the binding MATRIX and of its scales; joined once for each matrix of a shader, with its name for MATRIX.
fn chunks_of_MATRIX(at: u32) -> Chunks {
    var chunks = Chunks();
    chunks.a = MATRIX[at];
    if COLUMNS_PER_THREAD > 1u {
        chunks.b = MATRIX[at + COLUMN_THREADS];
        chunks.c = MATRIX[at + 2u * COLUMN_THREADS];
        chunks.d = MATRIX[at + 3u * COLUMN_THREADS];
    }
    return chunks;
}

fn words_of_MATRIX(at: u32) -> vec4<u32> {
    var words = vec4<u32>(MATRIX_scales[at], 0u, 0u, 0u);
    if COLUMNS_PER_THREAD > 1u {
        words.y = MATRIX_scales[at + COLUMN_THREADS];
        words.z = MATRIX_scales[at + 2u * COLUMN_THREADS];
        words.w = MATRIX_scales[at + 3u * COLUMN_THREADS];
    }
    return words;
}

// What all scales and all minima of a super-block are multiplied by.
fn factors_of_MATRIX(first: u32, index: u32) -> Scales {
    let words = words_of_MATRIX(first + index * words_of_super() * LANES);
    return Scales(halves(words, 0u), halves(words, 1u));
}

// Whole numbers that these are multiplied by in a group; the products are exact.
fn steps_of_MATRIX(first: u32, group: u32) -> Scales {
    let at = first + (group / SUPER * words_of_super() + 1u + group % SUPER / 4u) * LANES;
    var steps = Scales(signed_bytes(words_of_MATRIX(at), group % 4u), vec4<f32>());
    if MINIMA { steps.minimum = signed_bytes(words_of_MATRIX(at + SUPER / 4u * LANES), group % 4u); }
    return steps;
}

// Scales and minima of a group; `first` is the place of the columns' first words.
fn scales_of_MATRIX(first: u32, group: u32) -> Scales {
    if SCALES == GROUPS {
        return Scales(bitcast<vec4<f32>>(words_of_MATRIX(first + group * LANES)), vec4<f32>());
    }
    if SCALES == HALVES {
        if MINIMA {
            let words = words_of_MATRIX(first + group * LANES);
            return Scales(halves(words, 0u), halves(words, 1u));
        }
        return Scales(halves(words_of_MATRIX(first + group / 2u * LANES), group % 2u), vec4<f32>());
    }
    if SCALES == SUPERS {
        let factors = factors_of_MATRIX(first, group / SUPER);
        let steps = steps_of_MATRIX(first, group);
        return Scales(factors.scale * steps.scale, factors.minimum * steps.minimum);
    }
    return Scales(vec4<f32>(1.0), vec4<f32>());
}
