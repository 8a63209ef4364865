//! GGUF files of every kind of damage, and good ones in every form: the header, the parts of a split file, the metadata.

use super::*;
use crate::{LayerTensor, checkpoint::gguf, tokenizer::Tokenizer};

/// A GGUF file in the making.
#[derive(Clone, Default)]
pub(super) struct Gguf {
    metadata: Vec<u8>,
    keys: u64,
    infos: Vec<u8>,
    tensors: u64,
    data: Vec<u8>,
}

fn text(text: &str) -> Vec<u8> {
    [(text.len() as u64).to_le_bytes().to_vec(), text.as_bytes().to_vec()].concat()
}

impl Gguf {
    pub(super) fn raw(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.metadata.extend([text(key), kind.to_le_bytes().to_vec(), value.to_vec()].concat());
        self.keys += 1;
        self
    }

    pub(super) fn number(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    pub(super) fn text(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, &text(value))
    }

    /// A tensor whose sizes stand innermost first, as in the file.
    fn tensor(mut self, name: &str, sizes: &[u64], kind: u32, bytes: &[u8]) -> Self {
        let offset = self.data.len() as u64;
        self.data.extend_from_slice(bytes);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self.info(name, sizes, kind, offset)
    }

    fn info(mut self, name: &str, sizes: &[u64], kind: u32, offset: u64) -> Self {
        self.infos.extend(text(name));
        self.infos.extend((sizes.len() as u32).to_le_bytes());
        sizes.iter().for_each(|size| self.infos.extend(size.to_le_bytes()));
        self.infos.extend(kind.to_le_bytes());
        self.infos.extend(offset.to_le_bytes());
        self.tensors += 1;
        self
    }

    pub(super) fn done(&self) -> Vec<u8> {
        let counts = [self.tensors.to_le_bytes(), self.keys.to_le_bytes()].concat();
        let mut file = [b"GGUF".as_slice(), &3_u32.to_le_bytes(), &counts, &self.metadata, &self.infos].concat();
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend_from_slice(&self.data);
        file
    }
}

/// Changes a little-endian number of the finished file.
fn with_u64(mut file: Vec<u8>, at: usize, value: u64) -> Vec<u8> {
    file[at..at + 8].copy_from_slice(&value.to_le_bytes());
    file
}

fn one(kind: u32, sizes: &[u64], bytes: usize) -> Vec<u8> {
    Gguf::default().tensor("a", sizes, kind, &vec![0; bytes]).done()
}

fn array(kind: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [kind.to_le_bytes().as_slice(), &count.to_le_bytes(), elements].concat()
}

