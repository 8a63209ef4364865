//! `grokpipe logits`: the logits of a token sequence, computed in this process, for parity checks.
//!
//! The file has `logits` `[T, vocab]` f32 and with `--trace` also `hidden` `[L, T, d]` f32, `topk_idx` i32 and `topk_prob` f32,
//! both `[L, T, experts per token]`. Long sequences are computed in chunks; that does not show in the bits, unless `--prefill fast` has a
//! GPU compute them so.

use std::{
    error::Error,
    path::{Path, PathBuf},
    sync::Arc,
};

use grokpipe_kernels::{
    Batch, KV_BLOCK_TOKENS, Precision, Prefill, Row, StageOptions, StepInput, StepOutput, Trace, select_device,
};
use grokpipe_model::{Model, ModelConfig};
use safetensors::{Dtype, tensor::TensorView};

use crate::{
    common,
    config::{parse_precision, parse_prefill},
    error::CliError,
    machine, paths,
};

/// Rows of a step: enough to read each weight rarely, few enough for little scratch memory.
const CHUNK_ROWS: usize = 128;

/// Arguments of `logits`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder or file of the model
    #[arg(long, value_name = "PATH", value_parser = paths::parser())]
    model: PathBuf,
    /// The sequence, as numbers separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true)]
    token_ids: Vec<u32>,
    /// Device: auto, gpu, gpu:NAME or cpu
    #[arg(long, value_parser = common::parse_device, default_value = "auto")]
    device: String,
    /// Threads of the CPU backend; all cores if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// exact computes products in f32, fast with 8-bit inputs
    #[arg(long, value_name = "exact|fast", value_parser = parse_precision, default_value = "exact")]
    precision: Precision,
    /// How a GPU computes steps of many rows: fast takes its tensor cores, where it has them
    #[arg(long, value_name = "invariant|fast", value_parser = parse_prefill, default_value = "invariant")]
    prefill: Prefill,
    /// File to write, safetensors
    #[arg(long, value_name = "FILE", value_parser = paths::parser())]
    out: PathBuf,
    /// Also write hidden states and chosen experts of every layer
    #[arg(long)]
    trace: bool,
}

/// Runs `logits`.
///
/// # Errors
/// What is wrong with the ids, the model, the device, or the file to write.
pub(crate) fn run(args: Args) -> Result<(), Box<dyn Error + Send + Sync>> {
    let model = Model::open(&args.model)?;
    let config = model.config().clone();
    check_ids(&config, &args.token_ids)?;
    let threads = args.threads.unwrap_or_else(machine::cores) as usize;
    let options = StageOptions {
        kv_blocks: args.token_ids.len().div_ceil(KV_BLOCK_TOKENS).try_into()?,
        max_rows: args.token_ids.len().min(CHUNK_ROWS),
        ..StageOptions::default()
    };
    let device = select_device(&args.device, threads, args.precision, args.prefill)?;
    let layers = 0..config.num_hidden_layers;
    let mut stage = device.load_traced(&config, Arc::new(model), layers, options, &mut |_, _| ())?;
    let mut found = Found::default();
    for (index, ids) in args.token_ids.chunks(CHUNK_ROWS).enumerate() {
        let batch = chunk(index * CHUNK_ROWS, ids, config.pad_token_id);
        let wanted: Vec<u32> = (0..ids.len() as u32).collect();
        let (output, trace) = if args.trace {
            stage.run_traced(&batch, StepInput::TokenIds(ids), &wanted)?
        } else {
            (stage.run(&batch, StepInput::TokenIds(ids), &wanted)?, Trace::default())
        };
        let (StepOutput::Logits(logits) | StepOutput::HiddenStates(logits)) = output;
        found.logits.extend(logits);
        found.traces.push(trace);
    }
    found.write(&args, &config)
}

fn check_ids(config: &ModelConfig, ids: &[u32]) -> Result<(), CliError> {
    if ids.len() > config.max_position_embeddings {
        return Err(CliError::usage(format!("{} token ids do not fit the model", ids.len()))
            .at("--token-ids")
            .because(format!("its context is {} tokens", config.max_position_embeddings)));
    }
    match ids.iter().position(|&id| id as usize >= config.vocab_size) {
        Some(index) => Err(CliError::usage(format!("token id {} is not in the vocabulary", ids[index]))
            .at(format!("--token-ids, number {}", index + 1))
            .because(format!("the model has ids 0 to {}", config.vocab_size - 1))),
        None => Ok(()),
    }
}

