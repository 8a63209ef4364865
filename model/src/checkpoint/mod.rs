//! Opens a model's files: xAI's checkpoint, safetensors with its names or with those of the Hugging Face copies, GGUF.
//!
//! Opening a model looks at names and lengths only. A tensor's file is opened when that tensor is asked for, so that a worker
//! reads its own layers' bytes and no others. Shapes and formats are checked against the configuration at that moment.

use std::{
    collections::BTreeMap,
    fmt, io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock, PoisonError, RwLock},
    time::SystemTime,
};

use crate::{
    BlockType, Format, Layout, MatrixSource, MatrixSpec, ModelConfig, ModelError, TensorName, TensorShape,
    WeightSource, config_file,
    contents::{Part, Record},
    manifest,
};

pub(crate) mod digest;
pub(crate) mod files;
pub(crate) mod folder;
pub mod gguf;
pub mod header;
pub mod kind;
mod names;
pub(crate) mod open_gguf;
pub mod pickle;
pub(crate) mod published;
pub mod safetensors;
pub mod storage;

#[cfg(test)]
pub(crate) mod tests;

use files::{Files, Placed};
use header::parsed;
use kind::FileKind;
use storage::{Folder, ReadAt, Storage, open_regular};

/// A model on disk.
pub struct Model {
    config: ModelConfig,
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    files: Files,
    gguf: Option<GgufFile>,
    /// Opened with the first row that is read from it, and anew when reading fails.
    embedding: RwLock<Option<Arc<StoredMatrix>>>,
    record: OnceLock<Record>,
}

/// The GGUF file with the metadata.
struct GgufFile {
    name: String,
    /// Whether a vocabulary of the kind that is read is in it.
    has_vocabulary: bool,
}

/// What `inspect` shows of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSummary {
    /// Which tensor.
    pub name: TensorName,
    /// Sizes, outermost first.
    pub shape: Vec<u64>,
    /// How the numbers are stored.
    pub format: Format,
    /// Its file, relative to the model.
    pub file: String,
    /// Bytes that it takes on disk.
    pub bytes: u64,
}

/// Scales are read and widened this many at a time.
const SCALES_AT_ONCE: usize = 1 << 16;