#[test]
fn every_hostile_header_is_refused() {
    let good = one(0, &[8], 32);
    let key = |kind: u32, value: &[u8]| Gguf::default().raw("k", kind, value).done();
    let nested = (0..9).fold(array(0, 0, &[]), |inner, _| array(9, 1, &inner));
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("an empty file", Vec::new(), "4 more bytes"),
        ("another magic", [b"GGML".as_slice(), &good[4..]].concat(), "GGUF"),
        ("version 1", [&good[..4], &1_u32.to_le_bytes(), &good[8..]].concat(), "version 2 or 3"),
        ("version 0", [&good[..4], &[0; 4], &good[8..]].concat(), "found version 0"),
        ("version 4", [&good[..4], &4_u32.to_le_bytes(), &good[8..]].concat(), "version 4"),
        ("big-endian", [&good[..4], &3_u32.to_be_bytes(), &good[8..]].concat(), "little-endian"),
        ("2^64 - 1 tensors", with_u64(good.clone(), 8, u64::MAX), "at most 65536 tensors"),
        ("a tensor too many", with_u64(good.clone(), 8, 2), "found"),
        ("2^64 - 1 keys", with_u64(good.clone(), 16, u64::MAX), "at most 65536 keys"),
        ("a key too many", with_u64(good.clone(), 16, 1), "found"),
        ("a name of 2^63 bytes", with_u64(good.clone(), 24, 1 << 63), "at most 65536 bytes"),
        ("a name past the end", with_u64(good.clone(), 24, 60_000), "more bytes"),
        ("no dimensions", one(0, &[], 32), "1 to 4 dimensions"),
        ("five dimensions", one(0, &[1, 1, 1, 1, 8], 32), "1 to 4 dimensions"),
        ("a size of 0", one(0, &[0], 32), "a shape that fits a file"),
        ("sizes that overflow", one(0, &[1 << 33, 1 << 33], 32), "a shape that fits a file"),
        ("sizes that overflow to little", one(0, &[(1 << 62) + 8, 4], 32), "a shape that fits a file"),
        ("half a block", one(8, &[48], 68), "rows of whole blocks of 32"),
        ("rows of half a block", one(12, &[128, 2], 144), "rows of whole blocks of 256"),
        ("type IQ3_S", one(21, &[256], 110), "IQ3_S"),
        ("type 99", one(99, &[256], 110), "type number 99"),
        ("data past the end", one(0, &[9], 32), "data within the file"),
        ("an offset of 2^64 - 32", Gguf::default().info("a", &[8], 0, u64::MAX - 31).done(), "data within the file"),
        (
            "an odd offset",
            Gguf { data: vec![0; 96], ..Gguf::default() }.info("a", &[8], 0, 4).done(),
            "an offset that 32 divides",
        ),
        (
            "an overlap",
            Gguf::default().tensor("a", &[16], 0, &[0; 64]).info("b", &[8], 0, 32).done(),
            "data after byte",
        ),
        (
            "a tensor twice",
            Gguf::default().tensor("a", &[8], 0, &[0; 32]).tensor("a", &[8], 0, &[0; 32]).done(),
            "once",
        ),
        ("a key twice", Gguf::default().number("k", 1).number("k", 1).done(), "each key once"),
        ("a kind of value 13", key(13, &[0; 8]), "a kind of value from 0 to 12"),
        ("a kind of element 13", key(9, &array(13, 1, &[0; 8])), "a kind of element"),
        ("an array of 2^64 - 1", key(9, &array(0, u64::MAX, &[])), "as many as there are bytes left"),
        ("an array longer than the file", key(9, &array(10, 20, &[0; 64])), "more bytes"),
        ("arrays nine deep", key(9, &nested), "arrays at most 4 deep"),
        ("a whole number of 2^64 - 1 in a list", key(9, &array(10, 1, &u64::MAX.to_le_bytes())), "below 2^63"),
        ("bytes that are no text", key(8, &[2, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe]), "UTF-8"),
        ("an alignment of 0", Gguf::default().number("general.alignment", 0).done(), "a power of two"),
        ("an alignment of 3", Gguf::default().number("general.alignment", 3).done(), "a power of two"),
        ("an alignment as a text", Gguf::default().text("general.alignment", "32").done(), "a power of two"),
    ];
    assert!(cases.len() >= 35);
    for (name, file, wanted) in cases {
        let error = gguf::read(&Memory(&file)).expect_err(name).to_string();
        assert_refused(name, &error, wanted);
    }
}

#[test]
fn a_truncated_header_is_refused_at_every_length() {
    let file = Gguf::default().number("k", 7).text("t", "text").tensor("a", &[8], 0, &[1; 32]).done();
    assert!(gguf::read(&Memory(&file)).is_ok());
    for length in 0..file.len() {
        assert!(gguf::read(&Memory(&file[..length])).is_err(), "{length} of {} bytes", file.len());
    }
}

#[test]
fn lists_of_bytes_take_no_memory() {
    let list = |kind: u32, width: usize| array(kind, 1 << 16, &vec![1; width << 16]);
    let lists = [("u8", 0, 1), ("i8", 1, 1), ("u16", 2, 2), ("i16", 3, 2), ("bool", 7, 1)];
    let file = lists.iter().fold(Gguf::default(), |file, (key, kind, width)| file.raw(key, 9, &list(*kind, *width)));
    let header = gguf::read(&Memory(&file.number("after", 7).done())).unwrap();
    assert_eq!(header.metadata.into_iter().collect::<Vec<_>>(), [("after".to_owned(), gguf::Value::Integer(7))]);
    let cut = Gguf::default().raw("u16", 9, &array(2, 40, &[0; 60])).done();
    assert_refused("a list past the end", &gguf::read(&Memory(&cut)).unwrap_err().to_string(), "80 more bytes");
}

