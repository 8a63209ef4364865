//! Random damage to good files: the readers never panic, and what they accept lies within the file.

use proptest::prelude::*;

use super::{build::Pickle, tiny, *};
use crate::LayerTensor;

/// One change to a file; places are taken modulo its length.
#[derive(Clone, Debug)]
enum Change {
    Set(usize, u8),
    Flip(usize, u8),
    Insert(usize, Vec<u8>),
    Delete(usize, usize),
    Copy(usize, usize, usize),
    Truncate(usize),
}

fn changes(reach: usize) -> impl Strategy<Value = Vec<Change>> {
    let place = 0..reach;
    let change = prop_oneof![
        (place.clone(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        (place.clone(), 0..8_u8).prop_map(|(at, bit)| Change::Flip(at, 1 << bit)),
        (place.clone(), prop::collection::vec(any::<u8>(), 1..12)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        (place.clone(), 1..40_usize).prop_map(|(at, count)| Change::Delete(at, count)),
        (place.clone(), place.clone(), 1..40_usize).prop_map(|(from, to, count)| Change::Copy(from, to, count)),
        place.prop_map(Change::Truncate),
    ];
    prop::collection::vec(change, 1..6)
}

fn changed(mut file: Vec<u8>, changes: &[Change]) -> Vec<u8> {
    for change in changes {
        let length = file.len().max(1);
        match change {
            Change::Set(at, byte) => file.iter_mut().skip(at % length).take(1).for_each(|place| *place = *byte),
            Change::Flip(at, bits) => file.iter_mut().skip(at % length).take(1).for_each(|place| *place ^= bits),
            Change::Insert(at, bytes) => {
                let at = (at % length).min(file.len());
                file.splice(at..at, bytes.iter().copied());
            }
            Change::Delete(at, count) => {
                let at = (at % length).min(file.len());
                file.drain(at..(at + count).min(file.len()));
            }
            Change::Copy(from, to, count) => {
                let (from, to) = ((from % length).min(file.len()), (to % length).min(file.len()));
                let piece = file[from..(from + count).min(file.len())].to_vec();
                file.splice(to..to, piece);
            }
            Change::Truncate(at) => file.truncate(at % length),
        }
    }
    file
}

/// Whatever a reader accepts can be read, to its last byte.
fn check_pickle(file: &[u8]) {
    let Ok(tensor) = pickle::read(&Memory(file)) else { return };
    for array in [Some(tensor.weight), tensor.scales].into_iter().flatten() {
        let count = array.shape.iter().try_fold(1_u64, |count, size| count.checked_mul(*size)).expect("a count");
        let end = count.checked_mul(array.dtype.bytes()).and_then(|bytes| bytes.checked_add(array.offset));
        assert!(end.is_some_and(|end| end <= file.len() as u64), "{array:?} in {} bytes", file.len());
    }
}

fn check_safetensors(file: &[u8]) {
    let Ok(entries) = safetensors::read(&Memory(file)) else { return };
    for (name, entry) in entries {
        let end = entry.offset.checked_add(entry.length);
        assert!(end.is_some_and(|end| end <= file.len() as u64), "{name}: {entry:?} in {} bytes", file.len());
        assert_eq!(entry.shape.iter().product::<u64>() * 4, entry.length, "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn a_damaged_pickle_never_reaches_outside_its_file(quantised: bool, changes in changes(900)) {
        let name = if quantised { TensorName::Layer(0, LayerTensor::AttentionOutput) } else { TensorName::FinalNorm };
        let (weight, scales) = tiny::arrays(&name);
        check_pickle(&changed(tiny::pickle(&weight, scales.as_ref()), &changes));
    }

    #[test]
    fn a_damaged_header_never_reaches_outside_its_file(changes in changes(400)) {
        let names = [TensorName::FinalNorm, TensorName::Layer(0, LayerTensor::Router)];
        check_safetensors(&changed(tiny::safetensors(&names), &changes));
    }

    #[test]
    fn known_instructions_in_any_order_never_panic(
        codes in prop::collection::vec(prop::sample::select(b"\x94)}(t\x85\x86\x87N\x88\x89\x81Rbuh\x93CKM.".to_vec()), 0..200),
    ) {
        let begun = Pickle::new().global("__main__", "QuantizedWeight8bit").global("numpy", "dtype").text("f4");
        check_pickle(&begun.raw(&codes).done());
    }

    #[test]
    fn numbers_in_a_header_never_overflow(sizes in prop::collection::vec(any::<u64>(), 0..5), from: u64, to: u64) {
        let header = serde_json::json!({"a": {"dtype": "F32", "shape": sizes, "data_offsets": [from, to]}}).to_string();
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 64]].concat();
        check_safetensors(&file);
    }
}
