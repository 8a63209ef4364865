//! The checkpoint as xAI published it, 770 files and 318 GB of it: every byte but the numbers, which are zeros that lie nowhere.
//!
//! The instructions are those that the published files are made of, in their order, and so lengths and offsets must come out to the
//! byte as they are known of the real ones.

use std::collections::BTreeMap;

use super::{build::Pickle, *};
use crate::LayerTensor;

const MEMOIZE: u8 = 0x94;
const TUPLES: [u8; 4] = [b')', 0x85, 0x86, 0x87];
/// Payloads from here on stand outside pickle's frames, and a new frame begins behind them.
const FRAMED_MOST: u64 = 1 << 16;

/// A file: what its instructions say, and where so many zeros stand between them.
#[derive(Clone)]
struct Holed {
    text: Vec<u8>,
    /// Place in `text`, and length, of each run of zeros.
    holes: Vec<(usize, u64)>,
}

impl Holed {
    fn offset_of_hole(&self, index: usize) -> u64 {
        self.holes[index].0 as u64 + self.holes[..index].iter().map(|(_, length)| length).sum::<u64>()
    }

    fn byte(&self, at: u64) -> u8 {
        let mut skipped = 0;
        for (place, length) in &self.holes {
            let begin = *place as u64 + skipped;
            if at < begin {
                break;
            }
            if at < begin + length {
                return 0;
            }
            skipped += length;
        }
        self.text[(at - skipped) as usize]
    }
}

impl ReadAt for Holed {
    fn length(&self) -> u64 {
        self.text.len() as u64 + self.holes.iter().map(|(_, length)| length).sum::<u64>()
    }

    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        if offset + out.len() as u64 > self.length() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        out.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = self.byte(at));
        Ok(())
    }
}

/// Python's pickler, as far as it writes arrays; frames are given the length 0, which no reader needs.
struct Writer {
    pickle: Pickle,
    holes: Vec<(usize, u64)>,
    memo: Vec<String>,
}

impl Writer {
    fn new() -> Self {
        Self { pickle: Pickle::new().raw(&[0x95, 0, 0, 0, 0, 0, 0, 0, 0]), holes: Vec::new(), memo: Vec::new() }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.pickle.0.extend_from_slice(bytes);
    }

    /// Remembers the value on top under a name of ours.
    fn memoize(&mut self, name: &str) {
        self.memo.push(name.to_owned());
        self.put(&[MEMOIZE]);
    }

    /// Recalls a value remembered before, if there is one.
    fn recall(&mut self, name: &str) -> bool {
        let Some(index) = self.memo.iter().position(|other| other == name) else { return false };
        self.put(&[b'h', index as u8]);
        true
    }

    fn text(&mut self, text: &str) {
        if !self.recall(text) {
            self.put(&[0x8c, text.len() as u8]);
            self.put(text.as_bytes());
            self.memoize(text);
        }
    }

    fn global(&mut self, module: &str, name: &str) {
        let whole = format!("{module}.{name}");
        if !self.recall(&whole) {
            self.text(module);
            self.text(name);
            self.put(&[0x93]);
            self.memoize(&whole);
        }
    }

    fn int(&mut self, value: u64) {
        match value {
            0..=0xff => self.put(&[b'K', value as u8]),
            0x100..=0xffff => self.put(&[b'M', value as u8, (value >> 8) as u8]),
            _ => {
                self.put(b"J");
                self.put(&(value as i32).to_le_bytes());
            }
        }
    }

    fn array(&mut self, code: &str, shape: &[u64], bytes: u64) {
        self.global("numpy.core.multiarray", "_reconstruct");
        self.global("numpy", "ndarray");
        self.put(b"K\0\x85");
        self.memoize("(0,)");
        if !self.recall("b") {
            self.put(b"C\x01b");
            self.memoize("b");
        }
        self.put(b"\x87");
        self.memoize("arguments");
        self.put(b"R");
        self.memoize("array");
        self.put(b"(K\x01");
        shape.iter().for_each(|size| self.int(*size));
        self.put(&[TUPLES[shape.len()]]);
        self.memoize("shape");
        self.dtype(code);
        self.put(b"\x89B");
        self.put(&(bytes as u32).to_le_bytes());
        self.holes.push((self.pickle.0.len(), bytes));
        if bytes >= FRAMED_MOST {
            self.put(&[0x95, 0, 0, 0, 0, 0, 0, 0, 0]);
        }
        self.memoize("payload");
        self.put(b"t");
        self.memoize("state");
        self.put(b"b");
    }

