//! Rows as 8-bit numbers, for products of precision `fast`: blocks of 32, in which the largest magnitude becomes 127.
//!
//! `number = round(x * 127 / largest)`, ties to even; it is worth `factor = largest / 127`. What is not finite makes its block's factor
//! NaN, so that it is not hidden. No operation of its own: a device does it to the inputs of its products.

#[cfg(test)]
pub(crate) mod cpu;

/// Inputs of a block.
pub(crate) const BLOCK: usize = 32;

/// Constants of the operation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    /// Blocks of a row.
    pub(crate) blocks: u32,
}
