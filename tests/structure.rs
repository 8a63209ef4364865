//! What ARCHITECTURE.md says of the structure, held to the sources: who depends on whom, and what the pure parts do not know.

use std::{
    fs,
    path::{Path, PathBuf},
};

use grokpipe_tests::root;

/// Every crate, and all of ours that it may use in production.
const MAY_USE: [(&str, &[&str]); 7] = [
    ("proto", &[]),
    ("model", &[]),
    ("kernels", &["model"]),
    ("worker", &["kernels", "model", "proto"]),
    ("coordinator", &["model", "proto"]),
    ("bench", &["coordinator", "kernels", "model", "proto"]),
    ("cli", &["bench", "coordinator", "kernels", "model", "proto", "worker"]),
];

/// Modules of the coordinator that decide. What they take in and give out is in no protocol's words.
const PURE: [&str; 7] = ["cluster", "engine", "planner", "request", "scheduler", "session.rs", "text.rs"];

/// Names that stand for a protocol, or for a socket.
const PROTOCOLS: [&str; 6] = ["tonic", "prost", "v1::", "axum", "TcpStream", "TcpListener"];

fn sources(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let entries = fs::read_dir(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let inside = entries.flat_map(|entry| sources(&entry.expect("an entry").path()));
    inside.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

#[test]
fn crates_depend_on_each_other_in_one_direction() {
    for (name, allowed) in MAY_USE {
        let manifest = fs::read_to_string(root().join(name).join("Cargo.toml")).expect("a manifest");
        let of_production = manifest.split("\n[").find(|section| section.starts_with("dependencies]"));
        let used = of_production.unwrap_or_default().lines().filter_map(|line| line.strip_prefix("grokpipe-"));
        for other in used.map(|line| line.split(['.', ' ', '=']).next().unwrap_or_default()) {
            assert!(allowed.contains(&other), "{name} uses {other}, expected only {allowed:?}");
        }
    }
}

#[test]
fn the_deciding_modules_know_no_protocol() {
    let source = root().join("coordinator/src");
    let mut files = 0;
    for module in PURE {
        let folder = source.join(module);
        let beside = source.join(format!("{module}.rs"));
        let paths = [folder, beside].into_iter().filter(|path| path.exists()).flat_map(|path| sources(&path));
        for path in paths {
            files += 1;
            let text = fs::read_to_string(&path).expect("a source");
            for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
                let found = PROTOCOLS.iter().find(|name| line.contains(*name));
                assert!(found.is_none(), "{}:{}: {}", path.display(), index + 1, line.trim());
            }
        }
    }
    assert!(files > 20, "only {files} files were found");
}
