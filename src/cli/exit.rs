//! Exit codes (docs/exit-codes.md), and errors as one line for people.

use std::io;
use std::process::ExitCode;

use crate::control::client::ClientError;
use crate::control::place::PlaceError;
use crate::control::types::Refusal;

/// How the command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// As asked.
    Done,
    /// Something else went wrong.
    Failed,
    /// Wrong usage, or an invalid configuration.
    Usage,
    /// The upgrade failed; the version from before serves on.
    UpgradeFailed,
    /// `--timeout` passed; what was asked for goes on.
    TimedOut,
    /// No supervisor was reached, or it went away before the result was known.
    NoSupervisor,
    /// Refused, nothing was changed.
    Refused,
    /// Another request took its place, or it was called off or rolled back.
    Superseded,
    /// The new version was tried and given up; the version from before serves on.
    Aborted,
    /// The new version serves, and connections of the old one were cut, reset or left.
    Lost,
    /// `run`: no version ever became ready.
    NeverReady,
    /// `run`: it was lost too often.
    RestartLimit,
    /// `run`: the service ended by itself, with this status.
    Service(u8),
}

impl Exit {
    /// The number.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::UpgradeFailed => 3,
            Exit::TimedOut => 4,
            Exit::NoSupervisor => 5,
            Exit::Refused => 6,
            Exit::Superseded => 7,
            Exit::Aborted => 8,
            Exit::Lost => 9,
            Exit::NeverReady => 10,
            Exit::RestartLimit => 11,
            Exit::Service(status) => status,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}

/// Why a command was not done: one line, with its cause and its remedy.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// No service, or more than one.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// No answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// No is the answer.
    #[error("refused, nothing was changed: {reason}; {remedy}", reason = .0.reason, remedy = .0.remedy)]
    Refused(Refusal),
    /// Nobody reads the output any more.
    #[error("nobody reads the output")]
    ReaderGone,
    /// The system says no.
    #[error("cannot {step}: {source}")]
    System {
        /// What failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// In words, with its own exit code.
    #[error("{line}")]
    Said {
        /// The code.
        exit: Exit,
        /// The words.
        line: String,
    },
}

impl Failure {
    /// An error of another kind, with the code that fits it.
    #[must_use]
    pub fn with(exit: Exit, error: &impl std::fmt::Display) -> Failure {
        Failure::Said { exit, line: error.to_string() }
    }

    /// How the command ends for it.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Failure::Place(PlaceError::Name(_) | PlaceError::Several(_)) => Exit::Usage,
            Failure::Place(PlaceError::Nobody { .. } | PlaceError::NotThere { .. }) => Exit::NoSupervisor,
            Failure::Client(error) => match error {
                ClientError::Unreachable { .. } | ClientError::Gone { .. } | ClientError::Silent(_) => {
                    Exit::NoSupervisor
                }
                ClientError::Strange { .. } | ClientError::Denied(_) => Exit::Failed,
            },
            Failure::Refused(_) => Exit::Refused,
            // As `zddsup status | head` is meant.
            Failure::ReaderGone => Exit::Done,
            Failure::Place(PlaceError::Directory(_)) | Failure::System { .. } => Exit::Failed,
            Failure::Said { exit, .. } => *exit,
        }
    }

    /// Says it on stderr, unless there is nothing to say.
    pub fn say(&self) {
        if !matches!(self, Failure::ReaderGone) {
            super::text::complain(&self.to_string());
        }
    }
}
