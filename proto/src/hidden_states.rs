//! Hidden states on the wire: raw little-endian f32, `[rows, width]`, guarded by a CRC32C.
//!
//! What a peer says of shapes is only compared with what the receiver expects, never used to allocate.

use bytes::Bytes;
use thiserror::Error;

use crate::v1::{ActivationDtype, HiddenStates};

/// Why received hidden states were refused.
#[derive(Debug, Error, PartialEq)]
pub enum HiddenStatesError {
    /// Not the shape of this frame.
    #[error(
        "expected hidden states of {expected_rows} rows of {expected_width} f32, found {rows} rows of {width} in {bytes} bytes"
    )]
    Shape {
        /// Tokens in the frame.
        expected_rows: usize,
        /// The model's hidden size.
        expected_width: usize,
        /// Rows that the sender declared.
        rows: u32,
        /// Width that the sender declared.
        width: u32,
        /// Bytes that came.
        bytes: usize,
    },
    /// A number format that this build does not read.
    #[error("expected hidden states in f32, found dtype number {found}")]
    Dtype {
        /// Number of the dtype that the sender declared.
        found: i32,
    },
    /// Damaged on the way.
    #[error("expected hidden states with CRC32C {expected:#010x}, found {found:#010x}")]
    Checksum {
        /// What the sender computed.
        expected: u32,
        /// What arrived.
        found: u32,
    },
    /// Infinity or not a number.
    #[error("expected finite hidden states, found {value} at row {row}, column {column}")]
    NotFinite {
        /// Row in the frame.
        row: usize,
        /// Component.
        column: usize,
        /// The value.
        value: f32,
    },
}

/// Packs `values`, `[values.len() / width, width]`.
pub fn encode(values: &[f32], width: usize) -> HiddenStates {
    let mut data = Vec::with_capacity(values.len() * 4);
    data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    HiddenStates {
        crc32c: crc32c::crc32c(&data),
        data: Bytes::from(data),
        dtype: ActivationDtype::F32 as i32,
        rows: (values.len() / width.max(1)) as u32,
        width: width as u32,
    }
}

/// Unpacks what must be `[rows, width]`.
///
/// # Errors
/// [`HiddenStatesError`]; the checksum is compared before any number is looked at.
pub fn decode(received: &HiddenStates, rows: usize, width: usize) -> Result<Vec<f32>, HiddenStatesError> {
    if received.dtype != ActivationDtype::F32 as i32 {
        return Err(HiddenStatesError::Dtype { found: received.dtype });
    }
    let fits = received.rows as usize == rows
        && received.width as usize == width
        && rows.checked_mul(width).and_then(|n| n.checked_mul(4)) == Some(received.data.len());
    if !fits {
        return Err(HiddenStatesError::Shape {
            expected_rows: rows,
            expected_width: width,
            rows: received.rows,
            width: received.width,
            bytes: received.data.len(),
        });
    }
    let found = crc32c::crc32c(&received.data);
    if found != received.crc32c {
        return Err(HiddenStatesError::Checksum { expected: received.crc32c, found });
    }
    let (chunks, _) = received.data.as_chunks::<4>();
    let values: Vec<f32> = chunks.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect();
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(at) => {
            Err(HiddenStatesError::NotFinite { row: at / width.max(1), column: at % width.max(1), value: values[at] })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_the_wire_bit_for_bit() {
        let values = [0.0, -0.0, f32::MIN_POSITIVE / 2.0, 1.5, f32::MAX, -3.25e-20];
        let decoded = decode(&encode(&values, 3), 2, 3).unwrap();
        assert_eq!(decoded.map_bits(), values.to_vec().map_bits());
    }

    trait Bits {
        fn map_bits(&self) -> Vec<u32>;
    }
    impl Bits for Vec<f32> {
        fn map_bits(&self) -> Vec<u32> {
            self.iter().map(|value| value.to_bits()).collect()
        }
    }

    #[test]
    fn malformed_hidden_states_are_refused() {
        let good = encode(&[1.0; 6], 3);
        assert!(decode(&good, 2, 3).is_ok());
        let cases: Vec<(&str, HiddenStates)> = vec![
            ("fewer rows", HiddenStates { rows: 1, ..good.clone() }),
            ("more rows", HiddenStates { rows: 3, ..good.clone() }),
            ("rows at the maximum", HiddenStates { rows: u32::MAX, ..good.clone() }),
            ("zero width", HiddenStates { width: 0, ..good.clone() }),
            ("width at the maximum", HiddenStates { width: u32::MAX, ..good.clone() }),
            ("bytes missing", HiddenStates { data: good.data.slice(..23), ..good.clone() }),
            ("no bytes", HiddenStates { data: Bytes::new(), ..good.clone() }),
            ("bytes too many", HiddenStates { data: [&good.data[..], &[0]].concat().into(), ..good.clone() }),
            ("unknown dtype", HiddenStates { dtype: 9, ..good.clone() }),
            ("unspecified dtype", HiddenStates { dtype: 0, ..good.clone() }),
            ("wrong checksum", HiddenStates { crc32c: good.crc32c ^ 1, ..good.clone() }),
            ("not a number", encode(&[1.0, 2.0, f32::NAN, 4.0, 5.0, 6.0], 3)),
            ("infinite", encode(&[1.0, 2.0, 3.0, 4.0, f32::INFINITY, 6.0], 3)),
        ];
        for (name, frame) in cases {
            let refusal = decode(&frame, 2, 3).expect_err(name);
            assert!(refusal.to_string().contains("expected"), "{name}: {refusal}");
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let good = encode(&[0.5, -1.25, 3.0], 3);
        for bit in 0..good.data.len() * 8 {
            let mut data = good.data.to_vec();
            data[bit / 8] ^= 1 << (bit % 8);
            let flipped = HiddenStates { data: data.into(), ..good.clone() };
            assert!(matches!(decode(&flipped, 1, 3), Err(HiddenStatesError::Checksum { .. })), "bit {bit}");
        }
    }
}
