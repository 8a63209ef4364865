//! What downloads, caches and other people's disks make of a model: found where it lies and by what it holds, or refused by name.

use std::ffi::OsString;

use super::{
    hostile_gguf::{self as made, Gguf},
    tiny, *,
};
use crate::tokenizer::Tokenizer;

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n";

/// A GGUF model of one file.
fn whole() -> Vec<u8> {
    made::with_tensors(made::metadata(), &made::tensors(true), &mut 0).done()
}

/// The same model in so many parts.
fn parts(count: usize) -> Vec<(String, Vec<u8>)> {
    let all = made::tensors(true);
    let mut first = 0;
    let part = |(index, tensors): (usize, &[(String, Vec<u64>)])| {
        let file = if index == 0 { made::metadata() } else { Gguf::default() };
        let file = file.raw("split.no", 2, &(index as u16).to_le_bytes());
        let file = file.raw("split.count", 2, &(count as u16).to_le_bytes());
        let name = format!("m-{:05}-of-{count:05}.gguf", index + 1);
        (name, made::with_tensors(file, tensors, &mut first).done())
    };
    all.chunks(all.len().div_ceil(count)).enumerate().map(part).collect()
}

fn write(path: &Path, bytes: impl AsRef<[u8]>) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

fn write_parts(folder: &Path, wanted: &[usize]) {
    for (index, (name, bytes)) in parts(3).iter().enumerate() {
        if wanted.contains(&(index + 1)) {
            write(&folder.join(name), bytes);
        }
    }
}

/// The tiny checkpoint, its tensors in this folder, and `config.json` in that one.
fn checkpoint(tensors: &Path, config: &Path) {
    let source = tiny::write();
    std::fs::create_dir_all(tensors).unwrap();
    std::fs::create_dir_all(config).unwrap();
    for entry in std::fs::read_dir(source.path().join("ckpt-0")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), tensors.join(entry.file_name())).unwrap();
    }
    std::fs::copy(source.path().join("config.json"), config.join("config.json")).unwrap();
}

