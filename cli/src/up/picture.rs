//! A terminal as indicatif draws on it: what belongs to one picture is collected and handed over in one piece, so that drawing never waits
//! for the terminal.

use std::{
    fmt::Write as _,
    io,
    sync::{Mutex, PoisonError},
};

use console::Term;
use indicatif::TermLike;

use crate::stderr;

/// Standard error, drawn on by the picture.
#[derive(Debug)]
pub(super) struct Canvas {
    term: Term,
    picture: Mutex<String>,
}

impl Canvas {
    /// An empty picture.
    pub(super) fn new() -> Self {
        Self { term: Term::stderr(), picture: Mutex::default() }
    }

    fn draw(&self, drawn: std::fmt::Arguments<'_>) -> io::Result<()> {
        self.picture.lock().unwrap_or_else(PoisonError::into_inner).write_fmt(drawn).map_err(io::Error::other)
    }

    /// The escape sequence that moves the cursor; by 0 it would move by 1.
    fn move_cursor(&self, by: usize, direction: char) -> io::Result<()> {
        if by == 0 { Ok(()) } else { self.draw(format_args!("\x1b[{by}{direction}")) }
    }
}

impl TermLike for Canvas {
    fn width(&self) -> u16 {
        self.term.size().1
    }

    fn height(&self) -> u16 {
        self.term.size().0
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.draw(format_args!("{text}\n"))
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.draw(format_args!("{text}"))
    }

    fn clear_line(&self) -> io::Result<()> {
        self.draw(format_args!("\r\x1b[2K"))
    }

    fn flush(&self) -> io::Result<()> {
        let picture = std::mem::take(&mut *self.picture.lock().unwrap_or_else(PoisonError::into_inner));
        if !picture.is_empty() {
            stderr::picture(picture.into_bytes());
        }
        Ok(())
    }
}
