//! Whole conversions of small models: what comes out, what is refused, and what an interruption leaves.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tempfile::TempDir;

use super::*;
use crate::{
    BlockType, Format, LayerTensor, Layout, MatrixSource, ModelConfig, TensorName, TensorShape, WeightSource,
    checkpoint::tests::{
        build::{ArraySpec, Pickle},
        failing::Failing,
        hugging_face,
    },
    tokenizer::Tokenizer,
};

/// Layers of the small checkpoint.
const LAYERS: u32 = 3;

/// A checkpoint in xAI's layout: width 256, experts of width 512, scales between 2^-11 and 2^-9, which halves hold exactly.
struct Checkpoint {
    groups: usize,
    hidden: usize,
    /// The scale at a place.
    scale: fn(usize) -> f32,
    /// The embedding's number at a place.
    embedding: fn(usize) -> f32,
}

impl Default for Checkpoint {
    fn default() -> Self {
        let scale = |i: usize| (1.0 + (i * 29 % 128) as f32 / 128.0) / [512.0, 1024.0, 2048.0][i % 3];
        let embedding = |i: usize| ((i * 7919 % 2003) as f32 / 1001.0 - 1.0) * 0.3;
        Self { groups: 8, hidden: 256, scale, embedding }
    }
}

impl Checkpoint {
    fn config_json(&self) -> String {
        let d = self.hidden;
        serde_json::json!({
            "name": "small", "vocab_size": 40, "d_model": d, "num_layers": LAYERS, "num_q_heads": 8, "num_kv_heads": 2,
            "key_size": d / 8, "widening_factor": 3, "ffn_size": 2 * d, "num_experts": 2, "num_selected_experts": 2,
            "rope_base": 10000, "rms_norm_eps": 1e-5, "embedding_multiplier_scale": 16.5, "output_multiplier_scale": 0.25,
            "attn_output_multiplier": 0.18, "attn_logit_cap": 30.0, "sequence_len": 128, "pad_token": 0, "eos_token": 2,
            "scale_groups_row_parallel": self.groups
        })
        .to_string()
    }

    fn write(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), self.config_json()).unwrap();
        fs::create_dir(folder.path().join("ckpt-0")).unwrap();
        let config = ModelConfig::from_json(&self.config_json(), "config.json").unwrap();
        let sizes = |dimensions: &[u64]| dimensions.iter().map(|size| *size as i32).collect::<Vec<_>>();
        for (index, name) in TensorName::in_file_order(LAYERS).into_iter().enumerate() {
            let shape = name.shape(&config);
            let (dimensions, count) = (sizes(&shape.dimensions()), shape.dimensions().iter().product::<u64>() as usize);
            let pickle = match shape.scale_dimensions() {
                None => {
                    let number = |i: usize| match name {
                        TensorName::Embedding => (self.embedding)(i),
                        _ => 0.5 + (i * 31 % 97) as f32 / 97.0,
                    };
                    let numbers: Vec<f32> = (0..count).map(number).collect();
                    Pickle::new().array(&ArraySpec::f32(&dimensions, &numbers))
                }
                Some(scales) => {
                    // Every byte occurs, -128 too, and neighbours in both directions differ.
                    let integers: Vec<i8> = (0..count).map(|i| (i * 113 + i / 255 * 7 + index) as i8).collect();
                    let count = scales.iter().product::<u64>() as usize;
                    let numbers: Vec<f32> = (0..count).map(|i| (self.scale)(i + index)).collect();
                    let weight = ArraySpec::i8(&dimensions, &integers);
                    let scales = ArraySpec::bf16(&sizes(&scales), &numbers);
                    Pickle::new().quantised(&[("weight", &weight), ("scales", &scales)])
                }
            };
            fs::write(folder.path().join(format!("ckpt-0/tensor{index:05}_000")), pickle.done()).unwrap();
        }
        folder
    }
}

fn options(mix: Mix) -> Options {
    Options { mix, split_max_bytes: None, threads: 2 }
}

/// Converts without being interrupted.
fn converted(model: &Path, out: &Path, options: &Options) -> Result<Report, ModelError> {
    convert(&Model::open(model)?, out, options, &mut |_, _| ())
}

fn bytes(matrix: &dyn MatrixSource) -> Vec<u8> {
    let mut bytes = vec![0; matrix.spec().weight_bytes() as usize];
    matrix.read(0, &mut bytes).unwrap();
    bytes
}

