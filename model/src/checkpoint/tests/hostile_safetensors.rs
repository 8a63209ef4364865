//! Safetensors files that lie about their sizes, their places or their kind: each is refused, by tensor.

use serde_json::{Value, json};

use super::{tiny, *};

/// The file of this header and so many bytes of numbers.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data, 0);
    file
}

fn tensor(dtype: &str, shape: Value, offsets: Value) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": offsets})
}

fn one(tensor: Value) -> Vec<u8> {
    file(&json!({ "a": tensor }).to_string(), 8)
}

fn two(first: Value, second: Value, data: usize) -> Vec<u8> {
    file(&json!({"a": tensor("F32", json!([2]), first), "b": tensor("F32", json!([2]), second)}).to_string(), data)
}

fn prefixed(length: u64, rest: &[u8]) -> Vec<u8> {
    [&length.to_le_bytes(), rest].concat()
}

fn headers() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let good = || tensor("F32", json!([2]), json!([0, 8]));
    let text = good().to_string();
    vec![
        ("an empty file", Vec::new(), "at least 8 bytes"),
        ("seven bytes", vec![0; 7], "at least 8 bytes"),
        ("a header of no bytes", prefixed(0, b"{}"), "a JSON object"),
        ("a header of 2^63", prefixed(1 << 63, b"{}"), "at most 2 bytes"),
        ("a header of 2^64 - 1", prefixed(u64::MAX, b"{}"), "at most 2 bytes"),
        ("a header one byte longer than the file", prefixed(3, b"{}"), "at most 2 bytes"),
        ("a header longer than any", prefixed((16 << 20) + 1, &vec![b' '; (16 << 20) + 1]), "at most 16777216 bytes"),
        ("a text", file("hello", 0), "a JSON object"),
        ("bytes that are no text", prefixed(2, &[0xff, 0xfe]), "a JSON object"),
        ("a list", file("[]", 0), "a JSON object"),
        ("null", file("null", 0), "a JSON object"),
        ("half an object", file("{\"a\":", 0), "a JSON object"),
        ("two objects", file("{}{}", 0), "trailing characters"),
        ("lists in lists", file(&"[".repeat(100_000), 0), "a JSON object"),
        ("objects in objects", file(&"{\"a\":".repeat(100_000), 0), "a JSON object"),
        (
            "a shape of lists in lists",
            file(&format!("{{\"a\":{{\"shape\":{}", "[".repeat(100_000)), 0),
            "a JSON object",
        ),
        ("deep metadata", file(&format!("{{\"__metadata__\":{{\"a\":{}", "[".repeat(100_000)), 0), "a JSON object"),
        ("metadata of numbers", file("{\"__metadata__\":{\"a\":1}}", 0), "a JSON object"),
        ("one name twice", file(&format!("{{\"a\":{text},\"a\":{text}}}"), 8), "each tensor once"),
        ("two tensors in one place", two(json!([0, 8]), json!([0, 8]), 16), "an overlap"),
        ("two tensors that overlap", two(json!([0, 8]), json!([4, 12]), 12), "an overlap"),
        ("a gap between tensors", two(json!([0, 8]), json!([12, 20]), 20), "a gap"),
        ("a gap at the start", one(tensor("F32", json!([1]), json!([4, 8]))), "a gap"),
        ("bytes after the last tensor", file(&json!({"a": good()}).to_string(), 9), "as the header says"),
        ("a tensor past the end", file(&json!({"a": good()}).to_string(), 7), "data within the file"),
        ("offsets the wrong way round", one(tensor("F32", json!([2]), json!([8, 0]))), "data offsets 8 to 0"),
        (
            "an offset of 2^64 - 1",
            one(tensor("F32", json!([2]), json!([u64::MAX - 8, u64::MAX]))),
            "data within the file",
        ),
        (
            "a shape that overflows",
            one(tensor("F32", json!([1_u64 << 62, 8]), json!([0, 8]))),
            "a shape that fits a file",
        ),
        (
            "a shape that overflows to the right length",
            one(tensor("F32", json!([(1_u64 << 62) + 1, 4]), json!([0, 8]))),
            "a shape that fits",
        ),
        ("a shape of another length", one(tensor("F32", json!([3]), json!([0, 8]))), "12 bytes for [3]"),
        ("five dimensions", one(tensor("F32", json!([1, 1, 1, 1, 2]), json!([0, 8]))), "at most 4 dimensions"),
        ("a negative size", one(tensor("F32", json!([-2]), json!([0, 8]))), "a JSON object"),
        ("a negative offset", one(tensor("F32", json!([2]), json!([-8, 0]))), "a JSON object"),
        ("half a size", one(tensor("F32", json!([2.5]), json!([0, 8]))), "a JSON object"),
        ("a size of 1e30", one(tensor("F32", json!([1e30]), json!([0, 8]))), "a JSON object"),
        ("a size as a text", one(tensor("F32", json!(["2"]), json!([0, 8]))), "a JSON object"),
        ("three offsets", one(tensor("F32", json!([2]), json!([0, 4, 8]))), "a JSON object"),
        ("one offset", one(tensor("F32", json!([2]), json!([8]))), "a JSON object"),
        ("no offsets", one(json!({"dtype": "F32", "shape": [2]})), "data_offsets"),
        ("no dtype", one(json!({"shape": [2], "data_offsets": [0, 8]})), "dtype"),
        (
            "a key too many",
            one(json!({"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "url": "x"})),
            "unknown field",
        ),
        ("a key as long as a book", one(json!({ "x".repeat(1 << 20): 1 })), "unknown field"),
        ("a tensor that is a text", one(json!("F32")), "a JSON object"),
        ("dtype F16 with the length of F32", one(tensor("F16", json!([2]), json!([0, 8]))), "4 bytes for [2]"),
        ("dtype F8_E4M3", one(tensor("F8_E4M3", json!([8]), json!([0, 8]))), "dtype F8_E4M3"),
        ("dtype I64", one(tensor("I64", json!([1]), json!([0, 8]))), "dtype I64"),
        ("dtype that is none", one(tensor("\u{1b}[2J", json!([2]), json!([0, 8]))), "dtype F32"),
    ]
}

#[test]
fn every_hostile_header_is_refused() {
    let cases = headers();
    assert!(cases.len() >= 40);
    for (name, file, wanted) in cases {
        let error = safetensors::read(&Memory(&file)).expect_err(name).to_string();
        assert_refused(name, &error, wanted);
    }
}

#[test]
fn metadata_and_padding_are_no_harm() {
    let header =
        format!("{{\"__metadata__\":{{\"format\":\"pt\"}},\"a\":{}}}   ", tensor("F32", json!([2]), json!([0, 8])));
    let found = safetensors::read(&Memory(&file(&header, 8))).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found["a"].offset, found["a"].length), (8 + header.len() as u64, 8));
    assert!(safetensors::read(&Memory(&file("{}", 0))).unwrap().is_empty());
}

