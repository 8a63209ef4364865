//! The GPU backend: Grok-1's operations as compute shaders, through wgpu, on any adapter that has WebGPU's default limits.
//!
//! This is the portable path: no f16, no binding arrays. Faster paths for an adapter's features, subgroups and cooperative matrices, are
//! further kernels in `pipelines.rs`, chosen when the device is opened. The one idea: operations only record what is to be done; `finish`
//! submits a step as one compute pass and reads what is wanted, so that a decode step costs one submission however many layers it has.
//! Nothing here panics on what a driver does: failures become [`KernelError`]s.
//!
//! `adapters.rs` lists the machine's adapters, `heap.rs` says how much memory one offers, `device.rs` opens it, `probe.rs` tries its subgroups, `failure.rs` keeps why it failed, `memory.rs` counts buffers.
//! `format.rs` says how weights are held, `matrix.rs` lays them out, `blocks.rs` and `upload.rs` get them there. `shaders.rs` and
//! `pipelines.rs` hold the kernels, `recorder.rs` submits them, `batch.rs` is what a step's rows become, `rounded.rs` what precision and
//! prefill `fast` make of rows, `attention.rs` and `experts.rs` are the operations of several dispatches, `cooperative.rs` says
//! what prefill `fast` needs, `trial.rs` tries it and `prefill.rs` is what it makes of products, `measure.rs` times the device, `clock.rs`
//! reads its own clock.

mod adapters;
mod attention;
mod batch;
mod blocks;
mod clock;
mod cooperative;
#[cfg(test)]
mod cooperative_tests;
mod device;
mod experts;
mod failure;
#[cfg(test)]
mod fast_tests;
mod format;
mod heap;
mod matrix;
mod measure;
mod memory;
mod pipelines;
mod prefill;
mod probe;
mod recorder;
mod rounded;
mod shaders;
#[cfg(test)]
mod tests;
mod trial;
mod upload;

use grokpipe_model::{MatrixSource, MatrixSpec};

pub use self::{
    adapters::{GpuAdapter, GpuChoice, GpuKind, gpu_adapters},
    matrix::GpuMatrix,
    pipelines::gpu_kernels,
    shaders::{SHADERS, Shader},
};
use self::{
    batch::StepBatch,
    cooperative::{Cooperative, ROWS_MIN},
    matrix::Shape,
    memory::{GpuBuffer, Memory, words},
    pipelines::{CooperativeVariant, Kernel, Sharing, TILE_ROWS, TILES_PER_WORKGROUP, Variant},
    recorder::Recorder,
    rounded::{RoundedRows, Rounding},
    shaders::{GatherParams, Lanes, MatmulParams},
    upload::Expanded,
};
use crate::{
    AttentionParams, Backend, Batch, DeviceInfo, KernelError, Precision, Prefill,
    ops::{gather, matmul, rms_norm},
};

/// Rows of a step that is one submission whatever it computes: decode micro-batches.
const DECODE_ROWS_MAX: usize = 33;

/// What may be asked of a device when it is opened.
#[derive(Clone, Debug, Default)]
pub struct GpuOptions {
    /// How exactly products are computed.
    pub precision: Precision,
    /// Cut weights into buffers of at most this size, although the device could hold larger ones. Results do not change.
    pub max_shard_bytes: Option<u64>,
    /// Whether several threads share a product's sum; else hardware that has room for that does. Results do not change.
    pub share_sums: Option<bool>,
    /// Whether threads reduce within subgroups on a device where these work; else hardware does. Results do not change.
    pub subgroups: Option<bool>,
    /// How steps of many rows are computed.
    pub prefill: Prefill,
}

/// A device behind wgpu. See the module's page.
pub struct GpuBackend {
    info: DeviceInfo,
    software: bool,
    /// Whether several threads share a sum.
    sliced: bool,
    /// How threads reduce their numbers.
    lanes: Lanes,
    precision: Precision,
    /// Where prefill `fast` is in use.
    cooperative: Option<Cooperative>,
    recorder: Recorder,
    memory: Memory,
    /// The step's rows on the device.
    batch: StepBatch,
    /// Rows that operations see: the batch's, or those of the last gather.
    rows: usize,
    /// Products of pairs before they are added up.
    products: Option<GpuBuffer>,
    /// Blocks of keys before they are combined.
    partials: Option<GpuBuffer>,
    /// Inputs of products in precision `fast`.
    rounded: RoundedRows,
}

