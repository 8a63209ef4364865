//! What is opened and read, recorded: a worker touches its own layers' bytes and no others.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

use super::{failing::Failing, tiny, *};
use crate::LayerTensor;

#[derive(Default)]
struct Log {
    opened: Vec<String>,
    read: Vec<(String, Range<u64>)>,
}

/// A folder that writes down what is asked of it.
struct Recording {
    folder: Folder,
    log: Arc<Mutex<Log>>,
}

struct RecordedFile {
    name: String,
    file: Box<dyn ReadAt>,
    log: Arc<Mutex<Log>>,
}

impl Storage for Recording {
    fn list(&self, folder: &str) -> io::Result<Option<Vec<(String, u64)>>> {
        self.folder.list(folder)
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn ReadAt>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).opened.push(name.to_owned());
        let (file, log) = (self.folder.open(name)?, Arc::clone(&self.log));
        Ok(Box::new(RecordedFile { name: name.to_owned(), file, log }))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path(name)
    }
}

impl ReadAt for RecordedFile {
    fn length(&self) -> u64 {
        self.file.length()
    }

    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let range = offset..offset + out.len() as u64;
        self.log.lock().unwrap_or_else(PoisonError::into_inner).read.push((self.name.clone(), range));
        self.file.read_exact_at(out, offset)
    }
}

fn recorded(folder: &Path) -> (Model, Arc<Mutex<Log>>) {
    let log = Arc::new(Mutex::new(Log::default()));
    let storage = Recording { folder: Folder(folder.to_owned()), log: Arc::clone(&log) };
    (Model::open_folder(folder, Arc::new(storage)).unwrap(), log)
}

fn load_layers(model: &Model, layers: Range<u32>) {
    for name in layers.flat_map(|layer| LayerTensor::ALL.map(|tensor| TensorName::Layer(layer, tensor))) {
        if let TensorShape::Vector(_) = name.shape(model.config()) {
            model.vector(&name).unwrap();
            continue;
        }
        let matrix = model.matrix(&name).unwrap();
        matrix.read(0, &mut vec![0; matrix.spec().weight_bytes() as usize]).unwrap();
        matrix.scales().unwrap();
    }
}

#[test]
fn opening_a_checkpoint_opens_none_of_its_tensors() {
    let folder = tiny::write();
    let (model, log) = recorded(folder.path());
    model.digest();
    model.stored_bytes(0..1, true);
    let log = log.lock().unwrap();
    assert_eq!((log.opened.len(), log.read.len()), (0, 0));
}

#[test]
fn layers_16_to_32_open_only_their_own_192_files() {
    let Some(folder) = golden("b64") else { return };
    let (model, log) = recorded(&folder);
    assert!(log.lock().unwrap().opened.is_empty());
    load_layers(&model, 16..32);
    let names = TensorName::in_file_order(64);
    let wanted: BTreeSet<String> = names
        .iter()
        .enumerate()
        .filter(|(_, name)| matches!(name, TensorName::Layer(16..32, _)))
        .map(|(index, _)| format!("ckpt-0/tensor{index:05}_000"))
        .collect();
    let log = log.lock().unwrap();
    assert_eq!(wanted.len(), 192);
    assert_eq!(log.opened.len(), 192, "each once");
    assert_eq!(log.opened.iter().cloned().collect::<BTreeSet<_>>(), wanted);
    assert!(log.read.iter().all(|(name, _)| wanted.contains(name)));
    // And little is read twice: the headers, and what is fetched along with them.
    let read: u64 = log.read.iter().map(|(_, range)| range.end - range.start).sum();
    let stored = model.stored_bytes(16..32, false);
    assert!(read >= stored - 192 * 1024 && read <= stored + 192 * 2048, "{read} bytes of {stored}");
}

#[test]
fn describing_a_pickle_reads_its_header_and_not_its_numbers() {
    let folder = tiny::write();
    let name = TensorName::Layer(0, LayerTensor::MoeGate);
    let weight = build::ArraySpec::i8(&[2, 8, 16], &[1; 256]);
    let large = build::ArraySpec { shape: vec![2, 8, 1 << 16], bytes: vec![1; 16 << 16], ..weight };
    let scales = build::ArraySpec::bf16(&[2, 1, 16], &[1.0; 32]);
    let path = folder.path().join(tiny::file_of(&name));
    std::fs::write(&path, tiny::pickle(&large, Some(&scales))).unwrap();
    let (model, log) = recorded(folder.path());
    let message = model.matrix(&name).err().unwrap().to_string();
    assert_refused("a large matrix", &message, "[2, 8, 65536]");
    let read: u64 = log.lock().unwrap().read.iter().map(|(_, range)| range.end - range.start).sum();
    assert!(read <= 2048, "{read} bytes of a file of {}", std::fs::metadata(path).unwrap().len());
}