/// The numbers of a matrix, `[experts, outputs, inputs]`, however it is stored.
fn numbers(model: &Model, name: &TensorName) -> Vec<f32> {
    let matrix = model.matrix(name).unwrap();
    let (spec, bytes, scales) = (matrix.spec(), bytes(&*matrix), matrix.scales().unwrap());
    let (inputs, outputs) = (spec.inputs, spec.outputs);
    let mut numbers = vec![0.0; spec.experts * inputs * outputs];
    match spec.format {
        Format::Blocks(kind) => {
            kind.dequantize(&bytes, &mut numbers);
            return numbers;
        }
        Format::F32 => {
            let words = bytes.as_chunks::<4>().0;
            numbers.iter_mut().zip(words).for_each(|(number, word)| *number = f32::from_le_bytes(*word));
        }
        Format::Int8 { groups } => {
            for (at, number) in numbers.iter_mut().enumerate() {
                let (expert, input, output) = (at / outputs / inputs, at / outputs % inputs, at % outputs);
                let scale = scales[(expert * groups + input / (inputs / groups)) * outputs + output];
                *number = f32::from(bytes[at] as i8) * scale;
            }
        }
    }
    if spec.layout == Layout::OutIn {
        return numbers;
    }
    let place = |at: usize| {
        let (expert, output, input) = (at / inputs / outputs, at / inputs % outputs, at % inputs);
        (expert * inputs + input) * outputs + output
    };
    (0..numbers.len()).map(|at| numbers[place(at)]).collect()
}

fn names() -> impl Iterator<Item = TensorName> {
    TensorName::in_file_order(LAYERS).into_iter()
}

fn is_matrix(model: &Model, name: &TensorName) -> bool {
    matches!(name.shape(model.config()), TensorShape::Matrix { .. })
}

fn files_of(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn an_int8_checkpoint_becomes_q8_0_with_its_integers_and_scales_byte_for_byte() {
    let (source, target) = (Checkpoint::default().write(), tempfile::tempdir().unwrap());
    let out = target.path().join("small.gguf");
    let report = converted(source.path(), &out, &options(Mix::Q8_0)).unwrap();
    assert_eq!(report.notes, []);
    let (source, target) = (Model::open(source.path()).unwrap(), Model::open(&out).unwrap());
    let mut compared = 0;
    for name in names().filter(|name| is_matrix(&source, name)) {
        let (from, to) = (source.matrix(&name).unwrap(), target.matrix(&name).unwrap());
        let Format::Int8 { groups } = from.spec().format else { continue };
        assert_eq!(to.spec().format, Format::Blocks(BlockType::Q8_0));
        let (inputs, outputs) = (from.spec().inputs, from.spec().outputs);
        let (integers, scales, blocks) = (bytes(&*from), from.scales().unwrap(), bytes(&*to));
        for (index, block) in blocks.as_chunks::<34>().0.iter().enumerate() {
            let (row, first) = (index / (inputs / 32), index % (inputs / 32) * 32);
            let (expert, output) = (row / outputs, row % outputs);
            let scale = scales[(expert * groups + first / (inputs / groups)) * outputs + output];
            let half = half::f16::from_le_bytes([block[0], block[1]]);
            assert_eq!(half.to_f32().to_bits(), scale.to_bits(), "{name}: block {index}");
            for (l, byte) in block[2..].iter().enumerate() {
                assert_eq!(*byte, integers[(expert * inputs + first + l) * outputs + output], "{name}: block {index}");
            }
            compared += 1;
        }
    }
    assert_eq!(compared, LAYERS as usize * (6 * 256 * 512 + 2 * 256 * 256 + 2 * 256 * 64) / 32);
}

#[test]
fn every_type_opens_and_its_numbers_are_near_the_sources() {
    let (source, target) = (Checkpoint::default().write(), tempfile::tempdir().unwrap());
    let from = Model::open(source.path()).unwrap();
    for (mix, name, bound) in [
        (Mix::Q8_0, "q8_0", 0.005),
        (Mix::Q4_0, "q4_0", 0.09),
        (Mix::Q4K, "q4_k", 0.075),
        (Mix::Q6K, "q6_k", 0.02),
        (Mix::Bf16, "bf16", 0.003),
        (Mix::Mixed, "mixed", 0.075),
    ] {
        let out = target.path().join(format!("{name}.gguf"));
        let report = converted(source.path(), &out, &options(mix)).unwrap();
        assert_eq!((report.notes, report.resumed_bytes), (vec![], 0));
        let to = Model::open(&out).unwrap();
        assert_eq!(to.inspect().unwrap().len(), 2 + 12 * LAYERS as usize);
        assert_eq!(*to.config(), ModelConfig { scale_groups_row_parallel: 1, ..from.config().clone() });
        for tensor in names() {
            if !is_matrix(&from, &tensor) {
                assert_eq!(to.vector(&tensor).unwrap(), from.vector(&tensor).unwrap(), "{tensor} in {name}");
                continue;
            }
            let (expected, found) = (numbers(&from, &tensor), numbers(&to, &tensor));
            assert!(found.iter().all(|number| number.is_finite()));
            if matches!(tensor, TensorName::Layer(_, LayerTensor::Router)) {
                assert_eq!(to.matrix(&tensor).unwrap().spec().format, Format::F32);
                assert_eq!(found, expected, "{tensor} in {name}");
                continue;
            }
            let wanted = Format::Blocks(mix.format(&tensor, from.config(), false));
            assert_eq!(to.matrix(&tensor).unwrap().spec().format, wanted, "{tensor} in {name}");
            let square = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| f64::from(x).powi(2)).sum::<f64>();
            let off = square(&mut expected.iter().zip(&found).map(|(a, b)| a - b));
            let off = (off / square(&mut expected.iter().copied())).sqrt();
            assert!(off <= bound, "{tensor} in {name}: {off}");
        }
    }
}

