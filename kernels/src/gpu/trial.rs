//! A trial of prefill `fast` when a device is opened: whether its kernels give what they should.
//!
//! An adapter says that it has cooperative matrices, but not that its driver compiles these kernels or loads matrices as they expect,
//! and a wrong product would show nowhere. So all of them multiply whole numbers, which both halves and sums in f32 hold exactly. A
//! device that refuses one or gives anything else keeps the usual kernels, with a warning that says why.

use grokpipe_model::{Format, Layout, MatrixSource, MatrixSpec, ModelError};

use super::{
    GpuBackend, GpuMatrix,
    cooperative::{Cooperative, PLACES},
    upload,
};
use crate::{Backend, KV_BLOCK_TOKENS, KernelError, batch::single_tokens};

/// More than a workgroup has places for, as each expert that is chosen has pairs.
const ROWS: usize = PLACES + 1;
/// More columns than a block has.
const OUTPUTS: usize = 70;
const EXPERTS: usize = 3;
/// Every row's, whose probabilities are both 1.
const CHOSEN: [u32; 2] = [2, 0];
const PAIRS: usize = ROWS * CHOSEN.len();
/// What a gelu may add to a gate, or leave of one, for each 1 of it. Of the gates here, which are 0 or at least 8 in magnitude, it leaves
/// nothing or all; a device's tanh may be a little off.
const GELU: f32 = 1e-5;

impl GpuBackend {
    /// Takes cooperative matrices into use, if they do on this device what the kernels need.
    ///
    /// # Errors
    /// Those of allocations; [`KernelError::DeviceLost`].
    pub(super) fn try_cooperative(&mut self, cooperative: Cooperative) -> Result<(), KernelError> {
        self.use_cooperative(Some(cooperative));
        // In groups of whole chunks, and in others.
        for inputs in [96, 100] {
            let numbers = Numbers::new(inputs);
            let mut load = |matrix| {
                let mut matrix = upload::load(&mut self.memory, &mut self.recorder, matrix, &mut |_| ())?;
                self.prepare_cooperative(&mut matrix).map(|()| matrix)
            };
            let [matrix, gate, up, up_in_groups, down] = &numbers.matrices;
            let loaded = [load(matrix)?, load(gate)?, load(up)?, load(up_in_groups)?, load(down)?];
            if self.cooperative.is_none() {
                return Ok(());
            }
            if let Some(what) = numbers.wrong(&self.multiply(&numbers.rows, &loaded)?) {
                self.give_up_cooperative(&format!("{what} are not what they should be"));
                return Ok(());
            }
        }
        Ok(())
    }

    /// What [`Numbers::wrong`] looks at.
    fn multiply(
        &mut self,
        x: &[f32],
        [matrix, gate, up, up_in_groups, down]: &[GpuMatrix; 5],
    ) -> Result<Vec<Vec<f32>>, KernelError> {
        let mut kv = self.kv_pool(1, ROWS * KV_BLOCK_TOKENS, 1)?;
        let rows = self.activations(PAIRS, x.len() / PAIRS)?;
        let selection = self.selection(ROWS, CHOSEN.len())?;
        let [mut products, mut sums] = [self.activations(ROWS, OUTPUTS)?, self.activations(ROWS, OUTPUTS)?];
        let [mut alike, mut mixed] = [self.activations(PAIRS, OUTPUTS)?, self.activations(PAIRS, OUTPUTS)?];
        self.begin(&single_tokens(ROWS), &mut kv)?;
        self.recorder.write(&rows.buffer, 0, bytemuck::cast_slice(x));
        self.recorder.write(&selection.ids, 0, bytemuck::cast_slice(&[CHOSEN; ROWS]));
        self.recorder.write(&selection.probabilities, 0, bytemuck::cast_slice(&[1.0f32; PAIRS]));
        self.group_pairs([&selection.ids, &selection.tiles], PAIRS, EXPERTS, PLACES);
        self.matmul(&rows, matrix, 1.0, &mut products);
        self.expert_gate_up(&rows, &selection, gate, up, &mut alike);
        self.expert_gate_up(&rows, &selection, gate, up_in_groups, &mut mixed);
        self.expert_down(&rows, &selection, down, &mut sums);
        self.finish(&[(&products, ROWS), (&alike, PAIRS), (&mixed, PAIRS), (&sums, ROWS)])
    }
}

