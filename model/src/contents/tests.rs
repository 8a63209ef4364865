//! Sums do not depend on how a matrix is read, and differ where a bit does.

use std::sync::Arc;

use super::*;
use crate::{Format, Layout};

struct Bytes {
    spec: MatrixSpec,
    bytes: Arc<Vec<u8>>,
    scales: Vec<f32>,
}

impl MatrixSource for Bytes {
    fn spec(&self) -> &MatrixSpec {
        &self.spec
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ModelError> {
        out.copy_from_slice(&self.bytes[offset as usize..][..out.len()]);
        Ok(())
    }

    fn scales(&self) -> Result<Vec<f32>, ModelError> {
        Ok(self.scales.clone())
    }
}

fn matrix(change: impl Fn(&mut Vec<u8>, &mut Vec<f32>)) -> Summed {
    let mut bytes: Vec<u8> = (0..2 * 50 * 700).map(|i| (i % 251) as u8).collect();
    let mut scales: Vec<f32> = (0..2 * 700).map(|i| i as f32).collect();
    change(&mut bytes, &mut scales);
    let format = Format::Int8 { groups: 1 };
    let spec = MatrixSpec { name: "m".into(), experts: 2, inputs: 50, outputs: 700, format, layout: Layout::InOut };
    Summed::new(Box::new(Bytes { spec, bytes: Arc::new(bytes), scales }))
}

fn sum(summed: Summed) -> Sum {
    let (sum, hole) = summed.finish().unwrap();
    assert!(hole.is_none());
    sum
}

#[test]
fn a_sum_is_the_same_however_the_matrix_is_read() {
    let expected = sum(matrix(|_, _| ()));
    let ways: [&[(u64, usize)]; 6] = [
        &[(0, 70_000)],
        &[(0, 1), (1, 69_999)],
        &[(0, 50_000), (40_000, 30_000)],
        &[(35_000, 35_000), (0, 35_000)],
        &[(0, 10), (0, 10), (20, 10)],
        &[(0, 70_000), (0, 70_000)],
    ];
    for way in ways {
        let summed = matrix(|_, _| ());
        for (offset, length) in way {
            summed.read(*offset, &mut vec![0; *length]).unwrap();
        }
        summed.scales().unwrap();
        summed.scales().unwrap();
        assert_eq!(sum(summed), expected, "{way:?}");
    }
}

#[test]
fn a_sum_differs_where_a_number_or_a_scale_does() {
    let sums = [
        sum(matrix(|_, _| ())),
        sum(matrix(|bytes, _| bytes[69_999] ^= 1)),
        sum(matrix(|bytes, _| bytes.swap(3, 4))),
        sum(matrix(|_, scales| scales[0] = 9.0)),
        sum(matrix(|_, scales| scales.swap(1398, 1399))),
    ];
    for (index, one) in sums.iter().enumerate() {
        assert!(!sums[index + 1..].contains(one), "{index}");
    }
}

/// Workers of different builds compare sums, and manifests keep them.
#[test]
fn a_sum_is_written_as_ever() {
    assert_eq!(Sum::of_vector(&[1.0, -2.5]).to_string(), "0ee1ae55463f11904bfb7dc1c530658a");
    assert_eq!(sum(matrix(|_, _| ())).to_string(), "2ba56780e81c2903ddf022ed87cf998c");
}

#[test]
fn a_layer_is_summed_by_its_tensors_in_any_order() {
    let mut tensors: Vec<_> =
        LayerTensor::ALL.into_iter().enumerate().map(|(i, t)| (t, Sum::of_vector(&[i as f32]))).collect();
    let sum = Sum::of_layer(&tensors);
    tensors.reverse();
    assert_eq!(Sum::of_layer(&tensors), sum);
    tensors[0].1 = Sum::of_vector(&[99.0]);
    assert_ne!(Sum::of_layer(&tensors), sum);
}

#[test]
fn zeros_within_rows_are_named_by_their_place() {
    let (_, hole) = matrix(|bytes, _| bytes[9000..14_000].fill(0)).finish().unwrap();
    let message = hole.unwrap().to_string();
    assert!(message.contains("m: byte 9000: expected numbers, found 5000 zeros"), "{message}");
}

#[test]
fn parts_have_numbers_and_names() {
    for part in [Part::Layer(0), Part::Layer(63), Part::Embedding, Part::Head, Part::FinalNorm] {
        assert_eq!(Part::from_index(part.index(64), 64), Some(part));
        assert_eq!(Part::from_text(&part.to_string()), Some(part));
    }
    assert_eq!((Part::from_index(67, 64), Part::from_text("layer x")), (None, None));
}