#[test]
fn the_same_bytes_for_any_number_of_threads_and_from_what_is_converted_already() {
    let (source, target) = (Checkpoint::default().write(), tempfile::tempdir().unwrap());
    for mix in [Mix::Q4K, Mix::Q8_0, Mix::Mixed] {
        let name = |text: &str| target.path().join(format!("{mix:?}-{text}.gguf"));
        let (one, many, again) = (name("one"), name("many"), name("again"));
        converted(source.path(), &one, &Options { threads: 1, ..options(mix) }).unwrap();
        converted(source.path(), &many, &Options { threads: 5, ..options(mix) }).unwrap();
        // Blocks of the wanted format are copied, and not quantised once more.
        converted(&one, &again, &options(mix)).unwrap();
        let bytes = fs::read(&one).unwrap();
        assert!(bytes == fs::read(many).unwrap() && bytes == fs::read(again).unwrap(), "{mix:?}");
    }
}

#[test]
fn split_output_equals_unsplit_and_no_part_is_longer_than_asked() {
    let (source, target) = (Checkpoint::default().write(), tempfile::tempdir().unwrap());
    let (whole, split) = (target.path().join("whole.gguf"), target.path().join("split.gguf"));
    converted(source.path(), &whole, &options(Mix::Q8_0)).unwrap();
    let most = 700_000;
    let parted = Options { split_max_bytes: Some(most), ..options(Mix::Q8_0) };
    let report = converted(source.path(), &split, &parted).unwrap();
    assert!(report.files.len() >= 3, "{:?}", report.files);
    assert!(!split.exists());
    let mut sums = String::new();
    for (index, (path, length, checksum)) in report.files.iter().enumerate() {
        let name = format!("split-{:05}-of-{:05}.gguf", index + 1, report.files.len());
        assert_eq!(path.file_name().unwrap(), &*name);
        let bytes = fs::read(path).unwrap();
        assert!(bytes.len() as u64 == *length && *length <= most, "{length}");
        let mut sum = Checksum::default();
        sum.add(&bytes);
        assert_eq!(sum.hex(), *checksum);
        sums.push_str(&format!("{checksum}  {name}\n"));
    }
    assert_eq!(fs::read_to_string(target.path().join("split.gguf.sha256")).unwrap(), sums);
    let (whole, split) = (Model::open(&whole).unwrap(), Model::open(&report.files[1].0).unwrap());
    assert_eq!(whole.config(), split.config());
    for name in names() {
        if is_matrix(&whole, &name) {
            assert!(bytes(&*whole.matrix(&name).unwrap()) == bytes(&*split.matrix(&name).unwrap()), "{name}");
        } else {
            assert_eq!(whole.vector(&name).unwrap(), split.vector(&name).unwrap());
        }
    }
    let small = Options { split_max_bytes: Some(50_000), ..options(Mix::Q8_0) };
    let error = converted(source.path(), &target.path().join("small.gguf"), &small).unwrap_err().to_string();
    assert!(error.contains("blk.0.ffn_gate_exps.weight") && error.contains("found 50000 bytes"), "{error}");
    assert!(files_of(target.path()).iter().all(|name| !name.starts_with("small")));
}

/// Converts until `bytes` of the source were read; bytes that were left at the end, or how it failed.
fn limited(source: &Path, out: &Path, options: &Options, bytes: u64) -> Result<u64, ModelError> {
    let left = Arc::new(AtomicU64::new(bytes));
    let model = Model::open_folder(source, Failing::after_bytes(source, &left))?;
    convert(&model, out, options, &mut |_, _| ())?;
    Ok(left.load(Ordering::SeqCst))
}

/// A conversion in parts, interrupted after three fifths of the source, and what it should have come to.
struct Interrupted {
    source: TempDir,
    target: TempDir,
    out: PathBuf,
    options: Options,
    expected: Vec<(String, Vec<u8>)>,
    /// Bytes read by a conversion from the beginning.
    reads: u64,
}

