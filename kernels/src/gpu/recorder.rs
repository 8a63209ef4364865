//! Collects a step's dispatches and submits them: one compute pass, one submission, unless the work exceeds what one may hold.
//!
//! Parameters of all dispatches lie one after the other in one uniform buffer, written once a submission and addressed by
//! dynamic offsets; bind groups are kept by kernel and buffers. So a dispatch of a later step costs about a microsecond. The first
//! error of a step is kept and told when its results are read: operations themselves cannot fail.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
};

use bytemuck::Pod;

use super::{
    clock::Clock,
    failure::Failure,
    memory::{GpuBuffer, scoped, whole},
    pipelines::{Kernel, Pipelines},
    shaders::Lanes,
};
use crate::KernelError;

/// Distance of parameters in the uniform buffer: the largest alignment that WebGPU lets a device ask for.
const UNIFORM_STRIDE: usize = 256;
/// Dispatches in one submission. 64 layers of the full model in 128 MiB shards need about 4,500.
const DISPATCHES_MAX: usize = 16_384;
/// Multiply-adds after which a submission is cut, and which no dispatch exceeds that can be cut along its blocks: 200 ms of a GPU that
/// makes 100 billion of them a second. Drivers reset a GPU whose work runs for seconds.
pub(super) const WORK_MAX: u64 = 20_000_000_000;
/// Submissions that are remembered to be waited for one by one; older ones are waited for with them.
const SUBMITTED_MAX: usize = 4096;
/// Bindings beside the parameters.
const BINDINGS_MAX: usize = 8;
/// Bind groups kept. A stage of 64 layers in few shards has some thousands.
const BIND_GROUPS_MAX: usize = 65_536;

type GroupKey = (Kernel, [u64; BINDINGS_MAX]);

struct Dispatch {
    kernel: Kernel,
    key: GroupKey,
    group: wgpu::BindGroup,
    offset: u32,
    workgroups: [u32; 3],
}

/// See the module's page.
pub(super) struct Recorder {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) failure: Failure,
    pipelines: Pipelines,
    uniforms: wgpu::Buffer,
    uniform_bytes: Vec<u8>,
    pending: Vec<Dispatch>,
    groups: HashMap<GroupKey, wgpu::BindGroup>,
    work: u64,
    may_cut: bool,
    /// [`WORK_MAX`], except in tests.
    work_max: u64,
    /// Of a single dispatch, for tests.
    #[cfg(test)]
    most_work: u64,
    /// What was submitted and not waited for, with its multiply-adds.
    submitted: VecDeque<(wgpu::SubmissionIndex, u64)>,
    /// A buffer that was not written since it was to be watched.
    watched: Option<u64>,
    error: Option<KernelError>,
    staging: Option<wgpu::Buffer>,
    submissions: u64,
    /// Times passes, once it was asked for.
    clock: Option<Clock>,
    /// Passes of this step that it timed; it keeps the last one alone.
    timed: u64,
}

impl Recorder {
    /// Makes the uniform buffer. No kernel is compiled yet.
    pub(super) fn new(device: wgpu::Device, queue: wgpu::Queue, failure: Failure) -> Result<Self, KernelError> {
        let uniforms = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("parameters"),
            size: (UNIFORM_STRIDE * DISPATCHES_MAX) as u64,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        failure.check()?;
        Ok(Self {
            device,
            queue,
            failure,
            pipelines: Pipelines::default(),
            uniforms,
            uniform_bytes: Vec::new(),
            pending: Vec::new(),
            groups: HashMap::new(),
            work: 0,
            may_cut: false,
            work_max: WORK_MAX,
            #[cfg(test)]
            most_work: 0,
            submitted: VecDeque::new(),
            watched: None,
            error: None,
            staging: None,
            submissions: 0,
            clock: None,
            timed: 0,
        })
    }

