//! Reads one table of the merged configuration, key by key, and refuses what nobody asked for.
//!
//! The keys that a section reads are the keys that it knows: there is no second list to keep equal.

use config::{Map, Value, ValueKind};

use super::places::{ENVIRONMENT, FLAGS, Places};
use crate::error::CliError;

/// A table being read.
pub(crate) struct Table<'a> {
    /// `kv`, `worker[1]`, or nothing for the top.
    section: String,
    values: Map<String, Value>,
    known: Vec<&'static str>,
    places: &'a Places,
}

impl<'a> Table<'a> {
    /// The whole configuration.
    pub(crate) fn root(value: Value, places: &'a Places) -> Result<Self, CliError> {
        Self::of(String::new(), "", value, places)
    }

    fn of(section: String, key: &str, value: Value, places: &'a Places) -> Result<Self, CliError> {
        let place = places.of("", key, &value);
        match value.kind {
            ValueKind::Table(values) => Ok(Self { section, values, known: Vec::new(), places }),
            other => Err(CliError::usage(format!("{section} is {}", shown(&other)))
                .at(place)
                .because(format!("{section} is a section, not a value"))
                .advise(format!("set its keys: {}", section_hint(&section)))),
        }
    }

    /// A section of the top; empty if it is absent.
    pub(crate) fn section(&mut self, name: &'static str) -> Result<Self, CliError> {
        self.known.push(name);
        let value = self.values.remove(name).unwrap_or_else(|| Value::new(None, Map::<String, Value>::new()));
        Self::of(name.to_owned(), name, value, self.places)
    }

    /// A list of at most `most` sections, as `[[worker]]`.
    pub(crate) fn sections(&mut self, name: &'static str, most: usize) -> Result<Vec<Self>, CliError> {
        self.known.push(name);
        let Some(value) = self.values.remove(name) else { return Ok(Vec::new()) };
        let place = self.places.of("", name, &value);
        let ValueKind::Array(items) = value.kind else {
            return Err(CliError::usage(format!("{name} is {}", shown(&value.kind)))
                .at(place)
                .because(format!("expected a list of tables, each under [[{name}]]")));
        };
        if items.len() > most {
            return Err(CliError::usage(format!("there are {} tables [[{name}]]", items.len()))
                .at(place)
                .because(format!("expected at most {most}")));
        }
        let of = |(index, item)| Self::of(format!("{name}[{index}]"), name, item, self.places);
        items.into_iter().enumerate().map(of).collect()
    }

    /// The value of `key` as `parse` reads it; `None` if it is not set. `expected` says what is allowed.
    pub(crate) fn get<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl FnOnce(&Scalar) -> Option<T>,
    ) -> Result<Option<T>, CliError> {
        self.known.push(key);
        let Some(value) = self.values.remove(key) else { return Ok(None) };
        let parsed = Scalar::of(&value.kind).and_then(|scalar| parse(&scalar));
        parsed.map(Some).ok_or_else(|| self.refuse(key, &value, expected))
    }

    /// As [`Table::get`], for a list of texts; in the environment, texts separated by spaces.
    pub(crate) fn texts(&mut self, key: &'static str) -> Result<Option<Vec<String>>, CliError> {
        self.known.push(key);
        let Some(value) = self.values.remove(key) else { return Ok(None) };
        let texts = match &value.kind {
            ValueKind::String(text) if value.origin() == Some(ENVIRONMENT) => {
                Some(text.split_whitespace().map(str::to_owned).collect())
            }
            ValueKind::Array(items) => items
                .iter()
                .map(|item| if let ValueKind::String(text) = &item.kind { Some(text.clone()) } else { None })
                .collect(),
            _ => None,
        };
        texts.map(Some).ok_or_else(|| self.refuse(key, &value, r#"a list of texts, as ["-p", "2222"]"#))
    }

    /// Whether a value that is still to be read was set outside the file, so that a relative path in it is the caller's own.
    pub(crate) fn is_from_outside(&self, key: &str) -> bool {
        self.values.get(key).is_some_and(|value| matches!(value.origin(), Some(FLAGS | ENVIRONMENT)))
    }

    /// Where a value that is still to be read comes from.
    pub(crate) fn place(&self, key: &str) -> String {
        self.values.get(key).map_or_else(String::new, |value| self.places.of(&self.section, key, value))
    }

    /// Refuses any key that was not asked for.
    pub(crate) fn finish(mut self) -> Result<(), CliError> {
        let mut left: Vec<(String, Value)> = self.values.drain().collect();
        left.sort_by(|a, b| a.0.cmp(&b.0));
        let Some((key, value)) = left.first() else { return Ok(()) };
        let name = self.qualified(key);
        let kind = if self.section.is_empty() { "section" } else { "key" };
        let error = CliError::usage(format!("unknown {kind} {name}"))
            .at(self.places.of(&self.section, key, value))
            .because(format!("the known ones are {}", self.known.join(", ")));
        Err(match nearest(key, &self.known) {
            Some(near) => error.advise(format!("did you mean {}?", self.qualified(near))),
            None => error.advise("remove it"),
        })
    }

    fn refuse(&self, key: &str, value: &Value, expected: &str) -> CliError {
        CliError::usage(format!("{} is {}", self.qualified(key), shown(&value.kind)))
            .at(self.places.of(&self.section, key, value))
            .because(format!("expected {expected}"))
    }

    fn qualified(&self, key: &str) -> String {
        if self.section.is_empty() { key.to_owned() } else { format!("{}.{key}", self.section) }
    }
}

/// A single value as it was written.
pub(crate) enum Scalar {
    /// In quotes, or from the environment or a flag.
    Text(String),
    /// A bare number in the file, as text.
    Number(String),
}

impl Scalar {
    fn of(kind: &ValueKind) -> Option<Self> {
        match kind {
            ValueKind::String(text) => Some(Self::Text(text.clone())),
            ValueKind::I64(number) => Some(Self::Number(number.to_string())),
            ValueKind::U64(number) => Some(Self::Number(number.to_string())),
            ValueKind::Float(number) => Some(Self::Number(number.to_string())),
            _ => None,
        }
    }

    /// The text, if it is not a bare number.
    pub(crate) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Number(_) => None,
        }
    }

    /// A text that is not empty.
    pub(crate) fn filled(&self) -> Option<String> {
        self.text().map(str::trim).filter(|text| !text.is_empty()).map(str::to_owned)
    }

    /// Text or number.
    pub(crate) fn any(&self) -> &str {
        match self {
            Self::Text(text) | Self::Number(text) => text,
        }
    }
}

/// The known word that `key` most likely means.
fn nearest<'k>(key: &str, known: &[&'k str]) -> Option<&'k str> {
    known
        .iter()
        .map(|word| (strsim::jaro_winkler(key, word), *word))
        .filter(|(score, _)| *score >= 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, word)| word)
}

/// A value for messages: texts in quotes and cut to a bearable length.
fn shown(kind: &ValueKind) -> String {
    match kind {
        ValueKind::String(text) if text.chars().count() > 80 => {
            format!("{:?} and more", text.chars().take(80).collect::<String>())
        }
        ValueKind::String(text) => format!("{text:?}"),
        ValueKind::Table(_) => "a table".to_owned(),
        ValueKind::Array(_) => "a list".to_owned(),
        ValueKind::Nil => "nothing".to_owned(),
        other => other.to_string(),
    }
}

fn section_hint(section: &str) -> String {
    match section.split_once('[') {
        Some((name, _)) => format!("[[{name}]]"),
        None => format!("[{section}]"),
    }
}
