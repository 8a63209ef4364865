//! The operations of Grok-1's forward pass, as every device offers them.
//!
//! A backend owns device memory and runs operations in the order in which they are called; `forward.rs` calls them and is
//! written once. A weight is an opaque handle that the backend makes from bytes and their format. Activations are f32,
//! row-major, one row a token. No operation waits on a network, and none decides which tokens run.
//!
//! **Batch invariance.** A row of any result depends on that row's inputs and the weights alone: the order of every sum depends
//! on the shapes of the weights, in attention on absolute key positions, and never on how many rows a call has. A device that was
//! asked for [`Prefill::Fast`](crate::Prefill) may break this, and says for which steps ([`DeviceInfo::invariant_below`]).

use grokpipe_model::{MatrixSource, MatrixSpec};

use crate::{Batch, DeviceInfo, KernelError};

/// Constants of attention. Shapes: `q` is `[rows, heads * head_dim]`, `k` and `v` are `[rows, kv_heads * head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionParams {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; `heads` is a multiple of it.
    pub kv_heads: usize,
    /// Components of a head.
    pub head_dim: usize,
    /// Factor on `q . k`.
    pub multiplier: f32,
    /// Logits become `cap * tanh(x / cap)` before the mask.
    pub logit_cap: f32,
    /// Base of the rotary embedding.
    pub rope_theta: f32,
}

