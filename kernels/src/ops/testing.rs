//! What the tests of all operations share: seeded inputs, matrices in memory, and a comparison that says where it failed.
//!
//! `SEED=17 cargo test` replays a run; without it every test has a fixed seed of its own, printed when it fails.

use std::{fmt::Debug, ops::Range};

use grokpipe_model::{BlockType, Format, Layout, MatrixSource, MatrixSpec, ModelError};

pub(crate) use crate::batch::single_tokens;
use crate::{Backend, Batch, KV_BLOCK_TOKENS, Row, synthetic::SyntheticMatrix};

/// The seed of a test: `SEED` from the environment, else `default`.
pub(crate) fn seed(default: u64) -> u64 {
    std::env::var("SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// SplitMix64: small, and the same everywhere.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub(crate) fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Less than `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// `n` numbers uniform in [-scale, scale).
    pub(crate) fn floats(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.unit() * scale).collect()
    }
}

/// A matrix in memory, as a source for a backend and as operand of the references.
#[derive(Clone)]
pub(crate) struct TestMatrix {
    pub(crate) spec: MatrixSpec,
    pub(crate) bytes: Vec<u8>,
    pub(crate) scales: Vec<f32>,
}

impl TestMatrix {
    /// Random numbers of about unit variance over the inputs, so that products stay near 1.
    pub(crate) fn random(
        random: &mut Random,
        (experts, inputs, outputs): (usize, usize, usize),
        format: Format,
        layout: Layout,
    ) -> Self {
        let spec = MatrixSpec { name: "test".into(), experts, inputs, outputs, format, layout };
        let count = experts * inputs * outputs;
        let size = 1.0 / (inputs as f32).sqrt();
        let (bytes, scales) = match format {
            Format::F32 => ((0..count).flat_map(|_| (random.unit() * size).to_le_bytes()).collect(), Vec::new()),
            Format::Int8 { .. } => {
                let bytes = (0..count).map(|_| (random.below(255) as i32 - 127) as i8 as u8).collect();
                let scales =
                    (0..spec.scale_count()).map(|_| size / 127.0 * (1.0 + 0.5 * random.unit())).collect::<Vec<_>>();
                (bytes, scales)
            }
            Format::Blocks(_) => {
                let (source, mut bytes) =
                    (SyntheticMatrix::new(random.bits(), spec.clone()), vec![0; spec.weight_bytes() as usize]);
                source.read(0, &mut bytes).unwrap();
                (bytes, Vec::new())
            }
        };
        Self { spec, bytes, scales }
    }

