//! Where a stage's weights come from: a model's files, or a seed.
//!
//! Weights from a seed are the same in every process that is told the same shape, type and seed, and each process makes only the
//! layers that it runs, directly on its device. So the workers of a benchmark need no files.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use grokpipe_kernels::SyntheticWeights;
use grokpipe_model::{BlockType, Model, ModelConfig, ModelError, WeightSource};

use crate::error::CliError;

/// Seed of weights from a seed, if none is given.
const SEED: u64 = 1;

/// Weights without a file.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct SyntheticArgs {
    /// Weights from a seed instead of a model's, of this shape
    #[arg(long, value_name = "SHAPE", ignore_case = true, conflicts_with = "model")]
    pub(crate) synthetic: Option<Shape>,
    /// How weights from a seed are stored: a type of GGUF files [default: int8, as xAI published them]
    #[arg(long, value_name = "TYPE", value_parser = parse_type, conflicts_with = "model")]
    pub(crate) r#type: Option<BlockType>,
    /// Seed of weights from a seed [default: 1]
    #[arg(long, value_name = "N", conflicts_with = "model")]
    pub(crate) seed: Option<u64>,
}

/// Sizes of a model whose weights come from a seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Shape {
    /// Grok-1
    Grok1,
    /// Grok-1 with layers of a megabyte, for tests
    Tiny,
}

impl Shape {
    /// As on the command line.
    fn name(self) -> &'static str {
        match self {
            Self::Grok1 => "grok1",
            Self::Tiny => "tiny",
        }
    }

    fn config(self) -> ModelConfig {
        match self {
            Self::Grok1 => ModelConfig::grok_1(),
            Self::Tiny => ModelConfig {
                name: "tiny".to_owned(),
                vocab_size: 1024,
                hidden_size: 256,
                num_attention_heads: 4,
                num_key_value_heads: 2,
                head_dim: 64,
                intermediate_size: 256,
                ..ModelConfig::grok_1()
            },
        }
    }
}

/// A stored type by the name that GGUF files give it, in either case.
fn parse_type(text: &str) -> Result<BlockType, String> {
    by_name(BlockType::all(), BlockType::name, text)
}

/// The one of `all` that has this name, in either case.
pub(crate) fn by_name<T: Copy>(
    all: impl Iterator<Item = T>,
    name: impl Fn(T) -> &'static str,
    text: &str,
) -> Result<T, String> {
    let all: Vec<T> = all.collect();
    all.iter().copied().find(|&one| name(one).eq_ignore_ascii_case(text)).ok_or_else(|| {
        let names: Vec<String> = all.iter().map(|&one| name(one).to_lowercase()).collect();
        format!("expected one of {}, found {text:?}", names.join(", "))
    })
}

