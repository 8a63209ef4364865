//! Compiles the protocol with protox, so that no `protoc` is needed, and writes the descriptor set for reflection.
//!
//! What `snapshot.proto` defines can also be written as JSON; this file says how.

use std::{env, error::Error, fs, path::PathBuf};

const FILES: [&str; 6] = ["membership", "pipeline", "inference", "cluster", "snapshot", "diagnosis"];

fn main() -> Result<(), Box<dyn Error>> {
    let files: Vec<String> = FILES.iter().map(|name| format!("grokpipe/v1/{name}.proto")).collect();
    for file in &files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(&files, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    // Payloads stay views of the received message instead of being copied out of it.
    let mut builder = tonic_prost_build::configure().bytes(".");

    // The JSON of the snapshot: every message and enum of its file, fields by their own names.
    let is_snapshot = |name: &str| name.ends_with("/snapshot.proto");
    let snapshot = descriptors.file.iter().find(|file| is_snapshot(file.name())).ok_or("expected snapshot.proto")?;
    for message in &snapshot.message_type {
        builder = builder.message_attribute(message.name(), "#[derive(serde::Serialize)]");
    }
    for kind in &snapshot.enum_type {
        let words = "#[derive(serde::Serialize)] #[serde(rename_all = \"lowercase\")]";
        builder = builder.enum_attribute(kind.name(), words);
        // A field of this type is a number in Rust.
        let type_name = format!(".{}.{}", snapshot.package(), kind.name());
        for message in &snapshot.message_type {
            for field in message.field.iter().filter(|field| field.type_name() == type_name) {
                let word = format!("#[serde(serialize_with = \"crate::snapshot::json::word::<{}, _>\")]", kind.name());
                builder = builder.field_attribute(format!("{}.{}", message.name(), field.name()), word);
            }
        }
    }
    builder = builder.message_attribute("LayerRange", "#[serde(into = \"[u32; 2]\")]");
    // Readers find these objects even where nothing is known yet.
    for part in ["SnapshotNode.load", "SnapshotNode.stats", "NodeStats.memory"] {
        builder = builder.field_attribute(part, "#[serde(serialize_with = \"crate::snapshot::json::or_unknown\")]");
    }
    builder = builder.field_attribute("SnapshotNode.stats", "#[serde(flatten)]");

    builder.compile_fds(descriptors)?;
    Ok(())
}
