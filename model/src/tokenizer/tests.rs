//! Equal to SentencePiece on every golden case, and robust against everything else.

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use proptest::prelude::*;
use serde_json::Value;

use super::*;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| Tokenizer::open(&root().join("model/demo/tokenizer.model")).unwrap())
}

fn cases() -> Value {
    serde_json::from_str(&std::fs::read_to_string(root().join("tests/golden/tokenizer_cases.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn streamed(ids: &[u32]) -> String {
    let mut decoder = StreamDecoder::default();
    let mut text = String::new();
    for id in ids {
        text.push_str(&decoder.push(tokenizer(), *id));
    }
    text + &decoder.finish()
}

fn bytes_of(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect()
}

#[test]
fn every_golden_case_is_equal() {
    let cases = cases();
    let (mut encoded, mut decoded) = (0, 0);
    for case in cases["encode"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let expected = ids(&case["ids"]);
        assert_eq!(tokenizer().encode(text), expected, "{text:?}");
        assert_eq!(tokenizer().decode(&expected), case["decoded"].as_str().unwrap(), "{text:?}");
        assert_eq!(streamed(&expected), case["decoded"].as_str().unwrap(), "{text:?}");
        encoded += 1;
    }
    for case in cases["bytes"].as_array().unwrap() {
        let expected = ids(&case["ids"]);
        assert_eq!(tokenizer().encode_bytes(&bytes_of(case["bytes_hex"].as_str().unwrap())), expected, "{case}");
        assert_eq!(tokenizer().decode(&expected), case["decoded"].as_str().unwrap(), "{case}");
        encoded += 1;
    }
    for case in cases["decode"].as_array().unwrap() {
        let given = ids(&case["ids"]);
        assert_eq!(tokenizer().decode(&given), case["text"].as_str().unwrap(), "{case}");
        assert_eq!(streamed(&given), case["text"].as_str().unwrap(), "{case}");
        decoded += 1;
    }
    assert_eq!((encoded, decoded), (220, 56));
}

#[test]
fn control_ids_never_come_from_text() {
    for text in ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "a[EOS]b"] {
        assert!(tokenizer().encode(text).iter().all(|id| *id > 3), "{text:?}");
    }
    assert_eq!(tokenizer().encode("<|separator|>").last(), Some(&47));
}

#[test]
fn long_monotonous_texts_do_not_take_the_hours_of_a_quadratic_merge() {
    // Seconds a MiB on any machine. No clock is read: a merge that looks at every pair anew would not come to its end here.
    for unit in ["a", " ", "\u{200d}", "\n", "ab", " the cat", "0", "🦀", "\0", "<|control", "aaaaaaaaaaaaaaaab"] {
        let text = unit.repeat((1 << 20) / unit.len());
        assert_eq!(tokenizer().decode(&tokenizer().encode(&text)), text, "{unit:?}");
    }
}

#[test]
fn ids_out_of_range_decode_to_nothing() {
    assert_eq!(tokenizer().decode(&[131_072, u32::MAX, 0, 1, 2]), "");
}

#[test]
fn a_continuation_keeps_its_leading_space() {
    let prompt = tokenizer().encode("The capital of France is");
    let out = tokenizer().encode("Paris");
    let mut decoder = StreamDecoder::after(tokenizer(), &prompt);
    let text: String = out.iter().map(|id| decoder.push(tokenizer(), *id)).collect();
    assert_eq!(text, " Paris");
    let mut decoder = StreamDecoder::after(tokenizer(), &[]);
    let text: String = out.iter().map(|id| decoder.push(tokenizer(), *id)).collect();
    assert_eq!(text, "Paris");
}

#[test]
fn a_character_begun_in_the_prompt_is_completed() {
    let crab = tokenizer().encode("🦀");
    for split in 0..crab.len() {
        let mut decoder = StreamDecoder::after(tokenizer(), &crab[..split]);
        let rest: String = crab[split..].iter().map(|id| decoder.push(tokenizer(), *id)).collect();
        // The space that encoding put in front is the first id.
        assert_eq!(rest + &decoder.finish(), "🦀", "split at {split}");
    }
}

#[test]
fn a_control_id_ends_a_run_of_bytes() {
    let byte = |byte: u32| 69 + byte;
    // Ids and texts as SentencePiece 0.2.3 has them.
    let cases: &[(&[u32], &str)] = &[
        (&[byte(0xc3), byte(0xa9)], "é"),
        (&[byte(0xc3), 2, byte(0xa9)], "\u{fffd}\u{fffd}"),
        (&[byte(0xf0), byte(0x9f), 1, byte(0xa6), byte(0x80)], "\u{fffd}\u{fffd}\u{fffd}\u{fffd}"),
        (&[2, byte(0xc3), byte(0xa9), 0], "é"),
        (&[189, 284, 0, 198, 217, 21], "x\u{fffd}\u{fffd}\u{fffd}7"),
    ];
    for (ids, expected) in cases {
        assert_eq!(tokenizer().decode(ids), *expected, "{ids:?}");
        assert_eq!(streamed(ids), *expected, "{ids:?}");
    }
}

#[test]
fn the_text_of_every_piece_survives() {
    for id in 4..tokenizer().vocab_size() as u32 {
        let mut decoder = StreamDecoder::after(tokenizer(), &[14]);
        let text = decoder.push(tokenizer(), id) + &decoder.finish();
        assert_eq!(tokenizer().decode(&tokenizer().encode(&text)), text, "id {id}");
    }
}

#[test]
fn half_a_character_is_never_emitted() {
    let ids = tokenizer().encode("🦀🧪é");
    let mut decoder = StreamDecoder::default();
    let whole: String = ids.iter().map(|id| decoder.push(tokenizer(), *id)).collect();
    assert!(!whole.contains('\u{fffd}'));
    assert_eq!(whole, "🦀🧪é");
}

#[test]
fn files_that_are_no_tokenizer_are_refused() {
    let good = std::fs::read(root().join("model/demo/tokenizer.model")).unwrap();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("text", b"hello, this is no protobuf".to_vec()),
        ("cut in a piece", good[..1000].to_vec()),
        ("cut before the flags", good[..good.len() / 2].to_vec()),
        ("a huge length", [&[0x0a][..], &[0xff; 9], &[0x01]].concat()),
        ("an endless number", vec![0xff; 64]),
        ("a piece that is not UTF-8", vec![0x0a, 0x04, 0x0a, 0x02, 0xff, 0xfe]),
        ("an unknown kind", vec![0x0a, 0x05, 0x0a, 0x01, b'a', 0x18, 0x09]),
        ("an unknown wire type", vec![0x0b, 0x00]),
    ];
    for (name, bytes) in cases {
        let error = Tokenizer::from_bytes(&bytes, "tokenizer.model").expect_err(name).to_string();
        assert!(error.contains("expected"), "{name}: {error}");
    }
    for path in ["/dev/zero", "/", "/nowhere"] {
        assert!(Tokenizer::open(Path::new(path)).is_err(), "{path}");
    }
}

/// A protobuf field: a number, or the bytes of a message.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let length = bytes.len() as u16;
    [&[number << 3 | 2, length as u8 | 0x80, (length >> 7) as u8][..], bytes].concat()
}

