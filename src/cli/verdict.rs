//! The end of a transaction in words, and as an exit code.

use std::fmt::Write as _;
use std::io::{self, Write as _};

use super::exit::{Exit, Failure};
use super::text;
use super::wait::{Asked, Outcome};
use crate::control::types::{Proof, UpgradePhase, UpgradeReport, UpgradeResult};

/// Says what came of it, and gives the exit code.
pub fn tell(asked: Asked, outcome: &Outcome, json: bool) -> Result<Exit, Failure> {
    let Asked { word, wanted } = asked;
    let exit = exit_of(outcome, wanted);
    let report = match outcome {
        Outcome::Over(report) | Outcome::InCanary(report) => Some(report),
        Outcome::TimedOut { last, .. } | Outcome::Gone { last, .. } => last.as_ref(),
        Outcome::Accepted { .. } => None,
    };
    let written = match (json, outcome, report) {
        (true, Outcome::Accepted { upgrade }, _) => text::print(&format!("{{\"upgrade\":{upgrade}}}\n")),
        (true, _, Some(report)) => text::print(&format!("{}\n", serde_json::to_string(report).unwrap_or_default())),
        (false, ..) if exit == Exit::Done => text::print(&format!("{}\n", in_words(word, outcome))),
        (true, _, None) | (false, ..) => Ok(()),
    };
    if exit != Exit::Done {
        text::complain(&in_words(word, outcome));
        let failed = report.filter(|report| {
            report.result == Some(UpgradeResult::Failed)
                || report.result == Some(UpgradeResult::Aborted) && !report.stderr.is_empty()
        });
        let _nobody_reads = io::stderr().write_all(last_words(failed).as_bytes());
    }
    match written {
        // Whoever does not read it gets the exit code all the same.
        Ok(()) | Err(Failure::ReaderGone) => Ok(exit),
        Err(error) => Err(error),
    }
}

/// The truth as a number.
fn exit_of(outcome: &Outcome, wanted: UpgradeResult) -> Exit {
    match outcome {
        Outcome::Accepted { .. } | Outcome::InCanary(_) => Exit::Done,
        Outcome::TimedOut { .. } => Exit::TimedOut,
        Outcome::Gone { .. } => Exit::NoSupervisor,
        Outcome::Over(report) => match report.result {
            Some(UpgradeResult::Succeeded) if wanted == UpgradeResult::Succeeded && !report.proof.is_clean() => {
                Exit::Lost
            }
            Some(result) if result == wanted => Exit::Done,
            Some(UpgradeResult::Aborted) => Exit::Aborted,
            Some(UpgradeResult::Failed) if report.old_kept_serving => Exit::UpgradeFailed,
            Some(UpgradeResult::Failed) | None => Exit::Failed,
            // It succeeded, and its abort was asked for.
            Some(
                UpgradeResult::Succeeded
                | UpgradeResult::RolledBack
                | UpgradeResult::Superseded
                | UpgradeResult::Cancelled,
            ) => Exit::Superseded,
        },
    }
}

/// The truth in a line.
fn in_words(word: &str, outcome: &Outcome) -> String {
    match outcome {
        Outcome::Accepted { upgrade } => format!("{word} {upgrade} accepted; follow it by `zddsup events` or `zddsup status`"),
        Outcome::Over(report) => over(word, report),
        Outcome::InCanary(report) => {
            format!("{word} {}: {}", report.id, report.canary.as_ref().map(text::canary).unwrap_or_default())
        }
        Outcome::TimedOut { upgrade: None, .. } => {
            format!("no answer in time: whether the {word} was accepted is not known; see `zddsup status`")
        }
        Outcome::TimedOut { upgrade: Some(upgrade), last } => match last.as_ref().filter(|last| last.result.is_some()) {
            Some(last) => format!("{}; stopped waiting for it, it goes on", over(word, last)),
            None => format!("{word} {upgrade}: no result in time ({}); it goes on, see `zddsup status`", standing(last.as_ref())),
        },
        Outcome::Gone { upgrade, last } => match last.as_ref().filter(|last| last.result.is_some()) {
            Some(last) => format!("{}; then the supervisor went away, see its log", over(word, last)),
            None => format!(
                "{word} {upgrade}: the supervisor went away before there was a result ({}): it was stopped or killed, see \
                 its log and `zddsup status`",
                standing(last.as_ref())
            ),
        },
    }
}

fn over(word: &str, report: &UpgradeReport) -> String {
    let id = report.id;
    let reason = report.reason.as_deref().unwrap_or("no reason is known");
    let old =
        report.from.map_or_else(|| "the old version".to_owned(), |from| format!("the old version (generation {from})"));
    match report.result {
        None => format!("{word} {id} has no result yet"),
        Some(UpgradeResult::Succeeded) => succeeded(word, report),
        Some(UpgradeResult::Failed) if !report.old_kept_serving => {
            format!(
                "{word} {id} failed: {reason}; no version serves, connections wait in the queue; see `zddsup status`"
            )
        }
        Some(UpgradeResult::Failed) if report.phases.iter().any(|time| time.phase == UpgradePhase::Baking) => {
            format!("{word} {id} failed: {reason}; {old} was on standby and serves again")
        }
        Some(UpgradeResult::Failed) => format!("{word} {id} failed: {reason}; {old} never stopped serving"),
        Some(UpgradeResult::Aborted) => {
            format!("{word} {id}: given up before the switch: {reason}; {old} never stopped serving")
        }
        Some(UpgradeResult::RolledBack) => format!("{word} {id} did not stay: {reason}; {old} serves again"),
        Some(UpgradeResult::Superseded) => {
            format!("{word} {id} was not done: {reason}; see `zddsup status` for that one")
        }
        Some(UpgradeResult::Cancelled) => format!("{word} {id} was called off: {reason}"),
    }
}

