//! `grokpipe convert` as a process: killed in the middle and run again, and what it wrote run like any other model.

use std::{
    fs,
    path::Path,
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use grokpipe_tests::{
    demo_model,
    processes::{PATIENCE, grokpipe, wait},
};
use safetensors::SafeTensors;

fn convert(model: &Path, out: &Path, more: &[&str]) -> Output {
    let output = grokpipe(["convert"]).arg(model).arg(out).args(more).output().expect("grokpipe runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

fn lines_of(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[test]
fn a_conversion_killed_in_the_middle_goes_on_and_comes_to_the_same_bytes() {
    let model = demo_model();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    convert(&model, &path("whole.gguf"), &["--type", "q4_0"]);
    let journal = path("killed.gguf.journal");
    let mut continued = false;
    // It takes a moment only, and on a machine that is fast enough it ends before it is killed.
    for _ in 0..10 {
        let mut child = grokpipe(["convert"])
            .arg(&model)
            .arg(path("killed.gguf"))
            .args(["--type", "q4_0"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("grokpipe runs");
        let begun = Instant::now();
        while lines_of(&journal) < 20 && !path("killed.gguf").exists() {
            assert!(begun.elapsed() < PATIENCE, "nothing was written");
            wait(Duration::from_millis(1));
        }
        child.kill().expect("a process that is killed or over");
        child.wait().expect("its end");
        if journal.exists() {
            assert!(!path("killed.gguf").exists(), "no file before everything is in it");
            let output = convert(&model, &path("killed.gguf"), &["--type", "q4_0"]);
            continued = String::from_utf8_lossy(&output.stdout).contains("continued an interrupted conversion");
            break;
        }
        fs::remove_file(path("killed.gguf")).expect("a file");
        fs::remove_file(path("killed.gguf.sha256")).expect("a file");
    }
    assert!(continued, "it was killed and went on");
    assert!(!journal.exists() && !path("killed.gguf.partial").exists());
    assert!(fs::read(path("killed.gguf")).expect("a file") == fs::read(path("whole.gguf")).expect("a file"));
}

/// Logits of the first ids of the quiz.
fn logits(model: &Path, out: &Path) -> Vec<f32> {
    let run = grokpipe(["logits", "--token-ids", "455,5403,404,6970,393", "--device", "cpu", "--model"])
        .arg(model)
        .arg("--out")
        .arg(out)
        .output()
        .expect("grokpipe runs");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let bytes = fs::read(out).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let words = file.tensor("logits").expect("logits").data().as_chunks::<4>().0.to_vec();
    words.into_iter().map(f32::from_le_bytes).collect()
}

#[test]
fn the_demo_model_says_the_same_after_its_conversion() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("out.safetensors");
    let expected = logits(&demo_model(), &out);
    let largest =
        |row: &[f32]| (0..row.len()).reduce(|a, b| if row[b] > row[a] { b } else { a }).expect("a vocabulary");
    for (format, more, most) in [("q8_0", &[][..], 0.2), ("bf16", &["--split-max-size", "20MB"], 0.2)] {
        let name = format!("{format}.gguf");
        let output = convert(&demo_model(), &folder.path().join(&name), &[&["--type", format], more].concat());
        let text = String::from_utf8_lossy(&output.stdout);
        let file = text.split_whitespace().next().expect("the name of a file");
        let found = logits(&folder.path().join(file), &out);
        let worst = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{format}: logits within {worst:e}");
        assert!(worst <= most, "{format}: {worst}");
        for (a, b) in expected.chunks(131_072).zip(found.chunks(131_072)) {
            assert_eq!(largest(a), largest(b), "{format}");
        }
    }
}

#[test]
fn a_failure_names_the_file_and_what_to_do() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("m.gguf");
    fs::write(&out, "precious").expect("a file");
    let run = grokpipe(["convert"]).arg(demo_model()).arg(&out).args(["--type", "q8_0"]).output().expect("it runs");
    let said = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(1), "{said}");
    assert!(
        said.contains("the model was not converted") && said.contains("m.gguf: expected no such file yet"),
        "{said}"
    );
    assert_eq!(fs::read_to_string(&out).expect("a file"), "precious");
}