impl Interrupted {
    fn new() -> Self {
        const MUCH: u64 = 1 << 40;
        let (source, target) = (Checkpoint::default().write(), tempfile::tempdir().unwrap());
        let options = Options { split_max_bytes: Some(1_200_000), ..options(Mix::Q8_0) };
        let out = target.path().join("out.gguf");
        let reads = MUCH - limited(source.path(), &out, &options, MUCH).unwrap();
        let all = |name: &String| (name.clone(), fs::read(target.path().join(name)).unwrap());
        let expected: Vec<_> = files_of(target.path()).iter().map(all).collect();
        assert!(expected.len() >= 3, "parts and checksums");
        let this = Self { source, target, out, options, expected, reads };
        this.remove_all();
        this.interrupt(3 * reads / 5);
        this
    }

    fn remove_all(&self) {
        files_of(self.target.path()).iter().for_each(|name| fs::remove_file(self.path(name)).unwrap());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.target.path().join(name)
    }

    fn interrupt(&self, after: u64) {
        let error = limited(self.source.path(), &self.out, &self.options, after).unwrap_err().to_string();
        assert!(error.contains("pulled out"), "{error}");
        assert!(is_unfinished(&self.out));
        // Nothing stands under its real name before everything is there.
        let names = files_of(self.target.path());
        assert!(names.iter().all(|name| name.ends_with(".partial") || name == "out.gguf.journal"), "{names:?}");
    }

    /// Converts again, and compares all files; bytes of the source that were read.
    fn resumed(&self) -> (Report, u64) {
        let left = Arc::new(AtomicU64::new(u64::MAX));
        let folder = self.source.path();
        let model = Model::open_folder(folder, Failing::after_bytes(folder, &left)).unwrap();
        let report = convert(&model, &self.out, &self.options, &mut |done, total| assert!(done <= total)).unwrap();
        let names: Vec<&String> = self.expected.iter().map(|(name, _)| name).collect();
        assert_eq!(files_of(self.target.path()).iter().collect::<Vec<_>>(), names);
        for (name, expected) in &self.expected {
            assert!(fs::read(self.path(name)).unwrap() == *expected, "{name}");
        }
        (report, u64::MAX - left.load(Ordering::SeqCst))
    }

    /// The last file that was being written.
    fn last_partial(&self) -> PathBuf {
        let names = files_of(self.target.path());
        self.path(names.iter().rfind(|name| name.ends_with(".gguf.partial")).unwrap())
    }
}

#[test]
fn an_interrupted_conversion_goes_on_behind_the_last_whole_tensor() {
    let interrupted = Interrupted::new();
    let (report, reads) = interrupted.resumed();
    assert!(report.resumed_bytes > 1_200_000, "{}", report.resumed_bytes);
    assert!(reads < interrupted.reads * 3 / 5, "{reads} of {} were read", interrupted.reads);
}

#[test]
fn a_conversion_interrupted_anywhere_comes_to_the_same_bytes() {
    let interrupted = Interrupted::new();
    for fifth in [1, 2, 4] {
        interrupted.remove_all();
        interrupted.interrupt(fifth * interrupted.reads / 5);
        // And once more, before it gets as far again.
        interrupted.interrupt(interrupted.reads / 4);
        interrupted.resumed();
    }
}

#[test]
fn what_was_torn_or_damaged_by_the_interruption_is_written_anew() {
    type Damage = fn(&Interrupted);
    let damages: [(&str, Damage); 7] = [
        ("the file is shorter than the journal says", |this| {
            let file = fs::OpenOptions::new().write(true).open(this.last_partial()).unwrap();
            file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        }),
        ("a byte of a finished tensor is another", |this| {
            let path = this.path("out-00001-of-00003.gguf.partial");
            let mut bytes = fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(&path, bytes).unwrap();
        }),
        ("a file is gone", |this| fs::remove_file(this.last_partial()).unwrap()),
        ("the journal's last line is torn", |this| {
            let text = fs::read_to_string(this.path("out.gguf.journal")).unwrap();
            fs::write(this.path("out.gguf.journal"), &text[..text.len() - 20]).unwrap();
        }),
        ("the journal is empty", |this| fs::write(this.path("out.gguf.journal"), "").unwrap()),
        ("the journal has other lines in between", |this| {
            let text = fs::read_to_string(this.path("out.gguf.journal")).unwrap();
            fs::write(this.path("out.gguf.journal"), text.replacen("\n0 3 ", "\n7 999 ", 1) + "0 -1 x\n\n").unwrap();
        }),
        ("the file has more than was finished", |this| {
            let bytes = [fs::read(this.last_partial()).unwrap(), vec![7; 2_000_000]].concat();
            fs::write(this.last_partial(), bytes).unwrap();
        }),
    ];
    for (name, damage) in damages {
        println!("{name}");
        let interrupted = Interrupted::new();
        damage(&interrupted);
        interrupted.resumed();
    }
}