    fn dtype(&mut self, code: &str) {
        self.global("numpy", "dtype");
        if code == "bfloat16" {
            self.global("ml_dtypes", code)
        } else {
            self.text(code)
        }
        self.put(b"\x89\x88\x87");
        self.memoize("code");
        self.put(b"R");
        self.memoize("dtype of a code");
        self.put(b"(K\x03");
        self.text(if code == "i1" { "|" } else { "<" });
        self.put(b"NNN");
        self.put(if code == "bfloat16" { b"K\x02K\x02K\x50" } else { b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\0" });
        self.put(b"t");
        self.memoize("state of a dtype");
        self.put(b"b");
    }

    fn done(mut self) -> Holed {
        self.put(b".");
        Holed { text: self.pickle.0, holes: self.holes }
    }
}

fn published(name: &TensorName) -> Holed {
    let shape = name.shape(&ModelConfig::grok_1());
    let dimensions = shape.dimensions();
    let count: u64 = dimensions.iter().product();
    let mut writer = Writer::new();
    let Some(scales) = shape.scale_dimensions() else {
        writer.array("f4", &dimensions, count * 4);
        return writer.done();
    };
    writer.global("__main__", "QuantizedWeight8bit");
    writer.put(b")\x81");
    writer.memoize("quantised");
    writer.put(b"}");
    writer.memoize("dictionary");
    writer.put(b"(");
    writer.text("weight");
    writer.array("i1", &dimensions, count);
    writer.text("scales");
    writer.array("bfloat16", &scales, scales.iter().product::<u64>() * 2);
    writer.put(b"ub");
    writer.done()
}

/// The 770 files.
struct Checkpoint(BTreeMap<String, Holed>);

impl Storage for Checkpoint {
    fn list(&self, folder: &str) -> io::Result<Option<Vec<(String, u64)>>> {
        let prefix = format!("{folder}/");
        let named = self.0.iter().filter_map(|(name, file)| Some((name.strip_prefix(&prefix)?, file)));
        Ok(Some(named.map(|(name, file)| (name.to_owned(), file.length())).collect()))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn ReadAt>> {
        Ok(Box::new(self.0.get(name).ok_or(io::ErrorKind::NotFound)?.clone()))
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(name)
    }
}

#[test]
fn the_published_files_have_the_published_lengths_and_offsets() {
    let layer = |tensor| TensorName::Layer(5, tensor);
    // Length of the file, where the weight begins, and how far behind its end the scales do.
    let cases = [
        (TensorName::Embedding, 3_221_225_637, 151, None),
        (TensorName::FinalNorm, 24_727, 146, None),
        (layer(LayerTensor::MoeGate), 1_611_137_347, 201, Some(106)),
        (layer(LayerTensor::MoeDown), 1_611_399_491, 201, Some(106)),
        (layer(LayerTensor::MoeUp), 1_611_137_347, 201, Some(106)),
        (layer(LayerTensor::Key), 6_293_814, 199, None),
        (layer(LayerTensor::AttentionOutput), 37_847_359, 199, Some(104)),
        (layer(LayerTensor::Query), 37_761_334, 199, Some(104)),
        (layer(LayerTensor::Value), 6_293_814, 199, None),
        (layer(LayerTensor::PostMoeNorm), 24_727, 146, None),
        (layer(LayerTensor::Router), 196_770, 148, None),
    ];
    for (name, length, offset, behind) in cases {
        let file = published(&name);
        assert_eq!(file.length(), length, "{name}");
        let tensor = pickle::read(&file).unwrap();
        assert_eq!((tensor.weight.offset, file.offset_of_hole(0)), (offset, offset), "{name}");
        if let Some(behind) = behind {
            let end = offset + file.holes[0].1;
            let scales = tensor.scales.unwrap();
            assert_eq!((scales.offset, file.offset_of_hole(1)), (end + behind, end + behind), "{name}");
        }
    }
}

#[test]
fn the_published_checkpoint_opens_as_grok_1_without_a_configuration() {
    let names = TensorName::in_file_order(64);
    let files = names.iter().enumerate().map(|(index, name)| (format!("ckpt-0/tensor{index:05}_000"), published(name)));
    let storage = Checkpoint(files.collect());
    for (name, length) in crate::checkpoint::published::lengths() {
        assert_eq!(storage.0[&format!("ckpt-0/{name}")].length(), length, "{name}");
    }
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open_folder(folder.path(), Arc::new(storage)).unwrap();
    assert_eq!(model.config(), &ModelConfig::grok_1());
    assert_eq!(model.stored_bytes(0..64, true), 318_239_886_140);
    let tensors = model.inspect().unwrap();
    assert_eq!(tensors.len(), 770);
    // The fifth layer of files is layer 12, and the thirteenth is layer 2.
    assert_eq!(tensors[2 + 4 * 12].name, TensorName::Layer(12, LayerTensor::MoeGate));
    assert_eq!(tensors[2 + 12 * 12].name, TensorName::Layer(2, LayerTensor::MoeGate));
    let down = model.matrix(&TensorName::Layer(63, LayerTensor::MoeDown)).unwrap();
    assert_eq!(down.spec().format, Format::Int8 { groups: 8 });
    assert_eq!(down.scales().unwrap().len(), 8 * 8 * 6144);
    let mut last = [1; 16];
    down.read(down.spec().weight_bytes() - 16, &mut last).unwrap();
    assert_eq!(last, [0; 16]);
    assert!(down.read(down.spec().weight_bytes() - 15, &mut last).is_err());
}
