//! What a stage says of the numbers that it loaded, and which it refuses to load.

use std::collections::BTreeMap;

use grokpipe_model::{
    LayerTensor, MatrixSource, MatrixSpec, ModelError, TensorName,
    contents::{Part, Record, Sum},
};

use super::*;
use crate::{CpuBackend, Precision, SyntheticWeights};

const DAMAGED: TensorName = TensorName::Layer(1, LayerTensor::MoeUp);

fn config() -> ModelConfig {
    ModelConfig {
        name: "tiny".into(),
        vocab_size: 512,
        hidden_size: 64,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 32,
        intermediate_size: 512,
        scale_groups_row_parallel: 1,
        ..ModelConfig::grok_1()
    }
}

/// Weights as a model's files have them, some bytes of one matrix overwritten.
struct Stored {
    weights: SyntheticWeights,
    record: Record,
    damage: Option<(Range<usize>, u8)>,
}

struct Damaged(Box<dyn MatrixSource>, Range<usize>, u8);

impl MatrixSource for Damaged {
    fn spec(&self) -> &MatrixSpec {
        self.0.spec()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ModelError> {
        self.0.read(offset, out)?;
        let within = |at: &usize| self.1.contains(&(at + offset as usize));
        (0..out.len()).filter(within).for_each(|at| out[at] = self.2);
        Ok(())
    }

    fn scales(&self) -> Result<Vec<f32>, ModelError> {
        self.0.scales()
    }
}

impl WeightSource for Stored {
    fn matrix(&self, name: &TensorName) -> Result<Box<dyn MatrixSource>, ModelError> {
        let matrix = self.weights.matrix(name)?;
        Ok(match &self.damage {
            Some((bytes, value)) if *name == DAMAGED => Box::new(Damaged(matrix, bytes.clone(), *value)),
            _ => matrix,
        })
    }

    fn vector(&self, name: &TensorName) -> Result<Vec<f32>, ModelError> {
        self.weights.vector(name)
    }

    fn embedding_rows(&self, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
        self.weights.embedding_rows(ids)
    }

    fn stored_bytes(&self, layers: Range<u32>, with_head: bool) -> u64 {
        self.weights.stored_bytes(layers, with_head)
    }

    fn record(&self) -> Option<&Record> {
        Some(&self.record)
    }
}

/// What a stage of these layers says that it holds, by part.
fn contents(
    layers: Range<u32>,
    precision: Precision,
    known: &BTreeMap<Part, Sum>,
    damage: Option<(Range<usize>, u8)>,
) -> Result<BTreeMap<Part, (Sum, bool)>, String> {
    let record = Record::new(false, known.clone(), "m/grokpipe.sha256".into());
    let weights = Arc::new(Stored { weights: SyntheticWeights::new(config(), 1), record, damage });
    let backend = CpuBackend::new(1, precision).unwrap();
    let options = StageOptions { kv_blocks: 1, max_rows: 4, logit_rows: 1, head: true };
    let stage = StageModel::load(backend, &config(), weights, layers, options, &mut |_, _| {});
    let stage = stage.map_err(|error| error.to_string())?;
    Ok(stage.contents().iter().map(|sum| (sum.part, (sum.sum, sum.confirmed))).collect())
}

#[test]
fn a_layer_has_the_same_sum_in_every_stage_and_the_embedding_the_heads() {
    let known = BTreeMap::new();
    let whole = contents(0..3, Precision::Exact, &known, None).unwrap();
    let parts = [Part::Layer(0), Part::Layer(1), Part::Layer(2), Part::Embedding, Part::FinalNorm];
    assert_eq!(whole.keys().copied().collect::<Vec<_>>(), parts);
    for layers in [0..1, 1..3, 0..2, 2..3] {
        for precision in [Precision::Exact, Precision::Fast] {
            let part = contents(layers.clone(), precision, &known, None).unwrap();
            assert!(part.iter().all(|(name, sum)| whole[name] == *sum), "{layers:?}");
            assert_eq!(part.contains_key(&Part::Embedding), layers.start == 0 || layers.end == 3);
        }
    }
    // One bit of one layer.
    let other = contents(0..3, Precision::Exact, &known, Some((70..71, 0x55))).unwrap();
    let differing: Vec<_> = parts.into_iter().filter(|part| other[part] != whole[part]).collect();
    assert_eq!(differing, [Part::Layer(1)]);
}

#[test]
fn holes_are_refused_unless_a_manifest_says_that_they_are_the_models_own() {
    let none = BTreeMap::new();
    let hole = || Some((10_000..16_000, 0));
    let refused = contents(1..2, Precision::Exact, &none, hole()).unwrap_err();
    for said in ["moe/linear_v/w: byte 10000", "6000 zeros", "fetch the file again"] {
        assert!(refused.contains(said), "{refused}");
    }
    assert!(contents(0..1, Precision::Exact, &none, hole()).is_ok(), "another layer");
    // Ten rows of 512 bytes.
    let rows = contents(1..2, Precision::Exact, &none, Some((1024..6144, 0))).unwrap();
    let known: BTreeMap<_, _> = rows.iter().map(|(part, (sum, _))| (*part, *sum)).collect();
    let again = contents(1..2, Precision::Exact, &known, Some((1024..6144, 0))).unwrap();
    assert!(again.values().all(|(_, confirmed)| *confirmed));
    let differs = contents(1..2, Precision::Exact, &known, None).unwrap_err();
    assert!(differs.contains("m/grokpipe.sha256: expected layer 1 with the sum"), "{differs}");
}

#[test]
fn weights_from_a_seed_are_not_summed() {
    let weights = Arc::new(SyntheticWeights::new(config(), 1));
    let backend = CpuBackend::new(1, Precision::Exact).unwrap();
    let options = StageOptions { kv_blocks: 1, max_rows: 4, logit_rows: 1, head: true };
    let stage = StageModel::load(backend, &config(), weights, 0..3, options, &mut |_, _| {}).unwrap();
    assert!(stage.contents().is_empty());
}
