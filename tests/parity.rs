//! `grokpipe logits` against outputs of xAI's own implementation.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use grokpipe_tests::{gpu_required, processes::grokpipe, shared};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

const MODELS: [&str; 3] = ["a4", "b64", "c8way"];

struct Tensors(HashMap<String, (Vec<usize>, Vec<f32>)>);

impl Tensors {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).expect("a file");
        let file = SafeTensors::deserialize(&bytes).expect("safetensors");
        let tensors = file.tensors().into_iter().map(|(name, view)| {
            let words = view.data().as_chunks::<4>().0;
            let value = |word: &[u8; 4]| match view.dtype() {
                Dtype::F32 => f32::from_le_bytes(*word),
                Dtype::I32 => i32::from_le_bytes(*word) as f32,
                other => panic!("{name} is {other:?}"),
            };
            let values: Vec<f32> = words.iter().map(value).collect();
            (name.clone(), (view.shape().to_vec(), values))
        });
        Self(tensors.collect())
    }

    fn get(&self, name: &str) -> &(Vec<usize>, Vec<f32>) {
        self.0.get(name).unwrap_or_else(|| panic!("no {name}"))
    }
}

fn largest_difference(name: &str, a: &(Vec<usize>, Vec<f32>), b: &(Vec<usize>, Vec<f32>)) -> f32 {
    assert_eq!(a.0, b.0, "{name}");
    let largest = a.1.iter().zip(&b.1).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(a.1.iter().all(|value| value.is_finite()), "{name}");
    largest
}

fn prompts(model: &Path) -> Vec<Vec<u64>> {
    let text = std::fs::read_to_string(model.join("prompts.json")).expect("prompts");
    let value: Value = serde_json::from_str(&text).expect("JSON");
    let list = value.as_array().or_else(|| value["prompts"].as_array()).expect("a list of prompts");
    let ids = |prompt: &Value| {
        let ids = prompt.as_array().or_else(|| prompt["ids"].as_array()).expect("ids");
        ids.iter().map(|id| id.as_u64().expect("an id")).collect()
    };
    list.iter().map(ids).collect()
}

/// Runs `grokpipe logits`; `None` when the device is not there.
fn logits(model: &Path, ids: &[u64], device: &str, precision: &str, out: &Path, trace: bool) -> Option<Tensors> {
    let ids = ids.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    let mut command =
        grokpipe(["logits", "--token-ids", &ids, "--device", device, "--precision", precision, "--model"]);
    command.arg(model).arg("--out").arg(out);
    if trace {
        command.arg("--trace");
    }
    let output = command.output().expect("grokpipe runs");
    if output.status.success() {
        return Some(Tensors::read(out));
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(device == "gpu" && !gpu_required(), "{complaint}");
    println!("skipped: {complaint}");
    None
}

fn equal_to_the_reference(device: &str, bound: f32) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("out.safetensors");
    for name in MODELS {
        let Some(model) = shared(&format!("golden/{name}")) else { return };
        let expected = Tensors::read(&model.join("expected_f32.safetensors"));
        for (index, ids) in prompts(&model).iter().enumerate() {
            let trace = index == 1;
            let Some(found) = logits(&model, ids, device, "exact", &out, trace) else { return };
            let key = format!("prompt{index}.logits");
            let difference = largest_difference(&key, found.get("logits"), expected.get(&key));
            println!("{name} prompt {index} on {device}: logits within {difference:e}");
            assert!(difference <= bound, "{name} {key}: {difference:e}");
            if trace {
                let hidden = largest_difference("hidden", found.get("hidden"), expected.get("hidden"));
                println!("{name} prompt {index} on {device}: hidden states within {hidden:e}");
                assert!(hidden <= 1e-3, "{name}: {hidden:e}");
                assert_eq!(found.get("topk_idx").1, expected.get("topk_idx").1, "{name}: chosen experts");
                let probabilities = largest_difference("topk_prob", found.get("topk_prob"), expected.get("topk_prob"));
                assert!(probabilities <= 1e-4, "{name}: {probabilities:e}");
            }
        }
    }
}

#[test]
fn logits_on_the_cpu_equal_the_reference() {
    equal_to_the_reference("cpu", 2e-4);
}

#[test]
fn logits_on_a_gpu_equal_the_reference() {
    equal_to_the_reference("gpu", 1e-3);
}

#[test]
fn greedy_tokens_through_the_kv_cache_equal_the_reference() {
    use grokpipe_tests::processes::{Cluster, ClusterOptions, token_ids};
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("out.safetensors");
    for name in MODELS {
        let Some(model) = shared(&format!("golden/{name}")) else { return };
        let expected = Tensors::read(&model.join("expected_f32.safetensors"));
        let expected: Vec<u32> = expected.get("greedy.ids").1.iter().map(|id| *id as u32).collect();
        let ids = prompts(&model)[1].iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        let workers = if name == "b64" { 4 } else { 2 };
        for device in ["cpu", "gpu"] {
            if device == "gpu" && logits(&model, &[5], "gpu", "exact", &out, false).is_none() {
                continue;
            }
            let options = ClusterOptions {
                model: model.clone(),
                workers,
                device: device.into(),
                kv_tokens: 256,
                ..ClusterOptions::demo()
            };
            let cluster = Cluster::start(options);
            let generated = cluster.generated(["--token-ids", &ids, "--max-tokens", "32", "--ignore-eos"]);
            assert_eq!(token_ids(&generated, "output_token_ids"), expected, "{name} on {device}");
        }
    }
}

