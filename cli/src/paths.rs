//! Paths as people write them: `~/` at the beginning is the home. A shell puts it there itself, but not in `--model=~/grok`, in a
//! configuration file or in a variable.

use std::{
    ffi::OsString,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use clap::builder::{PathBufValueParser, TypedValueParser};

use crate::common::variable_os;

/// Reads a flag's path.
pub(crate) fn parser() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| expanded(&path))
}

/// The path with the home in place of `~`.
///
/// # Errors
/// In words: there is no home, or it is somebody else's.
pub(crate) fn expanded(path: &Path) -> Result<PathBuf, String> {
    expand(path, variable_os("HOME"))
}

fn expand(path: &Path, home: Option<OsString>) -> Result<PathBuf, String> {
    let bytes = path.as_os_str().as_bytes();
    let rest = match bytes {
        b"~" => b"",
        [b'~', b'/', rest @ ..] => rest,
        [b'~', ..] => {
            return Err(format!(
                "{} begins with ~, and only ~/ is known, which is the own home: write the whole path",
                path.display()
            ));
        }
        _ => return Ok(path.to_owned()),
    };
    let home = home.ok_or_else(|| format!("{} begins with ~, and HOME is not set", path.display()))?;
    let rest = rest.iter().copied().skip_while(|byte| *byte == b'/').collect();
    Ok(PathBuf::from(home).join(OsString::from_vec(rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_put_in_its_place_and_another_ones_is_refused_by_name() {
        for (path, expected) in [
            ("~/grok", Some("/home/me/grok")),
            ("~//grok", Some("/home/me/grok")),
            ("~", Some("/home/me/")),
            ("/a/~/b", Some("/a/~/b")),
            ("a~b", Some("a~b")),
            ("~you/grok", None),
        ] {
            let found = expand(Path::new(path), Some("/home/me".into()));
            assert_eq!(found.clone().ok().as_deref(), expected.map(Path::new), "{path}: {found:?}");
        }
        assert!(expand(Path::new("~/grok"), None).unwrap_err().contains("~/grok"));
        assert_eq!(expand(Path::new("grok"), None), Ok("grok".into()));
    }
}
