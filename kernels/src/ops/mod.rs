//! The operations of the forward pass: one folder each, with its contract, its parameters and a reference to hold devices to.
//!
//! `mod.rs` of a folder says what the operation computes and owns its `Params`, which the reference, the CPU backend and the
//! shader share. `cpu.rs` is the reference: plain loops, sums in f64, written to be read, compiled for tests only. A device's own
//! code stands elsewhere (`cpu/`, `gpu/`, and the shader beside the reference) and is held to it by `tests.rs`.

pub(crate) mod attention;
pub(crate) mod expert_down;
pub(crate) mod gated_gelu;
pub(crate) mod gather;
pub(crate) mod matmul;
pub(crate) mod moe_router;
pub(crate) mod quantise;
pub(crate) mod rms_norm;
pub(crate) mod rope;

#[cfg(test)]
pub(crate) mod testing;
