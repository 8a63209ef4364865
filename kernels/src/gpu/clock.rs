//! The device's own clock: how long the compute pass of a submission ran, without what submitting and waiting for it cost.

use super::failure::Failure;
use crate::KernelError;

/// Bytes of the two times of a pass.
const BYTES: u64 = 16;

/// Times of the last submission that was given [`Clock::writes`].
pub(super) struct Clock {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    staging: wgpu::Buffer,
    /// Seconds of a tick.
    tick: f64,
}

impl Clock {
    /// `None` where the device has no such clock.
    pub(super) fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Option<Self> {
        if !device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            return None;
        }
        let buffer = |usage| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("times"),
                size: BYTES,
                usage: usage | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        };
        Some(Self {
            queries: device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("times"),
                ty: wgpu::QueryType::Timestamp,
                count: 2,
            }),
            resolved: buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC),
            staging: buffer(wgpu::BufferUsages::MAP_READ),
            tick: f64::from(queue.get_timestamp_period()) * 1e-9,
        })
    }

    /// What a pass is given so that it is timed.
    pub(super) fn writes(&self) -> wgpu::ComputePassTimestampWrites<'_> {
        wgpu::ComputePassTimestampWrites {
            query_set: &self.queries,
            beginning_of_pass_write_index: Some(0),
            end_of_pass_write_index: Some(1),
        }
    }

    /// Has the times of a pass copied once it is done.
    pub(super) fn resolve(&self, encoder: &mut wgpu::CommandEncoder) {
        encoder.resolve_query_set(&self.queries, 0..2, &self.resolved, 0);
        encoder.copy_buffer_to_buffer(&self.resolved, 0, &self.staging, 0, BYTES);
    }

    /// Seconds of the last pass that was timed.
    ///
    /// # Errors
    /// [`KernelError::DeviceLost`].
    pub(super) fn seconds(&self, device: &wgpu::Device, failure: &Failure) -> Result<f64, KernelError> {
        let wait = || failure.wait(device, None, 0, "the copy of its times");
        let ticks = failure.read(&self.staging, BYTES, "times", wait, |bytes| {
            let times = bytemuck::pod_collect_to_vec::<u8, u64>(bytes);
            times[1].saturating_sub(times[0])
        })?;
        Ok(ticks as f64 * self.tick)
    }
}
