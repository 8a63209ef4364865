//! Plain tables for people, and text on standard output.

use std::{
    fmt,
    io::{self, Write},
};

use crate::error::{CliError, output};

/// Writes to standard output.
///
/// # Errors
/// [`output`], as when a pipe is closed or a disk is full.
pub(crate) fn print(text: &str) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| output(&error))
}

/// As [`print()`], without holding up the tasks of this thread while nobody reads.
///
/// # Errors
/// As [`print()`].
pub(crate) async fn print_aside(text: String) -> Result<(), CliError> {
    let printed = tokio::task::spawn_blocking(move || print(&text)).await;
    printed.unwrap_or_else(|error| Err(CliError::failed("the output could not be written").because(error)))
}

/// Text of a file without the byte order mark that some editors begin it with.
pub(crate) fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// Columns as wide as their widest cell; the last one is not padded.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub(crate) fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|&heading| heading.to_owned()).collect()] }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["node", "layers"]);
        table.row(vec!["w1".into(), "0..16".into()]);
        table.row(vec!["a-long-name".into(), "-".into()]);
        assert_eq!(table.to_string(), "node         layers\nw1           0..16\na-long-name  -\n");
    }
}