#[test]
fn a_run_that_ended_between_two_renamings_is_completed() {
    let interrupted = Interrupted::new();
    interrupted.remove_all();
    let journal = interrupted.path("out.gguf.journal");
    let mut saved = Vec::new();
    let model = Model::open(interrupted.source.path()).unwrap();
    convert(&model, &interrupted.out, &interrupted.options, &mut |_, _| saved = fs::read(&journal).unwrap()).unwrap();
    // As it was after the first renaming, of the last part; the others and the checksums were still to come.
    fs::write(&journal, saved).unwrap();
    fs::remove_file(interrupted.path("out.gguf.sha256")).unwrap();
    for name in ["out-00001-of-00003.gguf", "out-00003-of-00003.gguf"] {
        fs::rename(interrupted.path(name), interrupted.path(&format!("{name}.partial"))).unwrap();
    }
    let (report, _) = interrupted.resumed();
    // All but the last norm, which was not yet in the journal.
    let total: u64 = report.files.iter().map(|(_, length, _)| length).sum();
    assert!(report.resumed_bytes >= total - 1024, "{} of {total}", report.resumed_bytes);
}

#[test]
fn the_first_part_gets_its_name_when_all_others_have_theirs() {
    let interrupted = Interrupted::new();
    let blocked = interrupted.path("out-00002-of-00003.gguf");
    let model = Model::open(interrupted.source.path()).unwrap();
    let mut block = |_, _| fs::create_dir_all(blocked.join("in the way")).unwrap();
    let error = convert(&model, &interrupted.out, &interrupted.options, &mut block).unwrap_err().to_string();
    assert!(error.contains("out-00002-of-00003.gguf"), "{error}");
    assert!(!interrupted.path("out-00001-of-00003.gguf").exists());
    fs::remove_dir_all(blocked).unwrap();
    interrupted.resumed();
}

#[test]
fn a_journal_of_another_conversion_is_refused_and_left_alone() {
    let interrupted = Interrupted::new();
    let before = fs::read(interrupted.path("out.gguf.journal")).unwrap();
    let other = Checkpoint { embedding: |i| i as f32 / 1e5, ..Checkpoint::default() }.write();
    // Another number in one norm is another model, even where all sizes and times agree.
    let retrained = Checkpoint::default().write();
    for name in files_of(&retrained.path().join("ckpt-0")) {
        let [ours, other] = [interrupted.source.path(), retrained.path()].map(|path| path.join("ckpt-0").join(&name));
        if name == "tensor00001_000" {
            let mut bytes = fs::read(&other).unwrap();
            let at = bytes.len() - 40;
            bytes[at] ^= 1;
            fs::write(&other, bytes).unwrap();
        }
        let time = fs::metadata(ours).unwrap().modified().unwrap();
        fs::File::options().write(true).open(other).unwrap().set_modified(time).unwrap();
    }
    for (source, options) in [
        (interrupted.source.path(), Options { mix: Mix::Q4_0, ..interrupted.options }),
        (interrupted.source.path(), Options { split_max_bytes: None, ..interrupted.options }),
        (other.path(), interrupted.options),
        (retrained.path(), interrupted.options),
    ] {
        let error = converted(source, &interrupted.out, &options).unwrap_err().to_string();
        assert!(
            error.contains("out.gguf.journal") && error.contains("since changed, another format or file"),
            "{error}"
        );
    }
    // A tensor that was written anew is another model, even where all sizes agree, or most of it would be the old one's.
    let tensor =
        fs::File::options().write(true).open(interrupted.source.path().join("ckpt-0/tensor00003_000")).unwrap();
    let before_that = tensor.metadata().unwrap().modified().unwrap();
    tensor.set_modified(before_that + Duration::from_millis(1)).unwrap();
    let error = converted(interrupted.source.path(), &interrupted.out, &interrupted.options).unwrap_err().to_string();
    assert!(error.contains("since changed"), "{error}");
    tensor.set_modified(before_that).unwrap();
    assert_eq!(fs::read(interrupted.path("out.gguf.journal")).unwrap(), before);
    for list in ["a shopping list\n", "a shopping list"] {
        fs::write(interrupted.path("out.gguf.journal"), list).unwrap();
        let error =
            converted(interrupted.source.path(), &interrupted.out, &interrupted.options).unwrap_err().to_string();
        assert!(error.contains("out.gguf.journal"), "{error}");
        assert_eq!(fs::read_to_string(interrupted.path("out.gguf.journal")).unwrap(), list);
    }
}