fn piece(text: &[u8], score: f32, kind: u8) -> Vec<u8> {
    let text = [&[0x0a, text.len() as u8 | 0x80, (text.len() >> 7) as u8], text].concat();
    field(1, &[&text[..], &[0x15], &score.to_le_bytes(), &[0x18, kind]].concat())
}

const TRAINER: &[u8] = &[0x18, 2, 0x98, 0x02, 1];
const NORMALISER: &[u8] = &[0x20, 0, 0x18, 1, 0x28, 1];

/// A whole model of few pieces, with these at the end, and these flags.
fn tiny(more: &[Vec<u8>], trainer: &[u8], normaliser: &[u8]) -> Vec<u8> {
    let special = [piece(b"[UNK]", 0.0, 2), piece(b"[EOS]", 0.0, 3), piece(b"\n", 0.0, 4)];
    let bytes = (0..256).map(|byte| piece(format!("<0x{byte:02X}>").as_bytes(), 0.0, 6));
    let learned = ["a", "b", "ab", "\u{2581}", "\u{2581}ab"];
    let learned = learned.iter().zip(0_u8..).map(|(text, rank)| piece(text.as_bytes(), -f32::from(rank), 1));
    let pieces: Vec<u8> =
        special.into_iter().chain(bytes).chain(learned).chain(more.iter().cloned()).flatten().collect();
    [pieces, field(2, trainer), field(3, normaliser)].concat()
}

#[test]
fn a_small_model_of_the_same_kind_is_read() {
    let tokenizer = Tokenizer::from_bytes(&tiny(&[], TRAINER, NORMALISER), "tiny").unwrap();
    assert_eq!(tokenizer.vocab_size(), 264);
    assert_eq!(tokenizer.encode("abab\nc"), [263, 261, 2, 3 + u32::from(b'c')]);
    assert_eq!(tokenizer.decode(&[263, 261, 2, 3 + u32::from(b'c')]), "abab\nc");
}