/// Makes a model within a folder, and gives what a person then names.
type Case = (&'static str, fn(&Path) -> PathBuf);

fn assert_opened(cases: &[Case], digest: &str) {
    for (name, make) in cases {
        let folder = tempfile::tempdir().unwrap();
        let path = make(folder.path());
        let model = Model::open(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(model.digest(), digest, "{name}");
        model.inspect().unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

const GGUF: &[Case] = &[
    ("an extension in capitals", |folder| {
        write(&folder.join("X.GGUF"), whole());
        folder.join("X.GGUF")
    }),
    ("the folder of one with capitals", |folder| {
        write(&folder.join("X.GGUF"), whole());
        folder.to_owned()
    }),
    ("a blob without an extension", |folder| {
        write(&folder.join("sha256-9f43"), whole());
        folder.join("sha256-9f43")
    }),
    ("the folder of a blob", |folder| {
        write(&folder.join("sha256-9f43"), whole());
        write(&folder.join("README"), "a model");
        folder.to_owned()
    }),
    ("another program's extension", |folder| {
        write(&folder.join("model.safetensors"), whole());
        folder.join("model.safetensors")
    }),
    ("AppleDouble files beside it", |folder| {
        write(&folder.join("x.gguf"), whole());
        write(&folder.join("._x.gguf"), b"\0\x05\x16\x07Mac OS X");
        folder.to_owned()
    }),
    ("the folder above", |folder| {
        write(&folder.join("grok/x.gguf"), whole());
        write(&folder.join("notes/x.txt"), "");
        folder.to_owned()
    }),
];

#[test]
fn a_gguf_model_is_told_by_what_it_holds() {
    let plain = made::folder_of(&[("m.gguf", whole())]);
    assert_opened(GGUF, &Model::open(plain.path()).unwrap().digest());
}

const CHECKPOINTS: &[Case] = &[
    ("the folder of the tensors, its configuration beside them", |folder| {
        checkpoint(folder, folder);
        folder.to_owned()
    }),
    ("ckpt-0, its configuration above", |folder| {
        checkpoint(&folder.join("ckpt-0"), folder);
        folder.join("ckpt-0")
    }),
    ("a folder with ckpt", |folder| {
        checkpoint(&folder.join("ckpt"), folder);
        folder.to_owned()
    }),
    ("a folder with ckpt/ckpt-0", |folder| {
        checkpoint(&folder.join("ckpt/ckpt-0"), folder);
        folder.to_owned()
    }),
    ("ckpt, with ckpt-0 in it", |folder| {
        checkpoint(&folder.join("ckpt/ckpt-0"), &folder.join("ckpt"));
        folder.join("ckpt")
    }),
    ("the folder above", |folder| {
        checkpoint(&folder.join("grok-1/ckpt-0"), &folder.join("grok-1"));
        folder.to_owned()
    }),
    ("AppleDouble files among the tensors", |folder| {
        checkpoint(&folder.join("ckpt-0"), folder);
        write(&folder.join("ckpt-0/._tensor00003_000"), b"\0\x05\x16\x07");
        folder.to_owned()
    }),
];

#[test]
fn a_checkpoint_is_found_where_people_point() {
    assert_opened(CHECKPOINTS, &Model::open(tiny::write().path()).unwrap().digest());
}

/// Hugging Face's cache: blobs by checksum, and links to them by revision.
#[cfg(unix)]
fn cached(folder: &Path, revision: &str) -> PathBuf {
    let (blobs, snapshot) = (folder.join("blobs"), folder.join("snapshots").join(revision));
    checkpoint(&blobs.join("all"), &blobs);
    std::fs::create_dir_all(snapshot.join("ckpt-0")).unwrap();
    std::os::unix::fs::symlink("../../blobs/config.json", snapshot.join("config.json")).unwrap();
    for entry in std::fs::read_dir(blobs.join("all")).unwrap() {
        let name = entry.unwrap().file_name();
        let link = Path::new("../../../blobs/all").join(&name);
        std::os::unix::fs::symlink(link, snapshot.join("ckpt-0").join(name)).unwrap();
    }
    snapshot
}

#[cfg(unix)]
const CACHES: &[Case] = &[
    ("a snapshot", |folder| cached(folder, "7050")),
    ("a cache with one snapshot", |folder| {
        cached(folder, "7050");
        // Its blobs are a checkpoint of their own here.
        std::fs::rename(folder.join("blobs"), folder.join("b")).unwrap();
        std::os::unix::fs::symlink("b", folder.join(".hidden")).unwrap();
        std::fs::create_dir(folder.join("blobs")).unwrap();
        for name in ["all", "config.json"] {
            std::fs::rename(folder.join("b").join(name), folder.join("blobs").join(name)).unwrap();
        }
        folder.to_owned()
    }),
    ("the snapshot that was asked for last", |folder| {
        cached(&folder.join("one"), "old");
        cached(&folder.join("two"), "new");
        for (from, name) in [("one", "old"), ("two", "new")] {
            std::fs::create_dir_all(folder.join("hub/snapshots")).unwrap();
            std::os::unix::fs::symlink(
                folder.join(from).join("snapshots").join(name),
                folder.join("hub/snapshots").join(name),
            )
            .unwrap();
        }
        write(&folder.join("hub/refs/main"), "new\n");
        folder.join("hub")
    }),
];

#[cfg(unix)]
#[test]
fn a_cache_of_hugging_face_is_a_model() {
    assert_opened(CACHES, &Model::open(tiny::write().path()).unwrap().digest());
}

#[cfg(unix)]
#[test]
fn names_that_are_not_utf_8_are_names() {
    use std::os::unix::ffi::OsStringExt;
    let latin = |text: &[u8]| OsString::from_vec(text.to_vec());
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join(latin(b"gr\xf6k"));
    // Some file systems have no such names.
    if std::fs::create_dir(&root).is_err() {
        return;
    }
    let file = root.join(latin(b"m\xf6del.gguf"));
    write(&file, whole());
    for path in [&root, &file] {
        let model = Model::open(path).unwrap();
        model.inspect().unwrap();
    }
    let root = folder.path().join(latin(b"p\xe4rts"));
    for (index, (_, bytes)) in parts(3).iter().enumerate() {
        let name = [b"m\xf6-0000", (index + 1).to_string().as_bytes(), b"-of-00003.gguf"].concat();
        write(&root.join(latin(&name)), bytes);
    }
    Model::open(&root).unwrap().inspect().unwrap();
    let vocabulary = root.join(latin(b"v\xf6.gguf"));
    write(&vocabulary, whole());
    let message = Tokenizer::open(&vocabulary).unwrap_err().to_string();
    assert!(message.contains("tokenizer.ggml.model"), "{message}");
    // Two names of which nothing but what is no text differs cannot be told apart.
    write(&root.join(latin(b"v\xe4.gguf")), whole());
    let message = Model::open(&vocabulary).unwrap_err().to_string();
    assert!(message.contains("differ only in what is not UTF-8"), "{message}");
}

/// Damage, what a person then names, and what the refusal says.
type Damage = (&'static str, fn(&Path) -> PathBuf, &'static str);

const DAMAGE: &[Damage] = &[
    (
        "a pointer in place of GGUF",
        |folder| {
            write(&folder.join("a.gguf"), POINTER);
            folder.join("a.gguf")
        },
        "a Git LFS pointer to its 12.1 KiB: fetch it with `git lfs pull`",
    ),
    (
        "a pointer in place of the GGUF of a folder",
        |folder| {
            write(&folder.join("a.gguf"), POINTER);
            folder.to_owned()
        },
        "git lfs pull",
    ),
    (
        "a pointer in place of a part",
        |folder| {
            write_parts(folder, &[1, 2, 3]);
            write(&folder.join("m-00002-of-00003.gguf"), POINTER);
            folder.to_owned()
        },
        "m-00002-of-00003.gguf: expected the file itself",
    ),
    (
        "a pointer in place of a tensor",
        |folder| {
            checkpoint(&folder.join("ckpt-0"), folder);
            write(&folder.join("ckpt-0/tensor00005_000"), POINTER);
            folder.to_owned()
        },
        "tensor00005_000: expected the file itself, found a Git LFS pointer",
    ),
    (
        "a pointer in place of the configuration",
        |folder| {
            checkpoint(&folder.join("ckpt-0"), folder);
            write(&folder.join("config.json"), POINTER);
            folder.to_owned()
        },
        "config.json: expected the file itself, found a Git LFS pointer",
    ),
    (
        "a pointer in place of an index",
        |folder| {
            checkpoint(&folder.join("nothing"), folder);
            write(&folder.join("model.safetensors.index.json"), POINTER);
            folder.to_owned()
        },
        "model.safetensors.index.json: expected the file itself, found a Git LFS pointer",
    ),
    (
        "a pointer in place of safetensors",
        |folder| {
            checkpoint(&folder.join("nothing"), folder);
            write(&folder.join("model.safetensors"), POINTER);
            folder.to_owned()
        },
        "model.safetensors: expected the file itself, found a Git LFS pointer",
    ),
    (
        "a web page",
        |folder| {
            write(&folder.join("a.gguf"), "<!doctype html><html>log in</html>");
            folder.join("a.gguf")
        },
        "a web page",
    ),
    (
        "PyTorch's own file",
        |folder| {
            write(&folder.join("model.bin"), b"PK\x03\x04");
            folder.join("model.bin")
        },
        "a ZIP archive",
    ),
    (
        "a download that was not begun",
        |folder| {
            write(&folder.join("a.gguf"), vec![0; 9000]);
            folder.join("a.gguf")
        },
        "zeros",
    ),
    (
        "an AppleDouble file by its name",
        |folder| {
            write(&folder.join("._x.gguf"), b"\0\x05\x16\x07Mac OS X");
            folder.join("._x.gguf")
        },
        "AppleDouble",
    ),
    (
        "no first part",
        |folder| {
            write_parts(folder, &[2, 3]);
            folder.to_owned()
        },
        "all 3 parts of m, found m-00001-of-00003.gguf missing",
    ),
    (
        "no first part, by the name of another",
        |folder| {
            write_parts(folder, &[2, 3]);
            folder.join("m-00002-of-00003.gguf")
        },
        "m-00001-of-00003.gguf missing",
    ),
    (
        "two parts missing",
        |folder| {
            write_parts(folder, &[1]);
            folder.to_owned()
        },
        "m-00002-of-00003.gguf and 1 others missing",
    ),
    (
        "a folder in place of a part",
        |folder| {
            write_parts(folder, &[1, 3]);
            std::fs::create_dir(folder.join("m-00002-of-00003.gguf")).unwrap();
            folder.to_owned()
        },
        "m-00002-of-00003.gguf: it is a folder",
    ),
    (
        "parts joined with cat",
        |folder| {
            let joined: Vec<u8> = parts(3).into_iter().flat_map(|(_, bytes)| bytes).collect();
            write(&folder.join("c.gguf"), joined);
            folder.join("c.gguf")
        },
        "another GGUF file joined to it",
    ),
    (
        "parts joined under the first one's name",
        |folder| {
            let joined: Vec<u8> = parts(3).into_iter().flat_map(|(_, bytes)| bytes).collect();
            write_parts(folder, &[2, 3]);
            write(&folder.join("m-00001-of-00003.gguf"), joined);
            folder.to_owned()
        },
        "another GGUF file joined to it",
    ),
    (
        "one tensor of a checkpoint",
        |folder| {
            checkpoint(&folder.join("ckpt-0"), folder);
            folder.join("ckpt-0/tensor00005_000")
        },
        "the folder with all tensors",
    ),
    (
        "a folder above two models",
        |folder| {
            write(&folder.join("one/a.gguf"), whole());
            write(&folder.join("two/a.gguf"), whole());
            folder.to_owned()
        },
        "2 of them, \"one\" and \"two\"",
    ),
];

#[test]
fn what_a_download_left_is_refused_by_name() {
    for (name, make, wanted) in DAMAGE {
        let folder = tempfile::tempdir().unwrap();
        let path = make(folder.path());
        let message = tiny::load(&path).expect_err(name).to_string();
        assert!(message.contains(wanted), "{name}: {wanted:?} is not in {message:?}");
    }
}

#[test]
fn a_tokenizer_that_was_not_fetched_is_named() {
    let folder = made::folder_of(&[("tokenizer.model", POINTER.into())]);
    let message = Tokenizer::open(&folder.path().join("tokenizer.model")).unwrap_err().to_string();
    assert_refused("a pointer", &message, "git lfs pull");
}

#[cfg(unix)]
#[test]
fn a_pipe_in_place_of_a_model_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    for message in [Model::open(&path).unwrap_err().to_string(), Tokenizer::open(&path).unwrap_err().to_string()] {
        assert!(message.contains("it is a pipe"), "{message}");
    }
}
