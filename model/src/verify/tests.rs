//! Good models, and every way in which a download goes wrong.

use super::*;
use crate::checkpoint::tests::tiny;

fn run(path: &Path, everything: bool) -> Verified {
    let mut last = (0, 0);
    let verified = verify(path, Options { threads: 2, everything }, &mut |done, total| {
        assert!(done >= last.0 && done <= total, "{done} of {total} after {last:?}");
        last = (done, total);
    });
    verified.unwrap()
}

fn damage(verified: &Verified) -> Vec<String> {
    let of_file = |file: &Checked| match &file.state {
        State::Damaged(reason) => {
            Some(format!("{}: {reason}", file.path.file_name().unwrap_or_default().to_string_lossy()))
        }
        _ => None,
    };
    verified.files.iter().filter_map(of_file).chain(verified.damage.iter().cloned()).collect()
}

const TENSOR: &str = "ckpt-0/tensor00004_000";

#[test]
fn a_manifest_confirms_what_was_there_when_it_was_written_and_nothing_else() {
    let folder = tiny::write();
    let before = run(folder.path(), false);
    assert!(before.is_good() && !before.is_confirmed() && before.files.len() == 15);
    assert!(before.files.iter().all(|file| file.sha256.is_none()), "nothing to compare with");
    run(folder.path(), true).write_manifest().unwrap();
    assert!(run(folder.path(), false).is_confirmed());
    let mut checked = std::process::Command::new("sha256sum");
    checked.args(["--check", "--quiet", manifest::NAME]).current_dir(folder.path());
    if let Ok(status) = checked.status() {
        assert!(status.success(), "sha256sum reads it too");
    }
    // Its sums are those that a worker makes of what it loads.
    let model = Model::open(folder.path()).unwrap();
    let recorded: BTreeMap<_, _> =
        crate::WeightSource::record(&model).unwrap().sums().map(|sum| (sum.part, sum.sum)).collect();
    assert_eq!(
        recorded.keys().copied().collect::<Vec<_>>(),
        model.parts().into_iter().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>()
    );
    let (norm, _) = contents::sum_of(&TensorName::FinalNorm, &model).unwrap();
    assert_eq!(recorded[&Part::FinalNorm], norm);

    let path = folder.path().join(TENSOR);
    let good = std::fs::read(&path).unwrap();
    let cases: [(&str, Option<Vec<u8>>, &str); 4] = [
        (
            "a bit",
            Some(good.iter().enumerate().map(|(at, byte)| byte ^ u8::from(at == 250)).collect()),
            "its SHA-256 is",
        ),
        ("cut short", Some(good[..good.len() - 1].to_vec()), "its SHA-256 is"),
        ("a pointer", Some(b"version https://git-lfs.github.com/spec/v1\nsize 9\n".to_vec()), "a Git LFS pointer"),
        ("gone", None, "it is missing"),
    ];
    for (name, bytes, wanted) in cases {
        match bytes {
            Some(bytes) => std::fs::write(&path, bytes).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let found = run(folder.path(), false);
        let said = damage(&found);
        assert!(
            said.iter().any(|said| said.starts_with("tensor00004_000") && said.contains(wanted)),
            "{name}: {said:?}"
        );
        let refused = found.write_manifest().unwrap_err().to_string();
        assert!(refused.contains("a damaged one"), "{name}: {refused}");
        std::fs::write(&path, &good).unwrap();
    }
    assert!(run(folder.path(), false).is_confirmed());
}

#[test]
fn what_is_wrong_is_found_without_a_checksum_too() {
    let (folder, pipe) = (tiny::write(), "ckpt-0/tensor00003_000");
    std::fs::remove_file(folder.path().join(pipe)).unwrap();
    std::fs::create_dir(folder.path().join(pipe)).unwrap();
    std::fs::write(folder.path().join(TENSOR), vec![0; 400]).unwrap();
    let said = damage(&run(folder.path(), false));
    assert!(said.iter().any(|said| said.contains("tensor00003_000: it is a folder")), "{said:?}");
    let folder = tiny::write();
    std::fs::write(folder.path().join(TENSOR), vec![0; 400]).unwrap();
    let said = damage(&run(folder.path(), false));
    assert!(
        said.iter().any(|said| said.starts_with("tensor00004_000") && said.contains("begins with 0x80")),
        "{said:?}"
    );
}

#[test]
fn xais_checkpoint_is_held_to_its_published_lengths() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = folder.path().join("ckpt-0");
    std::fs::create_dir(&tensors).unwrap();
    for (name, length) in [("tensor00001_000", 24_727), ("tensor00013_000", 196_769)] {
        std::fs::write(tensors.join(name), vec![1; length]).unwrap();
    }
    std::fs::write(folder.path().join("tokenizer.model"), "short").unwrap();
    let said = damage(&run(folder.path(), false));
    let count = |wanted: &str| said.iter().filter(|said| said.contains(wanted)).count();
    assert_eq!(count("it is missing"), 768, "of 770");
    for wanted in
        ["tensor00013_000: it has 196769 bytes, 196770 by xAI's publication", "tokenizer.model: it has 5 bytes"]
    {
        assert_eq!(count(wanted), 1, "{wanted}: {said:?}");
    }
    assert_eq!(count("tensor00001_000"), 0);
}