/// The numbers of a trial.
struct Numbers {
    /// A row for each pair. The first ones are those of all operations whose pairs share rows.
    rows: Vec<f32>,
    /// One matrix; gate, up, an up that is held otherwise, and down of each expert.
    matrices: [WholeNumbers; 5],
}

impl Numbers {
    fn new(inputs: usize) -> Self {
        let matrix = |experts, groups, scale| WholeNumbers::new([experts, inputs, OUTPUTS], groups, scale);
        Self {
            rows: (0..PAIRS * inputs).map(|i| (i * i % 17) as f32 - 8.0).collect(),
            matrices: [
                matrix(1, 1, 1.0),
                matrix(EXPERTS, 1, 8.0),
                matrix(EXPERTS, 1, 2.0),
                matrix(EXPERTS, 2, 4.0),
                matrix(EXPERTS, 1, 1.0),
            ],
        }
    }

    /// Which of the results are not what they should be.
    fn wrong(&self, found: &[Vec<f32>]) -> Option<&'static str> {
        let [matrix, gate, up, up_in_groups, down] = &self.matrices;
        let expert = |pair| CHOSEN[pair % CHOSEN.len()] as usize;
        let product = |row, n| matrix.product(self.row(row), 0, n);
        let gated = |up: &WholeNumbers, pair, n| {
            let row = self.row(pair / CHOSEN.len());
            let [gate, up] = [gate, up].map(|matrix| matrix.product(row, expert(pair), n));
            [gate.max(0.0) * up, GELU * (gate * up).abs()]
        };
        let sum = |row, n| {
            let pairs = CHOSEN.len() * row..CHOSEN.len() * (row + 1);
            pairs.map(|pair| down.product(self.row(pair), expert(pair), n)).sum()
        };
        let exact = |result: f32| [result, 0.0];
        let wants = [
            ("products", results(ROWS, |row, n| exact(product(row, n)))),
            ("gates and ups", results(PAIRS, |pair, n| gated(up, pair, n))),
            ("gates and ups that are held differently", results(PAIRS, |pair, n| gated(up_in_groups, pair, n))),
            ("sums of experts", results(ROWS, |row, n| exact(sum(row, n)))),
        ];
        let is_right = |found: &[f32], want: &[[f32; 2]]| {
            found.iter().zip(want).all(|(found, [result, allowed])| (found - result).abs() <= *allowed)
        };
        let mut wants = wants.into_iter().zip(found);
        wants.find(|((_, want), found)| !is_right(found, want)).map(|((what, _), _)| what)
    }

    fn row(&self, index: usize) -> &[f32] {
        let inputs = self.rows.len() / PAIRS;
        &self.rows[index * inputs..][..inputs]
    }
}

/// The result of each row and column, and by how much it may be missed.
fn results(rows: usize, result: impl Fn(usize, usize) -> [f32; 2]) -> Vec<[f32; 2]> {
    (0..rows * OUTPUTS).map(|at| result(at / OUTPUTS, at % OUTPUTS)).collect()
}

/// A matrix of whole numbers, or a stack of them.
pub(super) struct WholeNumbers {
    spec: MatrixSpec,
    /// What 1 stands for, a power of two.
    scale: f32,
}

impl WholeNumbers {
    pub(super) fn new([experts, inputs, outputs]: [usize; 3], groups: usize, scale: f32) -> Self {
        let (name, format) = ("a trial of cooperative matrices".to_owned(), Format::Int8 { groups });
        Self { spec: MatrixSpec { name, experts, inputs, outputs, format, layout: Layout::InOut }, scale }
    }

    /// The number at this place; matrices of different scales have different numbers.
    fn at(&self, place: u64) -> i8 {
        let place = place + self.scale as u64;
        ((place * place % 251) as i16 - 125) as i8
    }

    /// Of a row with a column.
    fn product(&self, row: &[f32], expert: usize, n: usize) -> f32 {
        let MatrixSpec { inputs, outputs, .. } = self.spec;
        let column = (expert * inputs..).map(|k| self.at((k * outputs + n) as u64));
        self.scale * row.iter().zip(column).map(|(x, w)| x * f32::from(w)).sum::<f32>()
    }
}

impl MatrixSource for WholeNumbers {
    fn spec(&self) -> &MatrixSpec {
        &self.spec
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ModelError> {
        for (byte, place) in out.iter_mut().zip(offset..) {
            *byte = self.at(place) as u8;
        }
        Ok(())
    }

    fn scales(&self) -> Result<Vec<f32>, ModelError> {
        Ok(vec![self.scale; self.spec.scale_count()])
    }
}