fn succeeded(word: &str, report: &UpgradeReport) -> String {
    let mut line = format!("{word} {} succeeded", report.id);
    // Writing to a String cannot fail.
    let _written = match (report.to, report.from) {
        (Some(to), Some(from)) => write!(line, ": generation {to} serves in the place of generation {from}"),
        (Some(to), None) => write!(line, ": generation {to} serves"),
        (None, _) => write!(line, ": switched back at once"),
    };
    let times = phase_times(report);
    if !times.is_empty() {
        let _written = write!(line, " ({times})");
    }
    if let Some(reason) = &report.reason {
        let _written = write!(line, "; {reason}");
    }
    if report.retired {
        if report.from.is_some() {
            let _written = write!(line, "; connections: {}", proven(&report.proof));
        }
        return line;
    }
    let left = report.connections_left.map(|left| format!(", {} left", text::count(left, "connection")));
    let _written = write!(line, "; the old one drains{}", left.unwrap_or_default());
    line
}

/// What became of connections.
#[must_use]
pub fn proven(proof: &Proof) -> String {
    let Proof { queued_at_switch, drained, cut, queued_when_gone, moved, kept, reset } = proof;
    let mut words = format!(
        "{queued_at_switch} waited at the switch, {drained} drained, {cut} cut, {queued_when_gone} waited when the old one \
         was gone"
    );
    if *queued_when_gone > 0 {
        // Writing to a String cannot fail.
        let _written = write!(words, " ({moved} moved to the new one, {kept} kept for the next one)");
    }
    words + &format!(", {reset} reset")
}

/// The time that each phase took.
#[must_use]
pub fn phase_times(report: &UpgradeReport) -> String {
    let times = report.phases.iter().filter(|time| time.phase != UpgradePhase::Waiting || time.ms > 0);
    let times: Vec<_> = times.map(|time| format!("{} {}", time.phase, text::span_ms(time.ms))).collect();
    times.join(", ")
}

fn standing(last: Option<&UpgradeReport>) -> String {
    match last.and_then(|last| last.phases.last()) {
        Some(time) => format!("it was {}", time.phase),
        None => "nothing was heard of it".to_owned(),
    }
}

/// What the new version said last.
fn last_words(failed: Option<&UpgradeReport>) -> String {
    let Some(failed) = failed else { return String::new() };
    if failed.stderr.is_empty() {
        return "The new version wrote nothing to stderr.\n".to_owned();
    }
    let mut text = "The new version's last lines on stderr:\n".to_owned();
    for line in &failed.stderr {
        let _written = writeln!(text, "  | {}", text::harmless(line));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::fixture;

    fn ended(result: UpgradeResult, old_kept_serving: bool) -> Outcome {
        let reason = Some("exited with status 1".to_owned());
        Outcome::Over(UpgradeReport { result: Some(result), reason, old_kept_serving, ..fixture::report(7) })
    }

    #[test]
    fn the_exit_code_is_the_truth() {
        for (outcome, code) in [
            (ended(UpgradeResult::Succeeded, false), 0),
            (ended(UpgradeResult::Failed, true), 3),
            (ended(UpgradeResult::Failed, false), 1),
            (ended(UpgradeResult::Aborted, true), 8),
            (Outcome::InCanary(fixture::report(1)), 0),
            (ended(UpgradeResult::RolledBack, true), 7),
            (ended(UpgradeResult::Superseded, true), 7),
            (ended(UpgradeResult::Cancelled, true), 7),
            (Outcome::Accepted { upgrade: 1 }, 0),
            (Outcome::TimedOut { upgrade: Some(1), last: None }, 4),
            (Outcome::Gone { upgrade: 1, last: Some(fixture::report(1)) }, 5),
        ] {
            assert_eq!(exit_of(&outcome, UpgradeResult::Succeeded).code(), code, "{outcome:?}");
        }
        let mut lost = UpgradeReport { result: Some(UpgradeResult::Succeeded), retired: true, ..fixture::report(7) };
        lost.proof.cut = 2;
        let lost = Outcome::Over(lost);
        assert_eq!(exit_of(&lost, UpgradeResult::Succeeded).code(), 9);
        assert!(in_words("upgrade", &lost).contains("0 waited at the switch, 0 drained, 2 cut"), "{lost:?}");
        // What was asked is what was asked.
        assert_eq!(exit_of(&ended(UpgradeResult::Aborted, true), UpgradeResult::Aborted).code(), 0);
        assert_eq!(exit_of(&ended(UpgradeResult::Succeeded, false), UpgradeResult::Aborted).code(), 7);
    }

    #[test]
    fn that_the_old_version_served_on_is_said_only_where_it_did() {
        let kept = in_words("upgrade", &ended(UpgradeResult::Failed, true));
        assert_eq!(
            kept,
            "upgrade 7 failed: exited with status 1; the old version (generation 3) never stopped serving"
        );
        let lost = in_words("upgrade", &ended(UpgradeResult::Failed, false));
        assert!(lost.contains("no version serves") && !lost.contains("never stopped"), "{lost}");
    }

    #[test]
    fn the_new_version_has_the_last_word_but_not_the_terminal() {
        let report = UpgradeReport { stderr: vec!["\x1b[31mpanic".to_owned()], ..fixture::report(1) };
        assert_eq!(last_words(Some(&report)), "The new version's last lines on stderr:\n  | \u{fffd}[31mpanic\n");
    }
}
