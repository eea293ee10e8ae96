//! The last lines of what a generation wrote to its stderr, for reports.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

const MOST_LINES: usize = 20;
const MOST_BYTES: usize = 1024;

/// The last 20 lines, up to 1 KiB of each.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Tail(Mutex<Lines>);

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Lines {
    whole: VecDeque<Line>,
    /// The last one, without its end yet.
    open: Option<Line>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Line {
    bytes: Vec<u8>,
    /// It was longer.
    cut: bool,
}

impl Clone for Tail {
    fn clone(&self) -> Self {
        Tail(Mutex::new(self.lock().clone()))
    }
}

impl Tail {
    /// The lines, fit to be shown: invalid UTF-8 is replaced, and control characters can do nothing to a terminal.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let lines = self.lock();
        let all: Vec<_> = lines.whole.iter().chain(&lines.open).collect();
        all[all.len().saturating_sub(MOST_LINES)..].iter().map(|line| line.show()).collect()
    }

    /// Takes what was read.
    pub(super) fn push(&self, bytes: &[u8]) {
        let mut lines = self.lock();
        // Most of a flood is forgotten again anyway: begin where the last lines do.
        let ends = bytes.iter().enumerate().rev().filter(|(_, &byte)| byte == b'\n');
        let bytes = match ends.map(|(at, _)| at).nth(MOST_LINES) {
            Some(at) => {
                *lines = Lines::default();
                &bytes[at + 1..]
            }
            None => bytes,
        };
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let text = piece.strip_suffix(b"\n");
            let line = lines.open.get_or_insert_default();
            line.extend(text.unwrap_or(piece));
            if text.is_some() {
                let line = lines.open.take();
                lines.whole.extend(line);
                if lines.whole.len() > MOST_LINES {
                    lines.whole.pop_front();
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    fn extend(&mut self, bytes: &[u8]) {
        let room = MOST_BYTES - self.bytes.len();
        self.cut |= bytes.len() > room;
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    fn show(&self) -> String {
        let bytes = self.bytes.strip_suffix(b"\r").unwrap_or(&self.bytes);
        let mut text = String::from_utf8_lossy(bytes).into_owned();
        if self.cut {
            text = format!("{}…", text.trim_end_matches(char::REPLACEMENT_CHARACTER));
        }
        if !text.contains(is_harmful) {
            return text;
        }
        let mut harmless = String::with_capacity(text.len());
        for char in text.chars() {
            if is_harmful(char) {
                harmless.extend(char.escape_unicode());
            } else {
                harmless.push(char);
            }
        }
        harmless
    }
}

/// What moves the cursor, or the order in which text is shown.
fn is_harmful(char: char) -> bool {
    let turns = matches!(char, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    turns || (char.is_control() && char != '\t')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(pieces: &[&[u8]]) -> Vec<String> {
        let tail = Tail::default();
        for piece in pieces {
            tail.push(piece);
        }
        tail.lines()
    }

    #[test]
    fn lines_are_put_together_and_the_last_ones_kept() {
        assert_eq!(lines(&[b"one\ntw", b"o\nthr"]), ["one", "two", "thr"]);
        assert_eq!(lines(&[b"one\r\n\n"]), ["one", ""]);
        assert_eq!(lines(&[]), [""; 0]);
        let many: String = (0..100).fold(String::new(), |text, number| format!("{text}{number}\n"));
        let last: Vec<_> = (80..100).map(|number| number.to_string()).collect();
        assert_eq!(lines(&[many.as_bytes()]), last);
        assert_eq!(lines(&[many.as_bytes(), b"open"]).last().unwrap(), "open");
        assert_eq!(lines(&[many.as_bytes(), b"open"]).len(), MOST_LINES);
    }

    #[test]
    fn long_lines_are_cut_between_characters() {
        let long = lines(&["é".repeat(2000).as_bytes(), b"\nnext"]);
        assert_eq!(long, ["é".repeat(512) + "…", "next".to_owned()]);
        assert_eq!(lines(&[&[b'x'; 1024]]), ["x".repeat(1024)]);
        assert_eq!(lines(&[b"x", "é".repeat(2000).as_bytes()]), [format!("x{}…", "é".repeat(511))]);
    }

    #[test]
    fn nothing_happens_to_a_terminal() {
        assert_eq!(lines(&[b"\x1b[2Jgone\x07\ta\xffb"]), ["\\u{1b}[2Jgone\\u{7}\ta\u{fffd}b"]);
        assert_eq!(lines(&["\u{202e}evil".as_bytes()]), ["\\u{202e}evil"]);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(bytes in prop::collection::vec(prop::sample::select(&b"ab\n"[..]), 0..200), at in 0usize..200) {
            let (one, two) = bytes.split_at(at.min(bytes.len()));
            prop_assert_eq!(lines(&[one, two]), lines(&[&bytes]));
        }
    }
}
