//! The models that the reference wrote, read back: shapes, numbers, order, digest.

use super::{tiny, *};
use crate::LayerTensor;

/// The matrix as f32, in stored order, from its bytes and scales.
fn dequantised(model: &Model, name: &TensorName) -> Vec<f32> {
    let matrix = model.matrix(name).unwrap();
    let spec = matrix.spec().clone();
    let mut bytes = vec![0; spec.weight_bytes() as usize];
    matrix.read(0, &mut bytes).unwrap();
    let scales = matrix.scales().unwrap();
    assert_eq!(scales.len(), spec.scale_count());
    match spec.format {
        Format::F32 => bytes.chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect(),
        Format::Int8 { groups } => {
            let (rows, columns) = (spec.inputs, spec.outputs);
            let scale = |at: usize| {
                let (expert, row, column) = (at / (rows * columns), at / columns % rows, at % columns);
                scales[(expert * groups + row / (rows / groups)) * columns + column]
            };
            bytes.iter().enumerate().map(|(at, byte)| f32::from(*byte as i8) * scale(at)).collect()
        }
        Format::Blocks(kind) => {
            let mut values = vec![0.0; bytes.len() / kind.bytes() * kind.weights()];
            kind.dequantize(&bytes, &mut values);
            values
        }
    }
}

fn models() -> Vec<PathBuf> {
    ["a4", "b64", "c8way"].into_iter().filter_map(golden).chain([demo()]).collect()
}

#[test]
fn every_tensor_of_every_model_opens_with_the_shape_that_the_configuration_gives() {
    for folder in models() {
        let model = Model::open(&folder).unwrap();
        let config = model.config();
        let tensors = model.inspect().unwrap();
        assert_eq!(tensors.len(), 2 + 12 * config.num_hidden_layers as usize, "{}", folder.display());
        for (index, tensor) in tensors.iter().enumerate() {
            assert_eq!(tensor.file, format!("ckpt-0/tensor{index:05}_000"));
            assert_eq!(tensor.bytes, std::fs::metadata(folder.join(&tensor.file)).unwrap().len());
            let shape = tensor.name.shape(config);
            assert_eq!(tensor.shape, shape.dimensions(), "{}", tensor.name);
            let groups = match shape {
                TensorShape::Matrix { groups, .. } => groups,
                TensorShape::Vector(_) => None,
            };
            assert_eq!(tensor.format, groups.map_or(Format::F32, |groups| Format::Int8 { groups }));
        }
    }
}

#[test]
fn shapes_are_those_that_the_reference_wrote_down() {
    for folder in ["a4", "b64", "c8way"].into_iter().filter_map(golden) {
        let index = std::fs::read_to_string(folder.join("index.json")).unwrap();
        let index: Vec<serde_json::Value> = serde_json::from_str(&index).unwrap();
        let config = config_file::open(&folder.join("config.json")).unwrap();
        let names = TensorName::in_file_order(config.num_hidden_layers);
        assert_eq!(names.len(), index.len());
        for (name, entry) in names.iter().zip(&index) {
            assert_eq!(name.to_string(), entry["path"]);
            assert_eq!(serde_json::json!(name.shape(&config).dimensions()), entry["shape"], "{name}");
            assert_eq!(serde_json::json!(name.shape(&config).scale_dimensions()), entry["scales_shape"], "{name}");
        }
    }
}

#[test]
fn pickles_dequantise_to_the_references_numbers() {
    // Layers 2 and 10 change places when layers are counted instead of sorted as text.
    let cases: &[(&str, &[u32])] = &[("a4", &[0, 3]), ("b64", &[1, 2, 10, 63]), ("c8way", &[0, 1, 2])];
    for (golden_name, layers) in cases {
        let Some(folder) = golden(golden_name) else { continue };
        let model = Model::open(&folder).unwrap();
        let file = std::fs::read(folder.join("weights.safetensors")).unwrap();
        let reference = ::safetensors::SafeTensors::deserialize(&file).unwrap();
        let expected = |name: &TensorName| -> Vec<f32> {
            let data = reference.tensor(&name.to_string()).unwrap().data().to_vec();
            data.chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
        };
        assert!(dequantised(&model, &TensorName::Embedding) == expected(&TensorName::Embedding));
        assert!(model.vector(&TensorName::FinalNorm).unwrap() == expected(&TensorName::FinalNorm));
        for name in layers.iter().flat_map(|layer| LayerTensor::ALL.map(|tensor| TensorName::Layer(*layer, tensor))) {
            let found = match name.shape(model.config()) {
                TensorShape::Vector(_) => model.vector(&name).unwrap(),
                TensorShape::Matrix { .. } => dequantised(&model, &name),
            };
            assert!(found == expected(&name), "{golden_name}: {name}");
        }
    }
}

#[test]
fn row_parallel_matrices_of_the_sharded_golden_have_eight_groups() {
    let Some(folder) = golden("c8way") else { return };
    let model = Model::open(&folder).unwrap();
    for (tensor, groups) in [(LayerTensor::MoeDown, 8), (LayerTensor::AttentionOutput, 8), (LayerTensor::Query, 1)] {
        let matrix = model.matrix(&TensorName::Layer(1, tensor)).unwrap();
        assert_eq!(matrix.spec().format, Format::Int8 { groups }, "{}", matrix.spec().name);
    }
}

