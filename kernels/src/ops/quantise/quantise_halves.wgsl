// quantise_halves: rows of f32 as halves, for the products of prefill `fast`. A row is multiplied by the power of two that brings its
// largest magnitude to 2^14..2^15, so that none becomes infinite and few lose digits; factor = what undoes that. A row with what
// is not finite has the factor NaN.
// Shapes: x [rows, inputs] f32; halves [rows, ceil(inputs / 4)] of four, the last ones filled with zeros; factors [rows] f32.
// Dispatch: (rows, 1, 1), a workgroup a row. CPU reference: halves in cpu.rs.
struct Params {
    inputs: u32,
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;                     // [rows, inputs]
@group(0) @binding(2) var<storage, read_write> halves: array<vec2<u32>>;    // [rows, ceil(inputs / 4)]
@group(0) @binding(3) var<storage, read_write> factors: array<u32>;         // [rows], bits of f32
const WORKGROUP: u32 = 64u;
const INFINITY: u32 = 0x7f800000u;
const NOT_A_NUMBER: u32 = 0x7fc00000u;
var<workgroup> largest: array<u32, WORKGROUP>;

fn number(first: u32, k: u32, power: f32) -> f32 {
    if k >= params.inputs { return 0.0; }
    return x[first + k] * power;
}

@compute @workgroup_size(WORKGROUP)
fn quantise_halves(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let first = workgroup.x * params.inputs;
    // Magnitudes are compared by their bits: compilers may take for granted that there is no infinity and no NaN.
    var most = 0u;
    for (var k = thread; k < params.inputs; k += WORKGROUP) { most = max(most, bitcast<u32>(abs(x[first + k]))); }
    largest[thread] = most;
    workgroupBarrier();
    for (var i = WORKGROUP / 2u; i > 0u; i /= 2u) {
        if thread < i { largest[thread] = max(largest[thread], largest[thread + i]); }
        workgroupBarrier();
    }
    let bits = largest[0];
    // Exponents are 127 too large in f32. Both it and what undoes it are normal numbers.
    let exponent = clamp(2u * 127u + 14u - (bits >> 23u), 1u, 253u);
    let power = bitcast<f32>(exponent << 23u);
    let quads = (params.inputs + 3u) / 4u;
    for (var quad = thread; quad < quads; quad += WORKGROUP) {
        let k = 4u * quad;
        let low = vec2<f32>(number(first, k, power), number(first, k + 1u, power));
        let high = vec2<f32>(number(first, k + 2u, power), number(first, k + 3u, power));
        halves[workgroup.x * quads + quad] = vec2<u32>(pack2x16float(low), pack2x16float(high));
    }
    if thread == 0u { factors[workgroup.x] = select((254u - exponent) << 23u, NOT_A_NUMBER, bits >= INFINITY); }
}