#[test]
fn no_flipped_bit_makes_a_reader_panic() {
    let file = Gguf::default().number("k", 7).raw("l", 9, &array(5, 2, &[0; 8])).tensor("a", &[32], 8, &[1; 34]).done();
    for bit in 0..8 * file.len() {
        let mut damaged = file.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        // Most are refused; the others only name other things or numbers.
        let _ = gguf::read(&Memory(&damaged));
    }
}

/// Sizes of the tiny model, without what older files lack.
pub(super) fn metadata() -> Gguf {
    Gguf::default()
        .text("general.architecture", "grok")
        .number("grok.block_count", tiny::LAYERS)
        .number("grok.context_length", 128)
        .number("grok.embedding_length", 8)
        .number("grok.feed_forward_length", 16)
        .number("grok.attention.head_count", 2)
        .number("grok.attention.head_count_kv", 1)
        .number("grok.expert_count", 2)
        .number("grok.expert_used_count", 2)
        .raw("grok.attention.layer_norm_rms_epsilon", 6, &1e-5_f32.to_le_bytes())
}

/// Name, sizes innermost first.
pub(super) fn tensors(merged: bool) -> Vec<(String, Vec<u64>)> {
    let mut all: Vec<(String, Vec<u64>)> =
        vec![("token_embd.weight".into(), vec![8, 16]), ("output_norm.weight".into(), vec![8])];
    let layer = [
        ("attn_norm", vec![8]),
        ("attn_q", vec![8, 8]),
        ("attn_k", vec![8, 4]),
        ("attn_v", vec![8, 4]),
        ("attn_output", vec![8, 8]),
        ("attn_output_norm", vec![8]),
        ("ffn_norm", vec![8]),
        ("ffn_gate_inp", vec![8, 2]),
        ("layer_output_norm", vec![8]),
    ];
    all.extend(layer.map(|(name, sizes)| (format!("blk.0.{name}.weight"), sizes)));
    for (name, sizes) in [("ffn_gate", [8, 16]), ("ffn_up", [8, 16]), ("ffn_down", [16, 8])] {
        if merged {
            all.push((format!("blk.0.{name}_exps.weight"), [sizes.as_slice(), &[2]].concat()));
        } else {
            all.extend((0..2).map(|expert| (format!("blk.0.{name}.{expert}.weight"), sizes.to_vec())));
        }
    }
    all
}

/// Adds tensors of f32 that count on from `first`.
pub(super) fn with_tensors(file: Gguf, tensors: &[(String, Vec<u64>)], first: &mut u32) -> Gguf {
    tensors.iter().fold(file, |file, (name, sizes)| {
        let count = sizes.iter().product::<u64>() as u32;
        let bytes: Vec<u8> = (*first..*first + count).flat_map(|value| (value as f32).to_le_bytes()).collect();
        *first += count;
        file.tensor(name, sizes, 0, &bytes)
    })
}

fn numbers(model: &Model, name: &TensorName) -> Vec<f32> {
    let matrix = model.matrix(name).unwrap();
    let mut bytes = vec![0; matrix.spec().weight_bytes() as usize];
    matrix.read(0, &mut bytes).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
}

pub(super) fn folder_of(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| std::fs::write(folder.path().join(name), bytes).unwrap());
    folder
}