impl Model {
    /// Opens the model at `path`: a folder with one or above one, one safetensors file with its `config.json` beside it, its index, or a
    /// GGUF file (of a split one, any part). What a file is, its content tells. Reads no weights.
    ///
    /// # Errors
    /// [`ModelError`] naming the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        if std::fs::metadata(path).is_ok_and(|found| found.is_dir()) {
            let folder = folder::of_model(path)?;
            return Self::open_folder(&folder, Arc::new(Folder(folder.clone())));
        }
        let kind = FileKind::of(&*open_regular(path).map_err(io)?).map_err(io)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let storage: Arc<dyn Storage> = Arc::new(Folder(folder.to_owned()));
        // By its text: the storage finds the file again.
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match kind {
            FileKind::Gguf => Self::open_gguf(folder, storage, &file),
            FileKind::Safetensors => {
                let config = config_file::open(&folder.join("config.json"))?;
                let files = Files::in_safetensors(&*storage, &file, &config)?;
                Ok(Self::of(config, storage, folder, files, None))
            }
            FileKind::Json if file.ends_with(files::INDEX) => Self::open_folder(folder, storage),
            FileKind::Pickle if files::is_tensor(&file) => {
                Err(kind::unfit(path, "the folder with all tensors, of which this is one", kind))
            }
            FileKind::Pointer { .. } => Err(kind::unfit(path, "the file itself", kind)),
            // Its reader says best what is wrong with it.
            FileKind::Other | FileKind::Empty if open_gguf::is_gguf(&file) => Self::open_gguf(folder, storage, &file),
            FileKind::Other | FileKind::Empty if file.ends_with(".safetensors") => {
                let config = config_file::open(&folder.join("config.json"))?;
                Err(Files::in_safetensors(&*storage, &file, &config)
                    .err()
                    .unwrap_or_else(|| kind::unfit(path, "a safetensors file", kind)))
            }
            _ => Err(kind::unfit(path, "a model's folder, a safetensors or a GGUF file", kind)),
        }
    }

    /// Opens the model in `folder`, its tensors read through `storage`.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open_folder(folder: &Path, storage: Arc<dyn Storage>) -> Result<Self, ModelError> {
        if let Some(file) = open_gguf::only_model_of(&*storage, folder)? {
            return Self::open_gguf(folder, storage, &file);
        }
        let is_there = |path: &Path| std::fs::symlink_metadata(path).is_ok();
        let mut config_path = folder.join("config.json");
        // Of the folder of the tensors alone it lies above.
        if !is_there(&config_path) && files::checkpoint_in(&*storage)? == Some("") {
            let above = folder::above(folder).join("config.json");
            config_path = if is_there(&above) { above } else { config_path };
        }
        // A link that leads nowhere is a damaged model, not one without a configuration.
        let config = match std::fs::symlink_metadata(&config_path) {
            Ok(_) => config_file::open(&config_path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => ModelConfig::grok_1(),
            Err(source) => return Err(ModelError::Io { path: config_path, source }),
        };
        let files = Files::find(&*storage, folder, &config)?;
        Ok(Self::of(config, storage, folder, files, None))
    }

    fn open_gguf(folder: &Path, storage: Arc<dyn Storage>, file: &str) -> Result<Self, ModelError> {
        let open_gguf::Opened { config, files, has_vocabulary } = open_gguf::open(&*storage, file)?;
        let gguf = Some(GgufFile { name: open_gguf::first_part(file), has_vocabulary });
        Ok(Self::of(config, storage, folder, files, gguf))
    }

    /// A model of which nothing has been read yet.
    fn of(config: ModelConfig, storage: Arc<dyn Storage>, folder: &Path, files: Files, gguf: Option<GgufFile>) -> Self {
        let folder = folder.to_owned();
        Self { config, storage, folder, files, gguf, embedding: RwLock::default(), record: OnceLock::new() }
    }

    /// The model's sizes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The folder that the model lies in.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the vocabulary is: in the GGUF file itself, if one of the kind that is read is there; else `tokenizer.model` in the
    /// model's folder or its parent.
    pub fn tokenizer_path(&self) -> Option<PathBuf> {
        if let Some(GgufFile { name, has_vocabulary: true }) = &self.gguf {
            return Some(self.storage.path(name));
        }
        let candidates = [self.folder.clone(), folder::above(&self.folder)];
        candidates.into_iter().map(|folder| folder.join("tokenizer.model")).find(|path| path.is_file())
    }

    /// Where the manifest of this model's files is, if it has one: in its folder, or beside its GGUF file under that one's name.
    pub fn manifest_path(&self) -> PathBuf {
        match &self.gguf {
            None => self.folder.join(manifest::NAME),
            Some(file) => {
                // Of a split file the name without number and count, as conversions have it.
                let mut path = open_gguf::unsplit(&self.storage.path(&file.name)).into_os_string();
                path.push(manifest::EXTENSION);
                path.into()
            }
        }
    }

    /// The files that hold a tensor.
    pub(crate) fn files_of(&self, name: &TensorName) -> Vec<PathBuf> {
        self.files.of(name).into_iter().map(|name| self.storage.path(name)).collect()
    }

    /// All parts that can be summed.
    pub fn parts(&self) -> Vec<Part> {
        let layers = (0..self.config.num_hidden_layers).map(Part::Layer);
        let head = self.has_own_head().then_some(Part::Head);
        layers.chain([Part::Embedding]).chain(head).chain([Part::FinalNorm]).collect()
    }

    /// SHA-256, in hex, of configuration, tensor names, stored sizes and file format: equal for equal files, whatever the path.
    /// Contents are not part of it, since that would mean reading them all.
    pub fn digest(&self) -> String {
        // Not of models whose head is their embedding, which is there already.
        let head = self.files.has_head().then_some(TensorName::Head);
        let names = TensorName::in_file_order(self.config.num_hidden_layers).into_iter().chain(head);
        let lines = names.map(|name| digest::Line {
            bytes: self.tensor_bytes(&name),
            format: self.files.placed(&name).map(|placed| placed.format.to_string()),
            name: name.to_string(),
        });
        digest::of(&digest::text(&self.config, self.files.kind(), lines))
    }

    /// The files that hold tensors, and when each was last written to, where that is known.
    pub(crate) fn files_changed(&self) -> Result<Vec<(&str, Option<SystemTime>)>, ModelError> {
        let of = |file| {
            let changed = self.storage.changed(file);
            Ok((file, changed.map_err(|source| ModelError::Io { path: self.storage.path(file), source })?))
        };
        self.files.names().into_iter().map(of).collect()
    }

    /// Whether the files have a head of their own beside the embedding.
    pub(crate) fn has_own_head(&self) -> bool {
        self.files.has_head()
    }

    /// The header with the metadata, of a GGUF model.
    pub(crate) fn gguf_header(&self) -> Result<Option<gguf::Header>, ModelError> {
        self.gguf.as_ref().map(|file| open_gguf::read(&*self.storage, &file.name)).transpose()
    }

    /// Opens every tensor, checks it, and says what it is; in the order of the published files, a head of its own last.
    ///
    /// # Errors
    /// As [`WeightSource::matrix`], for the first tensor that is wrong.
    pub fn inspect(&self) -> Result<Vec<TensorSummary>, ModelError> {
        let names = TensorName::in_file_order(self.config.num_hidden_layers);
        let head = self.files.has_head().then_some(TensorName::Head);
        names.into_iter().chain(head).map(|name| self.summary(name)).collect()
    }

    /// Bytes of one tensor on disk.
    pub fn tensor_bytes(&self, name: &TensorName) -> u64 {
        self.files.bytes(name)
    }

    fn summary(&self, name: TensorName) -> Result<TensorSummary, ModelError> {
        let (shape, format) = match name.shape(&self.config) {
            shape @ TensorShape::Vector(_) => {
                self.vector(&name)?;
                (shape.dimensions(), self.files.placed(&name).map_or(Format::F32, |placed| placed.format))
            }
            shape @ TensorShape::Matrix { .. } => {
                let MatrixSpec { experts, inputs, outputs, format, layout, .. } = self.stored(&name)?.spec;
                let inner = if layout == Layout::InOut { [inputs, outputs] } else { [outputs, inputs] };
                let outer = (shape.dimensions().len() == 3).then_some(experts);
                (outer.into_iter().chain(inner).map(|size| size as u64).collect(), format)
            }
        };
        Ok(TensorSummary {
            shape,
            format,
            file: self.files.file(&name).unwrap_or_default().to_owned(),
            bytes: self.tensor_bytes(&name),
            name,
        })
    }

    fn open_file(&self, file: &str) -> Result<Box<dyn ReadAt>, ModelError> {
        kind::open(&*self.storage, file)
    }

    /// Opens a tensor's files and checks what they hold.
    fn located(&self, name: &TensorName) -> Result<Located, ModelError> {
        if let Some(Placed { format, layout, parts }) = self.files.placed(name) {
            let opened = parts.iter().map(|part| {
                Ok(Stretch {
                    file: self.open_file(&part.file)?,
                    path: self.storage.path(&part.file),
                    offset: part.offset,
                })
            });
            let part_bytes = parts.first().map_or(0, |part| part.length);
            let file = parts.first().map_or("", |part| &part.file);
            return Ok(Located {
                parts: opened.collect::<Result<_, ModelError>>()?,
                part_bytes,
                format: *format,
                layout: *layout,
                scales: None,
                place: format!("{} ({name})", self.storage.path(file).display()),
            });
        }
        let file_name = self.files.file(name).ok_or_else(|| missing(name, &self.folder))?;
        let place = format!("{} ({name})", self.storage.path(file_name).display());
        let file = self.open_file(file_name)?;
        let tensor = parsed(&*file, &self.storage.path(file_name), pickle::read, |error| {
            ModelError::invalid(format!("{place}: byte {}", error.offset), error.expected, error.found)
        })?;
        located_pickle(file, self.storage.path(file_name), tensor, &name.shape(&self.config), place)
    }

    /// The embedding, open; opened `anew` if asked.
    fn embedding(&self, anew: bool) -> Result<Arc<StoredMatrix>, ModelError> {
        let known = self.embedding.read().unwrap_or_else(PoisonError::into_inner).clone();
        match known.filter(|_| !anew) {
            Some(embedding) => Ok(embedding),
            None => {
                let opened = Arc::new(self.stored(&TensorName::Embedding)?);
                *self.embedding.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&opened));
                Ok(opened)
            }
        }
    }

    fn rows_of(&self, embedding: &StoredMatrix, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
        let width = self.config.hidden_size;
        let mut rows = Vec::with_capacity(ids.len() * width);
        for id in ids {
            if *id as usize >= self.config.vocab_size {
                let expected = format!("token ids below {}", self.config.vocab_size);
                return Err(ModelError::invalid("embedding", expected, id.to_string()));
            }
            let located = &embedding.located;
            let row_bytes = located.format.row_bytes_u64(width as u64).unwrap_or_default();
            let row = located.floats(u64::from(*id) * row_bytes, width)?;
            finite(&row, &located.place)?;
            rows.extend(row);
        }
        Ok(rows)
    }

    fn stored(&self, name: &TensorName) -> Result<StoredMatrix, ModelError> {
        let TensorShape::Matrix { experts, inputs, outputs, .. } = name.shape(&self.config) else {
            return Err(ModelError::invalid(name.to_string(), "a matrix", "a vector"));
        };
        let located = self.located(name)?;
        let (format, layout) = (located.format, located.layout);
        let spec =
            MatrixSpec { name: name.to_string(), experts: experts.unwrap_or(1), inputs, outputs, format, layout };
        Ok(StoredMatrix { spec, located })
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("folder", &self.folder).field("config", &self.config).finish_non_exhaustive()
    }
}

