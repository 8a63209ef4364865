//! Compiles the protocol with protox, so that no `protoc` is needed, and writes the descriptor set for reflection.

use std::{env, error::Error, fs, path::PathBuf};

const FILES: [&str; 5] = ["membership", "pipeline", "inference", "cluster", "diagnosis"];

fn main() -> Result<(), Box<dyn Error>> {
    let files: Vec<String> = FILES.iter().map(|name| format!("grokpipe/v1/{name}.proto")).collect();
    for file in &files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(&files, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    // Payloads stay views of the received message instead of being copied out of it.
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
