//! Picks rows: `out[i] = x[rows[i]]`. Bits are copied, so there is no error to bound.

#[cfg(test)]
pub(crate) mod cpu;
#[cfg(test)]
pub(crate) mod tests;

/// Constants of the operation, shared by every implementation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    /// Length of a row.
    pub(crate) width: u32,
}