impl WeightSource for Model {
    fn matrix(&self, name: &TensorName) -> Result<Box<dyn MatrixSource>, ModelError> {
        Ok(Box::new(self.stored(name)?))
    }

    fn vector(&self, name: &TensorName) -> Result<Vec<f32>, ModelError> {
        let TensorShape::Vector(length) = name.shape(&self.config) else {
            return Err(ModelError::invalid(name.to_string(), "a vector", "a matrix"));
        };
        let located = self.located(name)?;
        let values = located.floats(0, length)?;
        finite(&values, &located.place)?;
        Ok(values)
    }

    fn embedding_rows(&self, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
        match self.rows_of(&*self.embedding(false)?, ids) {
            // The file may have been replaced, or its file system mounted anew.
            Err(ModelError::Io { .. }) => self.rows_of(&*self.embedding(true)?, ids),
            rows => rows,
        }
    }

    fn record(&self) -> Option<&Record> {
        Some(self.record.get_or_init(|| {
            let path = self.manifest_path();
            let sums = manifest::sums_in(&path).unwrap_or_else(|error| {
                tracing::warn!(%error, "the manifest beside the model is left aside");
                BTreeMap::new()
            });
            Record::new(self.has_own_head(), sums, path.display().to_string())
        }))
    }

    fn stored_bytes(&self, layers: Range<u32>, with_head: bool) -> u64 {
        let names = layers.flat_map(|layer| crate::LayerTensor::ALL.map(|tensor| TensorName::Layer(layer, tensor)));
        let head = with_head.then_some([TensorName::Head, TensorName::FinalNorm]);
        names.chain(head.into_iter().flatten()).map(|name| self.tensor_bytes(&name)).sum()
    }
}

