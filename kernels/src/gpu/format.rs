//! How each number format is held in device memory: numbers apart from scales, both about as large as in the file.
//!
//! Decides what a chunk of sixteen bytes and what the words of scales mean; `ops/product/columns.wgsl` reads them. Numbers of five and six
//! bits are held as bytes, those of two and three bits as four: a shader that puts bits together would wait for its arithmetic,
//! not for memory.

use grokpipe_model::{BlockType, Format};

/// Bytes of a chunk: the widest load.
pub(super) const CHUNK_BYTES: usize = 16;
/// Weights of the blocks whose scales are apart from those of their parts.
const SUPER_WEIGHTS: usize = 256;

/// What a chunk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Numbers {
    /// Four floats.
    F32,
    /// Eight halves.
    F16,
    /// Eight bfloats.
    Bf16,
    /// Sixteen signed bytes.
    Bytes,
    /// Thirty-two numbers below 16, from which `offset` is taken.
    Nibbles { offset: u8 },
    /// Thirty-two codes of IQ4_NL and IQ4_XS.
    Codes,
}

impl Numbers {
    /// Inputs of a chunk.
    pub(super) fn in_a_chunk(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 8,
            Self::Bytes => 16,
            Self::Nibbles { .. } | Self::Codes => 32,
        }
    }
}

/// What the words of scales hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Scales {
    /// Nothing: numbers are weights.
    None,
    /// An f32 a group.
    Groups,
    /// A half each 32 inputs, and another of their minimum.
    Halves { minima: bool },
    /// Halves for 256 inputs, and a signed byte for each of `groups` parts of them; the same of their minima.
    Supers { groups: usize, minima: bool },
}

/// How a format is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Held {
    pub(super) numbers: Numbers,
    pub(super) scales: Scales,
}

impl Held {
    /// The one way for each format.
    pub(super) fn of(format: Format) -> Self {
        const HALVES: Scales = Scales::Halves { minima: false };
        const HALVES_AND_MINIMA: Scales = Scales::Halves { minima: true };
        let supers = |groups, minima| Scales::Supers { groups, minima };
        let (numbers, scales) = match format {
            Format::F32 => (Numbers::F32, Scales::None),
            Format::Int8 { .. } => (Numbers::Bytes, Scales::Groups),
            Format::Blocks(kind) => match kind {
                BlockType::F16 => (Numbers::F16, Scales::None),
                BlockType::Bf16 => (Numbers::Bf16, Scales::None),
                BlockType::Q8_0 | BlockType::Q5_0 => (Numbers::Bytes, HALVES),
                BlockType::Q4_0 => (Numbers::Nibbles { offset: 8 }, HALVES),
                BlockType::Iq4Nl => (Numbers::Codes, HALVES),
                BlockType::Q4_1 => (Numbers::Nibbles { offset: 0 }, HALVES_AND_MINIMA),
                BlockType::Q5_1 => (Numbers::Bytes, HALVES_AND_MINIMA),
                BlockType::Q2K => (Numbers::Nibbles { offset: 0 }, supers(16, true)),
                BlockType::Q3K => (Numbers::Nibbles { offset: 8 }, supers(16, false)),
                BlockType::Q4K => (Numbers::Nibbles { offset: 0 }, supers(8, true)),
                BlockType::Q5K => (Numbers::Bytes, supers(8, true)),
                BlockType::Q6K => (Numbers::Bytes, supers(16, false)),
                BlockType::Iq4Xs => (Numbers::Codes, supers(8, false)),
            },
        };
        Self { numbers, scales }
    }

    /// Groups of inputs that share a scale.
    pub(super) fn groups(self, format: Format, inputs: usize) -> usize {
        match (self.scales, format) {
            (Scales::None, _) => 1,
            (Scales::Groups, Format::Int8 { groups }) => groups,
            // One group of each expert's inputs: no format is held so.
            (Scales::Groups, _) => 1,
            (Scales::Halves { .. }, _) => inputs / 32,
            (Scales::Supers { groups, .. }, _) => inputs / SUPER_WEIGHTS * groups,
        }
    }

    /// Whether two groups share a chunk: sixteen inputs of four bits.
    pub(super) fn halved(self) -> bool {
        matches!(self.scales, Scales::Supers { groups: 16, .. }) && self.numbers.in_a_chunk() == 32
    }

    /// Chunks of a column.
    pub(super) fn chunks(self, inputs: usize, groups: usize) -> usize {
        let in_a_chunk = self.numbers.in_a_chunk();
        if self.halved() { inputs / in_a_chunk } else { groups * (inputs / groups).div_ceil(in_a_chunk) }
    }

    /// Words of scales of a column.
    pub(super) fn scale_words(self, groups: usize) -> usize {
        match self.scales {
            Scales::None => 0,
            Scales::Groups | Scales::Halves { minima: true } => groups,
            Scales::Halves { minima: false } => groups.div_ceil(2),
            Scales::Supers { groups: parts, minima } => groups / parts * words_of_super(parts, minima),
        }
    }

    /// Whether there are products with 8-bit inputs: numbers are whole.
    pub(super) fn has_fast(self) -> bool {
        self.scales != Scales::None
    }

    /// Constants of the shaders, which give them the same names.
    pub(super) fn constants(self) -> Vec<(&'static str, f64)> {
        let (numbers, offset) = match self.numbers {
            Numbers::F32 => (0, 0),
            Numbers::F16 => (1, 0),
            Numbers::Bf16 => (2, 0),
            Numbers::Bytes => (3, 0),
            Numbers::Nibbles { offset } => (4, offset),
            Numbers::Codes => (5, 0),
        };
        let (scales, parts, minima) = match self.scales {
            Scales::None => (0, 8, false),
            Scales::Groups => (1, 8, false),
            Scales::Halves { minima } => (2, 8, minima),
            Scales::Supers { groups, minima } => (3, groups, minima),
        };
        let quads = self.numbers.in_a_chunk() / if self.halved() { 8 } else { 4 };
        vec![
            ("NUMBERS", f64::from(numbers)),
            ("OFFSET", f64::from(offset)),
            ("QUADS", quads as f64),
            ("HALVED", f64::from(u8::from(self.halved()))),
            ("SCALES", f64::from(scales)),
            ("MINIMA", f64::from(u8::from(minima))),
            ("SUPER", parts as f64),
        ]
    }

    /// Every way there is.
    pub(super) fn all() -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        let formats = [Format::F32, Format::Int8 { groups: 1 }].into_iter();
        for held in formats.chain(BlockType::all().map(Format::Blocks)).map(Self::of) {
            if !all.contains(&held) {
                all.push(held);
            }
        }
        all
    }
}

/// Words of a super-block's scales: its halves, and a byte for each of its parts.
pub(super) fn words_of_super(parts: usize, minima: bool) -> usize {
    1 + if minima { 2 } else { 1 } * parts / 4
}