    /// `w[expert][k, n]`, dequantised.
    pub(crate) fn at(&self, expert: usize, k: usize, n: usize) -> f64 {
        let MatrixSpec { inputs, outputs, .. } = self.spec;
        let index = match self.spec.layout {
            Layout::InOut => (expert * inputs + k) * outputs + n,
            Layout::OutIn => (expert * outputs + n) * inputs + k,
        };
        match self.spec.format {
            Format::F32 => {
                let bytes = &self.bytes[index * 4..index * 4 + 4];
                f64::from(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            Format::Int8 { groups } => {
                let group = k / (inputs / groups);
                let scale = self.scales[(expert * groups + group) * outputs + n];
                f64::from(self.bytes[index] as i8) * f64::from(scale)
            }
            Format::Blocks(kind) => {
                let mut numbers = vec![0.0; kind.weights()];
                let block = &self.bytes[index / kind.weights() * kind.bytes()..][..kind.bytes()];
                kind.dequantize(block, &mut numbers);
                f64::from(numbers[index % kind.weights()])
            }
        }
    }
}

impl MatrixSource for TestMatrix {
    fn spec(&self) -> &MatrixSpec {
        &self.spec
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ModelError> {
        let start = offset as usize;
        out.copy_from_slice(&self.bytes[start..start + out.len()]);
        Ok(())
    }

    fn scales(&self) -> Result<Vec<f32>, ModelError> {
        Ok(self.scales.clone())
    }
}

/// How far a result may be from its reference: `|got - want| <= absolute + relative * max |want|`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    pub(crate) absolute: f32,
    pub(crate) relative: f32,
}

/// Panics with operation, shape, device, seed, the worst index and both values when `got` is out of bound or not finite.
pub(crate) fn compare(op: &str, shape: &dyn Debug, device: &str, seed: u64, got: &[f32], want: &[f32], bound: Bound) {
    assert_eq!(got.len(), want.len(), "{op} {shape:?} on {device}, seed {seed}: length");
    let largest = want.iter().fold(0.0f32, |m, w| m.max(w.abs()));
    let allowed = bound.absolute + bound.relative * largest;
    let distance = |i: usize| {
        let d = (got[i] - want[i]).abs();
        if d.is_nan() { f32::INFINITY } else { d }
    };
    let Some(worst) = (0..got.len()).max_by(|&a, &b| distance(a).total_cmp(&distance(b))) else { return };
    assert!(
        distance(worst) <= allowed,
        "{op} {shape:?} on {device}, seed {seed}: at {worst} got {}, want {}, difference {} > {allowed}",
        got[worst],
        want[worst],
        distance(worst),
    );
}

/// Panics with operation, shape, device, seed, first index and both values when two results differ in any bit.
pub(crate) fn compare_bits(op: &str, shape: &dyn Debug, device: &str, seed: u64, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{op} {shape:?} on {device}, seed {seed}: length");
    if let Some(i) = (0..got.len()).find(|&i| got[i].to_bits() != want[i].to_bits()) {
        panic!("{op} {shape:?} on {device}, seed {seed}: at {i} got {:?}, want {:?}", got[i], want[i]);
    }
}

/// A batch of one sequence: positions `first..first + count`, blocks in descending order from the end of a pool of `blocks`.
pub(crate) fn one_sequence(first: usize, count: usize, blocks: u32, attended: impl Fn(usize) -> bool) -> Batch {
    let needed = (first + count).div_ceil(KV_BLOCK_TOKENS) as u32;
    assert!(needed <= blocks, "the pool has {blocks} blocks, {needed} are needed");
    Batch {
        rows: (first..first + count)
            .map(|position| Row { position: position as u32, table_offset: 0, attended: attended(position) })
            .collect(),
        block_tables: (0..needed).map(|i| blocks - 1 - i).collect(),
    }
}

/// Uploads `[rows, width]` in a step of its own and begins a step of `batch` rows for the operation under test.
pub(crate) fn upload<B: Backend>(backend: &mut B, batch: &Batch, width: usize, values: &[f32]) -> B::Activations {
    let rows = values.len() / width;
    let mut kv = backend.kv_pool(1, rows.max(batch.rows.len()) * KV_BLOCK_TOKENS, 16).unwrap();
    let mut x = backend.activations(rows, width).unwrap();
    backend.begin(&single_tokens(rows), &mut kv).unwrap();
    backend.write(values, &mut x).unwrap();
    backend.finish(&[]).unwrap();
    backend.begin(batch, &mut kv).unwrap();
    x
}

/// The one buffer that a test reads.
pub(crate) fn download<B: Backend>(backend: &mut B, x: &B::Activations, rows: usize) -> Vec<f32> {
    backend.finish(&[(x, rows)]).unwrap().pop().unwrap()
}

/// What the operations with weights give for each row, when the rows come in these chunks: hidden of the experts, their sum, and
/// a product.
fn in_chunks<B: Backend>(
    backend: &mut B,
    weights: &[B::Matrix; 5],
    [hidden, reduced, outputs]: [usize; 3],
    x: &[f32],
    chunks: &[Range<usize>],
) -> [Vec<f32>; 3] {
    let [router, gate, up, down, head] = weights;
    let mut all = [const { Vec::new() }; 3];
    for chunk in chunks {
        let rows = chunk.len();
        let input = upload(backend, &single_tokens(rows), hidden, &x[chunk.start * hidden..chunk.end * hidden]);
        let mut selection = backend.selection(rows, 2).unwrap();
        let mut inner = backend.activations(rows * 2, hidden).unwrap();
        let mut out = backend.activations(rows, reduced).unwrap();
        let mut product = backend.activations(rows, outputs).unwrap();
        backend.route(&input, router, &mut selection);
        backend.expert_gate_up(&input, &selection, gate, up, &mut inner);
        backend.expert_down(&inner, &selection, down, &mut out);
        backend.matmul(&input, head, 0.5, &mut product);
        let found = backend.finish(&[(&inner, rows * 2), (&out, rows), (&product, rows)]).unwrap();
        all.iter_mut().zip(found).for_each(|(all, found)| all.extend(found));
    }
    all
}

/// Rows together at which blocks of a kernel begin or end, and those beside them.
const COUNTS: [usize; 20] = [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65];

/// In every format: rows of a batch of up to 65, so many at a time or in any chunks, have the bits that each has alone.
pub(crate) fn check_rows_in_chunks<B: Backend>(backend: &mut B) {
    let seed = seed(31);
    let device = backend.info().name.clone();
    let mut random = Random::new(seed);
    let int8 = [(1, 96), (8, 96), (3, 51)].map(|(groups, inputs)| (Format::Int8 { groups }, inputs));
    let floats = [(Format::F32, 33), (Format::F32, 64), (Format::Blocks(BlockType::F16), 37)];
    let blocks = BlockType::all().map(|kind| (Format::Blocks(kind), if kind.weights() > 32 { 256 } else { 96 }));
    for (format, width) in int8.into_iter().chain(floats).chain(blocks) {
        let layout = if matches!(format, Format::Blocks(_)) { Layout::OutIn } else { Layout::InOut };
        let router = TestMatrix::random(&mut random, (1, width, 4), Format::F32, Layout::InOut);
        let shapes = [(4, width, width), (4, width, width), (4, width, 5), (1, width, 70)];
        let [gate, up, down, head] = shapes.map(|shape| TestMatrix::random(&mut random, shape, format, layout));
        let matrices = [router, gate, up, down, head];
        let weights = matrices.map(|matrix| backend.load_matrix(&matrix, &mut |_| ()).unwrap());
        let rows = 65;
        let x = random.floats(rows * width, 1.7);
        let singles: Vec<_> = (0..rows).map(|row| row..row + 1).collect();
        let alone = in_chunks(backend, &weights, [width, 5, 70], &x, &singles);
        let cuts = COUNTS.map(|count| {
            let first = random.below(rows + 1 - count);
            std::iter::once(first..first + count).collect::<Vec<_>>()
        });
        let any = || {
            let first = 1 + random.below(rows);
            let next = |last: &Range<usize>| {
                let rest = rows - last.end;
                (rest > 0).then(|| last.end..last.end + 1 + random.below(rest))
            };
            std::iter::successors(Some(0..first), next).collect()
        };
        for chunks in cuts.into_iter().chain(std::iter::repeat_with(any).take(3)) {
            let among = in_chunks(backend, &weights, [width, 5, 70], &x, &chunks);
            let these = chunks[0].start..chunks[chunks.len() - 1].end;
            for (what, (among, alone)) in ["gate and up", "down", "product"].into_iter().zip(among.iter().zip(&alone)) {
                let a_row = alone.len() / rows;
                let alone = &alone[these.start * a_row..these.end * a_row];
                compare_bits(what, &(format, width, &chunks), &device, seed, among, alone);
            }
        }
    }
}
