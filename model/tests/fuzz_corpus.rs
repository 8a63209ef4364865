//! Every committed input of the fuzz targets goes through the targets' own functions. A reader that panics turns this red.

use std::path::Path;

#[path = "../../tests/fuzz/src/lib.rs"]
pub mod fuzz;

/// Runs the seeds and the regressions of one target. Seeds named `good-` must be accepted, so that they reach all of a reader.
fn replay(target: &str, run: fn(&[u8]) -> bool) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz");
    let mut good = 0;
    for kind in ["corpus", "regressions"] {
        let Ok(files) = std::fs::read_dir(folder.join(kind).join(target)) else {
            assert_eq!(kind, "regressions", "no seeds of {target}");
            continue;
        };
        for file in files {
            let path = file.expect("a readable folder").path();
            let bytes = std::fs::read(&path).expect("a readable file");
            eprintln!("{}, {} bytes", path.display(), bytes.len());
            let accepted = run(&bytes);
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("good-")) {
                assert!(accepted, "{} was refused", path.display());
                good += 1;
            }
        }
    }
    assert!(good > 0, "no good seed of {target}");
}

#[test]
fn gguf_inputs_do_no_harm() {
    replay("gguf", fuzz::gguf::run);
}

#[test]
fn safetensors_inputs_do_no_harm() {
    replay("safetensors", fuzz::safetensors::run);
}

#[test]
fn pickle_inputs_do_no_harm() {
    replay("pickle", fuzz::pickle::run);
}

#[test]
fn tokenizer_inputs_do_no_harm() {
    replay("tokenizer", fuzz::tokenizer::run);
}
