//! What whole-system tests share: where the goldens are, the built binary, clusters of real processes, and small models made
//! from a seed for clusters inside a test.
//!
//! A test that lacks something says `skipped: …` and returns; it never passes silently.

pub mod faults;
pub mod processes;
pub mod simulated;

use std::{
    env,
    path::{Path, PathBuf},
};

/// The project's root folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the project").to_owned()
}

/// A file or folder of the shared goldens, unless they are not here; then says so.
pub fn shared(path: &str) -> Option<PathBuf> {
    let folder = env::var_os("GROKPIPE_SHARED").map_or_else(|| root().join("../shared"), PathBuf::from);
    let found = folder.join(path);
    if found.exists() {
        return Some(found);
    }
    println!("skipped: no {path} in the shared goldens (GROKPIPE_SHARED)");
    None
}

/// The demo model that lies in the project.
pub fn demo_model() -> PathBuf {
    root().join("model/demo")
}

/// A command of this machine, or `None` after saying that the test is skipped.
pub fn command(name: &str) -> Option<PathBuf> {
    let tools = [root().join("target/test-tools/node_modules/.bin"), root().join("target/test-tools/venv/bin")];
    let path = env::var_os("PATH").unwrap_or_default();
    let found =
        tools.into_iter().chain(env::split_paths(&path)).map(|folder| folder.join(name)).find(|path| path.is_file());
    if found.is_none() {
        println!("skipped: no {name} on this machine");
    }
    found
}

/// Logs of clusters inside this test to standard error, if `GROKPIPE_LOG` has a filter.
pub fn start_logs() {
    if let Ok(filter) = env::var("GROKPIPE_LOG") {
        let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        // Another test of the same program may have been first.
        let _ = builder.try_init();
    }
}

/// Whether a GPU adapter must be there.
pub fn gpu_required() -> bool {
    env::var_os("GPU_REQUIRED").is_some_and(|value| value == "1")
}