#[test]
fn a_truncated_file_is_refused_at_every_length() {
    let whole = tiny::safetensors(&TensorName::in_file_order(tiny::LAYERS));
    for length in (0..whole.len()).filter(|length| *length < 2500 || length % 256 < 2) {
        let error = safetensors::read(&Memory(&whole[..length])).unwrap_err();
        assert_refused(&format!("{length} bytes"), &error.to_string(), "");
    }
}

/// The tiny model's file with its header changed.
fn edited(edit: impl Fn(&mut serde_json::Map<String, Value>)) -> Vec<u8> {
    let whole = tiny::safetensors(&TensorName::in_file_order(tiny::LAYERS));
    let begin = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&whole[8..begin]).unwrap();
    edit(header.as_object_mut().unwrap());
    let mut changed = file(&header.to_string(), 0);
    changed.extend_from_slice(&whole[begin..]);
    changed
}

#[test]
fn a_good_file_that_is_another_model_is_refused() {
    const NORM: &str = "language_model/rms_norm/scale";
    let names = TensorName::in_file_order(tiny::LAYERS);
    let rename = |from: &'static str, to: &'static str| {
        edited(move |header| {
            let moved = header.remove(from).unwrap();
            header.insert(to.to_owned(), moved);
        })
    };
    let cases = [
        ("a tensor is missing", tiny::safetensors(&names[1..]), "in_out_embed/embeddings"),
        ("no tensor at all", file("{}", 0), "this tensor"),
        (
            "a tensor of a second layer",
            {
                let mut more = names.clone();
                more.push(TensorName::Layer(1, crate::LayerTensor::Router));
                tiny::safetensors(&more)
            },
            "only the model's tensors",
        ),
        ("a name of another scheme", rename(NORM, "model.norm.scale"), NORM),
        ("another shape of the same length", edited(|header| header[NORM]["shape"] = json!([2, 4])), "shape [8]"),
        (
            "a matrix transposed",
            edited(|header| {
                header["transformer/decoder_layer_0/multi_head_attention/key/w"]["shape"] = json!([4, 8]);
            }),
            "shape [8, 4]",
        ),
        ("half the precision", edited(|header| header[NORM]["dtype"] = json!("BF16")), "16 bytes for [8]"),
    ];
    for (name, bytes, wanted) in cases {
        let folder = tiny::folder_with(&[("model.safetensors", &bytes)]);
        let message = Model::open(folder.path()).map(|_| ()).expect_err(name).to_string();
        assert_refused(name, &message, wanted);
        assert!(message.contains("model.safetensors"), "{name}: {message}");
    }
}

