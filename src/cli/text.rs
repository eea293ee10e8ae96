//! Words for people: output that survives a closed pipe, times, text of strangers made harmless.

use std::borrow::Cow;
use std::io::{self, Write};
use std::time::Duration;

use super::exit::Failure;
use crate::config::canary::Share;
use crate::control::types::CanaryReport;

/// Writes to stdout. A reader that is gone is no panic.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::ReaderGone),
        Err(source) => Err(Failure::System { step: "write the output", source }),
    }
}

/// Says what went wrong, on stderr.
pub fn complain(line: &str) {
    let _nobody_reads = writeln!(io::stderr(), "zddsup: {}", harmless(line));
}

/// A time in the two units that matter.
#[must_use]
pub fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0 => format!("{} ms", time.as_millis()),
        1..60 => format!("{}.{} s", seconds, time.subsec_millis() / 100),
        60..3_600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{} h {} min", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

/// As [`span`], of milliseconds.
#[must_use]
pub fn span_ms(ms: u64) -> String {
    span(Duration::from_millis(ms))
}

/// `1 connection`, `2 connections`.
#[must_use]
pub fn count(number: u64, one: &str) -> String {
    if number == 1 {
        format!("1 {one}")
    } else {
        format!("{number} {one}s")
    }
}

/// What a canary gets, and how far it is.
#[must_use]
pub fn canary(canary: &CanaryReport) -> String {
    let CanaryReport { share, from, step, steps, by_hand } = canary;
    let what = match (*share == Share::NONE, from.is_empty()) {
        (true, _) => format!("what comes from {}", from.join(", ")),
        (false, true) => format!("{share} of new connections"),
        (false, false) => format!("{share} of new connections and what comes from {}", from.join(", ")),
    };
    let how = match (by_hand, steps) {
        (true, 1) => "until `zddsup promote` or `abort`".to_owned(),
        (true, _) => format!("step {step} of {steps}, until `zddsup promote` or `abort`"),
        (false, _) => format!("step {step} of {steps}"),
    };
    format!("the new version gets {what} ({how})")
}

/// Text that a service wrote, without what would move a terminal's cursor or colour it.
#[must_use]
pub fn harmless(text: &str) -> Cow<'_, str> {
    if !text.chars().any(char::is_control) {
        return Cow::Borrowed(text);
    }
    let shown = text.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c });
    Cow::Owned(shown.collect())
}

/// A time on the command line: `30s`, `2min`, or a plain number of seconds.
pub fn parse_span(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    humantime::parse_duration(text).map_err(|error| format!("{error}; write it like 30s, 2min or 500ms"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        for (ms, text) in [
            (0, "0 ms"),
            (999, "999 ms"),
            (1_250, "1.2 s"),
            (65_000, "1 min 5 s"),
            (7_380_000, "2 h 3 min"),
            (200_000_000, "2 d 7 h"),
        ] {
            assert_eq!(span_ms(ms), text);
        }
    }

    #[test]
    fn a_canary_is_one_phrase() {
        let report = |share: &str, from: &[&str], by_hand| CanaryReport {
            share: share.parse().unwrap_or_default(),
            from: from.iter().map(|&network| network.to_owned()).collect(),
            step: 1,
            steps: if by_hand { 1 } else { 3 },
            by_hand,
        };
        assert_eq!(
            canary(&report("5%", &[], true)),
            "the new version gets 5% of new connections (until `zddsup promote` or `abort`)"
        );
        assert_eq!(
            canary(&report("", &["10.0.0.0/8"], false)),
            "the new version gets what comes from 10.0.0.0/8 (step 1 of 3)"
        );
        assert!(canary(&report("5%", &["::1/128"], true)).contains("5% of new connections and what comes from ::1/128"));
    }

    #[test]
    fn strangers_cannot_write_to_the_terminal() {
        assert_eq!(harmless("ok ä\t"), "ok ä\t");
        assert_eq!(harmless("\x1b[2Jx\n"), "\u{fffd}[2Jx\u{fffd}");
    }

    #[test]
    fn seconds_need_no_unit() {
        assert_eq!(parse_span("30"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_span("1min 5s"), Ok(Duration::from_secs(65)));
        assert!(parse_span("soon").unwrap_err().contains("30s"));
    }
}