/// An opened tensor whose extents lie within its files.
struct Located {
    /// One, or one an expert.
    parts: Vec<Stretch>,
    /// Length of each part.
    part_bytes: u64,
    format: Format,
    layout: Layout,
    /// Where in the first part's file the scales are, as bf16.
    scales: Option<u64>,
    place: String,
}

/// A part of a tensor.
struct Stretch {
    file: Box<dyn ReadAt>,
    path: PathBuf,
    offset: u64,
}

impl Located {
    fn error(&self, source: io::Error) -> ModelError {
        ModelError::Io { path: PathBuf::from(&self.place), source }
    }

    /// Reads from `offset` within the tensor, over the borders of parts.
    fn read(&self, mut offset: u64, mut out: &mut [u8]) -> Result<(), ModelError> {
        while !out.is_empty() {
            let part_bytes = self.part_bytes.max(1);
            let (index, within) = (offset / part_bytes, offset % part_bytes);
            let Some(part) = self.parts.get(index as usize) else {
                return Err(self.error(io::ErrorKind::UnexpectedEof.into()));
            };
            let now = (out.len() as u64).min(part_bytes - within);
            let (piece, rest) = out.split_at_mut(now as usize);
            part.file.read_exact_at(piece, part.offset + within).map_err(|source| self.error(source))?;
            (out, offset) = (rest, offset + now);
        }
        Ok(())
    }

    /// Numbers from a byte `offset` on, of whichever format but int8.
    fn floats(&self, offset: u64, count: usize) -> Result<Vec<f32>, ModelError> {
        let kind = match self.format {
            Format::F32 => None,
            Format::Blocks(kind) => Some(kind),
            Format::Int8 { .. } => return Err(ModelError::invalid(&*self.place, "floats or blocks", "int8")),
        };
        let Some(length) = self.format.row_bytes(count) else {
            let weights = kind.map_or(1, BlockType::weights);
            return Err(ModelError::invalid(&*self.place, format!("whole blocks of {weights}"), count.to_string()));
        };
        let mut bytes = vec![0; length];
        self.read(offset, &mut bytes)?;
        Ok(match kind {
            None => bytes.as_chunks::<4>().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect(),
            Some(kind) => {
                let mut values = vec![0.0; count];
                kind.dequantize(&bytes, &mut values);
                values
            }
        })
    }
}

