// gelu: 0.5 * g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3))); joined to every shader of pairs, of which gated_gelu's need it.
// tanh is given at most 15 in magnitude: beyond, it is 1 in f32, and some GPUs return NaN.
fn gelu(g: f32) -> f32 {
    let inner = 0.7978846 * fma(0.044715 * g * g, g, g);
    return 0.5 * g * (1.0 + tanh(clamp(inner, -15.0, 15.0)));
}