/// A norm's scale on the device.
pub struct GpuVector {
    length: usize,
    buffer: GpuBuffer,
}

/// Rows of f32 on the device.
pub struct GpuActivations {
    rows: usize,
    width: usize,
    buffer: GpuBuffer,
}

/// Chosen experts on the device.
pub struct GpuSelection {
    rows: usize,
    chosen: usize,
    ids: GpuBuffer,
    probabilities: GpuBuffer,
    /// Pairs by expert, for steps of many rows; see `expert_tiles.wgsl`.
    tiles: GpuBuffer,
}

/// Keys, values and marks on the device.
pub struct GpuKvPool {
    layers: Vec<KvLayer>,
    slots: usize,
    width: usize,
    attended: GpuBuffer,
}

struct KvLayer {
    keys: GpuBuffer,
    values: GpuBuffer,
}

impl GpuBackend {
    /// Opens the adapter that `choice` names and compiles the kernels that every model needs.
    ///
    /// # Errors
    /// [`KernelError::NoDevice`] listing the adapters there are, [`KernelError::Limit`] when the adapter is too small for any
    /// model, [`KernelError::DeviceLost`] naming the kernel that its driver refused.
    pub fn open(choice: &GpuChoice) -> Result<Self, KernelError> {
        Self::open_with(choice, &GpuOptions::default())
    }

    /// As [`GpuBackend::open`], with options.
    ///
    /// # Errors
    /// As there.
    pub fn open_with(choice: &GpuChoice, options: &GpuOptions) -> Result<Self, KernelError> {
        let opened = device::open(choice, options)?;
        let memory_bytes = opened.info.memory_bytes;
        let mut memory = Memory::new(&opened.device, &opened.failure, memory_bytes, options.max_shard_bytes);
        let mut recorder = Recorder::new(opened.device, opened.queue, opened.failure)?;
        let wanted = opened.has_subgroups && options.subgroups.unwrap_or(!opened.software);
        let works = wanted && probe::subgroups_work(&mut recorder, &mut memory)?;
        let lanes = if works { Lanes::Subgroups } else { Lanes::Memory };
        recorder.compile_always(lanes)?;
        let mut backend = Self {
            info: opened.info,
            software: opened.software,
            sliced: options.share_sums.unwrap_or(!opened.software && opened.has_large_workgroups),
            lanes,
            precision: options.precision,
            cooperative: None,
            recorder,
            memory,
            batch: StepBatch::default(),
            rows: 0,
            products: None,
            partials: None,
            rounded: RoundedRows::default(),
        };
        if let Some(cooperative) = opened.cooperative {
            backend.try_cooperative(cooperative)?;
        }
        Ok(backend)
    }

    /// The variant of a kernel for a matrix.
    fn variant(&self, matrix: &GpuMatrix, sharing: Sharing) -> Variant {
        let shape = matrix.shape;
        let (precision, whole) = (shape.precision(self.precision), shape.is_whole());
        Variant { held: shape.held, precision, whole, sharing, sliced: self.sliced, unrolled: !self.software }
    }

    /// How a single row is shared among threads. A software adapter's run one after the other.
    fn sharing_of_one(&self) -> Sharing {
        if self.software && !self.sliced { Sharing::Wide } else { Sharing::One }
    }

    /// The variant of a kernel for a matrix in prefill `fast`.
    fn cooperative_variant(matrix: &GpuMatrix, cooperative: Cooperative) -> CooperativeVariant {
        CooperativeVariant { held: matrix.shape.held, whole: matrix.shape.is_whole(), cooperative }
    }

    /// How this step's products use cooperative matrices; `None` for few rows and where they are not in use.
    fn cooperative(&self) -> Option<Cooperative> {
        self.cooperative.filter(|_| self.rows >= ROWS_MIN)
    }

    /// Compiles what a matrix will be multiplied with.
    fn compile_for(&mut self, matrix: &GpuMatrix) -> Result<(), KernelError> {
        for sharing in [self.sharing_of_one(), Sharing::Tiled] {
            let variant = self.variant(matrix, sharing);
            if matrix.shape.experts == 1 {
                self.recorder.compile(Kernel::Matmul(variant))?;
            } else {
                self.recorder.compile(Kernel::GatedGelu(variant))?;
                self.recorder.compile(Kernel::ExpertDown(variant))?;
            }
        }
        Ok(())
    }

