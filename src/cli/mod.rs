//! Command line: one file a subcommand.
//!
//! | file | what it holds |
//! |---|---|
//! | [`ask`] | `upgrade`, `promote`, `abort`, `rollback`, `restart` ask for a transaction … |
//! | [`wait`], [`verdict`], [`progress`] | … follow it, say how it ended, show how far it is |
//! | [`status`], [`events`], [`stop`], [`self_upgrade`] | the other clients of the control socket |
//! | [`check`] | looks at what `run` would do |
//! | [`doctor`] | looks at what this machine lets zddsup do |
//! | [`completions`], [`man`], [`mod@unit`] | for shells, manuals, systemd |
//! | [`target`] | which service is meant |
//! | [`exit`], [`text`], [`log`] | exit codes and errors, words, the supervisor's log |

pub mod ask;
pub mod check;
pub mod completions;
pub mod doctor;
pub mod events;
pub mod exit;
pub mod log;
pub mod man;
pub mod progress;
pub mod run;
pub mod self_upgrade;
pub mod status;
pub mod stop;
pub mod target;
pub mod text;
pub mod unit;
pub mod verdict;
pub mod wait;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::flags::RunFlags;
use exit::{Exit, Failure};

/// Upgrade any server without refusing, resetting or delaying a connection
///
/// zddsup wraps any server, also one that binds for itself and knows nothing of it. It starts new versions of it beside
/// the old one, and lets the old one finish what it has once the new one has shown that it can serve. A version that
/// cannot is gone again, and the old one serves on.
#[derive(Debug, Parser)]
#[command(name = "zddsup", version, max_term_width = 110, arg_required_else_help = true)]
#[command(
    after_help = "See `zddsup help SUBCOMMAND` for its options, and `zddsup --help` for examples and exit codes."
)]
#[command(after_long_help = AFTER_HELP)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const AFTER_HELP: &str = "\
EXAMPLES
  Run a server that binds for itself:
      zddsup run -- python3 -m http.server 8080
  Run one that gets its socket as fd 3 (LISTEN_FDS):
      zddsup run --listen 8080 -- ./server
  Put a new version in its place, and wait until the old one is gone:
      zddsup upgrade --wait
  See what there is, as it changes:
      zddsup status --watch
  Try a new version on 5 % of new connections first, then decide:
      zddsup upgrade --canary 5% --wait=canary
      zddsup promote    # or: zddsup abort
  Back to the version before:
      zddsup rollback
  Stop, once every connection has been finished:
      zddsup stop

EXIT CODES
  0  done as asked
  1  something else went wrong
  2  wrong usage, or an invalid configuration
  3  the upgrade failed; the version from before serves on
  4  --timeout passed; what was asked for goes on
  5  no supervisor was reached, or it went away before the result was known
  6  refused, nothing was changed
  7  another request took its place, or it was rolled back or called off
  8  the new version was tried and given up: by its check, by its end, or by hand; the version from before serves on
  9  the new version serves, and connections of the old one were cut, reset or left for the next version (--wait)
 10  run: no version ever became ready
 11  run: the service was lost more often than --restart-limit allows
     run: a service that ended by itself gives its own status, 128 + N for signal N
