//! `grokpipe verify`: whether a model's files are what they should be. What is checked is decided in `grokpipe_model::verify`; this file
//! knows flags, progress and how the answer is told.

use std::{fmt::Write as _, path::PathBuf};

use grokpipe_model::verify::{self, Checked, Options, State, Verified};
use serde_json::{Value, json};

use crate::{config::ByteSize, error::CliError, machine, paths, progress::Screen, text::print};

/// Arguments of `verify`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder or file of the model
    #[arg(value_parser = paths::parser())]
    path: PathBuf,
    /// Write a manifest, by which later checks and every worker that loads the model notice a change
    #[arg(long)]
    write: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Files that are read at a time: a disk gives no more for more.
const THREADS_MOST: usize = 4;
/// Good files that are listed by name; of more, their number is told.
const LISTED_MOST: usize = 16;

/// Runs `verify`; `false` when something is wrong with the model.
///
/// # Errors
/// When there is nothing to check, or the manifest cannot be written.
pub(crate) fn run(args: &Args) -> Result<bool, CliError> {
    let options = Options { threads: (machine::cores() as usize).min(THREADS_MOST), everything: args.write };
    let mut screen = Screen::new();
    let verified = verify::verify(&args.path, options, &mut |done, total| screen.show(done, total));
    screen.clear();
    let verified = verified.map_err(|error| CliError::failed("there is no model to verify").because(error))?;
    let good = verified.is_good();
    let written = args.write && good;
    if written {
        verified.write_manifest().map_err(|error| CliError::failed("the manifest was not written").because(error))?;
    }
    let text = if args.json { format!("{}\n", to_json(&verified, written)) } else { render(&verified, args.write) };
    print(&text)?;
    Ok(good)
}

/// State in a word, by whom, and what is wrong.
fn told(state: &State) -> (&'static str, Option<String>, Option<&str>) {
    match state {
        State::Confirmed(source) => ("ok", Some(source.to_string()), None),
        State::Plausible => ("unknown", None, None),
        State::Damaged(reason) => ("damaged", None, Some(reason)),
    }
}

fn to_json(verified: &Verified, written: bool) -> Value {
    let file = |file: &Checked| {
        let (state, by, reason) = told(&file.state);
        json!({
            "file": file.path.display().to_string(),
            "bytes": file.bytes,
            "sha256": file.sha256,
            "state": state,
            "by": by,
            "reason": reason,
        })
    };
    json!({
        "good": verified.is_good(),
        "files": verified.files.iter().map(file).collect::<Vec<_>>(),
        "damage": verified.damage,
        "manifest": written.then(|| verified.manifest.display().to_string()),
    })
}

/// For people: what is wrong first, then how many files are good and how that is known.
fn render(verified: &Verified, write: bool) -> String {
    let mut text = String::new();
    let mut good: Vec<(String, Vec<&Checked>)> = Vec::new();
    for file in &verified.files {
        let how = match &file.state {
            State::Damaged(reason) => {
                let _ = writeln!(text, "damaged  {}: {reason}", file.path.display());
                continue;
            }
            State::Confirmed(source) => format!("ok by {source}"),
            State::Plausible => "no checksum is known, the numbers have no holes".to_owned(),
        };
        match good.iter_mut().find(|(known, _)| *known == how) {
            Some((_, files)) => files.push(file),
            None => good.push((how, vec![file])),
        }
    }
    for damage in &verified.damage {
        let _ = writeln!(text, "damaged  {damage}");
    }
    for (how, files) in &good {
        let bytes = ByteSize(files.iter().map(|file| file.bytes).sum());
        if files.len() > LISTED_MOST {
            let _ = writeln!(text, "{} files, {bytes}: {how}", files.len());
        } else {
            for file in files {
                let _ = writeln!(text, "{}  {}: {how}", file.path.display(), ByteSize(file.bytes));
            }
        }
    }
    let damaged = verified.files.iter().filter(|file| matches!(file.state, State::Damaged(_))).count();
    let _ = match (verified.is_good(), write) {
        (true, true) => writeln!(text, "manifest: {}", verified.manifest.display()),
        (true, false) if verified.is_confirmed() => writeln!(text, "all files are as they should be"),
        (true, false) => writeln!(text, "nothing is wrong; --write records the files as they are"),
        (false, write) => {
            let what = if damaged == 1 { "1 file is".to_owned() } else { format!("{damaged} files are") };
            let model = if damaged == 0 { "the model cannot be used".to_owned() } else { format!("{what} damaged") };
            let not = if write { ", no manifest was written" } else { "" };
            writeln!(text, "{model}{not}: fetch what is named above again")
        }
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_is_verified_recorded_and_its_damage_named() {
        let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/demo");
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("ckpt-0")).unwrap();
        for entry in std::fs::read_dir(demo.join("ckpt-0")).unwrap().map(Result::unwrap) {
            std::fs::copy(entry.path(), folder.path().join("ckpt-0").join(entry.file_name())).unwrap();
        }
        std::fs::copy(demo.join("config.json"), folder.path().join("config.json")).unwrap();
        let verify =
            |everything| verify::verify(folder.path(), Options { threads: 2, everything }, &mut |_, _| {}).unwrap();
        let first = verify(true);
        assert!(first.is_good() && !first.is_confirmed());
        assert!(render(&first, false).contains("--write records"), "{}", render(&first, false));
        first.write_manifest().unwrap();
        assert!(verify(false).is_confirmed());
        let tensor = folder.path().join("ckpt-0/tensor00002_000");
        let mut bytes = std::fs::read(&tensor).unwrap();
        bytes[9000] ^= 1;
        std::fs::write(&tensor, bytes).unwrap();
        let damaged = verify(false);
        let text = render(&damaged, true);
        assert!(text.contains("tensor00002_000: its SHA-256 is") && text.contains("1 file is damaged"), "{text}");
        let json = to_json(&damaged, false);
        assert_eq!((&json["good"], &json["manifest"]), (&Value::Bool(false), &Value::Null));
    }
}