    /// Starts a step. What an abandoned one left is dropped. `may_cut` says whether this step may become several submissions.
    pub(super) fn begin(&mut self, may_cut: bool) {
        self.drop_pending();
        self.error = None;
        self.may_cut = may_cut;
        self.watched = None;
        self.timed = 0;
    }

    /// Watches one buffer, and no other, for whether it is written.
    pub(super) fn watch(&mut self, buffer: &GpuBuffer) {
        self.watched = Some(buffer.id);
    }

    /// Whether a buffer is the watched one and was not written in this step since.
    pub(super) fn is_as_watched(&self, buffer: &GpuBuffer) -> bool {
        self.watched == Some(buffer.id)
    }

    /// Keeps the step's first error.
    pub(super) fn refuse(&mut self, error: KernelError) {
        self.error.get_or_insert(error);
    }

    /// Bind groups hold their buffers; without this, buffers that were dropped would stay until the next allocation.
    pub(super) fn forget_bind_groups(&mut self) {
        self.groups.clear();
    }

    /// The same for the buffers of one kernel.
    pub(super) fn forget_bind_groups_of(&mut self, kernel: Kernel) {
        self.groups.retain(|(of, _), _| *of != kernel);
    }

    /// Has the submissions that follow timed by the device's clock, if it has one, or no more.
    pub(super) fn time_passes(&mut self, timed: bool) {
        self.clock = if timed { Clock::new(&self.device, &self.queue) } else { None };
    }

    /// Seconds of the step's pass by the device's clock; `None` when it was several or none.
    ///
    /// # Errors
    /// [`KernelError::DeviceLost`].
    pub(super) fn pass_seconds(&self) -> Result<Option<f64>, KernelError> {
        let clock = self.clock.as_ref().filter(|_| self.timed == 1);
        clock.map(|clock| clock.seconds(&self.device, &self.failure)).transpose()
    }

    /// Submissions so far, for tests.
    #[cfg(test)]
    pub(super) fn submissions(&self) -> u64 {
        self.submissions
    }

    /// Kernels that were compiled, for tests.
    #[cfg(test)]
    pub(super) fn compiled(&self) -> usize {
        self.pipelines.count()
    }

    /// As [`Pipelines::replace`], for tests.
    #[cfg(test)]
    pub(super) fn replace(&mut self, kernel: Kernel, shader: super::Shader) {
        self.pipelines.replace(kernel, shader);
    }

    /// Pretends that what is recorded is more work, for tests.
    #[cfg(test)]
    pub(super) fn add_work(&mut self, work: u64) {
        self.work = self.work.saturating_add(work);
    }

    /// Cuts submissions and dispatches at less work, for tests; counts anew what is the most.
    #[cfg(test)]
    pub(super) fn set_work_max(&mut self, work: u64) {
        (self.work_max, self.most_work) = (work, 0);
    }

    /// The most work of a dispatch so far, for tests.
    #[cfg(test)]
    pub(super) fn most_work(&self) -> u64 {
        self.most_work
    }

    /// Adds dispatches whose workgroups are `blocks` along their second dimension: as many as it takes that none is more than the most
    /// work. Each is given the parameters for the first of its blocks.
    pub(super) fn dispatch_blocks<P: Pod>(
        &mut self,
        kernel: Kernel,
        params: impl Fn(u32) -> P,
        buffers: &[&GpuBuffer],
        [x, blocks, z]: [u32; 3],
        work: u64,
    ) {
        for (blocks, work) in cut(blocks, work, self.work_max) {
            self.dispatch(kernel, &params(blocks.start), buffers, [x, blocks.len() as u32, z], work);
        }
    }

