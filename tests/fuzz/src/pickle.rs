//! xAI's pickles: the one tensor by itself, then as every tensor of the checkpoint with the sizes of `tiny/config.json`. It fits a few of
//! them, so that an input is accepted when the machine that reads pickles accepts it.

use grokpipe_model::{
    TensorName,
    checkpoint::pickle::{self, Array},
};

use super::{
    memory::Bytes,
    opened::{model, refused, tiny},
};

/// Layers that it has.
const LAYERS: u32 = 1;

/// Reads the input as a file of xAI's checkpoint.
pub fn run(data: &[u8]) -> bool {
    let file = Bytes::from(data);
    let tensor = match pickle::read(&file) {
        Ok(tensor) => tensor,
        Err(error) => return refused(&error),
    };
    lies_within(&tensor.weight, data);
    tensor.scales.iter().for_each(|scales| lies_within(scales, data));
    let count = TensorName::in_file_order(LAYERS).len();
    model(tiny(), (0..count).map(|index| (format!("ckpt-0/tensor{index:05}_000"), file.clone())).collect());
    true
}

/// The array's bytes are those of the file.
fn lies_within(array: &Array, data: &[u8]) {
    let bytes = array.shape.iter().try_fold(array.dtype.bytes(), |bytes, size| bytes.checked_mul(*size));
    let end = bytes.and_then(|bytes| bytes.checked_add(array.offset));
    assert!(end.is_some_and(|end| end <= data.len() as u64), "{array:?} in {} bytes", data.len());
}