struct StoredMatrix {
    spec: MatrixSpec,
    located: Located,
}

impl MatrixSource for StoredMatrix {
    fn spec(&self) -> &MatrixSpec {
        &self.spec
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ModelError> {
        let within = offset.checked_add(out.len() as u64).is_some_and(|end| end <= self.spec.weight_bytes());
        if !within {
            let expected = format!("bytes within 0..{}", self.spec.weight_bytes());
            return Err(ModelError::invalid(&*self.located.place, expected, format!("{} from {offset}", out.len())));
        }
        self.located.read(offset, out)
    }

    fn scales(&self) -> Result<Vec<f32>, ModelError> {
        let (Some(offset), Some(part)) = (self.located.scales, self.located.parts.first()) else {
            return Ok(Vec::new());
        };
        let count = self.spec.scale_count();
        let mut scales = Vec::with_capacity(count);
        let mut bytes = vec![0; SCALES_AT_ONCE.min(count) * 2];
        while scales.len() < count {
            let now = SCALES_AT_ONCE.min(count - scales.len());
            let piece = &mut bytes[..now * 2];
            let at = offset + scales.len() as u64 * 2;
            part.file.read_exact_at(piece, at).map_err(|source| self.located.error(source))?;
            // bf16 is the upper half of an f32.
            let halves = piece.as_chunks::<2>().0.iter().map(|half| u32::from(u16::from_le_bytes(*half)) << 16);
            scales.extend(halves.map(f32::from_bits));
        }
        finite(&scales, &self.located.place)?;
        Ok(scales)
    }

    fn place(&self, offset: u64) -> String {
        let Located { parts, part_bytes, .. } = &self.located;
        let part_bytes = (*part_bytes).max(1);
        match parts.get((offset / part_bytes) as usize) {
            Some(part) => {
                format!("{} ({}): byte {}", part.path.display(), self.spec.name, part.offset + offset % part_bytes)
            }
            None => self.located.place.clone(),
        }
    }
}

/// What a GGUF file of today calls this tensor, all experts in one.
pub(crate) fn gguf_name(name: &TensorName) -> String {
    names::Family::Gguf.names(name).whole.into_iter().next().unwrap_or_default()
}

fn finite(values: &[f32], place: &str) -> Result<(), ModelError> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(at) => Err(ModelError::invalid(place, "finite numbers", format!("{} at {at}", values[at]))),
    }
}

fn missing(name: &TensorName, folder: &Path) -> ModelError {
    ModelError::invalid(folder.display().to_string(), format!("tensor {name}"), "none")
}

fn located_pickle(
    file: Box<dyn ReadAt>,
    path: PathBuf,
    tensor: pickle::Tensor,
    shape: &TensorShape,
    place: String,
) -> Result<Located, ModelError> {
    let quantised = matches!(shape, TensorShape::Matrix { groups: Some(_), .. });
    let dtype = if quantised { pickle::Dtype::I8 } else { pickle::Dtype::F32 };
    let wanted = (shape.dimensions(), dtype);
    let count: u64 = wanted.0.iter().product();
    let part_bytes = if quantised { count } else { 4 * count };
    let found = (tensor.weight.shape, tensor.weight.dtype);
    if wanted != found {
        return Err(ModelError::invalid(
            place,
            format!("{:?} of {:?}", wanted.0, wanted.1),
            format!("{:?} of {:?}", found.0, found.1),
        ));
    }
    let scales = match (shape.scale_dimensions(), tensor.scales) {
        (None, None) => None,
        (Some(dimensions), Some(scales)) if dimensions == scales.shape && scales.dtype == pickle::Dtype::Bf16 => {
            Some(scales.offset)
        }
        (wanted, found) => {
            let text = |shape: Option<&Vec<u64>>| {
                shape.map_or("no scales".to_owned(), |shape| format!("bf16 scales of {shape:?}"))
            };
            let found = found
                .map_or("no scales".to_owned(), |scales| format!("{:?} scales of {:?}", scales.dtype, scales.shape));
            return Err(ModelError::invalid(place, text(wanted.as_ref()), found));
        }
    };
    let (format, layout) = match *shape {
        TensorShape::Matrix { groups: Some(groups), layout, .. } => (Format::Int8 { groups }, layout),
        TensorShape::Matrix { groups: None, layout, .. } => (Format::F32, layout),
        TensorShape::Vector(_) => (Format::F32, Layout::OutIn),
    };
    let part = Stretch { file, path, offset: tensor.weight.offset };
    Ok(Located { parts: vec![part], part_bytes, format, layout, scales, place })
}