impl SyntheticArgs {
    /// The weights, if these flags ask for any.
    ///
    /// # Errors
    /// When rows of this shape are no whole blocks of the type, and when a type or a seed is given without a shape.
    pub(crate) fn weights(&self) -> Result<Option<Weights>, CliError> {
        match self.synthetic {
            Some(shape) => Ok(Some(self.weights_or(shape)?)),
            None if self.r#type.is_some() || self.seed.is_some() => {
                Err(CliError::usage("--type and --seed are for weights from a seed").advise("add --synthetic SHAPE"))
            }
            None => Ok(None),
        }
    }

    /// The weights, of this shape if these flags ask for none.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] when rows of this shape are no whole blocks of the type.
    pub(crate) fn weights_or(&self, shape: Shape) -> Result<Weights, ModelError> {
        Weights::synthetic(self.synthetic.unwrap_or(shape), self.r#type, self.seed)
    }

    /// The flags that say the same to another process.
    pub(crate) fn to_flags(&self) -> Vec<String> {
        let mut flags = Vec::new();
        let mut add = |flag: &str, value: Option<String>| {
            if let Some(value) = value {
                flags.extend([flag.to_owned(), value]);
            }
        };
        add("--synthetic", self.synthetic.map(|shape| shape.name().to_owned()));
        add("--type", self.r#type.map(|kind| kind.name().to_lowercase()));
        add("--seed", self.seed.map(|seed| seed.to_string()));
        flags
    }
}

/// Weights to load layers of; nothing of them is read yet.
#[derive(Clone)]
pub(crate) struct Weights {
    /// The model's sizes.
    pub(crate) config: ModelConfig,
    /// The tensors.
    pub(crate) source: Arc<dyn WeightSource>,
    /// Equal wherever the weights are.
    pub(crate) digest: String,
    /// Where the files lie, if there are any.
    pub(crate) path: Option<PathBuf>,
}

impl Weights {
    /// Those of a model's files.
    ///
    /// # Errors
    /// What is wrong with the files.
    pub(crate) fn of_model(path: &Path) -> Result<Self, ModelError> {
        let model = Model::open(path)?;
        Ok(Self {
            config: model.config().clone(),
            digest: model.digest(),
            source: Arc::new(model),
            path: Some(path.to_owned()),
        })
    }

    /// Those of a seed, stored as `kind`, or as int8.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] when rows of this shape are no whole blocks of the type.
    pub(crate) fn synthetic(shape: Shape, kind: Option<BlockType>, seed: Option<u64>) -> Result<Self, ModelError> {
        let (config, seed) = (shape.config(), seed.unwrap_or(SEED));
        let source = match kind {
            Some(kind) => SyntheticWeights::in_blocks(config.clone(), seed, kind)?,
            None => SyntheticWeights::new(config.clone(), seed),
        };
        let digest = format!("synthetic {} {} seed {seed}", shape.name(), kind.map_or("int8", BlockType::name));
        Ok(Self { config, source: Arc::new(source), digest, path: None })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use grokpipe_model::{LayerTensor, TensorName};

    use super::*;
    use crate::error::Code;

    #[derive(Debug, Parser)]
    struct Line {
        #[arg(long)]
        model: Option<String>,
        #[command(flatten)]
        synthetic: SyntheticArgs,
    }

    fn parse(line: &str) -> Result<Line, clap::Error> {
        Line::try_parse_from(std::iter::once("x").chain(line.split_whitespace()))
    }

    #[test]
    fn types_are_known_by_name() {
        assert_eq!(parse_type("q4_k"), Ok(BlockType::Q4K));
        assert_eq!(parse_type("IQ4_XS"), Ok(BlockType::Iq4Xs));
        assert!(parse_type("q9").unwrap_err().contains("q8_0"));
    }

    #[test]
    fn another_process_that_is_told_the_same_makes_the_same_weights() {
        for line in ["--synthetic tiny", "--synthetic tiny --type q4_k --seed 7", "--synthetic grok1 --type bf16"] {
            let ours = parse(line).unwrap().synthetic;
            let theirs = parse(&ours.to_flags().join(" ")).unwrap().synthetic;
            let (ours, theirs) = (ours.weights().unwrap().unwrap(), theirs.weights().unwrap().unwrap());
            let read = |weights: &Weights| {
                let mut bytes = vec![0; 64];
                weights.source.matrix(&TensorName::Layer(1, LayerTensor::Key)).unwrap().read(0, &mut bytes).unwrap();
                (weights.digest.clone(), bytes)
            };
            assert_eq!(read(&ours), read(&theirs), "{line}");
        }
    }

    #[test]
    fn different_weights_have_different_digests() {
        let lines =
            ["--synthetic tiny", "--synthetic tiny --seed 2", "--synthetic tiny --type q8_0", "--synthetic grok1"];
        let digests: std::collections::BTreeSet<_> =
            lines.iter().map(|line| parse(line).unwrap().synthetic.weights().unwrap().unwrap().digest).collect();
        assert_eq!(digests.len(), lines.len());
    }

    #[test]
    fn flags_that_contradict_each_other_are_refused() {
        for line in ["--synthetic tiny --model m", "--model m --type q8_0", "--model m --seed 1", "--synthetic huge"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_type_or_a_seed_needs_a_shape_unless_there_is_one_by_default() {
        assert!(parse("").unwrap().synthetic.weights().unwrap().is_none());
        for (line, digest) in
            [("--type q8_0", "synthetic tiny Q8_0 seed 1"), ("--seed 2", "synthetic tiny int8 seed 2")]
        {
            let args = parse(line).unwrap().synthetic;
            assert_eq!(args.weights().err().map(|error| error.code()), Some(Code::Usage), "{line}");
            assert_eq!(args.weights_or(Shape::Tiny).unwrap().digest, digest);
        }
        let args = parse("--synthetic grok1").unwrap().synthetic;
        assert_eq!(args.weights_or(Shape::Tiny).unwrap().digest, "synthetic grok1 int8 seed 1");
    }
}
