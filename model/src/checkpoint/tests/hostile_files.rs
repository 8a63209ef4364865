//! Folders that are no models: files missing, doubled, or not files at all.

use std::{process::Command, sync::mpsc, time::Duration};

use super::{tiny, *};

/// A folder with the damage, and what the message must say.
type Damage = (&'static str, fn(&Path), &'static str);

const TENSOR: &str = "ckpt-0/tensor00005_000";

fn remove(folder: &Path, name: &str) {
    std::fs::remove_file(folder.join(name)).unwrap();
}

#[cfg(unix)]
fn link(folder: &Path, name: &str, target: &str) {
    remove(folder, name);
    std::os::unix::fs::symlink(target, folder.join(name)).unwrap();
}

#[cfg(unix)]
fn pipe(folder: &Path, name: &str) {
    remove(folder, name);
    assert!(Command::new("mkfifo").arg(folder.join(name)).status().unwrap().success());
}

fn sparse(path: &Path) {
    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(path).unwrap();
    // A file system without files this long is given the longest that it takes.
    if file.set_len(10_000_000_000_000).is_err() {
        file.set_len(1 << 40).unwrap();
    }
}

fn config_with(folder: &Path, key: &str, value: serde_json::Value) {
    let mut config = tiny::config_json();
    config[key] = value;
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

const DAMAGE: &[Damage] = &[
    ("a tensor is missing", |folder| remove(folder, TENSOR), "tensor00005_000"),
    ("the last tensor is missing", |folder| remove(folder, "ckpt-0/tensor00013_000"), "tensor00013_000"),
    (
        "a tensor too many",
        |folder| std::fs::write(folder.join("ckpt-0/tensor00014_000"), "").unwrap(),
        "14 tensor files",
    ),
    (
        "a tensor of another host",
        |folder| std::fs::write(folder.join("ckpt-0/tensor00005_001"), "").unwrap(),
        "one more",
    ),
    (
        "a tensor twice",
        |folder| {
            std::fs::copy(folder.join(TENSOR), folder.join("ckpt-0/tensor00005_000 (1)")).unwrap();
        },
        "one more",
    ),
    (
        "a tensor's name with fewer digits",
        |folder| {
            std::fs::rename(folder.join(TENSOR), folder.join("ckpt-0/tensor5_000")).unwrap();
        },
        "one more",
    ),
    (
        "two tensors changed places",
        |folder| {
            std::fs::rename(folder.join(TENSOR), folder.join("x")).unwrap();
            std::fs::rename(folder.join("ckpt-0/tensor00004_000"), folder.join(TENSOR)).unwrap();
            std::fs::rename(folder.join("x"), folder.join("ckpt-0/tensor00004_000")).unwrap();
        },
        "[2, 8, 16] of I8",
    ),
    (
        "an empty ckpt-0",
        |folder| {
            std::fs::remove_dir_all(folder.join("ckpt-0")).unwrap();
            std::fs::create_dir(folder.join("ckpt-0")).unwrap();
        },
        "0 without it",
    ),
    ("no weights", |folder| std::fs::remove_dir_all(folder.join("ckpt-0")).unwrap(), "none of them"),
    (
        "a folder in place of a tensor",
        |folder| {
            remove(folder, TENSOR);
            std::fs::create_dir(folder.join(TENSOR)).unwrap();
        },
        "it is a folder, not a file",
    ),
    ("an empty tensor", |folder| std::fs::write(folder.join(TENSOR), "").unwrap(), "the end of the file"),
    ("a sparse tensor of 10 TB", |folder| sparse(&folder.join(TENSOR)), "further bytes"),
    (
        "a sparse tensor of zeros",
        |folder| {
            remove(folder, TENSOR);
            sparse(&folder.join(TENSOR));
        },
        "begins with 0x80",
    ),
    ("no configuration: Grok-1 has more tensors", |folder| remove(folder, "config.json"), "770 tensor files"),
    ("a configuration of more layers", |folder| config_with(folder, "num_layers", 2.into()), "26 tensor files"),
    ("a configuration of another width", |folder| config_with(folder, "vocab_size", 32.into()), "[32, 8] of F32"),
    (
        "a configuration of other groups",
        |folder| config_with(folder, "scale_groups_row_parallel", 1.into()),
        "scales of [2, 1, 8]",
    ),
    ("an empty configuration", |folder| std::fs::write(folder.join("config.json"), "").unwrap(), "a JSON object"),
    (
        "a configuration of 2 MiB",
        |folder| std::fs::write(folder.join("config.json"), " ".repeat(2 << 20)).unwrap(),
        "at most 1048576",
    ),
    (
        "a deep configuration",
        |folder| std::fs::write(folder.join("config.json"), "[".repeat(500_000)).unwrap(),
        "a JSON object",
    ),
    (
        "a configuration that is no text",
        |folder| std::fs::write(folder.join("config.json"), [0xff, 0xfe]).unwrap(),
        "UTF-8",
    ),
    (
        "a folder in place of the configuration",
        |folder| {
            remove(folder, "config.json");
            std::fs::create_dir(folder.join("config.json")).unwrap();
        },
        "a folder, a pipe or a device",
    ),
];

#[cfg(unix)]
const UNIX_DAMAGE: &[Damage] = &[
    ("a pipe in place of a tensor", |folder| pipe(folder, TENSOR), "it is a pipe, not a file"),
    ("a pipe in place of the configuration", |folder| pipe(folder, "config.json"), "a folder, a pipe or a device"),
    (
        "an endless device in place of a tensor",
        |folder| link(folder, TENSOR, "/dev/zero"),
        "it is a device, not a file",
    ),
    (
        "an endless device in place of the configuration",
        |folder| link(folder, "config.json", "/dev/zero"),
        "a folder, a pipe or a device",
    ),
    ("a tensor that leads to itself", |folder| link(folder, TENSOR, "tensor00005_000"), "symbolic links"),
    ("a configuration that leads to itself", |folder| link(folder, "config.json", "config.json"), "config.json"),
    ("a configuration that leads nowhere", |folder| link(folder, "config.json", "gone"), "config.json"),
    ("a tensor that leads nowhere", |folder| link(folder, TENSOR, "gone"), "it is a link to gone, where nothing is"),
    ("a tensor that leads to a folder", |folder| link(folder, TENSOR, ".."), "it is a folder, not a file"),
];

/// What loading the folder ends in, within a deadline: a reader that waits on a pipe would wait for ever.
fn outcome(folder: &Path) -> String {
    let (sender, receiver) = mpsc::channel();
    let folder = folder.to_owned();
    std::thread::spawn(move || sender.send(tiny::load(&folder).err().map(|error| error.to_string())));
    let outcome = receiver.recv_timeout(Duration::from_secs(20)).expect("an answer within 20 s");
    outcome.expect("a refusal")
}

fn assert_all_refused(damages: &[Damage]) {
    for (name, damage, wanted) in damages {
        let folder = tiny::write();
        damage(folder.path());
        let message = outcome(folder.path());
        assert!(message.contains(wanted), "{name}: {wanted:?} is not in {message:?}");
        assert!(message.len() < 1000, "{name}: {message}");
    }
}

#[test]
fn damaged_folders_are_refused_by_name() {
    assert_all_refused(DAMAGE);
}

#[cfg(unix)]
#[test]
fn pipes_devices_and_circles_are_refused_at_once() {
    assert_all_refused(UNIX_DAMAGE);
}

#[cfg(unix)]
#[test]
fn the_storage_opens_regular_files_only() {
    let folder = tiny::write();
    pipe(folder.path(), "ckpt-0/tensor00001_000");
    link(folder.path(), "ckpt-0/tensor00002_000", "/dev/zero");
    let storage = Folder(folder.path().to_owned());
    for name in ["ckpt-0", "ckpt-0/tensor00001_000", "ckpt-0/tensor00002_000"] {
        let error = storage.open(name).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}: {error}");
    }
}