#[test]
fn what_somebody_put_where_results_go_is_left_alone_when_a_conversion_goes_on() {
    let interrupted = Interrupted::new();
    let written = || -> Vec<u64> {
        let partial = files_of(interrupted.target.path()).into_iter().filter(|name| name.ends_with(".gguf.partial"));
        partial.map(|name| fs::metadata(interrupted.path(&name)).unwrap().len()).collect()
    };
    let before = written();
    let refused = |name: &str, expected: &str| {
        let error =
            converted(interrupted.source.path(), &interrupted.out, &interrupted.options).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(expected), "{name}: {error}");
        assert_eq!(written(), before, "{name}: found before hours of work");
    };
    // A part that is being written, one that is not begun, and the checksums.
    for name in ["out-00001-of-00003.gguf", "out-00003-of-00003.gguf", "out.gguf.sha256"] {
        fs::write(interrupted.path(name), "precious").unwrap();
        refused(name, "no such file yet");
        assert_eq!(fs::read_to_string(interrupted.path(name)).unwrap(), "precious");
        fs::remove_file(interrupted.path(name)).unwrap();
    }
    fs::create_dir(interrupted.path("out.gguf.sha256.partial")).unwrap();
    refused("out.gguf.sha256.partial", "a plain file");
    fs::remove_dir(interrupted.path("out.gguf.sha256.partial")).unwrap();
    let partial = interrupted.path("out-00001-of-00003.gguf.partial");
    let (kept, precious) = (interrupted.path("kept"), interrupted.path("precious"));
    fs::rename(&partial, &kept).unwrap();
    fs::write(&precious, "precious").unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(&precious, &partial).unwrap();
        let error =
            converted(interrupted.source.path(), &interrupted.out, &interrupted.options).unwrap_err().to_string();
        assert!(error.contains("out-00001-of-00003.gguf.partial") && error.contains("a plain file"), "{error}");
        fs::remove_file(&partial).unwrap();
    }
    assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
    fs::remove_file(&precious).unwrap();
    fs::rename(kept, partial).unwrap();
    interrupted.resumed();
}

#[test]
fn a_run_that_ended_before_it_removed_its_journal_is_completed() {
    let interrupted = Interrupted::new();
    let journal = interrupted.path("out.gguf.journal");
    let (mut saved, model) = (Vec::new(), Model::open(interrupted.source.path()).unwrap());
    let (out, options) = (&interrupted.out, &interrupted.options);
    let report = convert(&model, out, options, &mut |_, _| saved = fs::read(&journal).unwrap()).unwrap();
    // The last record is written after the last progress.
    let (last, _, checksum) = report.files.last().unwrap();
    let part = report.files.len() - 1;
    let count = String::from_utf8_lossy(&saved).lines().filter(|line| line.starts_with(&format!("{part} "))).count();
    saved.extend(format!("{part} {count} {checksum} 0\n").bytes());
    fs::write(&journal, saved).unwrap();
    let (again, _) = interrupted.resumed();
    assert_eq!(again.files, report.files, "{}", last.display());
}

#[test]
fn two_conversions_never_write_the_same_file() {
    let interrupted = Interrupted::new();
    let running = fs::File::open(interrupted.path("out.gguf.journal")).unwrap();
    running.lock().unwrap();
    let error = converted(interrupted.source.path(), &interrupted.out, &interrupted.options).unwrap_err().to_string();
    assert!(error.contains("one that is running"), "{error}");
    drop(running);
    interrupted.resumed();
}

#[test]
fn nothing_that_exists_is_overwritten_and_the_name_must_be_one_of_a_gguf_file() {
    let (source, target) = (Checkpoint::default().write(), tempfile::tempdir().unwrap());
    let out = target.path().join("small.gguf");
    for taken in ["small.gguf", "small.gguf.sha256", "small.gguf.partial", "small.gguf.sha256.partial"] {
        fs::write(target.path().join(taken), "precious").unwrap();
        let error = converted(source.path(), &out, &options(Mix::Q8_0)).unwrap_err().to_string();
        assert!(error.contains(taken) && error.contains("no such file yet"), "{error}");
        assert_eq!(files_of(target.path()), [taken]);
        fs::remove_file(target.path().join(taken)).unwrap();
    }
    for name in ["small", "small.bin", ".gguf", "", "small-00001-of-00002.gguf"] {
        let error = converted(source.path(), &target.path().join(name), &options(Mix::Q8_0)).unwrap_err().to_string();
        assert!(error.contains("ends in .gguf"), "{name}: {error}");
    }
    let nowhere = target.path().join("no/such/folder");
    let error = converted(source.path(), &nowhere.join("m.gguf"), &options(Mix::Q8_0)).unwrap_err();
    assert!(matches!(error, ModelError::Io { path, .. } if path == nowhere));
    fs::write(target.path().join("file"), "precious").unwrap();
    let error = converted(source.path(), &target.path().join("file/m.gguf"), &options(Mix::Q8_0)).unwrap_err();
    assert!(error.to_string().ends_with("file: expected a folder, found a file"), "{error}");
    fs::write(target.path().join("small.gguf.journal"), "").unwrap();
    fs::write(&out, "precious").unwrap();
    let error = converted(source.path(), &out, &options(Mix::Q8_0)).unwrap_err().to_string();
    assert!(error.contains("no such file yet"), "{error}");
    assert_eq!(fs::read_to_string(&out).unwrap(), "precious", "also beside an empty journal");
    fs::remove_file(&out).unwrap();
    fs::remove_file(target.path().join("small.gguf.journal")).unwrap();
    fs::create_dir(target.path().join("small.gguf.journal")).unwrap();
    let error = converted(source.path(), &out, &options(Mix::Q8_0)).unwrap_err().to_string();
    assert!(error.contains("journal"), "{error}");
}

