//! `zddsup stop`: asks the supervisor to end, and waits until it has.

use std::collections::BTreeMap;
use std::time::Duration;

use nix::unistd::Pid;
use tokio::time::Instant;

use super::exit::{Exit, Failure};
use super::progress::Progress;
use super::target::{self, Target};
use super::text;
use super::wait::before;
use crate::control::client::{Client, ClientError, Events};
use crate::control::types::{Command, Event, Generation, GenerationPhase, Reply, ServicePhase};
use crate::core::GenerationId;
use crate::sys::pidfd::PidFd;

/// How to stop.
#[derive(Debug, Clone, clap::Args)]
pub struct Flags {
    #[command(flatten)]
    target: Target,
    /// Do not let connections finish: stop signal now, SIGKILL after the stop time
    #[arg(long)]
    quick: bool,
    /// Do not wait until it is gone
    #[arg(long)]
    no_wait: bool,
    /// Stop waiting after that long (exit code 4); stopping goes on
    #[arg(long, value_name = "DURATION", value_parser = text::parse_span, conflicts_with = "no_wait")]
    timeout: Option<Duration>,
}

/// Asks, and waits.
pub fn run(flags: &Flags) -> Result<Exit, Failure> {
    target::block_on(async {
        let client = flags.target.client()?;
        let mut progress = Progress::new();
        let stopped = stop(&client, flags, &mut progress).await;
        progress.clear();
        text::print(&format!("{}\n", stopped?))?;
        Ok(Exit::Done)
    })
}

async fn stop(client: &Client, flags: &Flags, progress: &mut Progress) -> Result<&'static str, Failure> {
    let deadline = flags.timeout.map(|timeout| Instant::now() + timeout);
    let late = || Failure::Said {
        exit: Exit::TimedOut,
        line: "it is not gone yet; stopping goes on, see `zddsup status`, or hurry it by `zddsup stop --quick`"
            .to_owned(),
    };
    let asking = async {
        let events = if flags.no_wait { None } else { Some(client.events().await?) };
        // Held before it is told to end, so that this pid is surely its.
        let process = events.as_ref().and_then(Events::supervisor).and_then(|pid| PidFd::open(Pid::from_raw(pid)).ok());
        match client.command(Command::Stop { quick: flags.quick }).await? {
            Reply::Stopping => Ok((events, process)),
            Reply::Refused(refusal) => Err(Failure::Refused(refusal)),
            Reply::Accepted { .. } | Reply::Status(_) | Reply::Replacing => Err(client.answered_otherwise().into()),
        }
    };
    let (events, process) = before(deadline, asking).await.ok_or_else(late)??;
    let Some(mut events) = events else { return Ok("stopping") };
    let mut living = Living::default();
    loop {
        progress.show(living.phase(), &living.detail());
        let next = tokio::time::timeout(progress.interval(), events.next());
        match before(deadline, next).await.ok_or_else(late)? {
            Err(_nothing_new) => {}
            Ok(Ok(Some(event))) => living.take(event),
            // A stream that breaks is how a supervisor ends that was asked twice.
            Ok(Ok(None) | Err(ClientError::Gone { .. } | ClientError::Unreachable { .. })) => break,
            Ok(Err(error)) => return Err(error.into()),
        }
    }
    if events.supervisor() == Some(1) {
        // PID 1 of this container. It takes with it whoever is left, and waits for a moment until this process has ended.
        progress.clear();
        text::print("stopped\n")?;
        std::process::exit(Exit::Done.code().into());
    }
    if let Some(process) = process {
        let ended = before(deadline, process.exited()).await.ok_or_else(late)?;
        ended.map_err(|source| Failure::System { step: "watch the supervisor end", source })?;
    }
    Ok("stopped")
}

/// What is left to be ended.
#[derive(Debug, Default)]
struct Living {
    generations: BTreeMap<GenerationId, Generation>,
    lame_duck: bool,
}

impl Living {
    fn take(&mut self, event: Event) {
        match event {
            Event::Status(status) => {
                self.lame_duck = status.phase == ServicePhase::LameDuck;
                self.generations = status.generations.into_iter().map(|one| (one.number, one)).collect();
            }
            Event::Generation(generation) => {
                self.generations.insert(generation.number, generation);
            }
            Event::Service { phase } => self.lame_duck = phase == ServicePhase::LameDuck,
            Event::Upgrade(_) | Event::Lagged { .. } | Event::Replacing => {}
        }
        self.generations.retain(|_, generation| generation.phase != GenerationPhase::Retired);
    }

    fn phase(&self) -> &'static str {
        if self.lame_duck {
            "stop: serves on for its lame-duck time"
        } else {
            "stop: waiting for the last generation to finish"
        }
    }

    fn detail(&self) -> String {
        let generations = text::count(self.generations.len() as u64, "generation");
        let connections: Option<u64> = self.generations.values().map(|generation| generation.connections).sum();
        match connections {
            Some(connections) => format!("{generations} and {} left", text::count(connections, "connection")),
            None => format!("{generations} left"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::fixture::{self, Fake};
    use crate::control::server::{Limits, Server};
    use std::io;

    fn flags(no_wait: bool, timeout: Option<Duration>) -> Flags {
        Flags { target: Target { name: None, control: None }, quick: true, no_wait, timeout }
    }

    #[tokio::test]
    async fn it_is_not_gone_before_it_is_gone() {
        let fake = Fake::accepting(1);
        let mut progress = Progress::lines(io::sink());
        assert_eq!(stop(&fake.client, &flags(true, None), &mut progress).await.unwrap(), "stopping");
        // The socket's end is not enough: this very process is the supervisor, and it lives.
        let client = fake.client.clone();
        let waiting = tokio::spawn(async move {
            let limit = Some(Duration::from_secs(1));
            stop(&client, &flags(false, limit), &mut Progress::lines(io::sink())).await
        });
        while fake.asked.lock().unwrap().len() < 2 {
            tokio::task::yield_now().await;
        }
        let _directory = fake.end().await;
        assert_eq!(waiting.await.unwrap().unwrap_err().exit(), Exit::TimedOut);
    }

    #[tokio::test]
    async fn nobody_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.sock");
        drop(Server::bind(&path).unwrap().limited(Limits::default()));
        let stopped = stop(&Client::new(path), &flags(false, None), &mut Progress::lines(io::sink())).await;
        assert_eq!(stopped.unwrap_err().exit(), Exit::NoSupervisor);
    }

    #[test]
    fn what_is_left_is_counted() {
        let mut living = Living::default();
        living.take(Event::Status(Box::new(fixture::status())));
        assert_eq!(living.detail(), "1 generation and 12 connections left");
        living.take(Event::Generation(fixture::generation(3, GenerationPhase::Retired)));
        assert_eq!(living.detail(), "0 generations and 0 connections left");
    }
}
