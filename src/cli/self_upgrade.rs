//! `zddsup self-upgrade`: a new zddsup in the place of the one that supervises.

use std::time::Duration;

use tokio::time::Instant;

use super::exit::{Exit, Failure};
use super::target::{self, Target};
use super::text;
use super::wait::before;
use crate::control::client::{ClientError, Events};
use crate::control::types::{Command, Event, Reply, Supervisor};

/// Which service, and how long to wait.
#[derive(Debug, Clone, clap::Args)]
pub struct Flags {
    #[command(flatten)]
    target: Target,
    /// Stop waiting after that long (exit code 4); the request goes on
    #[arg(long, value_name = "DURATION", value_parser = text::parse_span)]
    timeout: Option<Duration>,
}

/// Asks, and waits until the new one answers.
pub fn run(flags: &Flags) -> Result<Exit, Failure> {
    target::block_on(async {
        let deadline = flags.timeout.map(|timeout| Instant::now() + timeout);
        before(deadline, replaced(&flags.target)).await.unwrap_or_else(|| {
            text::complain("the new program does not answer yet, and is not waited for any longer (--timeout)");
            Ok(Exit::TimedOut)
        })
    })
}

async fn replaced(target: &Target) -> Result<Exit, Failure> {
    let client = target.client()?;
    let mut events = client.events().await?;
    let old = supervisor(&mut events).await?.ok_or_else(|| client.ended())?;
    match client.command(Command::SelfUpgrade).await? {
        Reply::Replacing => {}
        Reply::Refused(refusal) => return Err(Failure::Refused(refusal)),
        Reply::Accepted { .. } | Reply::Status(_) | Reply::Stopping => return Err(client.answered_otherwise().into()),
    }
    // The next status is that of whoever goes on.
    let new = supervisor(&mut events).await?.ok_or_else(|| client.ended())?;
    if new.replaced == old.replaced {
        let line = "the program could not be replaced, and the old one goes on: its log says why".to_owned();
        return Err(Failure::Said { exit: Exit::Failed, line });
    }
    let versions = if new.version == old.version {
        format!("zddsup {}", new.version)
    } else {
        format!("zddsup {} in the place of {}", new.version, old.version)
    };
    text::print(&format!("{versions} goes on as process {}\n", new.pid))?;
    Ok(Exit::Done)
}

/// What the next status says of the supervisor.
async fn supervisor(events: &mut Events) -> Result<Option<Supervisor>, ClientError> {
    while let Some(event) = events.next().await? {
        if let Event::Status(status) = event {
            return Ok(Some(status.supervisor));
        }
    }
    Ok(None)
}