";

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a service: its first generation now, a new one at each upgrade
    Run(Box<RunFlags>),
    /// Look at everything that `run` with these options would need, without binding or spawning anything
    Check(Box<RunFlags>),
    /// Try what this machine lets zddsup do with programs that bind for themselves, and say what to use instead
    ///
    /// Runs itself once as a service on loopback. Exit code 0: `zddsup run -- ./any-server` works here.
    Doctor(doctor::Flags),
    /// Show the service: generations, listeners, the last upgrades
    Status(status::Flags),
    /// Put a new generation in the place of the one that serves
    ///
    /// Program, working directory and environment files are looked up anew. The old generation stops only when the new one
    /// has shown that it can serve. The exit code tells how it went.
    ///
    /// With --canary, --canary-from or --canary-steps the new generation gets a part of the new connections first, until
    /// `zddsup promote`, `zddsup abort`, or the end of its steps.
    Upgrade(ask::UpgradeFlags),
    /// Switch to the generation that is being tried (--canary), now
    ///
    /// It gets all new connections, whatever step it was at; the old generation finishes what it has, after the bake.
    Promote(ask::Flags),
    /// Give up the generation that is being tried (--canary), or is not ready yet
    ///
    /// It gets nothing new any more, and finishes what it has; the old generation serves on, untouched.
    Abort(ask::Flags),
    /// Go back to the version before
    ///
    /// During a canary, that is its end, and during the bake a switch back at once; afterwards, a new generation of the previous program, which zddsup
    /// has kept open, so its file may have been replaced.
    Rollback(ask::Flags),
    /// Put a new process of the same version in the place of the one that serves
    Restart(ask::Flags),
    /// Put a new zddsup in the place of the one that supervises, without touching the service
    ///
    /// The program is looked up anew where it was found, and tried first: one that cannot go on changes nothing. Pid, listeners,
    /// generations, and upgrades, bakes, canaries and drains that are under way go on.
    SelfUpgrade(self_upgrade::Flags),
    /// Stop the service and its supervisor, once connections have been finished
    Stop(stop::Flags),
    /// Print what happens, as it happens
    Events(events::Flags),
    /// Print a systemd unit that runs a service with these options, with the reasons as comments
    Unit(Box<RunFlags>),
    /// Print a completion script for a shell
    Completions(completions::Flags),
    /// Print the manual page
    Man(man::Flags),
}

/// Parses, does, and gives the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| wrong_usage(&error));
    let done = dispatch(cli.command);
    let exit = done.unwrap_or_else(|failure| {
        failure.say();
        failure.exit()
    });
    exit.into()
}

/// As every other error: one line that begins with the program's name, and clap's hints below it.
fn wrong_usage(error: &clap::Error) -> ! {
    let text = error.render().to_string();
    match text.strip_prefix("error: ") {
        Some(text) => {
            let _nobody_reads = write!(std::io::stderr(), "zddsup: {text}");
            std::process::exit(Exit::Usage.code().into())
        }
        // Help, or the version.
        None => error.exit(),
    }
}

fn dispatch(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Run(flags) => run::run(*flags),
        Command::Check(flags) => check::run(*flags),
        Command::Doctor(flags) => doctor::run(&flags),
        Command::Status(flags) => status::run(&flags),
        Command::Upgrade(flags) => ask::upgrade(&flags),
        Command::Promote(flags) => ask::promote(&flags),
        Command::Abort(flags) => ask::abort(&flags),
        Command::Rollback(flags) => ask::rollback(&flags),
        Command::Restart(flags) => ask::restart(&flags),
        Command::SelfUpgrade(flags) => self_upgrade::run(&flags),
        Command::Stop(flags) => stop::run(&flags),
        Command::Events(flags) => events::run(&flags),
        Command::Unit(flags) => unit::run(*flags),
        Command::Completions(flags) => completions::run(&flags),
        Command::Man(flags) => man::run(&flags),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use std::time::Duration;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wait_may_stand_alone_or_say_until_what() {
        let parse = |args: &[&str]| match Cli::try_parse_from(args).unwrap().command {
            Command::Upgrade(flags) => flags.flags.waiting.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(parse(&["zddsup", "upgrade"]).wait, wait::Until::Result);
        assert_eq!(parse(&["zddsup", "upgrade", "--wait"]).wait, wait::Until::Retired);
        let some = parse(&["zddsup", "upgrade", "--wait=accepted", "--timeout", "90"]);
        assert_eq!((some.wait, some.timeout), (wait::Until::Accepted, Some(Duration::from_secs(90))));
        assert!(Cli::try_parse_from(["zddsup", "upgrade", "--wait", "accepted"]).is_err());
    }
}