#[test]
fn norms_and_embedding_rows_that_are_not_finite_are_refused() {
    let mut bytes = tiny::safetensors(&TensorName::in_file_order(tiny::LAYERS));
    let begin = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for chunk in bytes[begin..].chunks_exact_mut(4) {
        chunk.copy_from_slice(&f32::NAN.to_le_bytes());
    }
    let folder = tiny::folder_with(&[("model.safetensors", &bytes)]);
    let model = Model::open(folder.path()).unwrap();
    assert_refused("norm", &model.vector(&TensorName::FinalNorm).unwrap_err().to_string(), "NaN at 0");
    assert_refused("rows", &model.embedding_rows(&[3]).unwrap_err().to_string(), "embeddings");
}

#[test]
fn an_index_that_does_not_fit_its_files_is_refused() {
    let names = TensorName::in_file_order(tiny::LAYERS);
    let whole = tiny::safetensors(&names);
    let map = |file: &str| -> serde_json::Map<String, Value> {
        names.iter().map(|name| (name.to_string(), file.into())).collect()
    };
    let with = |name: &str, file: Value| {
        let mut map = map("a.safetensors");
        map.insert(name.to_owned(), file);
        json!({ "weight_map": map }).to_string()
    };
    let norm = TensorName::FinalNorm.to_string();
    let cases = [
        ("no map", "{}".to_owned(), "weight_map"),
        ("a list", "[]".to_owned(), "weight_map"),
        ("no text", "\u{0}".to_owned(), "weight_map"),
        ("an empty map", "{\"weight_map\":{}}".to_owned(), "this tensor"),
        ("a file of another folder", with(&norm, "../a.safetensors".into()), "beside it"),
        ("a file from the root", with(&norm, "/etc/passwd".into()), "beside it"),
        ("a file of another kind", with(&norm, "a.bin".into()), "beside it"),
        ("a file that is a number", with(&norm, 1.into()), "weight_map"),
        ("a tensor that is in another file", with(&norm, "b.safetensors".into()), "which is in it"),
        ("a tensor that no file has", with("ghost", "a.safetensors".into()), "in \"a.safetensors\", as it says"),
        ("too long", " ".repeat((4 << 20) + 1), "at most 4194304 bytes"),
    ];
    for (name, index, wanted) in cases {
        let files = [("a.safetensors", &whole[..]), ("b.safetensors", &whole[..])];
        let folder = tiny::folder_with(&files);
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        let message = Model::open(folder.path()).map(|_| ()).expect_err(name).to_string();
        assert_refused(name, &message, wanted);
    }
    let good = json!({ "weight_map": map("a.safetensors") }).to_string();
    let folder = tiny::folder_with(&[
        ("a.safetensors", &whole),
        ("m.safetensors.index.json", good.as_bytes()),
        ("n.safetensors.index.json", good.as_bytes()),
    ]);
    let message = Model::open(folder.path()).unwrap_err().to_string();
    assert_refused("two indices", &message, "found 2");
}