#[test]
fn rows_that_are_no_whole_blocks_stay_f16_and_are_listed() {
    let source = Checkpoint { hidden: 64, ..Checkpoint::default() }.write();
    let target = tempfile::tempdir().unwrap();
    let out = target.path().join("small.gguf");
    let report = converted(source.path(), &out, &options(Mix::Q6K)).unwrap();
    let (from, to) = (Model::open(source.path()).unwrap(), Model::open(&out).unwrap());
    // Rows of 64 and 128: every matrix but the routers.
    assert_eq!(report.notes.len(), 1 + 7 * LAYERS as usize);
    let reason = Reason::RowsOfParts { row: 128, wanted: BlockType::Q6K };
    assert!(report.notes.contains(&Note { tensor: "blk.2.ffn_down_exps.weight".into(), reason }));
    let name = TensorName::Layer(2, LayerTensor::MoeDown);
    assert_eq!(to.matrix(&name).unwrap().spec().format, Format::Blocks(BlockType::F16));
    let close = |(a, b): (&f32, &f32)| (a - b).abs() <= a.abs() / 2000.0 + 1e-7;
    assert!(numbers(&from, &name).iter().zip(&numbers(&to, &name)).all(close));
}

#[test]
fn blocks_that_cannot_be_carried_over_are_quantised_anew_and_their_tensors_listed() {
    // Sixteen inputs a group, or a scale in fifty that is too small for a half to have all its digits.
    let cut = Checkpoint { groups: 16, ..Checkpoint::default() };
    let odd: fn(usize) -> f32 = |i| if i.is_multiple_of(50) { 1.5078125 / (1 << 21) as f32 } else { 0.001953125 };
    let inexact = Checkpoint { scale: odd, ..Checkpoint::default() };
    for (checkpoint, tensors) in [(cut, LAYERS as usize), (inexact, 7 * LAYERS as usize)] {
        let (source, target) = (checkpoint.write(), tempfile::tempdir().unwrap());
        let out = target.path().join("small.gguf");
        let report = converted(source.path(), &out, &options(Mix::Q8_0)).unwrap();
        assert_eq!(report.notes.len(), tensors, "{:?}", report.notes);
        if checkpoint.groups == 16 {
            let reason = Reason::GroupsCutBlocks { group: 16 };
            assert_eq!(report.notes[0], Note { tensor: "blk.0.attn_output.weight".into(), reason });
        } else {
            assert!(matches!(report.notes[0].reason, Reason::ScalesNotHalves { count: 1.., of: 1024 }));
        }
        let (from, to) = (Model::open(source.path()).unwrap(), Model::open(&out).unwrap());
        let name = TensorName::Layer(0, LayerTensor::AttentionOutput);
        let (expected, found) = (numbers(&from, &name), numbers(&to, &name));
        for (expected, found) in expected.as_chunks::<32>().0.iter().zip(found.as_chunks::<32>().0) {
            let largest = expected.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
            let worst = expected.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= largest / 220.0 + 127.0 * 3e-8, "{worst} of {largest}");
        }
    }
}

#[test]
fn tensors_whose_numbers_became_zero_are_listed_also_after_an_interruption() {
    let source = Checkpoint { embedding: |i| i as f32 * 1e-9, ..Checkpoint::default() }.write();
    let target = tempfile::tempdir().unwrap();
    let out = |name: &str| target.path().join(name);
    let options = options(Mix::Q8_0);
    let report = converted(source.path(), &out("whole.gguf"), &options).unwrap();
    let Note { tensor, reason: Reason::TooSmall { count } } = &report.notes[0] else { panic!("{:?}", report.notes) };
    assert_eq!((tensor.as_str(), report.notes.len()), ("token_embd.weight", 1));
    // The first number is zero itself, and from here on a 127th is more than half of the least half.
    let kept = (2.0_f32.powi(-25) * 127.0 / 1e-9) as usize;
    assert!(*count > 0 && count.abs_diff(kept) <= 33, "{count}, {kept}");
    const MUCH: u64 = 1 << 40;
    let reads = MUCH - limited(source.path(), &out("other.gguf"), &options, MUCH).unwrap();
    limited(source.path(), &out("again.gguf"), &options, 3 * reads / 4).unwrap_err();
    let again = converted(source.path(), &out("again.gguf"), &options).unwrap();
    assert!(again.resumed_bytes > 0);
    assert_eq!(again.notes, report.notes);
}

