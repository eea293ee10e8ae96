//! What is wrong with flags together.

use std::path::PathBuf;

use super::canary::CanaryError;
use super::values::Span;
use super::SOCKET_PATH_MOST;
use crate::proto::placeholder::PlaceholderError;

/// Flags that cannot be meant together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A command of no length.
    #[error("the command is an empty text; name a program")]
    EmptyCommand,
    /// One name twice.
    #[error("two listeners are called {0}; write another NAME= before one of the addresses")]
    SameName(String),
    /// A placeholder of no listener.
    #[error("{place}: {source}")]
    Placeholder {
        /// Where it stands.
        place: String,
        /// What is wrong.
        source: PlaceholderError,
    },
    /// A socket that cannot be put in the place of a program's own.
    #[error(
        "--handoff adopt puts TCP listeners in the place of a program's own, and {listener} ({address}) is none: leave \
         it away"
    )]
    AdoptsOther {
        /// Which.
        listener: String,
        /// Where it is.
        address: String,
    },
    /// A program's own sockets cannot be shared.
    #[error(
        "a program that binds for itself has its own sockets, and --switch shared shares zddsup's: leave one of the two \
         away, or --listen and use --handoff fds or socket"
    )]
    AdoptsAndShares,
    /// There is one socket of it.
    #[error("listener {listener} ({address}) cannot be steered: it {why}")]
    CannotSteer {
        /// Which.
        listener: String,
        /// Where it is.
        address: String,
        /// Why not, and what to do.
        why: &'static str,
    },
    /// Nothing to look at.
    #[error(
        "{0} looks at the sockets that a program makes itself, which takes --handoff adopt, or auto without --listen"
    )]
    NothingAdopted(&'static str),
    /// A canary has no socket of its own.
    #[error(
        "--canary shares out new connections, for which each generation needs sockets of its own: use --switch steered \
         with TCP listeners alone, or let the program bind for itself (--handoff adopt)"
    )]
    NothingToShareOut,
    /// Nobody would look.
    #[error("--drain-idle is about connections that are watched until they are gone: it takes --drain observe")]
    NotObserved,
    /// Canary options that do not go together.
    #[error(transparent)]
    Canary(#[from] CanaryError),
    /// It would never be left alone.
    #[error(
        "--drain observe waits until the old generation has no connections, while it would still get new ones of {0}, \
         which is shared: use --switch steered with TCP listeners alone, or --drain signal"
    )]
    GetsNewOnes(String),
    /// No fds are passed by number.
    #[error(
        "{what} needs listeners at fd numbers, which --handoff socket and adopt do not give; use --handoff auto or fds"
    )]
    NoNumbers {
        /// Who needs them.
        what: String,
    },
    /// A probe that the old generation may answer.
    #[error(
        "--ready {probe} asks at listener {listener} ({address}), which all generations share: the old one may answer \
         for the new one; use --switch steered, probe an address of the new process's own, or use --ready notify or \
         exec:…"
    )]
    ProbesListener {
        /// What was asked for.
        probe: String,
        /// Which listener.
        listener: String,
        /// Where it is.
        address: String,
    },
    /// A flag about a probe that is not asked for.
    #[error("{flag} is for --ready {probe}; write both or none")]
    NoSuchProbe {
        /// Which flag.
        flag: &'static str,
        /// What it is about.
        probe: &'static str,
    },
    /// Never ready.
    #[error("--ready delay:{delay} is not shorter than --start-timeout {timeout}: no generation would ever be ready; raise the latter")]
    NeverReady {
        /// Until ready.
        delay: Span,
        /// Until failed.
        timeout: Span,
    },
    /// The control socket cannot be bound.
    #[error(
        "--control {0:?} is longer than the {SOCKET_PATH_MOST} bytes that a socket's path may have; take a shorter one"
    )]
    ControlTooLong(PathBuf),
}
