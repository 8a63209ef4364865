//! The sampler turns a row of logits into a token, in the last stage. Pure: the same logits, parameters and place in the sequence
//! give the same token, on any machine, whatever else is in the batch.
//!
//! It decides which id comes next and how likely the model found it. It does not know when to stop, what an id means, or which
//! tokens came before.

mod draw;
mod math;
mod params;
mod philox;
#[cfg(test)]
mod tests;

pub use draw::{DrawError, Drawn, draw, log_probability};
pub use params::{InvalidSampling, Sampling};
