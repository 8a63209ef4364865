//! Where a value came from, for messages: a line of the file, an environment variable, or a flag.
//!
//! The configuration layers remember only which source a value came from; lines are looked up in the file's text when a
//! message needs one.

use std::path::PathBuf;

use config::{Value, ValueKind};

/// Origin of values that flags set, as the layers remember it.
pub(crate) const FLAGS: &str = "the command line";
/// Origin of values from the environment, as the `config` crate names it.
pub(crate) const ENVIRONMENT: &str = "the environment";

/// The file in use, if any, and its text.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// As the user named it.
    pub(crate) path: Option<PathBuf>,
    /// Its text.
    pub(crate) text: String,
}

impl Places {
    /// For people: where `key` of `section` (`""` for the top, `worker[1]` for the second worker) got `value`.
    pub(crate) fn of(&self, section: &str, key: &str, value: &Value) -> String {
        // Merging forgets where a table came from; its values still know.
        if let (ValueKind::Table(values), true) = (&value.kind, section.is_empty()) {
            match (self.line("", key), &self.path, values.iter().min_by_key(|(name, _)| name.as_str())) {
                (Some(line), Some(path), _) => return format!("{}:{line}", path.display()),
                (_, _, Some((inner, value))) => return self.of(key, inner, value),
                _ => {}
            }
        }
        match (value.origin(), &self.path) {
            (Some(FLAGS), _) => FLAGS.to_owned(),
            (Some(ENVIRONMENT), _) => format!("environment variable {}", variable(section, key)),
            (Some(_), Some(path)) => match self.line(section, key) {
                Some(line) => format!("{}:{line}", path.display()),
                None => path.display().to_string(),
            },
            _ => "the built-in defaults".to_owned(),
        }
    }

    /// Line, from 1, of a key in a section. Inline tables and dotted keys are found by their first line only.
    fn line(&self, section: &str, key: &str) -> Option<usize> {
        let (wanted, index) = match section.split_once('[') {
            Some((name, index)) => (name, index.trim_end_matches(']').parse::<usize>().ok()?),
            None => (section, 0),
        };
        let mut current = "";
        let mut seen = 0_usize;
        for (number, line) in self.text.lines().enumerate() {
            let line = line.trim();
            if let Some(header) = header(line) {
                if header == wanted && line.starts_with("[[") {
                    seen += 1;
                }
                current = header;
                // A section's header is the place of the section itself.
                if section.is_empty() && header == key {
                    return Some(number + 1);
                }
                continue;
            }
            let here = current == wanted && (seen == 0 || seen == index + 1);
            let name = line.split('=').next().unwrap_or_default().trim().trim_matches('"');
            if here && line.contains('=') && name == key {
                return Some(number + 1);
            }
        }
        None
    }
}

/// The name in `[name]` or `[[name]]`.
fn header(line: &str) -> Option<&str> {
    let inner = line.strip_prefix('[')?.split(']').next()?;
    Some(inner.trim_start_matches('[').trim().trim_matches('"'))
}

/// The environment variable that sets a key.
pub(crate) fn variable(section: &str, key: &str) -> String {
    let parts: Vec<String> = [section, key]
        .iter()
        .filter(|part| !part.is_empty())
        .map(|part| part.to_uppercase().replace('.', "__"))
        .collect();
    format!("GROKPIPE__{}", parts.join("__"))
}
