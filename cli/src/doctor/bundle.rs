//! A folder that can be attached to a report: what `doctor` found, the settings in use, the cluster's snapshot, the end of a log.
//!
//! Decides what goes in, and that no secret does: the cluster's secret is cut out wherever it stands, and so is whatever follows a word
//! such as "password". Host names, addresses and paths are inside, and its own page says so.

use std::{
    fs,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use crate::{config::Config, error::CliError};

/// Most bytes of a log's end.
const LOG_BYTES: u64 = 256 << 10;
const REMOVED: &str = "[removed]";
/// What follows one of these words and `=` or `:`, up to the line's end, may be a secret.
const WORDS: [&str; 7] = ["secret", "password", "passwd", "token", "api_key", "apikey", "private_key"];

const README: &str = "What `grokpipe doctor --bundle` found. The files hold host names, addresses, user names and paths of this cluster.
The cluster's secret, options of ssh and whatever looks like a password were removed; look through the files all the same before you
hand them on.

report.txt, report.json   the checks
settings.txt              the settings in use, with all defaults
snapshot.json             the cluster as `grokpipe status --json` shows it, with its last events, if it could be asked
log.txt                   the end of the log that --log named
";

/// Writes the folder at `path`, which must not be there yet.
///
/// # Errors
/// When it is there, or cannot be written.
pub(super) fn write(path: &Path, mut files: Vec<(&'static str, String)>, scrubber: &Scrubber) -> Result<(), CliError> {
    let failed = |error| CliError::failed("the bundle cannot be written").at(path.display().to_string()).because(error);
    fs::create_dir(path).map_err(failed)?;
    files.push(("README.txt", README.to_owned()));
    for (name, text) in files {
        let text = if name == "README.txt" { text } else { scrubber.scrub(&text) };
        fs::write(path.join(name), text).map_err(failed)?;
    }
    Ok(())
}

/// The settings in use, without options of ssh, which may hold anything.
pub(super) fn settings(config: &Config) -> String {
    let mut config = config.clone();
    let options = config.cluster.ssh_options.len();
    config.cluster.ssh_options = vec![format!("{options} {REMOVED}")];
    format!("{config:#?}\n")
}

/// The last lines of a log.
///
/// # Errors
/// When it cannot be read.
pub(super) fn log_end(path: &Path) -> Result<String, CliError> {
    let read = || {
        let mut file = fs::File::open(path)?;
        let bytes = file.metadata()?.len();
        file.seek(SeekFrom::Start(bytes.saturating_sub(LOG_BYTES)))?;
        let mut end = Vec::new();
        file.take(LOG_BYTES).read_to_end(&mut end)?;
        Ok(String::from_utf8_lossy(&end).into_owned())
    };
    read().map_err(|error: std::io::Error| {
        CliError::usage("the log cannot be read").at(path.display().to_string()).because(error)
    })
}

/// Cuts secrets out of a text.
#[derive(Default)]
pub(super) struct Scrubber {
    known: Vec<String>,
}

impl Scrubber {
    pub(super) fn new(known: impl IntoIterator<Item = String>) -> Self {
        Self { known: known.into_iter().filter(|secret| !secret.is_empty()).collect() }
    }

    pub(super) fn scrub(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in &self.known {
            text = text.replace(secret, REMOVED);
        }
        let lines = text.lines().map(|line| user_secret(&after_word(line)));
        lines.map(|line| line + "\n").collect()
    }
}

/// Without what follows `password =` and its like, and a bearer.
fn after_word(line: &str) -> String {
    // ASCII alone changes, so that places stay where they are.
    let lower = line.to_ascii_lowercase();
    let mut end = line.len();
    for word in WORDS {
        for (at, _) in lower.match_indices(word) {
            let after = at + word.len();
            let skipped = lower[after..].trim_start_matches(['"', '\'', ' ', '\\']);
            if skipped.starts_with(['=', ':']) {
                end = end.min(line.len() - skipped.len() + 1);
            }
        }
    }
    if let Some(at) = lower.find("bearer ") {
        end = end.min(at + "bearer".len());
    }
    if end == line.len() { line.to_owned() } else { format!("{} {REMOVED}", &line[..end]) }
}

/// Without the middle of `user:password@host`.
fn user_secret(line: &str) -> String {
    let cut = |word: &str| {
        let at = word.rfind('@')?;
        let colon = word[..at].rfind(':').filter(|&colon| colon > 0 && colon + 1 < at)?;
        Some(format!("{}:{REMOVED}{}", &word[..colon], &word[at..]))
    };
    line.split(' ').map(|word| cut(word).unwrap_or_else(|| word.to_owned())).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Layers, SecretText, WorkerSection};

    const PLANTED: &str = "Tr0ub4dor-and-3-horses";

    #[test]
    fn a_secret_planted_anywhere_is_not_in_the_bundle() {
        let mut config = Layers { no_file: true, ..Layers::default() }.load().unwrap();
        config.secret = SecretText::new(PLANTED, "here").unwrap();
        config.cluster.name = PLANTED.into();
        config.cluster.ssh_options = vec!["-o".into(), "ProxyCommand=nc hunter2hunter2".into()];
        config.workers =
            vec![WorkerSection { host: Some("me:hunter2hunter2@node".into()), ..WorkerSection::named("w1") }];
        let scrubber = Scrubber::new([PLANTED.to_owned()]);
        let log = format!(
            "ok line\nauthorization: Bearer {PLANTED}\nBearer hunter2hunter2\npassword=hunter2hunter2\n  | secret = \"hunter2hunter2\n\
             {{\"api_key\": \"hunter2hunter2\"}}\nhttp://me:hunter2hunter2@node/x\nüöä PASSWORD : hunter2hunter2\n"
        );
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bundle");
        let log_file = folder.path().join("log");
        fs::write(&log_file, &log).unwrap();
        let files = vec![("settings.txt", settings(&config)), ("log.txt", log_end(&log_file).unwrap())];
        write(&path, files, &scrubber).unwrap();
        for entry in fs::read_dir(&path).unwrap() {
            let text = fs::read_to_string(entry.unwrap().path()).unwrap();
            assert!(!text.contains(PLANTED) && !text.contains("hunter2"), "{text}");
        }
        let kept = fs::read_to_string(path.join("log.txt")).unwrap();
        assert!(kept.contains("ok line\n") && kept.contains("@node/x"), "{kept}");
        assert!(write(&path, Vec::new(), &scrubber).is_err());
    }

    #[test]
    fn ordinary_lines_stay_as_they_are() {
        let text = "worker w1 at [::1]:7070 runs 12 tokens/s\nsecret_file: none given\nme@node: ok\n";
        assert_eq!(Scrubber::default().scrub(text), text);
    }
}