#[test]
fn a_safetensors_file_holds_the_same_model() {
    for name in ["a4", "c8way"] {
        let Some(folder) = golden(name) else { continue };
        let pickled = Model::open(&folder).unwrap();
        let model = Model::open(&folder.join("weights.safetensors")).unwrap();
        assert_eq!(model.config(), pickled.config());
        let tensors = model.inspect().unwrap();
        assert!(tensors.iter().all(|tensor| tensor.format == Format::F32 && tensor.file == "weights.safetensors"));
        for tensor in [LayerTensor::MoeDown, LayerTensor::Key, LayerTensor::Router] {
            let name = TensorName::Layer(2, tensor);
            assert!(dequantised(&model, &name) == dequantised(&pickled, &name), "{name}");
        }
        assert_eq!(model.embedding_rows(&[5, 0]).unwrap(), pickled.embedding_rows(&[5, 0]).unwrap());
    }
}

#[test]
fn a_folder_with_safetensors_alone_is_a_model() {
    let file = tiny::safetensors(&TensorName::in_file_order(tiny::LAYERS));
    for name in ["model.safetensors", "weights.safetensors"] {
        let folder = tiny::folder_with(&[(name, &file)]);
        tiny::load(folder.path()).unwrap();
        tiny::load(&folder.path().join(name)).unwrap();
    }
}

#[test]
fn a_model_in_several_safetensors_files_is_found_by_its_index() {
    let names = TensorName::in_file_order(tiny::LAYERS);
    let (first, second) = names.split_at(5);
    let map = |file: &str, names: &[TensorName]| -> Vec<_> {
        names.iter().map(|name| (name.to_string(), serde_json::Value::from(file))).collect()
    };
    let map: serde_json::Map<_, _> =
        map("a.safetensors", first).into_iter().chain(map("b.safetensors", second)).collect();
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
    let folder = tiny::folder_with(&[
        ("a.safetensors", &tiny::safetensors(first)),
        ("b.safetensors", &tiny::safetensors(second)),
        ("model.safetensors.index.json", index.as_bytes()),
    ]);
    tiny::load(folder.path()).unwrap();
    let whole = tiny::folder_with(&[("model.safetensors", &tiny::safetensors(&names))]);
    let (split, whole) = (Model::open(folder.path()).unwrap(), Model::open(whole.path()).unwrap());
    for name in [TensorName::Embedding, TensorName::Layer(0, LayerTensor::MoeUp)] {
        assert_eq!(dequantised(&split, &name), dequantised(&whole, &name));
    }
    assert_eq!(split.digest(), whole.digest());
}

#[test]
fn the_tiny_model_reads_back_as_written() {
    let folder = tiny::write();
    tiny::load(folder.path()).unwrap();
    let model = Model::open(folder.path()).unwrap();
    let found = dequantised(&model, &TensorName::Layer(0, LayerTensor::AttentionOutput));
    // Row 5 is in the second of two groups of 4; scales count up from 1 over [2, 8].
    assert_eq!(found[5 * 8 + 3], 43.0 * 12.0);
    assert_eq!(found[3 * 8 + 3], 27.0 * 4.0);
}

#[test]
fn arrays_of_newer_numpy_are_read() {
    let folder = tiny::write();
    for name in TensorName::in_file_order(tiny::LAYERS) {
        let path = folder.path().join(tiny::file_of(&name));
        let bytes = std::fs::read(&path).unwrap();
        // The longer name is a byte longer, its length byte included.
        let newer = replaced(&bytes, b"\x8c\x15numpy.core.multiarray", b"\x8c\x16numpy._core.multiarray");
        assert_ne!(newer, bytes);
        std::fs::write(path, newer).unwrap();
    }
    tiny::load(folder.path()).unwrap();
}

fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = bytes;
    while let Some(first) = rest.first() {
        if let Some(after) = rest.strip_prefix(from) {
            out.extend_from_slice(to);
            rest = after;
        } else {
            out.push(*first);
            rest = &rest[1..];
        }
    }
    out
}

#[test]
fn the_digest_follows_the_files_and_not_their_place() {
    let (one, two) = (tiny::write(), tiny::write());
    let digest = |folder: &Path| Model::open(folder).unwrap().digest();
    assert_eq!(digest(one.path()), digest(two.path()));
    assert_eq!(digest(one.path()).len(), 64);
    let mut config = tiny::config_json();
    config["rope_base"] = 20_000.into();
    std::fs::write(two.path().join("config.json"), config.to_string()).unwrap();
    assert_ne!(digest(one.path()), digest(two.path()), "another configuration");
    let path = one.path().join("ckpt-0/tensor00001_000");
    let before = digest(one.path());
    std::fs::write(&path, [std::fs::read(&path).unwrap(), vec![0]].concat()).unwrap();
    assert_ne!(digest(one.path()), before, "another length");
    let digests: std::collections::BTreeSet<String> = models().iter().map(|folder| digest(folder)).collect();
    assert_eq!(digests.len(), models().len());
}

#[test]
fn the_tokenizer_is_found_in_the_folder_or_its_parent() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("m");
    std::fs::rename(tiny::write().keep(), &folder).unwrap();
    let model = Model::open(&folder).unwrap();
    let outside = model.tokenizer_path();
    assert_eq!(outside, None);
    std::fs::write(parent.path().join("tokenizer.model"), "").unwrap();
    assert_eq!(model.tokenizer_path(), Some(parent.path().join("tokenizer.model")));
    std::fs::create_dir(folder.join("tokenizer.model")).unwrap();
    assert_eq!(model.tokenizer_path(), Some(parent.path().join("tokenizer.model")), "a folder is no tokenizer");
    std::fs::remove_dir(folder.join("tokenizer.model")).unwrap();
    std::fs::write(folder.join("tokenizer.model"), "").unwrap();
    assert_eq!(model.tokenizer_path(), Some(folder.join("tokenizer.model")));
    assert_eq!(Model::open(&demo()).unwrap().tokenizer_path(), Some(demo().join("tokenizer.model")));
}
