//! A model of one layer, small enough to be written anew for every case.

use std::{collections::BTreeMap, path::Path};

use ::safetensors::{Dtype, tensor::TensorView};
use tempfile::TempDir;

use super::{
    super::*,
    build::{ArraySpec, Pickle},
};

pub(crate) const LAYERS: u32 = 1;

pub(crate) fn config_json() -> serde_json::Value {
    serde_json::json!({
        "name": "tiny", "vocab_size": 16, "d_model": 8, "num_layers": LAYERS, "num_q_heads": 2, "num_kv_heads": 1,
        "key_size": 4, "widening_factor": 2, "ffn_size": 16, "num_experts": 2, "num_selected_experts": 2,
        "rope_base": 10000, "rms_norm_eps": 1e-5, "embedding_multiplier_scale": 78.4, "output_multiplier_scale": 0.577,
        "attn_output_multiplier": 0.25, "attn_logit_cap": 30.0, "sequence_len": 128, "pad_token": 0, "eos_token": 2,
        "scale_groups_row_parallel": 2
    })
}

pub(crate) fn config() -> ModelConfig {
    ModelConfig::from_json(&config_json().to_string(), "config.json").unwrap()
}

fn sizes(dimensions: &[u64]) -> Vec<i32> {
    dimensions.iter().map(|size| *size as i32).collect()
}

/// Weight and scales of a tensor, with numbers that differ from place to place.
pub(crate) fn arrays(name: &TensorName) -> (ArraySpec, Option<ArraySpec>) {
    let shape = name.shape(&config());
    let weight = sizes(&shape.dimensions());
    let count: usize = shape.dimensions().iter().product::<u64>() as usize;
    match shape.scale_dimensions() {
        None => (ArraySpec::f32(&weight, &(0..count).map(|i| i as f32 * 0.5).collect::<Vec<_>>()), None),
        Some(dimensions) => {
            let scales: Vec<f32> = (0..dimensions.iter().product::<u64>()).map(|i| (i + 1) as f32).collect();
            let values: Vec<i8> = (0..count).map(|i| i as i8).collect();
            (ArraySpec::i8(&weight, &values), Some(ArraySpec::bf16(&sizes(&dimensions), &scales)))
        }
    }
}

/// The pickle of these arrays.
pub(crate) fn pickle(weight: &ArraySpec, scales: Option<&ArraySpec>) -> Vec<u8> {
    match scales {
        None => Pickle::new().array(weight).done(),
        Some(scales) => Pickle::new().quantised(&[("weight", weight), ("scales", scales)]).done(),
    }
}

pub(crate) fn file_of(name: &TensorName) -> String {
    let index = TensorName::in_file_order(LAYERS).iter().position(|other| other == name).unwrap();
    format!("ckpt-0/tensor{index:05}_000")
}

/// The model as pickles, in a folder that goes with the value.
pub(crate) fn write() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config_json().to_string()).unwrap();
    std::fs::create_dir(folder.path().join("ckpt-0")).unwrap();
    for name in TensorName::in_file_order(LAYERS) {
        let (weight, scales) = arrays(&name);
        std::fs::write(folder.path().join(file_of(&name)), pickle(&weight, scales.as_ref())).unwrap();
    }
    folder
}

/// These tensors as one safetensors file, written by the format's own library.
pub(crate) fn safetensors(names: &[TensorName]) -> Vec<u8> {
    let config = config();
    let data: BTreeMap<String, (Vec<usize>, Vec<u8>)> = names
        .iter()
        .map(|name| {
            let shape: Vec<usize> = name.shape(&config).dimensions().iter().map(|size| *size as usize).collect();
            let bytes = (0..shape.iter().product::<usize>()).flat_map(|i| (i as f32).to_le_bytes()).collect();
            (name.to_string(), (shape, bytes))
        })
        .collect();
    let views = data.iter().map(|(name, (shape, bytes))| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("bytes fit the shape"))
    });
    ::safetensors::serialize(views, None).unwrap()
}

/// A folder with `config.json` and these files.
pub(crate) fn folder_with(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config_json().to_string()).unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

/// Opens the model and reads everything in it.
pub(crate) fn load(folder: &Path) -> Result<(), ModelError> {
    let model = Model::open(folder)?;
    model.inspect()?;
    for name in TensorName::in_file_order(model.config().num_hidden_layers) {
        if matches!(name.shape(model.config()), TensorShape::Matrix { .. }) {
            let matrix = model.matrix(&name)?;
            matrix.read(0, &mut vec![0; matrix.spec().weight_bytes() as usize])?;
            matrix.scales()?;
        }
    }
    Ok(())
}