#[test]
fn merged_apart_and_split_files_are_the_same_model() {
    let down = TensorName::Layer(0, LayerTensor::MoeDown);
    let (merged, apart) = (tensors(true), tensors(false));
    let mut of_forms = Vec::new();
    for all in [&merged, &apart] {
        let folder = folder_of(&[("m.gguf", with_tensors(metadata(), all, &mut 0).done())]);
        let model = Model::open(folder.path()).unwrap();
        assert_eq!(model.inspect().unwrap().len(), 14);
        of_forms.push((numbers(&model, &down), numbers(&model, &TensorName::Head)));
    }
    assert_eq!(of_forms[0], of_forms[1]);
    let mut first = 0;
    let part = |number: u16, file: Gguf| {
        file.raw("split.no", 2, &number.to_le_bytes()).raw("split.count", 2, &2_u16.to_le_bytes())
    };
    let total = (apart.len() as u32).to_le_bytes();
    let one = part(0, metadata()).raw("split.tensors.count", 5, &total);
    let one = with_tensors(one, &apart[..5], &mut first).done();
    let two = with_tensors(part(1, Gguf::default()), &apart[5..], &mut first).done();
    let (names, files) = (["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], [one, two]);
    let folder = folder_of(&[(names[0], files[0].clone()), (names[1], files[1].clone())]);
    for path in [folder.path().to_owned(), folder.path().join(names[0]), folder.path().join(names[1])] {
        let model = Model::open(&path).unwrap();
        assert_eq!((numbers(&model, &down), numbers(&model, &TensorName::Head)), of_forms[0], "{}", path.display());
    }
    std::fs::rename(folder.path().join(names[1]), folder.path().join("gone")).unwrap();
    let error = Model::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains(names[1]), "{error}");
    std::fs::write(folder.path().join(names[1]), &files[0]).unwrap();
    let error = Model::open(folder.path()).unwrap_err().to_string();
    assert_refused("the first part twice", &error, "part 2 of 2");
}

#[test]
fn a_file_that_llama_cpp_merged_is_one_part() {
    let all = tensors(true);
    let merged = metadata().raw("split.no", 2, &[0; 2]).raw("split.count", 2, &[0; 2]);
    let merged = merged.raw("split.tensors.count", 5, &(all.len() as u32).to_le_bytes());
    let folder = folder_of(&[("m.gguf", with_tensors(merged, &all, &mut 0).done())]);
    assert_eq!(Model::open(folder.path()).unwrap().inspect().unwrap().len(), 14);
}

#[test]
fn a_head_of_its_own_is_used_and_another_dtype_too() {
    let mut first = 0;
    let file = with_tensors(metadata(), &tensors(true), &mut first);
    // BF16 is the upper half of an f32.
    let head: Vec<u8> = (0..128_u16).flat_map(|value| (0x3f80 + value).to_le_bytes()).collect();
    let folder = folder_of(&[("m.gguf", file.tensor("output.weight", &[8, 16], 30, &head).done())]);
    let model = Model::open(&folder.path().join("m.gguf")).unwrap();
    assert_eq!(model.matrix(&TensorName::Head).unwrap().spec().format, Format::Blocks(BlockType::Bf16));
    assert_eq!(model.matrix(&TensorName::Embedding).unwrap().spec().format, Format::F32);
    assert_eq!(model.embedding_rows(&[1]).unwrap(), (8..16).map(|value| value as f32).collect::<Vec<_>>());
    assert_eq!(model.stored_bytes(0..0, true), 2 * 128 + 4 * 8);
    assert_eq!(model.inspect().unwrap().len(), 15);
    let tied = folder_of(&[("m.gguf", with_tensors(metadata(), &tensors(true), &mut 0).done())]);
    assert_ne!(model.digest(), Model::open(tied.path()).unwrap().digest(), "workers may not mix the two");
}

#[test]
fn what_old_files_do_not_say_is_as_published() {
    let folder = folder_of(&[("m.gguf", with_tensors(metadata(), &tensors(true), &mut 0).done())]);
    let (config, grok) = (Model::open(folder.path()).unwrap().config().clone(), ModelConfig::grok_1());
    assert_eq!((config.vocab_size, config.head_dim, config.max_position_embeddings), (16, 4, 128));
    assert_eq!(config.embedding_multiplier, grok.embedding_multiplier);
    assert_eq!(config.output_multiplier, grok.output_multiplier);
    assert_eq!(config.attention_multiplier, grok.attention_multiplier);
    assert_eq!((config.rope_theta, config.attention_logit_cap), (grok.rope_theta, grok.attention_logit_cap));
    assert_eq!((config.pad_token_id, config.eos_token_id), (0, 2));
}

#[test]
fn a_good_file_that_is_another_model_is_refused() {
    let all = tensors(true);
    let without = |name: &str| all.iter().filter(|(other, _)| other != name).cloned().collect::<Vec<_>>();
    let with = |tensors: &[(String, Vec<u64>)]| with_tensors(metadata(), tensors, &mut 0).done();
    let more = |name: &str, sizes: &[u64]| [all.clone(), vec![(name.to_owned(), sizes.to_vec())]].concat();
    let with_more = |(key, number)| {
        let metadata = metadata().number("grok.attention.key_length", 4).number(key, number);
        with_tensors(metadata, &all, &mut 0).done()
    };
    let with_true = |key| with_tensors(metadata().raw(key, 7, &[1]), &all, &mut 0).done();
    let transposed: Vec<_> =
        all.iter().map(|(name, sizes)| (name.clone(), sizes.iter().rev().copied().collect())).collect();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("no metadata", Gguf::default().done(), "general.architecture"),
        ("another architecture", Gguf::default().text("general.architecture", "llama").done(), "\"grok\""),
        ("no sizes", Gguf::default().text("general.architecture", "grok").done(), "grok."),
        ("no embedding", with(&without("token_embd.weight")), "vocab_size"),
        ("no norm", with(&without("blk.0.ffn_norm.weight")), "blk.0.ffn_norm.weight"),
        ("no experts", with(&without("blk.0.ffn_up_exps.weight")), "blk.0.ffn_up.0.weight or blk.0.ffn_up_exps.weight"),
        ("a second layer", with(&more("blk.1.attn_norm.weight", &[8])), "only the model's tensors"),
        ("a head of another shape", with(&more("output.weight", &[16, 8])), "output.weight"),
        ("matrices transposed", with(&transposed), "shape"),
        (
            "heads that do not divide",
            with_tensors(metadata().number("grok.attention.key_length", 5), &all, &mut 0).done(),
            "grok.attention.key_length",
        ),
        ("half of a head rotated", with_more(("grok.rope.dimension_count", 2)), "grok.rope.dimension_count"),
        ("values of another width", with_more(("grok.attention.value_length", 8)), "grok.attention.value_length"),
        ("a cap on logits", with_more(("grok.final_logit_softcapping", 30)), "grok.final_logit_softcapping"),
        ("an expert for all tokens", with_more(("grok.expert_shared_count", 1)), "grok.expert_shared_count"),
        ("gates by sigmoid", with_more(("grok.expert_gating_func", 2)), "grok.expert_gating_func"),
        ("a window", with_more(("grok.attention.sliding_window", 64)), "grok.attention.sliding_window"),
        ("blocks side by side", with_true("grok.use_parallel_residual"), "grok.use_parallel_residual"),
        (
            "texts without double spaces",
            with_true("tokenizer.ggml.remove_extra_whitespaces"),
            "remove_extra_whitespaces",
        ),
        ("positions stretched", with_more(("grok.rope.scaling.factor", 16)), "grok.rope.scaling.factor"),
        (
            "positions stretched otherwise",
            with_tensors(metadata().text("grok.rope.scaling.type", "yarn"), &all, &mut 0).done(),
            "grok.rope.scaling.type",
        ),
    ];
    for (name, bytes, wanted) in cases {
        let folder = folder_of(&[("m.gguf", bytes)]);
        let message = Model::open(&folder.path().join("m.gguf")).map(|_| ()).expect_err(name).to_string();
        assert_refused(name, &message, wanted);
        assert!(message.contains("m.gguf"), "{name}: {message}");
    }
    let none = metadata().number("grok.final_logit_softcapping", 0).number("grok.rope.scaling.factor", 1);
    let none = none.raw("grok.attention.causal", 7, &[1]).number("grok.router_logit_softcapping", 30);
    for kind in ["none", "linear"] {
        let none = with_tensors(none.clone().text("grok.rope.scaling.type", kind), &all, &mut 0).done();
        Model::open(folder_of(&[("m.gguf", none)]).path()).expect("what changes nothing is taken");
    }
    let two = folder_of(&[("a.gguf", with(&all)), ("b.gguf", with(&all))]);
    let message = Model::open(two.path()).unwrap_err().to_string();
    assert_refused("two models in a folder", &message, "one GGUF model");
}

