//! Asks for a transaction and follows it: what `upgrade`, `rollback` and the others have in common.
//!
//! The events are followed before the request is sent, so that nothing of it is missed; its end is taken from its own
//! report and from nothing else.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use clap::ValueEnum;
use tokio::time::Instant;

use super::exit::{Exit, Failure};
use super::progress::Progress;
use super::target::{self, Target};
use super::{text, verdict};
use crate::control::client::{Client, ClientError, Events};
use crate::control::types::{Command, Event, Generation, Reply, UpgradePhase, UpgradeReport, UpgradeResult};
use crate::core::GenerationId;

/// More reports of other transactions are not kept while the own number is not known.
const KEPT: usize = 64;

/// For what, and how long.
#[derive(Debug, Clone, clap::Args)]
pub struct Waiting {
    /// Wait until it is accepted, is in its canary, has its result, or the old generation is gone too (--wait alone: retired)
    #[arg(
        long,
        value_name = "UNTIL",
        value_enum,
        default_value = "result",
        default_missing_value = "retired",
        num_args = 0..=1,
        require_equals = true
    )]
    pub wait: Until,
    /// Stop waiting after that long (exit code 4); the request goes on
    #[arg(long, value_name = "DURATION", value_parser = text::parse_span)]
    pub timeout: Option<Duration>,
    /// Print the final report as JSON
    #[arg(long)]
    pub json: bool,
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Until {
    /// The supervisor took the request; its result is not waited for
    Accepted,
    /// The new generation is ready and gets its first share of new connections, or there is a result
    Canary,
    /// It succeeded, after the bake, or it failed
    Result,
    /// And the old generation has finished what it had, and is gone
    Retired,
}

/// What was asked for.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// The subcommand.
    pub word: &'static str,
    /// The result that is as asked.
    pub wanted: UpgradeResult,
}

/// What came of a request.
#[derive(Debug)]
pub enum Outcome {
    /// It was taken, and more was not asked.
    Accepted {
        /// Its number.
        upgrade: u64,
    },
    /// It has come as far as was waited for, or failed.
    Over(UpgradeReport),
    /// It is in its canary, and more was not waited for.
    InCanary(UpgradeReport),
    /// Time is up; it goes on.
    TimedOut {
        /// Its number, if the supervisor took it already.
        upgrade: Option<u64>,
        /// How it stood.
        last: Option<UpgradeReport>,
    },
    /// The supervisor went away first.
    Gone {
        /// Its number.
        upgrade: u64,
        /// How it stood.
        last: Option<UpgradeReport>,
    },
}

/// Runs a subcommand that asks for a transaction.
pub fn run(target: &Target, waiting: &Waiting, command: Command, asked: Asked) -> Result<Exit, Failure> {
    target::block_on(async {
        let client = target.client()?;
        let mut progress = Progress::new();
        let outcome = request(&client, command, asked, waiting, &mut progress).await;
        progress.clear();
        verdict::tell(asked, &outcome?, waiting.json)
    })
}

/// Asks, and waits as long as it was told to.
pub async fn request(
    client: &Client,
    command: Command,
    asked: Asked,
    waiting: &Waiting,
    progress: &mut Progress,
) -> Result<Outcome, Failure> {
    let deadline = waiting.timeout.map(|timeout| Instant::now() + timeout);
    let mut follower = Follower::default();
    let asking = async {
        let events = match waiting.wait {
            Until::Accepted => None,
            Until::Canary | Until::Result | Until::Retired => Some(following(client, &mut follower).await?),
        };
        Ok::<_, Failure>((events, client.command(command).await?))
    };
    let Some(answered) = before(deadline, asking).await else {
        return Ok(Outcome::TimedOut { upgrade: None, last: None });
    };
    let (events, reply) = answered?;
    let upgrade = match reply {
        Reply::Accepted { upgrade } => upgrade,
        Reply::Refused(refusal) => return Err(Failure::Refused(refusal)),
        Reply::Status(_) | Reply::Stopping | Reply::Replacing => return Err(client.answered_otherwise().into()),
    };
    let Some(mut events) = events else { return Ok(Outcome::Accepted { upgrade }) };
    follower.upgrade = Some(upgrade);
    loop {
        if let Some(over) = follower.over(waiting.wait, asked.wanted) {
            return Ok(Outcome::Over(over.clone()));
        }
        if let Some(report) = follower.own().filter(|own| waiting.wait == Until::Canary && own.canary.is_some()) {
            return Ok(Outcome::InCanary(report.clone()));
        }
        let (phase, detail) = follower.stand(asked.word);
        progress.show(&phase, &detail);
        let next = tokio::time::timeout(progress.interval(), events.next());
        match before(deadline, next).await {
            None => return Ok(Outcome::TimedOut { upgrade: Some(upgrade), last: follower.own().cloned() }),
            Some(Err(_nothing_new)) => {}
            Some(Ok(Ok(Some(event)))) => {
                let lost = matches!(event, Event::Status(_));
                follower.take(event);
                if lost && follower.own().is_none() {
                    forgotten(client, &mut follower, upgrade, asked.word).await?;
                }
            }
            Some(Ok(Ok(None))) => return Ok(Outcome::Gone { upgrade, last: follower.own().cloned() }),
            Some(Ok(Err(error))) => return Err(error.into()),
        }
    }
}