#[test]
fn models_of_another_kind_are_refused_by_what_differs() {
    let unlike: &[(&str, &[u8], &[u8])] = &[
        ("a BPE model", &[0x18, 1, 0x98, 0x02, 1], NORMALISER),
        ("a BPE model", &[0x98, 0x02, 1], NORMALISER),
        ("byte fallback", &[0x18, 2], NORMALISER),
        ("byte fallback", &[0x18, 2, 0x98, 0x02, 0], NORMALISER),
        ("white space at the beginning", &[0x18, 2, 0x98, 0x02, 1, 0xc0, 0x01, 1], NORMALISER),
        ("a space put in front", TRAINER, &[0x20, 0, 0x18, 0]),
        ("white space kept", TRAINER, &[]),
        ("white space kept", TRAINER, &[0x20, 1]),
        ("spaces written as U+2581", TRAINER, &[0x20, 0, 0x28, 0]),
        ("the identity normaliser", TRAINER, &[0x20, 0, 0x12, 1, 7]),
        ("a length within the message", TRAINER, &[0x12, 9, 7]),
        ("a number", &[0x18], NORMALISER),
    ];
    for (expected, trainer, normaliser) in unlike {
        let error = Tokenizer::from_bytes(&tiny(&[], trainer, normaliser), "tiny").expect_err(expected).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn hostile_vocabularies_are_refused() {
    let alike: Vec<_> = (0..4000).map(|i| piece(format!("{}{i}", "a".repeat(1000)).as_bytes(), 0.0, 4)).collect();
    let many: Vec<_> = (0..5000).map(|i| piece(format!("<{i}>").as_bytes(), 0.0, 4)).collect();
    let cases: &[(&str, Vec<Vec<u8>>)] = &[
        ("each piece once", vec![piece(b"ab", -9.0, 1)]),
        ("each piece once", vec![piece(b"\n", 0.0, 4)]),
        ("each piece once", vec![piece(b"<0x0A>", 0.0, 6)]),
        ("each piece once", vec![piece(b"<0x0a>", 0.0, 6)]),
        ("a byte as <0xNN>", vec![piece(b"<0x100>", 0.0, 6)]),
        ("a byte as <0xNN>", vec![piece(b"<0x+1>", 0.0, 6)]),
        ("a byte as <0xNN>", vec![piece(b"newline", 0.0, 6)]),
        ("a finite score", vec![piece(b"abb", f32::NAN, 1)]),
        ("a finite score", vec![piece(b"abb", f32::NEG_INFINITY, 1)]),
        ("a text of 1 to 1024 bytes", vec![piece(b"", -9.0, 1)]),
        ("a text of 1 to 1024 bytes", vec![piece(b"", 0.0, 4)]),
        ("a text of 1 to 1024 bytes", vec![piece(&[b'a'; 1025], -9.0, 1)]),
        ("at most 4096 user-defined pieces", many),
        ("at most 65536 bytes of user-defined pieces", alike),
        ("a piece in UTF-8", vec![piece(&[0xff], -9.0, 1)]),
        ("a kind of piece from 1 to 6", vec![piece(b"abb", -9.0, 7)]),
    ];
    for (expected, more) in cases {
        let error = Tokenizer::from_bytes(&tiny(more, TRAINER, NORMALISER), "tiny").expect_err(expected).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let error = Tokenizer::from_bytes(&[field(2, TRAINER), field(3, NORMALISER)].concat(), "tiny").unwrap_err();
    assert!(error.to_string().contains("a piece for every byte"), "{error}");
}

proptest! {
    #[test]
    fn every_text_without_the_space_mark_survives(text in "\\PC{0,60}") {
        prop_assume!(!text.contains('\u{2581}'));
        let ids = tokenizer().encode(&text);
        prop_assert_eq!(tokenizer().decode(&ids), text);
    }

    #[test]
    fn streaming_equals_decoding(ids in prop::collection::vec(0_u32..132_000, 0..40)) {
        prop_assert_eq!(streamed(&ids), tokenizer().decode(&ids));
    }

    #[test]
    fn damaged_files_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        length in any::<prop::sample::Index>(),
        whole in any::<bool>(),
        text in "\\PC{0,20}",
    ) {
        let mut bytes = tiny(&[], TRAINER, NORMALISER);
        for (at, byte) in changes {
            *at.get_mut(&mut bytes) = byte;
        }
        if !whole {
            bytes.truncate(length.index(bytes.len()));
        }
        if let Ok(tokenizer) = Tokenizer::from_bytes(&bytes, "tiny") {
            let ids = tokenizer.encode(&text);
            tokenizer.decode(&ids);
        }
    }

    #[test]
    fn damage_in_the_published_file_never_panics(at in 0_usize..4000, byte in any::<u8>(), cut in 0_usize..4000) {
        static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
        let good = GOOD.get_or_init(|| std::fs::read(root().join("model/demo/tokenizer.model")).unwrap());
        let mut bytes = good[..4000 - cut].to_vec();
        if let Some(slot) = bytes.get_mut(at) {
            *slot = byte;
        }
        prop_assert!(Tokenizer::from_bytes(&bytes, "tokenizer.model").is_err());
    }
}
