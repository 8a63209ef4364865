//! How fast the device is, measured with the kernels that a model would run.
//!
//! What is measured is what a plan needs to predict: not what the memory could deliver, but what the matrix kernel makes of it.

use std::time::{Duration, Instant};

use grokpipe_model::{Format, Layout, MatrixSpec};

use super::{GpuBackend, matrix, matrix::Shape};
use crate::{Backend, KernelError};

/// Time that a measurement may take after its first run.
const BUDGET: Duration = Duration::from_millis(120);

/// A product to time.
struct Product {
    rows: usize,
    inputs: usize,
    outputs: usize,
    /// Products in one submission, so that its cost does not count.
    repeats: usize,
}

impl GpuBackend {
    pub(super) fn read_bandwidth(&mut self) -> Result<f64, KernelError> {
        // Larger than the caches that GPUs have.
        let product = if self.software {
            Product { rows: 1, inputs: 4096, outputs: 8192, repeats: 1 }
        } else {
            Product { rows: 1, inputs: 6144, outputs: 49_152, repeats: 4 }
        };
        Ok((product.inputs * product.outputs) as f64 / self.seconds(&product)?)
    }

    pub(super) fn flop_rate(&mut self) -> Result<f64, KernelError> {
        let product = if self.software {
            Product { rows: 64, inputs: 1024, outputs: 512, repeats: 1 }
        } else {
            Product { rows: 64, inputs: 6144, outputs: 6144, repeats: 4 }
        };
        let flops = 2.0 * (product.rows * product.inputs * product.outputs) as f64;
        Ok(flops / self.seconds(&product)?)
    }

    /// Seconds of one product, the best of several runs, by the device's own clock where it has one.
    fn seconds(&mut self, product: &Product) -> Result<f64, KernelError> {
        self.recorder.time_passes(true);
        let seconds = self.best_seconds(product);
        self.recorder.time_passes(false);
        seconds
    }

    fn best_seconds(&mut self, product: &Product) -> Result<f64, KernelError> {
        let spec = MatrixSpec {
            name: "a matrix to measure with".into(),
            experts: 1,
            inputs: product.inputs,
            outputs: product.outputs,
            format: Format::Int8 { groups: 1 },
            layout: Layout::InOut,
        };
        let w = matrix::allocate(&mut self.memory, &mut self.recorder, &spec.name, Shape::new(&spec)?)?;
        let x = self.activations(product.rows, product.inputs)?;
        let mut out = self.activations(product.rows, product.outputs)?;
        let mut best = f64::MAX;
        let mut spent = Duration::ZERO;
        let mut run = 0;
        while run < 2 || spent < BUDGET {
            self.recorder.begin(false);
            self.rows = product.rows;
            let start = Instant::now();
            for _ in 0..product.repeats {
                self.matmul(&x, &w, 1.0, &mut out);
            }
            self.recorder.submit_and_wait()?;
            let elapsed = start.elapsed();
            // The first run compiles the kernel and clears the memory.
            if run > 0 {
                best = best.min(self.recorder.pass_seconds()?.unwrap_or(elapsed.as_secs_f64()));
                spent += elapsed;
            }
            run += 1;
        }
        self.rows = 0;
        self.recorder.forget_bind_groups();
        Ok(best / product.repeats as f64)
    }
}
