//! `grokpipe convert` as a process: killed in the middle and run again, and what it wrote run like any other model.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, ExitStatus, Output, Stdio},
};

use grokpipe_tests::{demo_model, processes::grokpipe};
use libc::SIGXFSZ;
use safetensors::SafeTensors;

fn convert(model: &Path, out: &Path, more: &[&str]) -> Output {
    let output = grokpipe(["convert"]).arg(model).arg(out).args(more).output().expect("grokpipe runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

/// A conversion that the system kills when a file of it grows beyond so many units of 512 bytes: in the middle on any machine.
fn convert_until_killed(model: &Path, out: &Path, units: u64) -> ExitStatus {
    let convert = grokpipe(["convert"]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -c 0; ulimit -f \"$0\"; exec \"$@\"", &units.to_string()]);
    limited.arg(convert.get_program()).args(convert.get_args()).arg(model).arg(out).args(["--type", "q4_0"]);
    for (key, value) in convert.get_envs() {
        match value {
            Some(value) => limited.env(key, value),
            None => limited.env_remove(key),
        };
    }
    limited.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("sh runs")
}

#[test]
fn a_conversion_killed_in_the_middle_goes_on_and_comes_to_the_same_bytes() {
    let model = demo_model();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    convert(&model, &path("whole.gguf"), &["--type", "q4_0"]);
    let whole = fs::read(path("whole.gguf")).expect("a file");
    let journal = path("killed.gguf.journal");
    // The vocabulary alone is half of this model.
    let killed = convert_until_killed(&model, &path("killed.gguf"), whole.len() as u64 * 4 / 5 / 512);
    assert_eq!(killed.signal(), Some(SIGXFSZ), "{killed}");
    assert!(fs::read_to_string(&journal).expect("a journal").lines().count() > 20, "much of it was written");
    assert!(!path("killed.gguf").exists(), "no file before everything is in it");
    let output = convert(&model, &path("killed.gguf"), &["--type", "q4_0"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("continued an interrupted conversion"), "{said}");
    assert!(!journal.exists() && !path("killed.gguf.partial").exists());
    assert!(fs::read(path("killed.gguf")).expect("a file") == whole);
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
