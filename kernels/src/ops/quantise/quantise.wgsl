// quantise: rows of f32 as signed bytes, for the products of precision `fast`. In a block of 32 inputs the largest magnitude becomes 127;
// numbers are rounded, ties to even; factor = largest / 127. What is not finite makes its block's factor NaN.
// Shapes: x [rows, blocks, 32] f32; numbers [rows, blocks, 8] words of four bytes, lowest first; factors [rows, blocks] of (bits of the
// factor, sums of the numbers in each half of the block, 16 bits each, low one first).
// Dispatch: (ceil(blocks / 64), rows, 1), a thread a block. CPU reference: cpu.rs.
struct Params {
    blocks: u32,  // in a row
}
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;                 // [rows, blocks, 8]
@group(0) @binding(2) var<storage, read_write> numbers: array<u32>;           // [rows, blocks, 8]
@group(0) @binding(3) var<storage, read_write> factors: array<vec2<u32>>;     // [rows, blocks]
const WORDS: u32 = 8u;
const INFINITY: u32 = 0x7f800000u;
const NOT_A_NUMBER: u32 = 0x7fc00000u;

@compute @workgroup_size(64)
fn quantise(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= params.blocks { return; }
    let block = id.y * params.blocks + id.x;
    // Infinity and NaN are found by their bits: compilers may take for granted that there are none.
    var most = vec4<u32>();
    for (var i = 0u; i < WORDS; i++) { most = max(most, bitcast<vec4<u32>>(abs(x[block * WORDS + i]))); }
    let bits = max(max(most.x, most.y), max(most.z, most.w));
    let largest = bitcast<f32>(bits);
    var inverse = 0.0;
    if bits > 0u && bits < INFINITY { inverse = 127.0 / largest; }
    var sums = vec2<i32>();
    for (var i = 0u; i < WORDS; i++) {
        let rounded = vec4<i32>(clamp(round(x[block * WORDS + i] * inverse), vec4<f32>(-127.0), vec4<f32>(127.0)));
        numbers[block * WORDS + i] = pack4xI8(rounded);
        let sum = rounded.x + rounded.y + rounded.z + rounded.w;
        if i < WORDS / 2u { sums.x += sum; } else { sums.y += sum; }
    }
    let factor = select(bitcast<u32>(largest / 127.0), NOT_A_NUMBER, bits >= INFINITY);
    factors[block] = vec2<u32>(factor, (bitcast<u32>(sums.x) & 0xffffu) | (bitcast<u32>(sums.y) << 16u));
}
