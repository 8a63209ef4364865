//! Uses a model that was opened, as a worker would, and holds the readers to what they promise.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use grokpipe_model::{
    BlockType, Format, MatrixSource, Model, ModelError, TensorName, TensorShape, WeightSource,
    checkpoint::storage::ReadAt,
};

use super::memory::{Bytes, Files};

/// Numbers are looked at in pieces of this many bytes: enough for every kind of block, and quick.
const PIECE: usize = 4096;

/// The folder of `tiny/config.json`, whose sizes the seeds of formats without their own have. Two crates share this code, so that it
/// is looked for above whichever was compiled.
pub(super) fn tiny() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|folder| folder.join("tests/fuzz/tiny"));
        above.into_iter().find(|folder| folder.is_dir()).unwrap_or_default()
    })
}

/// Opens these files as a model and uses all of it; says whether everything in it could be read. The folder is where a
/// `config.json` is looked for.
pub(super) fn model(folder: &Path, files: Vec<(String, Bytes)>) -> bool {
    let stored: u64 = files.iter().map(|(_, bytes)| bytes.length()).sum();
    let model = match Model::open_folder(folder, Arc::new(Files(files))) {
        Ok(model) => model,
        Err(error) => return refused(&error),
    };
    let names = TensorName::in_file_order(model.config().num_hidden_layers);
    // Not a short circuit: whatever one tensor is refused for, the others are looked at.
    let good =
        names.into_iter().chain([TensorName::Head]).filter(|name| !accepted(tensor(&model, name, stored))).count() == 0;
    let summed = accepted(model.inspect().map(|summaries| {
        for summary in summaries {
            assert!(summary.bytes <= stored, "{summary:?} in {stored} bytes");
        }
    }));
    assert_eq!(model.digest(), model.digest());
    let last = model.config().vocab_size as u32 - 1;
    let rows =
        accepted(model.embedding_rows(&[0, last]).map(|rows| assert_eq!(rows.len(), 2 * model.config().hidden_size)));
    assert!(model.embedding_rows(&[last + 1]).is_err(), "a row after the last");
    good && summed && rows
}

/// Reads one tensor.
fn tensor(model: &Model, name: &TensorName, stored: u64) -> Result<(), ModelError> {
    match name.shape(model.config()) {
        TensorShape::Vector(length) => {
            assert_eq!(model.vector(name)?.len(), length, "{name}");
            Ok(())
        }
        TensorShape::Matrix { .. } => matrix(&*model.matrix(name)?, stored),
    }
}

/// Reads the first and the last bytes of a matrix, its first row as numbers, and its scales.
fn matrix(matrix: &dyn MatrixSource, stored: u64) -> Result<(), ModelError> {
    let (spec, bytes) = (matrix.spec(), matrix.spec().weight_bytes());
    assert!(bytes <= stored, "{spec:?} in {stored} bytes");
    let mut piece = vec![0; bytes.min(PIECE as u64) as usize];
    matrix.read(bytes - piece.len() as u64, &mut piece)?;
    assert!(matrix.read(bytes - piece.len() as u64 + 1, &mut piece).is_err(), "{spec:?}: a byte after the last");
    matrix.read(0, &mut piece)?;
    numbers(spec.format, &piece);
    assert_eq!(matrix.scales()?.len(), spec.scale_count(), "{spec:?}");
    Ok(())
}

/// Dequantises the first of these bytes that are whole blocks, in every way that there is.
pub(super) fn numbers(format: Format, bytes: &[u8]) {
    let Format::Blocks(kind) = format else { return };
    let whole = &bytes[..bytes.len().min(PIECE) / kind.bytes() * kind.bytes()];
    let mut out = vec![0.0; whole.len() / kind.bytes() * kind.weights()];
    kind.dequantize(whole, &mut out);
    for block in whole.chunks_exact(kind.bytes()) {
        unpacked(kind, block);
    }
}

fn unpacked(kind: BlockType, block: &[u8]) {
    // Formats without whole-number weights say so.
    let _ = kind.unpack(block, &mut vec![0; kind.weights()]);
}

fn accepted<T>(result: Result<T, ModelError>) -> bool {
    match result {
        Ok(_) => true,
        Err(error) => refused(&error),
    }
}

/// Whatever the file holds, a refusal is short and can be printed. Always `false`: not accepted.
pub(super) fn refused(error: &dyn Display) -> bool {
    let message = error.to_string();
    assert!(message.len() < 1500 && !message.contains(char::is_control), "{message:?}");
    false
}