    /// Keeps the step's first shape error; operations return nothing, `finish` tells it.
    fn expect(&mut self, what: &str, expected: usize, found: usize) -> bool {
        if expected != found {
            self.recorder.refuse(shape(what, &expected.to_string(), found));
        }
        expected == found
    }

    /// Whether a buffer of a step holds `rows` rows of `width`.
    fn expect_rows(&mut self, what: &str, rows: usize, width: usize, found: &GpuActivations) -> bool {
        if rows > found.rows {
            self.recorder.refuse(shape(what, &format!("room for {rows} rows"), found.rows));
            return false;
        }
        self.expect(what, width, found.width)
    }

    fn norm(&mut self, kernel: Kernel, epsilon: f32, x: &GpuActivations, weight: &GpuVector, out: &GpuActivations) {
        let rows = self.rows;
        let fits = self.expect_rows("input of a norm", rows, weight.length, x)
            && self.expect_rows("output of a norm", rows, weight.length, out);
        if fits {
            let params = rms_norm::Params { hidden_size: weight.length as u32, epsilon };
            let buffers = [&x.buffer, &weight.buffer, &out.buffer];
            self.recorder.dispatch(kernel, &params, &buffers, [rows as u32, 1, 1], (rows * weight.length) as u64);
        }
    }
}

/// A [`KernelError::Shape`].
fn shape(what: &str, expected: &str, found: usize) -> KernelError {
    KernelError::Shape { what: what.to_string(), expected: expected.to_string(), found: found.to_string() }
}

/// Workgroups of 64 threads that cover `count`.
fn workgroups(count: usize) -> u32 {
    count.div_ceil(64) as u32
}

impl Backend for GpuBackend {
    type Matrix = GpuMatrix;
    type Vector = GpuVector;
    type Activations = GpuActivations;
    type Selection = GpuSelection;
    type KvPool = GpuKvPool;

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn load_matrix(
        &mut self,
        source: &dyn MatrixSource,
        progress: &mut dyn FnMut(u64),
    ) -> Result<GpuMatrix, KernelError> {
        let mut matrix = upload::load(&mut self.memory, &mut self.recorder, source, progress)?;
        self.compile_for(&matrix)?;
        self.prepare_cooperative(&mut matrix)?;
        Ok(matrix)
    }

    /// As f32, which is what its kernel reads.
    fn load_router(
        &mut self,
        source: &dyn MatrixSource,
        progress: &mut dyn FnMut(u64),
    ) -> Result<GpuMatrix, KernelError> {
        let expanded = Expanded::new(source);
        let source = expanded.as_ref().map_or(source, |expanded| expanded as &dyn MatrixSource);
        upload::load(&mut self.memory, &mut self.recorder, source, progress)
    }

    fn pair_experts(&mut self, gate: &GpuMatrix, up: &GpuMatrix) -> Result<(), KernelError> {
        if gate.shape == up.shape {
            return Ok(());
        }
        [self.sharing_of_one(), Sharing::Tiled]
            .into_iter()
            .try_for_each(|sharing| self.recorder.compile(Kernel::GatedGeluOfGate(self.variant(up, sharing))))
    }