#[test]
fn a_number_that_is_not_finite_or_too_large_is_named_by_its_place() {
    let target = tempfile::tempdir().unwrap();
    let nan: fn(usize) -> f32 = |i| if i == 5 * 256 + 77 { f32::NAN } else { 0.1 };
    let huge: fn(usize) -> f32 = |i| if i == 5 * 256 + 77 { 3e38 } else { 0.1 };
    let cases =
        [(nan, Mix::Mixed, "finite numbers"), (nan, Mix::Bf16, "finite numbers"), (huge, Mix::Q4K, "range of Q4_K")];
    for (index, (embedding, mix, expected)) in cases.into_iter().enumerate() {
        let source = Checkpoint { embedding, ..Checkpoint::default() }.write();
        let out = target.path().join(format!("{index}.gguf"));
        let error = converted(source.path(), &out, &options(mix)).unwrap_err().to_string();
        assert!(error.contains("embeddings: expert 0, output 5, input 77"), "{error}");
        assert!(error.contains(expected), "{error}");
        assert!(!out.exists());
    }
    // Nor is it copied, where the format stays the same.
    let (source, out) = (Checkpoint::default().write(), target.path().join("bf16.gguf"));
    converted(source.path(), &out, &options(Mix::Bf16)).unwrap();
    let header = Model::open(&out).unwrap().gguf_header().unwrap().unwrap();
    let mut bytes = fs::read(&out).unwrap();
    let at = header.tensors["blk.1.attn_q.weight"].offset as usize + 2 * (3 * 256 + 9);
    bytes[at..at + 2].copy_from_slice(&[0x80, 0x7f]);
    fs::write(&out, bytes).unwrap();
    let error = converted(&out, &target.path().join("again.gguf"), &options(Mix::Bf16)).unwrap_err().to_string();
    assert!(error.contains("output 3, input 9: expected finite numbers, found inf"), "{error}");
}

#[test]
fn the_copies_on_hugging_face_are_converted_with_their_head() {
    for family in ["hpcai", "keyfan"] {
        let (source, target) = (hugging_face::copy(family), tempfile::tempdir().unwrap());
        let out = target.path().join("copy.gguf");
        let report = converted(source.path(), &out, &options(Mix::Bf16)).unwrap();
        assert!(report.no_tokenizer.is_some_and(|why| why.contains("tokenizer.model")));
        let (from, to) = (Model::open(source.path()).unwrap(), Model::open(&out).unwrap());
        assert!(to.has_own_head());
        assert_eq!(to.tokenizer_path(), None, "a file without a vocabulary");
        let beside = target.path().join("tokenizer.model");
        fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/tokenizer.model"), &beside).unwrap();
        assert_eq!(to.tokenizer_path(), Some(beside));
        for name in TensorName::in_file_order(1).into_iter().chain([TensorName::Head]) {
            if is_matrix(&from, &name) {
                assert_eq!(numbers(&from, &name), numbers(&to, &name), "{name}");
            }
        }
    }
}

#[test]
fn the_vocabulary_goes_with_the_model() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let target = tempfile::tempdir().unwrap();
    let (first, second) = (target.path().join("first.gguf"), target.path().join("second.gguf"));
    let report = converted(&demo, &first, &options(Mix::Q8_0)).unwrap();
    assert_eq!(report.no_tokenizer, None);
    // And from there into the next file.
    converted(&first, &second, &options(Mix::Q4_0)).unwrap();
    let again = target.path().join("again.gguf");
    converted(&first, &again, &options(Mix::Q8_0)).unwrap();
    assert!(fs::read(&first).unwrap() == fs::read(&again).unwrap(), "a copy of a copy");
    let original = Tokenizer::open(&demo.join("tokenizer.model")).unwrap();
    for path in [first, second] {
        let copy = Tokenizer::open(&path).unwrap();
        assert_eq!(copy.pieces(), original.pieces());
        for text in ["The capital of France is", "", " two  spaces\n\n1234 naïve \u{1f600}"] {
            assert_eq!(copy.encode(text), original.encode(text), "{text:?}");
        }
        let header = Model::open(&path).unwrap().gguf_header().unwrap().unwrap();
        use crate::checkpoint::gguf::Value;
        for (key, id) in [("bos", 1), ("eos", 2), ("unknown", 3), ("padding", 0)] {
            assert_eq!(header.metadata[&format!("tokenizer.ggml.{key}_token_id")], Value::Integer(id), "{key}");
        }
        assert_eq!(header.metadata["tokenizer.ggml.add_bos_token"], Value::Bool(false));
    }
    // One that belongs to another model is left out: llama.cpp refuses as many pieces as the embedding has no rows for.
    let small = Checkpoint::default().write();
    fs::copy(demo.join("tokenizer.model"), small.path().join("tokenizer.model")).unwrap();
    let report = converted(small.path(), &target.path().join("small.gguf"), &options(Mix::Q8_0)).unwrap();
    assert!(report.no_tokenizer.is_some_and(|why| why.contains("131072 pieces, the model 40 rows")));
}