/// A vocabulary of the bytes, behind three control pieces and the unknown one.
fn vocabulary() -> Gguf {
    let named = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"].map(str::to_owned);
    let pieces: Vec<String> = named.into_iter().chain((0..=255).map(|byte| format!("<0x{byte:02X}>"))).collect();
    let kinds = (0..pieces.len()).map(|id| [3_i32, 3, 3, 2].get(id).copied().unwrap_or(6));
    let list = |kind, elements: Vec<u8>| array(kind, pieces.len() as u64, &elements);
    Gguf::default()
        .text("tokenizer.ggml.model", "llama")
        .raw("tokenizer.ggml.tokens", 9, &list(8, pieces.iter().flat_map(|piece| text(piece)).collect()))
        .raw("tokenizer.ggml.scores", 9, &list(6, vec![0; 4 * pieces.len()]))
        .raw("tokenizer.ggml.token_type", 9, &list(5, kinds.flat_map(i32::to_le_bytes).collect()))
}

#[test]
fn the_vocabulary_of_a_gguf_file_is_the_tokenizers() {
    let Some(folder) = golden("llamacpp") else { return };
    let path = folder.join("tiny4-Q4_0.gguf");
    let model = Model::open(&path).unwrap();
    assert_eq!(model.tokenizer_path(), Some(path.clone()));
    let tokenizer = Tokenizer::open(&path).unwrap();
    assert_eq!(tokenizer.vocab_size(), model.config().vocab_size);
    // The first 1024 pieces of Grok-1's, and no space in front, as the file says.
    let words = "thecat\nnaïve7";
    assert_eq!(tokenizer.decode(&tokenizer.encode(words)), words);
    let whole = Tokenizer::open(&demo().join("tokenizer.model")).unwrap();
    let bytes: Vec<u32> = whole.encode("\u{1}");
    assert_eq!(tokenizer.encode("\u{1}"), bytes[bytes.len() - 1..], "byte fallback");
    let around = |keys: &[&str]| {
        let header = keys.iter().fold(vocabulary(), |file, key| file.raw(&format!("tokenizer.ggml.{key}"), 7, &[1]));
        let header = gguf::read(&Memory(&header.number("tokenizer.ggml.eos_token_id", 9).done())).unwrap();
        Tokenizer::from_gguf(&header, "t.gguf")
    };
    let ids = |keys: &[&str], text: &str| around(keys).unwrap().encode(text);
    let bare = ids(&[], "x");
    for (keys, expected) in [
        (&["add_bos_token"][..], [vec![1], bare.clone()].concat()),
        (&["add_eos_token"], [bare.clone(), vec![9]].concat()),
        (&["add_bos_token", "add_eos_token"], [vec![1], bare.clone(), vec![9]].concat()),
    ] {
        assert_eq!(ids(keys, "x"), expected, "{keys:?}");
    }
    assert_eq!(ids(&["add_bos_token"], ""), [1]);
    let header = vocabulary().raw("tokenizer.ggml.add_bos_token", 7, &[1]).number("tokenizer.ggml.bos_token_id", 9999);
    let message =
        Tokenizer::from_gguf(&gguf::read(&Memory(&header.done())).unwrap(), "t.gguf").unwrap_err().to_string();
    assert_refused("an id that is no piece", &message, "tokenizer.ggml.bos_token_id");
    let scoreless =
        Gguf::default().text("tokenizer.ggml.model", "llama").raw("tokenizer.ggml.tokens", 9, &array(8, 1, &text("a")));
    let damaged = folder_of(&[
        ("t.gguf", scoreless.done()),
        ("u.gguf", Gguf::default().text("tokenizer.ggml.model", "gpt2").done()),
    ]);
    for (file, wanted) in [("t.gguf", "tokenizer.ggml.scores"), ("u.gguf", "llama")] {
        let message = Tokenizer::open(&damaged.path().join(file)).unwrap_err().to_string();
        assert_refused(file, &message, wanted);
    }
}