    fn held_bytes(&self, spec: &MatrixSpec) -> u64 {
        // A shape that cannot be loaded is refused when that is tried.
        Shape::new(spec).ok().and_then(Shape::held_bytes).unwrap_or_else(|| spec.weight_bytes())
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<GpuVector, KernelError> {
        self.recorder.forget_bind_groups();
        let buffer = self.memory.allocate("a norm", words(&[values.len()]))?;
        self.recorder.write(&buffer, 0, bytemuck::cast_slice(values));
        self.recorder.failure.check()?;
        Ok(GpuVector { length: values.len(), buffer })
    }

    fn activations(&mut self, rows: usize, width: usize) -> Result<GpuActivations, KernelError> {
        self.recorder.forget_bind_groups();
        let what = format!("activations [{rows}, {width}]");
        Ok(GpuActivations { rows, width, buffer: self.memory.allocate(&what, words(&[rows, width]))? })
    }

    fn selection(&mut self, rows: usize, experts_per_token: usize) -> Result<GpuSelection, KernelError> {
        self.recorder.forget_bind_groups();
        let pairs = words(&[rows, experts_per_token]);
        Ok(GpuSelection {
            rows,
            chosen: experts_per_token,
            ids: self.memory.allocate("chosen experts", pairs)?,
            probabilities: self.memory.allocate("chosen experts' probabilities", pairs)?,
            tiles: self.memory.allocate("pairs by expert", experts::tiles_bytes(rows, experts_per_token))?,
        })
    }

    fn kv_pool(&mut self, layers: usize, slots: usize, kv_width: usize) -> Result<GpuKvPool, KernelError> {
        self.recorder.forget_bind_groups();
        let mut made = Vec::new();
        for layer in 0..layers {
            let mut half = |what| {
                self.memory.allocate(&format!("{what} of {slots} tokens in layer {layer}"), words(&[slots, kv_width]))
            };
            made.push(KvLayer { keys: half("keys")?, values: half("values")? });
        }
        let attended = self.memory.allocate("marks of KV slots", words(&[slots]))?;
        Ok(GpuKvPool { layers: made, slots, width: kv_width, attended })
    }

    fn begin(&mut self, batch: &Batch, kv: &mut GpuKvPool) -> Result<(), KernelError> {
        self.rows = 0;
        self.recorder.failure.check()?;
        self.recorder.begin(batch.rows.len() > DECODE_ROWS_MAX);
        self.batch.upload(&mut self.memory, &mut self.recorder, batch, kv)?;
        self.rows = batch.rows.len();
        Ok(())
    }

    fn write(&mut self, values: &[f32], out: &mut GpuActivations) -> Result<(), KernelError> {
        if values.len() != self.rows * out.width {
            return Err(shape("written values", &format!("{} rows of {}", self.rows, out.width), values.len()));
        }
        if self.rows > out.rows {
            return Err(shape("written rows", &format!("at most {}", out.rows), self.rows));
        }
        self.recorder.write(&out.buffer, 0, bytemuck::cast_slice(values));
        self.recorder.failure.check()
    }

    fn rms_norm(&mut self, epsilon: f32, x: &GpuActivations, weight: &GpuVector, out: &mut GpuActivations) {
        self.norm(Kernel::RmsNorm(self.lanes), epsilon, x, weight, out);
    }

    fn rms_norm_add(&mut self, epsilon: f32, y: &GpuActivations, weight: &GpuVector, residual: &mut GpuActivations) {
        self.norm(Kernel::RmsNormAdd(self.lanes), epsilon, y, weight, residual);
    }

    fn matmul(&mut self, x: &GpuActivations, w: &GpuMatrix, factor: f32, out: &mut GpuActivations) {
        let (rows, shape) = (self.rows, w.shape);
        let fits = self.expect(&format!("experts of {}", w.name), 1, shape.experts)
            && self.expect_rows(&format!("input of {}", w.name), rows, shape.inputs, x)
            && self.expect_rows(&format!("output of {}", w.name), rows, shape.outputs, out);
        if !fits {
            return;
        }
        let op = matmul::Params {
            inputs: shape.inputs as u32,
            outputs: shape.outputs as u32,
            groups: shape.groups as u32,
            factor,
        };
        if let Some(cooperative) = self.cooperative() {
            return self.cooperative_matmul(cooperative, x, w, op, out);
        }
        let (sharing, rows_per_workgroup) = match rows {
            1 => (self.sharing_of_one(), 1),
            _ => (Sharing::Tiled, TILE_ROWS * TILES_PER_WORKGROUP),
        };
        let variant = self.variant(w, sharing);
        let kernel = Kernel::Matmul(variant);
        let rounding = Rounding::of(shape.precision(self.precision));
        self.rounded.make(&mut self.memory, &mut self.recorder, rounding, x, rows);
        let [x, factors] = self.rounded.bindings(rounding, x);
        for shard in &w.shards {
            let column_begin = (shard.blocks.start * matrix::LANES) as u32;
            let params = |block_begin| MatmulParams { op, rows: rows as u32, column_begin, block_begin };
            let groups =
                [rows.div_ceil(rows_per_workgroup) as u32, shard.blocks.len() as u32, variant.workgroups_a_block()];
            let work = (rows * shape.inputs) as u64 * (shard.blocks.len() * matrix::LANES) as u64;
            let buffers = [x, factors, &shard.chunks, shard.scales(), &out.buffer];
            self.recorder.dispatch_blocks(kernel, params, &buffers, groups, work);
        }
    }

    fn rope_store(
        &mut self,
        params: &AttentionParams,
        q: &mut GpuActivations,
        k: &GpuActivations,
        v: &GpuActivations,
        kv: &mut GpuKvPool,
        layer: usize,
    ) {
        self.rope_store_impl(params, [q, k, v], kv, layer);
    }

    fn attention(
        &mut self,
        params: &AttentionParams,
        q: &GpuActivations,
        kv: &GpuKvPool,
        layer: usize,
        out: &mut GpuActivations,
    ) {
        self.attention_impl(params, q, kv, layer, out);
    }

    fn route(&mut self, x: &GpuActivations, router: &GpuMatrix, out: &mut GpuSelection) {
        self.route_impl(x, router, out);
    }

    fn expert_gate_up(
        &mut self,
        x: &GpuActivations,
        selection: &GpuSelection,
        gate: &GpuMatrix,
        up: &GpuMatrix,
        out: &mut GpuActivations,
    ) {
        self.gate_up_impl(x, selection, gate, up, out);
    }

    fn expert_down(
        &mut self,
        hidden: &GpuActivations,
        selection: &GpuSelection,
        down: &GpuMatrix,
        out: &mut GpuActivations,
    ) {
        self.down_impl(hidden, selection, down, out);
    }

    fn gather(&mut self, x: &GpuActivations, rows: &[u32], out: &mut GpuActivations) {
        if !self.expect_rows("output of gather", rows.len(), x.width, out) {
            return;
        }
        // A step may gather several times: from the batch's rows, or from fewer that were gathered before.
        let rows_there = self.batch.positions.len();
        if let Some(&row) = rows.iter().find(|&&row| row as usize >= rows_there) {
            return self.recorder.refuse(shape("gathered row", &format!("less than {rows_there}"), row as usize));
        }
        let (buffer, begin) = match self.batch.upload_gather(&mut self.memory, &mut self.recorder, rows) {
            Ok(place) => place,
            Err(error) => return self.recorder.refuse(error),
        };
        let params = GatherParams { op: gather::Params { width: x.width as u32 }, begin };
        let groups = [workgroups(x.width), rows.len() as u32, 1];
        self.recorder.dispatch(Kernel::Gather, &params, &[&x.buffer, buffer, &out.buffer], groups, 0);
        self.rows = rows.len();
    }

    /// Nothing to do: the recorder cuts long steps by their work, between any two dispatches.
    fn layer_done(&mut self) {}

    fn finish(&mut self, reads: &[(&GpuActivations, usize)]) -> Result<Vec<Vec<f32>>, KernelError> {
        if let Some((x, rows)) = reads.iter().find(|(x, rows)| *rows > x.rows) {
            return Err(shape("rows to read", &format!("at most {}", x.rows), *rows));
        }
        let reads: Vec<_> = reads.iter().map(|(x, rows)| (&x.buffer, rows * x.width)).collect();
        self.recorder.read_back(&reads)
    }

    fn read_selection(&mut self, selection: &GpuSelection, rows: usize) -> Result<(Vec<u32>, Vec<f32>), KernelError> {
        if rows > selection.rows {
            return Err(shape("rows of a selection to read", &format!("at most {}", selection.rows), rows));
        }
        let count = rows * selection.chosen;
        let read = self.recorder.read_back::<u32>(&[(&selection.ids, count), (&selection.probabilities, count)])?;
        let mut read = read.into_iter();
        let ids = read.next().unwrap_or_default();
        let probabilities = read.next().unwrap_or_default().into_iter().map(f32::from_bits).collect();
        Ok((ids, probabilities))
    }

    fn time_by_device(&mut self, timed: bool) {
        self.recorder.time_passes(timed);
    }

    fn device_seconds(&mut self) -> Result<Option<f64>, KernelError> {
        self.recorder.pass_seconds()
    }

    fn measure_read_bandwidth(&mut self, most_bytes: u64) -> Result<f64, KernelError> {
        self.read_bandwidth(most_bytes)
    }

    fn measure_flop_rate(&mut self) -> Result<f64, KernelError> {
        self.flop_rate()
    }
}
