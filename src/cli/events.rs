//! `zddsup events`: what happens, a line each.

use std::time::SystemTime;

use super::exit::{Exit, Failure};
use super::target::{self, Target};
use super::{text, verdict};
use crate::control::types::{Event, Generation, UpgradePhase, UpgradeReport, UpgradeResult};

/// Which service, and in which form.
#[derive(Debug, Clone, clap::Args)]
pub struct Flags {
    #[command(flatten)]
    target: Target,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// Prints events until the supervisor ends.
pub fn run(flags: &Flags) -> Result<Exit, Failure> {
    target::block_on(async {
        let mut events = flags.target.client()?.events().await?;
        while let Some(event) = events.next().await? {
            if flags.json {
                text::print(&format!("{}\n", serde_json::to_string(&event).unwrap_or_default()))?;
            } else {
                let now = humantime::format_rfc3339_millis(SystemTime::now());
                text::print(&format!("{now} {}\n", text::harmless(&in_words(&event))))?;
            }
        }
        Ok(Exit::Done)
    })
}

fn in_words(event: &Event) -> String {
    match event {
        Event::Status(status) => {
            let serving =
                status.serving.map_or_else(|| "nobody serves".to_owned(), |one| format!("generation {one} serves"));
            format!("{} {}: {serving}", status.service, status.phase)
        }
        Event::Upgrade(report) => upgrade(report),
        Event::Generation(generation) => self::generation(generation),
        Event::Service { phase } => format!("service {phase}"),
        Event::Replacing => "the supervisor's program is being replaced".to_owned(),
        Event::Lagged { missed } => format!("{} left out: too slow a reader", text::count(*missed, "event")),
    }
}

fn upgrade(report: &UpgradeReport) -> String {
    let mut parts = vec![format!("{} {}", report.kind, report.id)];
    if let Some(to) = report.to {
        parts.push(format!("generation {to}"));
    }
    match (report.result, report.phases.last()) {
        (None, Some(time)) if time.phase == UpgradePhase::Canary => {
            parts.push(time.phase.to_string());
            parts.extend(report.canary.as_ref().map(text::canary));
        }
        (None, Some(time)) => parts.push(time.phase.to_string()),
        (None, None) => {}
        (Some(result), _) => {
            let reason = report.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
            parts.push(format!("{result}{reason}"));
            parts.push(verdict::phase_times(report));
        }
    }
    match (report.result, report.retired, report.connections_left) {
        (Some(UpgradeResult::Aborted), true, _) => parts.push("nothing left of the new one".to_owned()),
        (Some(_), true, _) => parts.push("nothing left of the old one".to_owned()),
        (_, false, Some(left)) => parts.push(format!("{} left", text::count(left, "connection"))),
        (_, _, None) | (None, true, _) => {}
    }
    parts.retain(|part| !part.is_empty());
    parts.join(", ")
}

fn generation(generation: &Generation) -> String {
    let mut parts = vec![format!("generation {} {}", generation.number, generation.phase)];
    if let Some(pid) = generation.pid {
        parts.push(format!("pid {pid}"));
    }
    parts.extend(generation.waiting_for.as_ref().map(|why| format!("waiting for {why}")));
    parts.extend(generation.status.as_ref().map(|status| format!("says \"{status}\"")));
    parts.extend(generation.end.clone());
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::fixture;
    use crate::control::types::{CanaryReport, GenerationPhase, PhaseTime};

    #[test]
    fn a_line_says_it_all() {
        let mut report = fixture::report(7);
        report.result = Some(UpgradeResult::Failed);
        report.reason = Some("exited with status 1".to_owned());
        assert_eq!(in_words(&Event::Upgrade(report)), "upgrade 7, generation 4, failed: exited with status 1");
        let mut report = fixture::report(8);
        report.phases = vec![PhaseTime { phase: UpgradePhase::Canary, ms: 1 }];
        report.canary =
            Some(CanaryReport { share: "5%".parse().unwrap(), from: Vec::new(), step: 1, steps: 2, by_hand: false });
        assert_eq!(
            in_words(&Event::Upgrade(report)),
            "upgrade 8, generation 4, canary, the new version gets 5% of new connections (step 1 of 2)"
        );
        let mut gone = fixture::generation(2, GenerationPhase::Retired);
        gone.end = Some("was killed by SIGKILL".to_owned());
        assert_eq!(in_words(&Event::Generation(gone)), "generation 2 retired, pid 100, was killed by SIGKILL");
        let status = Event::Status(Box::new(fixture::status()));
        assert_eq!(in_words(&status), "web serving: generation 3 serves");
    }
}