/// The events, from the state as it is before anything is asked.
async fn following(client: &Client, follower: &mut Follower) -> Result<Events, ClientError> {
    let mut events = client.events().await?;
    let Some(first) = events.next().await? else {
        let why = "its events ended at once".to_owned();
        return Err(ClientError::Gone { path: client.path().to_owned(), why });
    };
    follower.take(first);
    Ok(events)
}

/// Events were missed and the status does not have the transaction: it may have been made before that, so ask again.
async fn forgotten(client: &Client, follower: &mut Follower, upgrade: u64, word: &str) -> Result<(), Failure> {
    follower.take(Event::Status(Box::new(client.status().await?)));
    if follower.own().is_some() {
        return Ok(());
    }
    let line = format!("{word} {upgrade}: so much happened since that its result is forgotten; see `zddsup status`");
    Err(Failure::Said { exit: Exit::Failed, line })
}

/// Work, unless its time is up first.
pub(super) async fn before<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline, work).await.ok(),
        None => Some(work.await),
    }
}

/// What is known of a transaction that is followed.
#[derive(Debug, Default)]
struct Follower {
    /// Its number, once the supervisor has given it one. Its events may come earlier.
    upgrade: Option<u64>,
    reports: BTreeMap<u64, UpgradeReport>,
    generations: BTreeMap<GenerationId, Generation>,
}

impl Follower {
    fn take(&mut self, event: Event) {
        match event {
            Event::Status(status) => {
                self.generations = status.generations.into_iter().map(|one| (one.number, one)).collect();
                for report in status.upgrades {
                    self.reported(report);
                }
            }
            Event::Upgrade(report) => self.reported(report),
            Event::Generation(generation) => {
                self.generations.insert(generation.number, generation);
            }
            Event::Service { .. } | Event::Lagged { .. } | Event::Replacing => {}
        }
    }

    fn reported(&mut self, report: UpgradeReport) {
        // An event from before the status that was asked for after it: what is over stays over.
        let older = self.reports.get(&report.id).is_some_and(|known| known.result.is_some() && report.result.is_none());
        if !older {
            self.reports.insert(report.id, report);
        }
        while self.reports.len() > KEPT {
            let oldest = self.reports.keys().copied().find(|&id| Some(id) != self.upgrade);
            oldest.and_then(|id| self.reports.remove(&id));
        }
    }

    fn own(&self) -> Option<&UpgradeReport> {
        self.reports.get(&self.upgrade?)
    }

    /// Its report, once it has come as far.
    fn over(&self, until: Until, wanted: UpgradeResult) -> Option<&UpgradeReport> {
        self.own().filter(|report| match report.result {
            None => false,
            Some(result) if result == wanted => until != Until::Retired || report.retired,
            // It is not what was asked for, and so nothing more is waited for.
            Some(_) => true,
        })
    }

    /// Its phase, and what there is to say of it.
    fn stand(&self, word: &str) -> (String, String) {
        let number = self.upgrade.map(|upgrade| format!(" {upgrade}")).unwrap_or_default();
        let Some(report) = self.own() else { return (format!("{word}{number}: accepted"), String::new()) };
        let Some(phase) = report.phases.last().map(|last| last.phase) else {
            return (format!("{word}{number}: accepted"), String::new());
        };
        let candidate = report.to.map(|to| format!("generation {to}")).unwrap_or_default();
        let waiting_for = report.to.and_then(|to| self.generations.get(&to)?.waiting_for.clone());
        let detail = match phase {
            UpgradePhase::Waiting => "for its turn".to_owned(),
            UpgradePhase::Spawning => candidate,
            UpgradePhase::WaitingReady => match waiting_for {
                Some(why) => format!("{candidate}: {why}"),
                None => candidate,
            },
            UpgradePhase::Canary => report.canary.as_ref().map(text::canary).unwrap_or_default(),
            UpgradePhase::Baking => format!("{candidate} serves, the old generation is on standby"),
            UpgradePhase::Draining => match report.connections_left {
                Some(left) => format!("{} left", text::count(left, "connection")),
                None => "the old generation finishes what it has".to_owned(),
            },
        };
        (format!("{word}{number}: {phase}"), detail)
    }
}

#[cfg(test)]
mod tests;