/// A device that can run the forward pass. See the module's page for what all implementations promise.
pub trait Backend: Send + 'static {
    /// A matrix (or a stack of them, one an expert) on the device, in whatever layout suits it.
    type Matrix: Send;
    /// A norm's scale on the device.
    type Vector: Send;
    /// Room for `[rows, width]` f32 on the device; `rows` is a capacity, a step uses the batch's first rows of it.
    type Activations: Send;
    /// Chosen experts and their probabilities, `[rows, num_experts_per_tok]`, best first. Stays on the device unless traced.
    type Selection: Send;
    /// Keys and values of some layers: `[blocks * block_tokens, kv_heads * head_dim]` twice a layer, f32, and one mark a slot
    /// that says whether the token there may be attended to.
    type KvPool: Send;

    /// What this device is.
    fn info(&self) -> &DeviceInfo;

    // Memory. All of these fail with a typed error that names what did not fit; nothing panics.

    /// Copies a matrix to the device, in bounded pieces; `progress` is told the stored bytes done since its last call.
    ///
    /// # Errors
    /// [`KernelError::Model`] when reading fails, [`KernelError::OutOfMemory`] or [`KernelError::Limit`] when it does not fit.
    fn load_matrix(
        &mut self,
        source: &dyn MatrixSource,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self::Matrix, KernelError>;

    /// Copies a router to the device, as [`Backend::load_matrix`] does. Only [`Backend::route`] uses it, in f32.
    ///
    /// # Errors
    /// As [`Backend::load_matrix`].
    fn load_router(
        &mut self,
        source: &dyn MatrixSource,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self::Matrix, KernelError> {
        self.load_matrix(source, progress)
    }

    /// Readies the device for [`Backend::expert_gate_up`] with these two, which a file may hold in different formats.
    ///
    /// # Errors
    /// [`KernelError::DeviceLost`].
    fn pair_experts(&mut self, _gate: &Self::Matrix, _up: &Self::Matrix) -> Result<(), KernelError> {
        Ok(())
    }

    /// Bytes that a matrix takes on the device, with its scales and whatever fills it up: more or less than in the file.
    fn held_bytes(&self, spec: &MatrixSpec) -> u64;

    /// Copies a vector to the device.
    ///
    /// # Errors
    /// As [`Backend::load_matrix`].
    fn load_vector(&mut self, values: &[f32]) -> Result<Self::Vector, KernelError>;

    /// Room for activations.
    ///
    /// # Errors
    /// As [`Backend::load_matrix`].
    fn activations(&mut self, rows: usize, width: usize) -> Result<Self::Activations, KernelError>;

    /// Room for the chosen experts of `rows` tokens.
    ///
    /// # Errors
    /// As [`Backend::load_matrix`].
    fn selection(&mut self, rows: usize, experts_per_token: usize) -> Result<Self::Selection, KernelError>;

    /// A KV pool of `slots` token slots for each of `layers` layers. Zeroed.
    ///
    /// # Errors
    /// As [`Backend::load_matrix`].
    fn kv_pool(&mut self, layers: usize, slots: usize, kv_width: usize) -> Result<Self::KvPool, KernelError>;

    // A step: `begin`, operations, `finish`. On a GPU everything between is one submission for a decode step.

    /// Starts a step over these rows, and marks the batch's slots in the pool as to be attended to or not.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when the batch does not fit the pool; [`KernelError::DeviceLost`].
    fn begin(&mut self, batch: &Batch, kv: &mut Self::KvPool) -> Result<(), KernelError>;

    /// Copies `values`, `[batch rows, width]`, into `out`.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when the length is not `batch rows * width`.
    fn write(&mut self, values: &[f32], out: &mut Self::Activations) -> Result<(), KernelError>;

    /// `out[t, i] = x[t, i] * weight[i] / sqrt(mean_i(x[t, i]^2) + epsilon)`.
    fn rms_norm(&mut self, epsilon: f32, x: &Self::Activations, weight: &Self::Vector, out: &mut Self::Activations);

    /// `residual[t] += rms_norm(y[t])`.
    fn rms_norm_add(
        &mut self,
        epsilon: f32,
        y: &Self::Activations,
        weight: &Self::Vector,
        residual: &mut Self::Activations,
    );

    /// `out[t, n] = factor * sum_k x[t, k] * w[k, n]`.
    fn matmul(&mut self, x: &Self::Activations, w: &Self::Matrix, factor: f32, out: &mut Self::Activations);

    /// [`Backend::matmul`] of the same rows with several matrices, factor 1: each to the activations beside it.
    fn matmul_each(&mut self, x: &Self::Activations, products: &mut [(&Self::Matrix, &mut Self::Activations)]) {
        for (w, out) in products {
            self.matmul(x, w, 1.0, out);
        }
    }

    /// Says what will be multiplied by when the product after this call is done: matrices for all rows, or with a selection the chosen
    /// experts'. A device may ask its memory for them meanwhile. A hint: no result depends on it.
    fn upcoming(&mut self, _matrices: &[&Self::Matrix], _selection: Option<&Self::Selection>) {}

    /// Rotates `q` (in place) and `k` at each row's position and stores `k` and `v` in `layer` of the pool at the row's slot.
    /// Half-rotation layout; tables are made on the host.
    fn rope_store(
        &mut self,
        params: &AttentionParams,
        q: &mut Self::Activations,
        k: &Self::Activations,
        v: &Self::Activations,
        kv: &mut Self::KvPool,
        layer: usize,
    );

    /// Causal attention of each row over its sequence's positions up to its own. A masked key's logit is -1e30, so that a row
    /// whose keys are all masked averages them.
    fn attention(
        &mut self,
        params: &AttentionParams,
        q: &Self::Activations,
        kv: &Self::KvPool,
        layer: usize,
        out: &mut Self::Activations,
    );

    /// `p = softmax(x @ router)`; the largest are chosen, on a tie the lower index first, and not renormalised.
    fn route(&mut self, x: &Self::Activations, router: &Self::Matrix, out: &mut Self::Selection);

    /// For each row and each of its chosen experts `e`: `out[row * chosen + j] = gelu(x @ gate[e]) * (x @ up[e])`, tanh GELU.
    /// `out` holds `rows * chosen` rows.
    fn expert_gate_up(
        &mut self,
        x: &Self::Activations,
        selection: &Self::Selection,
        gate: &Self::Matrix,
        up: &Self::Matrix,
        out: &mut Self::Activations,
    );

    /// `out[t] = sum_j p_j * (hidden[t * chosen + j] @ down[e_j])`, best expert first.
    fn expert_down(
        &mut self,
        hidden: &Self::Activations,
        selection: &Self::Selection,
        down: &Self::Matrix,
        out: &mut Self::Activations,
    );

    /// `out[i] = x[rows[i]]`. The step's later operations work on `rows.len()` rows of what was gathered or computed since; only another
    /// gather reads what was there before. `rope_store` and `attention` are not among them: a row no longer stands where the batch says.
    fn gather(&mut self, x: &Self::Activations, rows: &[u32], out: &mut Self::Activations);

    /// A layer is complete. A GPU may submit here, so that a long prefill does not become one submission over its watchdog's limit.
    fn layer_done(&mut self);

    /// Waits for the step and reads the first `rows` rows of each buffer. Operations of the same step may follow and end with a
    /// `finish` of their own: the head in pieces, and traces, do that.
    ///
    /// # Errors
    /// [`KernelError::DeviceLost`] when the device failed during the step.
    fn finish(&mut self, reads: &[(&Self::Activations, usize)]) -> Result<Vec<Vec<f32>>, KernelError>;

    /// As [`Backend::finish`], for a selection: ids and probabilities, `[rows, chosen]`. For traces.
    ///
    /// # Errors
    /// As [`Backend::finish`].
    fn read_selection(&mut self, selection: &Self::Selection, rows: usize)
    -> Result<(Vec<u32>, Vec<f32>), KernelError>;

    /// Has the steps that follow timed by the device's own clock, if it has one, or no more.
    fn time_by_device(&mut self, _timed: bool) {}

    /// Seconds that the device's own clock counted for the step that [`Backend::finish`] waited for; `None` without such a clock, when
    /// it was not asked for, or when the step was several submissions.
    ///
    /// # Errors
    /// As [`Backend::finish`].
    fn device_seconds(&mut self) -> Result<Option<f64>, KernelError> {
        Ok(None)
    }

    /// Bytes a second that the device reads from its memory, measured now (a fraction of a second), beside what is loaded. Takes no more
    /// than `most_bytes` for it, or the least that is worth reading.
    ///
    /// # Errors
    /// As [`Backend::finish`]; [`KernelError::OutOfMemory`] when there is no room for what is to be read.
    fn measure_read_bandwidth(&mut self, most_bytes: u64) -> Result<f64, KernelError>;

    /// Multiply-adds times two a second of a matrix product of 64 rows, measured now.
    ///
    /// # Errors
    /// As [`Backend::finish`].
    fn measure_flop_rate(&mut self) -> Result<f64, KernelError>;
}
