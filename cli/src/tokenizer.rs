//! Finds the tokenizer of a model, and `grokpipe tokenize`.
//!
//! A tokenizer that was named must fit the model; one that was merely found beside it is left aside when it does not.

use std::{
    io::{self, BufRead, Write},
    path::PathBuf,
};

use grokpipe_model::{Model, tokenizer::Tokenizer};
use tracing::warn;

use crate::{
    common::ConfigArgs,
    config::ModelSection,
    error::{CliError, output},
    paths,
    text::without_mark,
};

/// Name of the file in a model's folder.
const FILE: &str = "tokenizer.model";

/// Arguments of `tokenize`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The tokenizer.model [default: the one of the configured model]
    #[arg(long, value_name = "F", value_parser = paths::parser())]
    tokenizer: Option<PathBuf>,
    /// A JSON string in, a JSON list of ids out; texts keep their line ends
    #[arg(long)]
    json: bool,
    /// Ids in, text out
    #[arg(long)]
    decode: bool,
    #[command(flatten)]
    config: ConfigArgs,
}

/// Runs `tokenize`: one line of standard input in, one line out.
///
/// # Errors
/// [`CliError`] naming the line that makes no sense.
pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let path = match &args.tokenizer {
        Some(path) => path.clone(),
        None => {
            let section = args.config.layers().load()?.model;
            let path = match &section.tokenizer {
                Some(named) => Some(named.clone()),
                None => Model::open(&section.path)?.tokenizer_path(),
            };
            path.ok_or_else(|| {
                CliError::usage("no tokenizer was found")
                    .at(section.path.display().to_string())
                    .because(format!("expected {FILE} in the model's folder or its parent"))
                    .advise("name it with --tokenizer")
            })?
        }
    };
    let tokenizer = Tokenizer::open(&path)?;
    lines(&tokenizer, args.json, args.decode, io::stdin().lock(), io::stdout().lock())
}

fn lines(
    tokenizer: &Tokenizer,
    json: bool,
    decode: bool,
    input: impl BufRead,
    mut out: impl Write,
) -> Result<(), CliError> {
    for (index, line) in input.lines().enumerate() {
        let refuse = |what: &str| CliError::failed(what).at(format!("line {} of standard input", index + 1));
        let mut line = line.map_err(|error| refuse("the line cannot be read").because(error))?;
        if index == 0 {
            line = without_mark(&line).to_owned();
        }
        let answer = if decode {
            let ids = if json {
                serde_json::from_str(&line).map_err(|error| refuse("the line is no JSON list of ids").because(error))?
            } else {
                ids(&line)
                    .ok_or_else(|| refuse("the line is no list of ids").because("expected whole numbers, as 1 2 3"))?
            };
            let found = ids.iter().copied().find(|&id| id as usize >= tokenizer.vocab_size());
            if let Some(id) = found {
                return Err(refuse("the line has an id out of range")
                    .because(format!("expected ids below {}, found {id}", tokenizer.vocab_size())));
            }
            let text = tokenizer.decode(&ids);
            if json { serde_json::Value::from(text).to_string() } else { text }
        } else {
            let text = if json {
                serde_json::from_str::<String>(&line)
                    .map_err(|error| refuse("the line is no JSON string").because(error))?
            } else {
                line
            };
            let ids = tokenizer.encode(&text);
            if json {
                serde_json::Value::from(ids).to_string()
            } else {
                ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
            }
        };
        writeln!(out, "{answer}").map_err(|error| output(&error))?;
    }
    out.flush().map_err(|error| output(&error))
}

/// Ids separated by spaces or commas.
fn ids(line: &str) -> Option<Vec<u32>> {
    let parts = line.split([' ', ',', '\t']).filter(|part| !part.is_empty());
    parts.map(|part| part.parse().ok()).collect()
}

/// The tokenizer that serves a model; `None` when there is none, and only token ids can be served.
///
/// # Errors
/// One that was named and does not fit, or cannot be read.
pub(crate) fn of_model(section: &ModelSection, model: &Model) -> Result<Option<Tokenizer>, CliError> {
    let Some(path) = section.tokenizer.clone().or_else(|| model.tokenizer_path()) else {
        warn!("no tokenizer was found: token ids are served, text is refused");
        return Ok(None);
    };
    let tokenizer = Tokenizer::open(&path)?;
    let (expected, found) = (model.config().vocab_size, tokenizer.vocab_size());
    if found == expected {
        return Ok(Some(tokenizer));
    }
    if section.tokenizer.is_some() {
        return Err(CliError::usage("the tokenizer does not fit the model")
            .at(path.display().to_string())
            .because(format!("expected {expected} pieces, found {found}")));
    }
    warn!(path = %path.display(), expected, found, "tokenizer left aside: its pieces are not the model's vocabulary");
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn ids_are_separated_by_spaces_or_commas() {
        assert_eq!(ids("1 2,3, 4"), Some(vec![1, 2, 3, 4]));
        assert_eq!(ids(""), Some(vec![]));
        for bad in ["1 x", "-1", "4294967296"] {
            assert_eq!(ids(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_named_tokenizer_wins_and_must_fit() {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/demo");
        let model = Model::open(&demo).unwrap();
        let section =
            |tokenizer: Option<&Path>| ModelSection { path: demo.clone(), tokenizer: tokenizer.map(Path::to_path_buf) };
        let found = of_model(&section(None), &model).unwrap().unwrap();
        assert_eq!(found.vocab_size(), model.config().vocab_size);
        let missing = of_model(&section(Some(Path::new("/none/of/this"))), &model).unwrap_err();
        assert!(missing.to_string().contains("/none/of/this"), "{missing}");
    }

    #[test]
    fn lines_are_encoded_and_decoded() {
        let shared = std::env::var_os("GROKPIPE_SHARED")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"), PathBuf::from);
        let path = shared.join("golden/tokenizer.model");
        if !path.is_file() {
            println!("skipped: {} is not there", path.display());
            return;
        }
        let tokenizer = Tokenizer::open(&path).unwrap();
        let run = |json, decode, input: &str| {
            let mut out = Vec::new();
            lines(&tokenizer, json, decode, input.as_bytes(), &mut out).map(|()| String::from_utf8(out).unwrap())
        };
        let (text, ids) = ("The capital of Greece is", "422 4073 359 14669 391");
        assert_eq!(run(false, false, text).unwrap(), format!("{ids}\n"));
        assert_eq!(run(false, true, ids).unwrap(), format!("{text}\n"));
        assert_eq!(run(true, false, &format!("\"{text}\"\n\"a\\nb\"\n")).unwrap().lines().count(), 2);
        assert_eq!(run(true, true, "[422,4073]").unwrap(), "\"The capital\"\n");
        assert!(run(true, false, "no json").unwrap_err().to_string().contains("line 1"));
        assert!(run(false, true, "1\n131072").unwrap_err().to_string().contains("line 2"));
    }
}