/// Who knows the checksum of a file, and how it is told.
#[cfg(unix)]
#[test]
fn checksums_are_found_where_others_leave_them() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let bytes = b"GGUF, or so";
    let sum = {
        let path = root.join("x");
        std::fs::write(&path, bytes).unwrap();
        manifest::sha256_of(&path, &|_| {}).unwrap()
    };
    let write = |name: &str, text: &[u8]| {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    };
    let link = |name: &str, target: &str| {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(target, &path).unwrap();
        path
    };
    for (case, right) in [("right", true), ("wrong", false)] {
        let known = if right { sum.clone() } else { "0".repeat(64) };
        write(&format!("{case}/blobs/{known}"), bytes);
        write(
            &format!("{case}/d/.cache/huggingface/download/m.gguf.metadata"),
            format!("rev\n{known}\n17.5\n").as_bytes(),
        );
        write(&format!("{case}/s/m.gguf.sha256"), format!("{known}  m.gguf\n").as_bytes());
        write(&format!("{case}/alone/m.gguf.sha256"), known.as_bytes());
        let paths = [
            link(&format!("{case}/snapshots/1/m.gguf"), &format!("../../blobs/{known}")),
            root.join(format!("{case}/blobs/{known}")),
            write(&format!("{case}/o/sha256-{known}"), bytes),
            write(&format!("{case}/d/m.gguf"), bytes),
            write(&format!("{case}/s/m.gguf"), bytes),
            write(&format!("{case}/alone/m.gguf"), bytes),
        ];
        for path in paths {
            let found = run(&path, false);
            let [file] = &found.files[..] else { panic!("{found:?}") };
            match &file.state {
                State::Confirmed(_) => assert!(right, "{}", path.display()),
                State::Damaged(reason) => {
                    assert!(!right && reason.contains("its SHA-256 is"), "{}: {reason}", path.display())
                }
                State::Plausible => panic!("{}: no checksum was found", path.display()),
            }
        }
    }
}

#[test]
fn a_manifest_names_no_file_of_another_folder() {
    let folder = tiny::write();
    let line = format!("{}  ../../etc/passwd\n{}  /etc/passwd\n", "0".repeat(64), "0".repeat(64));
    std::fs::write(folder.path().join("x.sha256"), line).unwrap();
    let found = run(folder.path(), false);
    assert!(found.is_good() && found.files.len() == 15, "{found:?}");
}

#[test]
fn where_nothing_is_nothing_is_verified() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().to_owned(), folder.path().join("none")] {
        assert!(
            verify(&path, Options { threads: 1, everything: false }, &mut |_, _| {}).is_err(),
            "{}",
            path.display()
        );
    }
}
