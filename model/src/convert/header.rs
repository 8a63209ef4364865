//! The beginning of a GGUF file (version 3): metadata, then what tensors follow and where.

use super::plan::Tensor;
use crate::Format;

/// Tensors begin at multiples of this.
pub(super) const ALIGNMENT: u64 = 32;

/// A value of the metadata, with the width that llama.cpp expects.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    U16(u16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(String),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Texts(Vec<String>),
}

/// Metadata as it is written.
#[derive(Clone, Default)]
pub(super) struct Metadata {
    bytes: Vec<u8>,
    keys: u64,
}

impl Metadata {
    pub(super) fn add(&mut self, key: &str, value: &Value) {
        text(&mut self.bytes, key);
        self.keys += 1;
        let out = &mut self.bytes;
        match value {
            Value::U16(value) => scalar(out, 2, &value.to_le_bytes()),
            Value::U32(value) => scalar(out, 4, &value.to_le_bytes()),
            Value::I32(value) => scalar(out, 5, &value.to_le_bytes()),
            Value::F32(value) => scalar(out, 6, &value.to_le_bytes()),
            Value::Bool(value) => scalar(out, 7, &[u8::from(*value)]),
            Value::Text(value) => {
                scalar(out, 8, &[]);
                text(out, value);
            }
            Value::I32s(values) => {
                array(out, 5, values.len());
                values.iter().for_each(|value| out.extend(value.to_le_bytes()));
            }
            Value::F32s(values) => {
                array(out, 6, values.len());
                values.iter().for_each(|value| out.extend(value.to_le_bytes()));
            }
            Value::Texts(values) => {
                array(out, 8, values.len());
                values.iter().for_each(|value| text(out, value));
            }
        }
    }

    /// The header of a file with this metadata and these tensors.
    pub(super) fn header(&self, tensors: &[Tensor]) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.bytes.len() + 100 * tensors.len());
        out.extend(b"GGUF");
        out.extend(3_u32.to_le_bytes());
        out.extend((tensors.len() as u64).to_le_bytes());
        out.extend(self.keys.to_le_bytes());
        out.extend(&self.bytes);
        let mut offset = 0_u64;
        for tensor in tensors {
            info(&mut out, tensor, offset);
            offset += tensor.bytes.next_multiple_of(ALIGNMENT);
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
        out
    }

    /// Length of a header without tensors.
    pub(super) fn length(&self) -> u64 {
        24 + self.bytes.len() as u64
    }
}

/// Bytes that a tensor takes in a header.
pub(super) fn info_length(tensor: &Tensor) -> u64 {
    (8 + tensor.label.len() + 4 + 8 * tensor.sizes.len() + 4 + 8) as u64
}

fn info(out: &mut Vec<u8>, tensor: &Tensor, offset: u64) {
    text(out, &tensor.label);
    out.extend((tensor.sizes.len() as u32).to_le_bytes());
    tensor.sizes.iter().for_each(|size| out.extend(size.to_le_bytes()));
    let number = match tensor.format {
        Format::Blocks(kind) => kind.number(),
        Format::F32 | Format::Int8 { .. } => 0,
    };
    out.extend(number.to_le_bytes());
    out.extend(offset.to_le_bytes());
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn scalar(out: &mut Vec<u8>, kind: u32, bytes: &[u8]) {
    out.extend(kind.to_le_bytes());
    out.extend(bytes);
}

fn array(out: &mut Vec<u8>, kind: u32, count: usize) {
    scalar(out, 9, &kind.to_le_bytes());
    out.extend((count as u64).to_le_bytes());
}
