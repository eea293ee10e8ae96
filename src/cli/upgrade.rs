//! `zddsup upgrade`: a new generation, resolved anew, in the place of the one that serves.

use super::exit::{Exit, Failure};
use super::target::Target;
use super::wait::{self, Waiting};
use crate::control::types::Command;

/// Which service, and how long to wait.
#[derive(Debug, Clone, clap::Args)]
pub struct Flags {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    pub(super) waiting: Waiting,
}

/// Asks, waits, and tells the truth.
pub fn run(flags: &Flags) -> Result<Exit, Failure> {
    wait::run(&flags.target, &flags.waiting, Command::Upgrade, "upgrade")
}
