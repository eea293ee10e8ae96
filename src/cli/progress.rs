//! How far a request is: one line that changes on a terminal, plain lines elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::text;

/// Between two plain lines of the same phase that say something new.
const BETWEEN: Duration = Duration::from_secs(1);

/// Between two plain lines that say the same.
const ALIVE: Duration = Duration::from_secs(10);

/// What is shown of a request under way, on stderr.
pub struct Progress {
    begun: Instant,
    shape: Shape,
}

enum Shape {
    Line(ProgressBar),
    Lines { out: Box<dyn Write + Send>, phase: String, detail: String, last: Instant },
}

impl Progress {
    /// As fits stderr.
    #[must_use]
    pub fn new() -> Self {
        if !io::stderr().is_terminal() {
            return Progress::lines(io::stderr());
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg}") {
            bar.set_style(style);
        }
        Progress { begun: Instant::now(), shape: Shape::Line(bar) }
    }

    /// Plain lines.
    pub fn lines(out: impl Write + Send + 'static) -> Self {
        let begun = Instant::now();
        let shape = Shape::Lines { out: Box::new(out), phase: String::new(), detail: String::new(), last: begun };
        Progress { begun, shape }
    }

    /// How often [`Progress::show`] should be called when nothing happens.
    #[must_use]
    pub fn interval(&self) -> Duration {
        match self.shape {
            Shape::Line(_) => Duration::from_millis(100),
            Shape::Lines { .. } => BETWEEN,
        }
    }

    /// Shows how it stands now.
    pub fn show(&mut self, phase: &str, detail: &str) {
        let now = Instant::now();
        let elapsed = text::span(now - self.begun);
        let comma = if detail.is_empty() { "" } else { ", " };
        match &mut self.shape {
            Shape::Line(bar) => {
                bar.set_message(text::harmless(&format!("{phase}, {elapsed}{comma}{detail}")).into_owned());
                bar.tick();
            }
            Shape::Lines { out, phase: shown, detail: said, last } => {
                let due = match (shown == phase, said == detail) {
                    (false, _) => true,
                    (true, false) => now - *last >= BETWEEN,
                    (true, true) => now - *last >= ALIVE,
                };
                if due {
                    let line = format!("{phase}, {elapsed}{comma}{detail}");
                    let _nobody_reads = writeln!(out, "{}", text::harmless(&line));
                    phase.clone_into(shown);
                    detail.clone_into(said);
                    *last = now;
                }
            }
        }
    }

    /// Makes room for what is said next.
    pub fn clear(&mut self) {
        if let Shape::Line(bar) = &self.shape {
            bar.finish_and_clear();
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Progress::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_new_phase_is_a_line_and_the_rest_waits() {
        let shared = Shared::default();
        let mut progress = Progress::lines(shared.clone());
        progress.show("draining", "3 connections left");
        progress.show("draining", "2 connections left");
        progress.show("retired", "");
        let text = String::from_utf8(shared.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].starts_with("draining, ") && lines[0].ends_with(", 3 connections left"), "{text}");
    }
}