    /// Adds a dispatch. `buffers` are the bindings from 1 on, `work` its multiply-adds.
    pub(super) fn dispatch(
        &mut self,
        kernel: Kernel,
        params: &impl Pod,
        buffers: &[&GpuBuffer],
        workgroups: [u32; 3],
        work: u64,
    ) {
        if workgroups.contains(&0) || self.error.is_some() {
            return;
        }
        #[cfg(test)]
        {
            self.most_work = self.most_work.max(work);
        }
        let over = self.may_cut && self.work.saturating_add(work) > self.work_max;
        if !self.pending.is_empty() && (over || self.pending.len() == DISPATCHES_MAX) {
            self.submit();
        }
        // Kernels of loaded matrices are there; one that is used in another way than foreseen is compiled now.
        if let Err(error) = self.compile(kernel) {
            return self.refuse(error);
        }
        let Some(pipeline) = self.pipelines.get(kernel) else { return };
        let bytes = bytemuck::bytes_of(params);
        assert_eq!(bytes.len() as u64, pipeline.params_bytes, "{kernel:?} is given other parameters");
        let written =
            buffers.iter().zip(pipeline.written).any(|(buffer, written)| *written && Some(buffer.id) == self.watched);
        if written {
            self.watched = None;
        }
        let offset = self.uniform_bytes.len();
        self.uniform_bytes.extend_from_slice(bytes);
        self.uniform_bytes.resize(offset + UNIFORM_STRIDE, 0);
        let mut ids = [0; BINDINGS_MAX];
        for (id, buffer) in ids.iter_mut().zip(buffers) {
            *id = buffer.id;
        }
        let key = (kernel, ids);
        let Some(group) = self.bind_group(key, buffers) else { return };
        self.pending.push(Dispatch { kernel, key, group, offset: offset as u32, workgroups });
        self.work = self.work.saturating_add(work);
    }

    /// Compiles a kernel, unless it is there.
    ///
    /// # Errors
    /// As [`Pipelines::compile`].
    pub(super) fn compile(&mut self, kernel: Kernel) -> Result<(), KernelError> {
        self.pipelines.compile(&self.device, &self.failure, kernel)
    }

    /// Compiles the kernels that every model needs.
    ///
    /// # Errors
    /// As [`Pipelines::compile`].
    pub(super) fn compile_always(&mut self, lanes: Lanes) -> Result<(), KernelError> {
        self.pipelines.compile_always(&self.device, &self.failure, lanes)
    }

    /// As [`Pipelines::refusal`].
    ///
    /// # Errors
    /// As there.
    pub(super) fn refusal(&mut self, kernel: Kernel) -> Result<Option<String>, KernelError> {
        self.pipelines.refusal(&self.device, &self.failure, kernel)
    }

