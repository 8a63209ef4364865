//! The file with the cluster's shared secret.

use std::{
    fmt, fs,
    io::{self, BufRead, Read},
    path::Path,
};

use grokpipe_proto::{link_token::LinkKey, secret::Secret};

use crate::error::CliError;

/// Bytes that a secret file may have: far more than any secret, far less than a file named by mistake.
const SECRET_FILE_BYTES_MAX: u64 = 4096;

/// Longest secret that is read from a pipe, with its line end.
const SECRET_LINE_BYTES_MAX: u64 = 2048;

/// The secret's text, needed to hand it to a worker on another host. Never printed.
#[derive(Clone, Default)]
pub(crate) struct SecretText(Option<String>);

impl SecretText {
    /// Checks a secret's text.
    pub(crate) fn new(text: &str, place: &str) -> Result<Self, CliError> {
        let text = text.trim();
        Secret::new(text).map_err(|error| {
            CliError::usage("the secret cannot be used")
                .at(place.to_owned())
                .because(error)
                .advise("make one: head -c 32 /dev/urandom | base64")
        })?;
        Ok(Self(Some(text.to_owned())))
    }

    /// Reads a secret file, which nobody but its owner may read.
    pub(crate) fn read(path: &Path, place: &str) -> Result<Self, CliError> {
        let what =
            || CliError::usage(format!("the secret file {} cannot be used", path.display())).at(place.to_owned());
        let metadata = fs::metadata(path).map_err(|error| what().because(error))?;
        if !metadata.is_file() || metadata.len() > SECRET_FILE_BYTES_MAX {
            return Err(what().because(format!("expected a file of at most {SECRET_FILE_BYTES_MAX} bytes")));
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = metadata.permissions().mode() & 0o777;
            if mode & 0o077 != 0 {
                return Err(what()
                    .because(format!("expected a file that only its owner can read, found mode {mode:03o}"))
                    .advise(format!("chmod 600 {}", path.display())));
            }
        }
        let text = fs::read_to_string(path).map_err(|error| what().because(error))?;
        Self::new(&text, &path.display().to_string())
    }

    /// A new secret, for processes that one of them starts.
    ///
    /// # Errors
    /// When the system gives no random numbers.
    pub(crate) fn random() -> Result<Self, CliError> {
        let text: String = random_bytes::<16>()?.iter().map(|byte| format!("{byte:02x}")).collect();
        Self::new(&text, "a new secret")
    }

    /// The first line of standard input.
    ///
    /// # Errors
    /// When it cannot be read, or is no secret.
    pub(crate) fn from_stdin() -> Result<Self, CliError> {
        let mut line = String::new();
        let read = io::stdin().lock().take(SECRET_LINE_BYTES_MAX).read_line(&mut line);
        read.map_err(|error| CliError::usage("the secret cannot be read").at("standard input").because(error))?;
        Self::new(&line, "standard input")
    }

    /// Whether there is a secret.
    pub(crate) fn is_set(&self) -> bool {
        self.0.is_some()
    }

    /// The text, for handing it on through a pipe.
    pub(crate) fn text(&self) -> Option<&str> {
        self.0.as_deref()
    }

    /// As calls carry it.
    pub(crate) fn to_secret(&self) -> Secret {
        // The text was checked when it was read, so that this cannot fail.
        self.0.as_deref().map_or_else(Secret::none, |text| Secret::new(text).unwrap_or_else(|_| Secret::none()))
    }
}

/// A new key for the tokens of links.
///
/// # Errors
/// When the system gives no random numbers.
pub(crate) fn link_key() -> Result<LinkKey, CliError> {
    random_bytes().map(LinkKey::new)
}

fn random_bytes<const N: usize>() -> Result<[u8; N], CliError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| CliError::failed("no secret could be made").because(error))?;
    Ok(bytes)
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_set() { "SecretText(set)" } else { "SecretText(none)" })
    }
}