/// A `.npy` file of f32 in C order: its numbers.
fn npy(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).expect("a file");
    assert!(bytes.starts_with(b"\x93NUMPY\x01"), "{}", path.display());
    let begin = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = String::from_utf8_lossy(&bytes[10..begin]);
    assert!(header.contains("'<f4'") && header.contains("'fortran_order': False"), "{header}");
    bytes[begin..].as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
}

/// Something with its name.
type Named<T> = (String, T);

/// Names and paths of the GGUF files of the goldens, and their prompts.
fn gguf_files(folder: &Path) -> (Vec<Named<PathBuf>>, Vec<Named<Vec<u64>>>) {
    let golden = std::fs::read(folder.join("golden.json")).expect("golden.json");
    let golden: Value = serde_json::from_slice(&golden).expect("JSON");
    let ids = |ids: &Value| ids.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id")).collect();
    let prompts = golden["prompts"].as_object().expect("prompts");
    let prompts = prompts.iter().map(|(name, value)| (name.clone(), ids(value))).collect();
    let paths = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let mut files: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "gguf"))
        .map(|path| (path.file_stem().and_then(|stem| stem.to_str()).expect("a name").to_owned(), path))
        .collect();
    files.sort();
    assert!(files.len() >= 8, "{files:?}");
    (files, prompts)
}

/// Every GGUF file of the goldens, against a reading of xAI's code in f64 with the same weights.
fn gguf_files_equal_the_reference(device: &str) {
    let Some(folder) = shared("golden/llamacpp") else { return };
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let out = scratch.path().join("out.safetensors");
    let (files, prompts) = gguf_files(&folder);
    for (name, file) in files {
        let mut largest = 0.0_f32;
        for (prompt, ids) in &prompts {
            let Some(found) = logits(&file, ids, device, "exact", &out, false) else { return };
            let expected = npy(&folder.join(format!("{name}.{prompt}.f64ref.npy")));
            let found = &found.get("logits").1;
            assert_eq!(found.len(), expected.len(), "{name} {prompt}");
            assert!(found.iter().all(|value| value.is_finite()), "{name} {prompt}");
            largest = found.iter().zip(&expected).map(|(x, y)| (x - y).abs()).fold(largest, f32::max);
        }
        println!("{name} on {device}: logits within {largest:e}");
        assert!(largest <= 1e-3, "{name}: {largest:e}");
    }
}

#[test]
fn gguf_files_on_the_cpu_equal_the_reference() {
    gguf_files_equal_the_reference("cpu");
}

#[test]
fn gguf_files_on_a_gpu_equal_the_reference() {
    gguf_files_equal_the_reference("gpu");
}

/// Products with 8-bit inputs keep as near to the reference as llama.cpp's, and change nothing where weights are floats.
fn gguf_files_in_fast_are_as_near_as_llama_cpp(device: &str) {
    let Some(folder) = shared("golden/llamacpp") else { return };
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let out = scratch.path().join("out.safetensors");
    let (files, prompts) = gguf_files(&folder);
    for (name, file) in files {
        let (mut ours, mut theirs, mut count) = (0.0_f64, 0.0_f64, 0);
        for (prompt, ids) in &prompts {
            let Some(found) = logits(&file, ids, device, "fast", &out, false) else { return };
            let found = found.get("logits").1.clone();
            if name.ends_with("F32") || name.ends_with("F16") {
                let exact = logits(&file, ids, device, "exact", &out, false).expect("the device is there");
                assert_eq!(found, exact.get("logits").1, "{name} {prompt}");
            }
            let expected = npy(&folder.join(format!("{name}.{prompt}.f64ref.npy")));
            let llama = npy(&folder.join(format!("{name}.{prompt}.llamacpp.npy")));
            let square = |a: &[f32]| a.iter().zip(&expected).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
            ours += square(&found);
            theirs += square(&llama);
            count += expected.len();
        }
        let (ours, theirs) = ((ours / count as f64).sqrt(), (theirs / count as f64).sqrt());
        println!("{name} in fast on {device}: rms distance {ours:.2e}, of llama.cpp {theirs:.2e}");
        assert!(ours <= 1.1 * theirs, "{name}: {ours:e} and {theirs:e}");
    }
}

#[test]
fn gguf_files_in_fast_on_the_cpu_are_as_near_to_the_reference_as_llama_cpp_is() {
    gguf_files_in_fast_are_as_near_as_llama_cpp("cpu");
}

#[test]
fn gguf_files_in_fast_on_a_gpu_are_as_near_to_the_reference_as_llama_cpp_is() {
    gguf_files_in_fast_are_as_near_as_llama_cpp("gpu");
}
