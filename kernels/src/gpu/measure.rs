//! How fast the device is. Memory: a reduction that does nothing but read. Arithmetic: what the matrix kernel makes of it. Medians count:
//! what disturbs some runs disturbs as many of a stage's.

use std::time::{Duration, Instant};

use grokpipe_model::{Format, Layout, MatrixSpec};

use super::{
    GpuBackend, matrix,
    matrix::Shape,
    memory::{GpuBuffer, words},
    pipelines::Kernel,
    shaders::ReadParams,
};
use crate::{Backend, KernelError, bench::median};

/// Time that a measurement may take after its first run.
const BUDGET: Duration = Duration::from_millis(120);
/// Bytes of a chunk of `read_words.wgsl`.
const CHUNK: u64 = 16;
/// Chunks that a workgroup of it reads.
const CHUNKS_A_WORKGROUP: u64 = 4096;

impl GpuBackend {
    pub(super) fn read_bandwidth(&mut self, most_bytes: u64) -> Result<f64, KernelError> {
        // More than the caches of GPUs hold, also where there is room for half of it alone; 4 GiB in one submission.
        let (bytes, in_all) = if self.software { (64 << 20, 64 << 20) } else { (512 << 20, 4u64 << 30) };
        let [sums, read] = self.sums_and_words(bytes.min(most_bytes).max(CHUNK * CHUNKS_A_WORKGROUP))?;
        let passes = in_all.div_ceil(read.bytes());
        let seconds = self.seconds(|backend| (0..passes).for_each(|_| backend.read_words(&read, &sums)));
        self.recorder.forget_bind_groups_of(Kernel::ReadWords);
        Ok((read.bytes() * passes) as f64 / seconds?)
    }

    /// So many bytes to read, or half as many where there is no room for them, behind room for a sum a workgroup.
    fn sums_and_words(&mut self, bytes: u64) -> Result<[GpuBuffer; 2], KernelError> {
        let bytes = bytes.min(self.memory.binding_bytes());
        let sums = self.memory.allocate("sums of words", words(&[workgroups(bytes) as usize]))?;
        let read = match self.memory.allocate("words to read", Some(bytes)) {
            Err(KernelError::OutOfMemory { .. }) => self.memory.allocate("words to read", Some(bytes / 2)),
            read => read,
        };
        Ok([sums, read?])
    }

    /// Reads a buffer once; leaves a sum a workgroup.
    fn read_words(&mut self, words: &GpuBuffer, sums: &GpuBuffer) {
        let params = ReadParams { chunks: (words.bytes() / CHUNK) as u32 };
        self.recorder.dispatch(Kernel::ReadWords, &params, &[words, sums], [workgroups(words.bytes()), 1, 1], 0);
    }

    pub(super) fn flop_rate(&mut self) -> Result<f64, KernelError> {
        let (rows, [inputs, outputs], repeats) =
            if self.software { (64, [1024, 512], 1) } else { (64, [6144, 6144], 4) };
        let name = "a matrix to measure with".to_owned();
        let format = Format::Int8 { groups: 1 };
        let spec = MatrixSpec { name, experts: 1, inputs, outputs, format, layout: Layout::InOut };
        let w = matrix::allocate(&mut self.memory, &mut self.recorder, &spec.name, Shape::new(&spec)?)?;
        let x = self.activations(rows, inputs)?;
        let mut out = self.activations(rows, outputs)?;
        let seconds = self.seconds(|backend| {
            backend.rows = rows;
            (0..repeats).for_each(|_| backend.matmul(&x, &w, 1.0, &mut out));
        });
        self.rows = 0;
        self.recorder.forget_bind_groups();
        Ok(2.0 * (repeats * rows * inputs * outputs) as f64 / seconds?)
    }

    /// Seconds of one submission, the median of several, by the device's own clock where it has one. More than nothing.
    fn seconds(&mut self, record: impl FnMut(&mut Self)) -> Result<f64, KernelError> {
        self.recorder.time_passes(true);
        let seconds = self.all_seconds(record);
        self.recorder.time_passes(false);
        // A clock that saw no time pass must not make a rate without end.
        Ok(median(seconds?).max(1e-9))
    }

    fn all_seconds(&mut self, mut record: impl FnMut(&mut Self)) -> Result<Vec<f64>, KernelError> {
        let mut all = Vec::new();
        let mut spent = Duration::ZERO;
        let mut run = 0;
        while run < 2 || spent < BUDGET {
            self.recorder.begin(false);
            let start = Instant::now();
            record(self);
            self.recorder.submit_and_wait()?;
            let elapsed = start.elapsed();
            // The first run compiles the kernel and clears the memory.
            if run > 0 {
                all.push(self.recorder.pass_seconds()?.unwrap_or(elapsed.as_secs_f64()));
                spent += elapsed;
            }
            run += 1;
        }
        Ok(all)
    }
}

/// Workgroups that read so many bytes.
fn workgroups(bytes: u64) -> u32 {
    bytes.div_ceil(CHUNK * CHUNKS_A_WORKGROUP) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        gpu::{memory::Memory, tests::open},
        ops::testing::{Random, seed},
    };

    #[test]
    fn every_word_is_read_once() {
        let Some(mut backend) = open(None) else { return };
        let seed = seed(1);
        let mut random = Random::new(seed);
        let workgroup = (CHUNK * CHUNKS_A_WORKGROUP) as usize / 4;
        for words in [4, workgroup - 4, workgroup, 2 * workgroup + 1028] {
            let numbers: Vec<u32> = (0..words).map(|_| random.bits() as u32).collect();
            let read = backend.memory.allocate("words", Some(4 * words as u64)).unwrap();
            let wants: Vec<u32> =
                numbers.chunks(workgroup).map(|part| part.iter().fold(0, |a: u32, b| a.wrapping_add(*b))).collect();
            assert_eq!(workgroups(read.bytes()) as usize, wants.len());
            let sums = backend.memory.allocate("sums", Some(4 * wants.len() as u64)).unwrap();
            backend.recorder.begin(false);
            backend.recorder.write(&read, 0, bytemuck::cast_slice(&numbers));
            backend.read_words(&read, &sums);
            let found = backend.recorder.read_back::<u32>(&[(&sums, wants.len())]).unwrap();
            assert_eq!(found, [wants], "{words} words, seed {seed}");
        }
    }

    #[test]
    fn less_is_read_where_there_is_no_room_for_more() {
        let Some(mut backend) = open(None) else { return };
        let most = 128 << 20;
        for (room, expected) in [(2 * most, most), (most, most / 2), (most / 2 + (1 << 20), most / 2)] {
            backend.memory = Memory::new(&backend.recorder.device, &backend.recorder.failure, room, None);
            let [_sums, read] = backend.sums_and_words(most).unwrap();
            assert_eq!(read.bytes(), expected, "{room} bytes");
        }
        backend.memory = Memory::new(&backend.recorder.device, &backend.recorder.failure, 1 << 20, None);
        let refused = backend.read_bandwidth(u64::MAX);
        assert!(matches!(refused, Err(KernelError::OutOfMemory { .. })), "{refused:?}");
    }

    #[test]
    fn measuring_gives_its_memory_back() {
        let Some(mut backend) = open(None) else { return };
        let before = backend.memory.allocated();
        backend.read_bandwidth(u64::MAX).unwrap();
        backend.flop_rate().unwrap();
        assert_eq!(backend.memory.allocated(), before);
    }
}