#[cfg(unix)]
#[test]
fn links_to_regular_files_are_followed() {
    let (folder, elsewhere) = (tiny::write(), tempfile::tempdir().unwrap());
    let target = elsewhere.path().join("blob");
    std::fs::rename(folder.path().join(TENSOR), &target).unwrap();
    std::os::unix::fs::symlink(&target, folder.path().join(TENSOR)).unwrap();
    tiny::load(folder.path()).unwrap();
}

#[test]
fn paths_that_are_no_models_are_refused() {
    let folder = tiny::folder_with(&[("notes.txt", b"hello"), ("x.safetensors", b"")]);
    let cases = [("notes.txt", "a model's folder"), ("x.safetensors", "at least 8 bytes"), ("nothing", "nothing")];
    for (name, wanted) in cases {
        let message = Model::open(&folder.path().join(name)).unwrap_err().to_string();
        assert!(message.contains(wanted), "{name}: {message}");
    }
}

#[test]
fn a_safetensors_file_of_10_tb_is_refused_by_its_header() {
    let folder = tiny::folder_with(&[("model.safetensors", b"")]);
    let path = folder.path().join("model.safetensors");
    sparse(&path);
    assert_refused("no header", &Model::open(&path).unwrap_err().to_string(), "zeros");
    std::fs::write(&path, tiny::safetensors(&TensorName::in_file_order(tiny::LAYERS))).unwrap();
    sparse(&path);
    assert_refused("a good header", &Model::open(&path).unwrap_err().to_string(), "as the header says");
}

#[test]
fn a_tensor_cut_short_after_opening_is_an_error_and_no_wrong_number() {
    let folder = tiny::write();
    let model = Model::open(folder.path()).unwrap();
    let matrix = model.matrix(&TensorName::Embedding).unwrap();
    std::fs::OpenOptions::new()
        .write(true)
        .open(folder.path().join("ckpt-0/tensor00000_000"))
        .unwrap()
        .set_len(200)
        .unwrap();
    let error = matrix.read(0, &mut [0; 512]).unwrap_err();
    assert!(
        matches!(&error, ModelError::Io { path, .. } if path.display().to_string().contains("embeddings")),
        "{error}"
    );
}