    /// `None` when the kernel was not compiled.
    fn bind_group(&mut self, key: GroupKey, buffers: &[&GpuBuffer]) -> Option<wgpu::BindGroup> {
        if let Some(group) = self.groups.get(&key) {
            return Some(group.clone());
        }
        let pipeline = self.pipelines.get(key.0)?;
        let mut entries =
            vec![wgpu::BindGroupEntry { binding: 0, resource: whole(&self.uniforms, pipeline.params_bytes) }];
        for (index, buffer) in buffers.iter().enumerate() {
            entries.push(wgpu::BindGroupEntry {
                binding: index as u32 + 1,
                resource: whole(&buffer.buffer, buffer.bytes()),
            });
        }
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.layout,
            entries: &entries,
        });
        if self.groups.len() >= BIND_GROUPS_MAX {
            self.groups.clear();
        }
        self.groups.insert(key, group.clone());
        Some(group)
    }

    /// Writes into a buffer now, after everything that was recorded and uses it.
    pub(super) fn write(&mut self, buffer: &GpuBuffer, offset: u64, bytes: &[u8]) {
        if bytes.is_empty() || self.error.is_some() {
            return;
        }
        if self.pending.iter().any(|dispatch| dispatch.key.1.contains(&buffer.id)) {
            self.submit();
        }
        if self.is_as_watched(buffer) {
            self.watched = None;
        }
        let written = self.failure.guard(|| self.queue.write_buffer(&buffer.buffer, offset, bytes));
        if let Err(error) = written {
            self.refuse(error);
        }
    }

    /// Submits what was recorded.
    pub(super) fn submit(&mut self) {
        if let Err(error) = self.submit_with(&[]) {
            self.refuse(error);
        }
    }

    /// Submits what was recorded and waits until the device has done it.
    ///
    /// # Errors
    /// The step's first error, or [`KernelError::DeviceLost`].
    pub(super) fn submit_and_wait(&mut self) -> Result<(), KernelError> {
        self.submit();
        self.take_error()?;
        self.wait("what it was given")
    }

    /// Waits for what was submitted, one submission after the other: as long as these end the device works.
    fn wait(&mut self, what: &str) -> Result<(), KernelError> {
        while let Some((submission, work)) = self.submitted.pop_front() {
            self.failure.wait(&self.device, Some(submission), work, what)?;
        }
        // What else is on its way: copies of what was written.
        self.failure.wait(&self.device, None, 0, what)
    }

    /// Submits what was recorded and reads the first words of each buffer.
    ///
    /// # Errors
    /// The step's first error, or [`KernelError::DeviceLost`].
    pub(super) fn read_back<T: Pod>(&mut self, reads: &[(&GpuBuffer, usize)]) -> Result<Vec<Vec<T>>, KernelError> {
        assert_eq!(size_of::<T>(), 4, "results are words");
        self.take_error()?;
        let total: u64 = reads.iter().map(|(_, words)| (*words as u64 * 4).next_multiple_of(16)).sum();
        if total == 0 {
            self.submit_and_wait()?;
            return Ok(reads.iter().map(|_| Vec::new()).collect());
        }
        let staging = self.staging(total)?;
        let mut copies = Vec::with_capacity(reads.len());
        let mut offset = 0;
        for (buffer, words) in reads {
            let bytes = *words as u64 * 4;
            copies.push((*buffer, &staging, offset, bytes));
            offset += bytes.next_multiple_of(16);
        }
        self.submit_with(&copies)?;
        let failure = self.failure.clone();
        failure.read(
            &staging,
            total,
            "results",
            || self.wait("a step"),
            |bytes| {
                let read = |(_, _, offset, length): &(&GpuBuffer, &wgpu::Buffer, u64, u64)| {
                    bytemuck::pod_collect_to_vec::<u8, T>(&bytes[*offset as usize..(*offset + *length) as usize])
                };
                copies.iter().map(read).collect()
            },
        )
    }

    /// The step's first error, if any; what was recorded after it is dropped.
    fn take_error(&mut self) -> Result<(), KernelError> {
        match self.error.take() {
            Some(error) => {
                self.drop_pending();
                Err(error)
            }
            None => self.failure.check(),
        }
    }

    fn drop_pending(&mut self) {
        self.pending.clear();
        self.uniform_bytes.clear();
        self.work = 0;
    }

    fn submit_with(&mut self, copies: &[(&GpuBuffer, &wgpu::Buffer, u64, u64)]) -> Result<(), KernelError> {
        if self.pending.is_empty() && copies.is_empty() {
            return self.failure.check();
        }
        let submission = self.failure.guard(|| {
            if !self.uniform_bytes.is_empty() {
                self.queue.write_buffer(&self.uniforms, 0, &self.uniform_bytes);
            }
            let mut encoder = self.device.create_command_encoder(&Default::default());
            self.encode(&mut encoder);
            for (source, target, offset, bytes) in copies {
                encoder.copy_buffer_to_buffer(&source.buffer, 0, target, *offset, *bytes);
            }
            self.queue.submit([encoder.finish()])
        })?;
        if self.submitted.len() == SUBMITTED_MAX {
            self.submitted.pop_front();
        }
        self.submitted.push_back((submission, self.work));
        self.submissions += 1;
        if self.clock.is_some() && !self.pending.is_empty() {
            self.timed += 1;
        }
        self.drop_pending();
        self.failure.check()
    }

    fn encode(&self, encoder: &mut wgpu::CommandEncoder) {
        if self.pending.is_empty() {
            return;
        }
        let timestamp_writes = self.clock.as_ref().map(Clock::writes);
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes });
        let mut current = None;
        for dispatch in &self.pending {
            if current != Some(dispatch.kernel) {
                // What is pending was compiled when it was recorded.
                let Some(pipeline) = self.pipelines.get(dispatch.kernel) else { continue };
                pass.set_pipeline(&pipeline.pipeline);
                current = Some(dispatch.kernel);
            }
            pass.set_bind_group(0, &dispatch.group, &[dispatch.offset]);
            let [x, y, z] = dispatch.workgroups;
            pass.dispatch_workgroups(x, y, z);
        }
        drop(pass);
        if let Some(clock) = &self.clock {
            clock.resolve(encoder);
        }
    }

    /// A buffer that the host can read, of at least `bytes`; kept for the next step.
    fn staging(&mut self, bytes: u64) -> Result<wgpu::Buffer, KernelError> {
        if let Some(staging) = self.staging.as_ref().filter(|staging| staging.size() >= bytes) {
            return Ok(staging.clone());
        }
        self.staging = None;
        let descriptor = wgpu::BufferDescriptor {
            label: Some("results"),
            size: bytes.next_power_of_two(),
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        };
        let device = self.device.clone();
        match self.failure.guard(|| scoped(&device, || device.create_buffer(&descriptor)))? {
            Ok(buffer) => {
                self.staging = Some(buffer.clone());
                Ok(buffer)
            }
            Err(_) => Err(KernelError::OutOfMemory {
                what: "results of a step".into(),
                needed_bytes: descriptor.size,
                available_bytes: 0,
                device: self.failure.device().to_string(),
            }),
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if self.failure.is_silent() {
            // A queue waits for its device when it goes, however long that takes. What belongs to a device that is silent stays until the
            // process ends.
            std::mem::forget(self.queue.clone());
        }
    }
}

