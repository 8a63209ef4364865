//! Products alone, of every stored type, by how many rows are multiplied at a time.
//!
//! Few rows read every weight for little work, so that their share of the memory's bandwidth counts; many rows work on weights
//! that are already near, so that their arithmetic does. What the memory gives is measured around each type, as it may change.

use grokpipe_kernels::{KernelError, Precision, Prefill, ProductShape, ProductTime, select_device, settled};
use grokpipe_model::{BlockType, Format};
use serde_json::{Value, json};

use crate::{BenchError, median};

/// What is multiplied, and how.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Stored types.
    pub types: Vec<Format>,
    /// Inputs of the matrix: whole blocks of every type.
    pub inputs: usize,
    /// Outputs of the matrix.
    pub outputs: usize,
    /// Numbers of rows that are multiplied at a time.
    pub rows: Vec<usize>,
    /// As [`select_device`] takes it.
    pub device: String,
    /// Threads of the CPU backend.
    pub threads: usize,
    /// How exactly products are computed.
    pub precision: Precision,
    /// How a GPU computes steps of many rows.
    pub prefill: Prefill,
    /// Times that each product is measured.
    pub repeat: usize,
}

/// Times the products. `progress` hears of each type before it is measured, with its index.
///
/// # Errors
/// What the device reports.
pub fn run(settings: &Settings, progress: &mut dyn FnMut(usize, Format)) -> Result<Report, BenchError> {
    let Settings { inputs, outputs, .. } = *settings;
    let mut device = select_device(&settings.device, settings.threads, settings.precision, settings.prefill)?;
    let times = settled(device.as_mut(), |device| {
        let mut before = device.measure_read_bandwidth(u64::MAX)?;
        let of_type = |(index, &format): (usize, &Format)| {
            progress(index, format);
            let shape = ProductShape { format, inputs, outputs };
            let times = device.time_products(shape, &settings.rows, settings.repeat)?;
            let after = device.measure_read_bandwidth(u64::MAX)?;
            let bandwidth = f64::midpoint(std::mem::replace(&mut before, after), after);
            Ok::<_, KernelError>(OfType { format, bandwidth, times })
        };
        settings.types.iter().enumerate().map(of_type).collect::<Result<Vec<_>, _>>()
    })?;
    let info = device.info();
    Ok(Report {
        device: info.name.clone(),
        precision: settings.precision,
        // What is in use, not what was asked for: few devices have it.
        prefill: Prefill::of_fingerprint(&info.fingerprint),
        inputs,
        outputs,
        times,
    })
}

/// int8 with the scale groups of the published checkpoint's row-parallel matrices.
const INT8: Format = Format::Int8 { groups: 8 };

/// Every stored type.
pub fn all() -> impl Iterator<Item = Format> {
    [Format::F32, INT8].into_iter().chain(BlockType::all().map(Format::Blocks))
}

/// The name by which people know a stored type.
pub fn name(format: Format) -> &'static str {
    match format {
        Format::F32 => "F32",
        Format::Int8 { .. } => "int8",
        Format::Blocks(kind) => kind.name(),
    }
}

/// The times of all types.
pub struct Report {
    /// What computed, for people.
    pub device: String,
    /// How exactly products were computed.
    pub precision: Precision,
    /// How the device computes steps of many rows.
    pub prefill: Prefill,
    /// Inputs of the matrix.
    pub inputs: usize,
    /// Outputs of the matrix.
    pub outputs: usize,
    /// In the order of the settings.
    pub times: Vec<OfType>,
}

/// Products with matrices of one type.
pub struct OfType {
    /// The stored type.
    pub format: Format,
    /// Bytes a second that the memory gave before and after, the mean.
    pub bandwidth: f64,
    /// By the number of rows.
    pub times: Vec<ProductTime>,
}

impl Report {
    /// Bytes a second that the memory gave, the median over the types.
    pub fn bandwidth(&self) -> f64 {
        median(self.times.iter().map(|of_type| of_type.bandwidth))
    }

    /// Bytes and multiply-adds times two a second.
    pub fn rates(&self, time: &ProductTime) -> (f64, f64) {
        let work = 2.0 * (time.rows * self.inputs * self.outputs) as f64;
        (time.bytes as f64 / time.seconds, work / time.seconds)
    }

    /// As one JSON object.
    pub fn to_json(&self) -> Value {
        let results = self.times.iter().flat_map(|OfType { format, bandwidth, times }| {
            times.iter().map(move |time| {
                let (bytes, work) = self.rates(time);
                json!({
                    "type": name(*format),
                    "rows": time.rows,
                    "seconds": time.seconds,
                    "bytes": time.bytes,
                    "gigabytes_per_second": bytes / 1e9,
                    "read_gigabytes_per_second": bandwidth / 1e9,
                    "share_of_bandwidth": bytes / bandwidth,
                    "gigaflops_per_second": work / 1e9,
                })
            })
        });
        json!({
            "machine": { "device": self.device, "read_gigabytes_per_second": self.bandwidth() / 1e9 },
            "precision": self.precision.name(),
            "prefill": self.prefill.name(),
            "inputs": self.inputs,
            "outputs": self.outputs,
            "results": results.collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_bytes_and_of_work() {
        let time = ProductTime { rows: 8, bytes: 1_000_000, seconds: 1e-3 };
        let (inputs, outputs) = (1000, 500);
        let of_type = |kind, bandwidth| OfType { format: Format::Blocks(kind), bandwidth, times: vec![time] };
        let times = vec![of_type(BlockType::Q8_0, 2e9), of_type(BlockType::Q4K, 4e9)];
        let (precision, prefill) = (Precision::Fast, Prefill::Invariant);
        let report = Report { device: "cpu".into(), precision, prefill, inputs, outputs, times };
        let json = report.to_json();
        assert_eq!(json["results"][0]["share_of_bandwidth"], 0.5);
        assert_eq!(json["results"][1]["share_of_bandwidth"], 0.25);
        assert_eq!(json["machine"]["read_gigabytes_per_second"], 3.0);
        assert_eq!(json["results"][0]["gigaflops_per_second"], 8.0);
        assert_eq!(json["prefill"], "invariant");
    }
}