/// Positions `first..` of the only sequence; its blocks are those of the pool in order.
fn chunk(first: usize, ids: &[u32], pad: u32) -> Batch {
    let row = |(i, &id): (usize, &u32)| Row { position: (first + i) as u32, table_offset: 0, attended: id != pad };
    let blocks = (first + ids.len()).div_ceil(KV_BLOCK_TOKENS) as u32;
    Batch { rows: ids.iter().enumerate().map(row).collect(), block_tables: (0..blocks).collect() }
}

/// What the chunks gave.
#[derive(Default)]
struct Found {
    logits: Vec<f32>,
    traces: Vec<Trace>,
}

impl Found {
    fn write(&self, args: &Args, config: &ModelConfig) -> Result<(), Box<dyn Error + Send + Sync>> {
        let (rows, layers) = (args.token_ids.len(), config.num_hidden_layers as usize);
        let mut tensors = vec![("logits", Dtype::F32, vec![rows, config.vocab_size], floats(&self.logits))];
        if args.trace {
            let (hidden, chosen) = (config.hidden_size, config.num_experts_per_tok);
            let states = by_layer(&self.traces, layers, |trace| &trace.hidden);
            let ids: Vec<u8> = by_layer(&self.traces, layers, |trace| &trace.expert_ids)
                .iter()
                .flat_map(|&id| (id as i32).to_le_bytes())
                .collect();
            let probabilities = by_layer(&self.traces, layers, |trace| &trace.expert_probabilities);
            tensors.push(("hidden", Dtype::F32, vec![layers, rows, hidden], floats(&states)));
            tensors.push(("topk_idx", Dtype::I32, vec![layers, rows, chosen], ids));
            tensors.push(("topk_prob", Dtype::F32, vec![layers, rows, chosen], floats(&probabilities)));
        }
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| Ok((*name, TensorView::new(*dtype, shape.clone(), bytes)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
        Ok(write_file(views, &args.out)?)
    }
}

/// Writes a file whole or not at all; into a pipe or a device that stands at this path it writes, and leaves it there.
fn write_file(views: Vec<(&str, TensorView<'_>)>, path: &Path) -> Result<(), CliError> {
    let is_special = std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir());
    let refuse = |reason: &dyn std::fmt::Display| {
        CliError::failed("the file could not be written").at(path.display().to_string()).because(reason)
    };
    if is_special {
        let bytes = safetensors::serialize(views, None).map_err(|error| refuse(&error))?;
        return std::fs::write(path, bytes).map_err(|error| refuse(&error));
    }
    safetensors::serialize_to_file(views, None, path).map_err(|error| refuse(&error))
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Chunks of `[layers, rows of the chunk, width]` joined to `[layers, rows, width]`.
fn by_layer<T: Copy>(traces: &[Trace], layers: usize, part: impl Fn(&Trace) -> &Vec<T>) -> Vec<T> {
    let mut joined = Vec::new();
    for layer in 0..layers {
        for trace in traces {
            let values = part(trace);
            let size = values.len() / layers;
            joined.extend_from_slice(&values[layer * size..(layer + 1) * size]);
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_joined_layer_by_layer() {
        let trace = |hidden: &[f32]| Trace { hidden: hidden.to_vec(), ..Trace::default() };
        let traces = [trace(&[1.0, 2.0, 11.0, 12.0]), trace(&[3.0, 13.0])];
        assert_eq!(by_layer(&traces, 2, |trace| &trace.hidden), [1.0, 2.0, 3.0, 11.0, 12.0, 13.0]);
    }

    #[test]
    fn ids_that_the_model_does_not_have_are_refused() {
        let config = ModelConfig::grok_1();
        assert!(check_ids(&config, &[1, 131_071]).is_ok());
        let error = check_ids(&config, &[1, 131_072]).unwrap_err().to_string();
        assert!(error.contains("131072") && error.contains("number 2"), "{error}");
        assert!(check_ids(&config, &vec![1; 8193]).is_err());
    }

    #[test]
    fn the_second_chunk_goes_on_where_the_first_ended() {
        let batch = chunk(128, &[5, 0], 0);
        assert_eq!((batch.rows[0].position, batch.rows[1].position), (128, 129));
        assert_eq!((batch.rows[0].attended, batch.rows[1].attended), (true, false));
        assert_eq!(batch.block_tables.len(), 9);
    }

    #[cfg(unix)]
    #[test]
    fn a_pipe_at_the_path_is_written_into_and_stays() {
        use std::os::unix::fs::FileTypeExt;
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || std::fs::read(pipe).unwrap()
        });
        let bytes = floats(&[1.0, 2.0]);
        let view = TensorView::new(Dtype::F32, vec![2], &bytes).unwrap();
        write_file(vec![("logits", view)], &pipe).unwrap();
        let read = reader.join().unwrap();
        assert!(safetensors::SafeTensors::deserialize(&read).is_ok());
        assert!(std::fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo());
    }
}
