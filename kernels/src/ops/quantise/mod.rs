//! Rows as 8-bit numbers, for products of precision `fast`: blocks of 32, in which the largest magnitude becomes 127.
//!
//! `number = round(x * 127 / largest)`, ties to even; it is worth `factor = largest / 127`. What is not finite makes its block's factor
//! NaN, so that it is not hidden. No operation of its own: a device does it to the inputs of its products.
//!
//! And rows as halves, for products of prefill `fast`: multiplied by the power of two that brings a row's largest magnitude to
//! 2^14..2^15; `factor` undoes it, and is NaN for a row with what is not finite.

#[cfg(test)]
pub(crate) mod cpu;

/// Inputs of a block.
pub(crate) const BLOCK: usize = 32;

/// Constants of rounding to halves.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct HalvesParams {
    /// Length of a row.
    pub(crate) inputs: u32,
}

/// Constants of rounding to 8 bits.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    /// Blocks of a row.
    pub(crate) blocks: u32,
}