#[test]
fn embedding_rows_read_only_those_rows() {
    let Some(folder) = golden("b64") else { return };
    let (model, log) = recorded(&folder);
    let width = model.config().hidden_size as u64;
    model.embedding_rows(&[7]).unwrap();
    let begin = log.lock().unwrap().read.last().unwrap().1.start - 7 * width * 4;
    log.lock().unwrap().read.clear();
    let ids = [1023, 0, 512, 512];
    let rows = model.embedding_rows(&ids).unwrap();
    assert_eq!(rows.len(), ids.len() * width as usize);
    let log = log.lock().unwrap();
    assert_eq!(log.opened, ["ckpt-0/tensor00000_000"], "once");
    let row = |id: u32| {
        let at = begin + u64::from(id) * width * 4;
        ("ckpt-0/tensor00000_000".to_owned(), at..at + width * 4)
    };
    assert_eq!(log.read, ids.map(row));
    drop(log);
    let whole = model.matrix(&TensorName::Embedding).unwrap();
    let mut bytes = vec![0; width as usize * 4];
    whole.read(512 * width * 4, &mut bytes).unwrap();
    let expected: Vec<f32> = bytes.chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect();
    assert_eq!(rows[2 * width as usize..3 * width as usize], expected);
}

#[test]
fn ids_outside_the_vocabulary_and_ranges_outside_a_matrix_are_refused() {
    let folder = tiny::write();
    let model = Model::open(folder.path()).unwrap();
    for id in [16, u32::MAX] {
        assert_refused("id", &model.embedding_rows(&[1, id]).unwrap_err().to_string(), "below 16");
    }
    let matrix = model.matrix(&TensorName::Layer(0, LayerTensor::Key)).unwrap();
    let length = matrix.spec().weight_bytes();
    for (offset, count) in [(length, 1), (length - 1, 2), (u64::MAX, 1), (0, length as usize + 1)] {
        let error = matrix.read(offset, &mut vec![0; count]).unwrap_err();
        assert_refused("range", &error.to_string(), "bytes within");
    }
    assert_refused("vector", &model.vector(&TensorName::Embedding).unwrap_err().to_string(), "a vector");
    assert_refused("matrix", &model.matrix(&TensorName::FinalNorm).err().unwrap().to_string(), "a matrix");
    let beyond = TensorName::Layer(tiny::LAYERS, LayerTensor::Key);
    assert_refused("layer", &model.matrix(&beyond).err().unwrap().to_string(), "decoder_layer_1");
}

#[test]
fn a_layer_of_a_safetensors_file_is_read_alone() {
    let file = tiny::safetensors(&TensorName::in_file_order(tiny::LAYERS));
    let folder = tiny::folder_with(&[("model.safetensors", &file)]);
    let (model, log) = recorded(folder.path());
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap());
    assert!(log.lock().unwrap().read.iter().all(|(_, range)| range.end <= header), "opening reads the header");
    log.lock().unwrap().read.clear();
    load_layers(&model, 0..1);
    let read: u64 = log.lock().unwrap().read.iter().map(|(_, range)| range.end - range.start).sum();
    assert_eq!(read, model.stored_bytes(0..1, false));
}

#[test]
fn a_read_that_fails_is_never_taken_for_a_file_that_is_wrong() {
    let names = TensorName::in_file_order(tiny::LAYERS);
    let pickles = tiny::write();
    let safetensors = tiny::folder_with(&[("model.safetensors", &tiny::safetensors(&names))]);
    let gguf = hostile_gguf::with_tensors(hostile_gguf::metadata(), &hostile_gguf::tensors(true), &mut 0).done();
    let gguf = hostile_gguf::folder_of(&[("model.gguf", gguf)]);
    for (kind, folder) in [("pickles", &pickles), ("safetensors", &safetensors), ("GGUF", &gguf)] {
        // All that opening a model, its embedding and a row of it read, with the first, the second, ... of them failing.
        for good in 0.. {
            let open = Model::open_folder(folder.path(), Failing::after_reads(folder.path(), good));
            let read = open.and_then(|model| model.embedding_rows(&[0]));
            match read {
                Ok(_) => {
                    assert!(good > 1, "{kind}: nothing was read");
                    break;
                }
                Err(error) => assert!(matches!(error, ModelError::Io { .. }), "{kind}, read {good}: {error}"),
            }
        }
    }
}