/// Ranges of `blocks` whose part of `work` is no more than `most`, of one length or nearly so; single blocks where these are more.
pub(super) fn cut(blocks: u32, work: u64, most: u64) -> impl Iterator<Item = (Range<u32>, u64)> {
    let of = move |count: u32| (u128::from(work) * u128::from(count)).div_ceil(u128::from(blocks.max(1))) as u64;
    let fitting = (u128::from(blocks) * u128::from(most) / u128::from(work.max(1))).clamp(1, u128::from(blocks.max(1)));
    let parts = u64::from(blocks).div_ceil(fitting as u64);
    let bound = move |part: u64| (u64::from(blocks) * part / parts) as u32;
    (0..parts).map(move |part| bound(part)..bound(part + 1)).map(move |range| {
        let work = of(range.end - range.start);
        (range, work)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_dispatch_are_all_of_it_and_none_is_too_much() {
        for blocks in [1, 2, 3, 96, 512, 513, 65_535] {
            for work in [0, 1, 511, 512, 100_000, 411_000_000_000, u64::MAX] {
                for most in [1, 1000, WORK_MAX, u64::MAX] {
                    let parts: Vec<_> = cut(blocks, work, most).collect();
                    let (mut next, a_block) = (0, work.div_ceil(blocks.into()));
                    for (range, work) in &parts {
                        assert_eq!(range.start, next);
                        assert!(range.end > range.start && (*work <= most || range.len() == 1 && *work <= a_block));
                        next = range.end;
                    }
                    assert_eq!(next, blocks, "{work} of {most}");
                    if work <= most {
                        assert_eq!(parts.len(), 1);
                    }
                }
            }
        }
        assert_eq!(cut(0, 5, 1).count(), 0);
    }
}
