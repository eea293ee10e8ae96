//! `zddsup upgrade`, `promote`, `abort`, `rollback`, `restart`: each asks for one thing, and waits for what comes of it.

use super::exit::{Exit, Failure};
use super::target::Target;
use super::wait::{self, Asked, Waiting};
use crate::config::CanaryFlags;
use crate::control::types::{Command, UpgradeResult};

/// Which service, and how long to wait.
#[derive(Debug, Clone, clap::Args)]
pub struct Flags {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    pub(super) waiting: Waiting,
}

/// The same, and how the new version is tried.
#[derive(Debug, Clone, clap::Args)]
pub struct UpgradeFlags {
    #[command(flatten)]
    pub(super) flags: Flags,
    #[command(flatten)]
    canary: CanaryFlags,
    /// Switch at once, although `run` was given a canary
    #[arg(long, conflicts_with_all = ["canary", "canary_from", "canary_steps"], help_heading = "Canary")]
    no_canary: bool,
}

/// A new generation, resolved anew, in the place of the one that serves.
pub fn upgrade(asked: &UpgradeFlags) -> Result<Exit, Failure> {
    let canary = asked.canary.plan().map_err(|error| Failure::with(Exit::Usage, &error))?;
    let command = match canary {
        None if !asked.no_canary => Command::Upgrade,
        None | Some(_) => Command::Canary(Box::new(asked.canary.clone())),
    };
    ask(&asked.flags, command, "upgrade", UpgradeResult::Succeeded)
}

/// The switch to the one that is being tried.
pub fn promote(flags: &Flags) -> Result<Exit, Failure> {
    ask(flags, Command::Promote, "promote", UpgradeResult::Succeeded)
}

/// The end of the one that is being tried.
pub fn abort(flags: &Flags) -> Result<Exit, Failure> {
    ask(flags, Command::Abort, "abort", UpgradeResult::Aborted)
}

/// Back to the version before.
pub fn rollback(flags: &Flags) -> Result<Exit, Failure> {
    ask(flags, Command::Rollback, "rollback", UpgradeResult::Succeeded)
}

/// A new process of the version that serves.
pub fn restart(flags: &Flags) -> Result<Exit, Failure> {
    ask(flags, Command::Restart, "restart", UpgradeResult::Succeeded)
}

fn ask(flags: &Flags, command: Command, word: &'static str, wanted: UpgradeResult) -> Result<Exit, Failure> {
    wait::run(&flags.target, &flags.waiting, command, Asked { word, wanted })
}
