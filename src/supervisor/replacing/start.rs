//! The side of the program that is executed in another one's place.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{OwnedFd, RawFd};

use super::state::State;
use super::{STATE_VAR, TRIAL_VAR};
use crate::config::{environment, ServiceConfig};
use crate::control::place;
use crate::process::identity::Identity;
use crate::process::table;
use crate::state::fds::Passed;
use crate::state::{self, StateError};
use crate::supervisor::run;
use crate::sys::fds;

/// More than any state has.
const MOST: u64 = 1 << 30;

/// What the program in whose place this one is left for it.
#[derive(Debug)]
pub struct Left {
    document: Vec<u8>,
    passed: Passed,
}

/// Why this one cannot go on in another one's place.
#[derive(Debug, thiserror::Error)]
pub enum LeftError {
    /// The variable does not name an open file.
    #[error("{STATE_VAR} is {value:?} and not the fd of a state: it is for zddsup's own use; unset it ({source})")]
    Variable {
        /// What it says.
        value: String,
        /// Why that cannot be.
        source: io::Error,
    },
    /// The state makes no sense.
    #[error(transparent)]
    State(#[from] StateError),
    /// It is not what this one is told to do.
    #[error("the state is of service {found}, and this is to be {own}; give the same options")]
    Service {
        /// Of the state.
        found: String,
        /// What the options say.
        own: String,
    },
    /// The same of its listeners.
    #[error("the state has the listeners {found:?}, and the options say {own:?}; give the same options")]
    Listeners {
        /// Of the state.
        found: Vec<String>,
        /// What the options say.
        own: Vec<String>,
    },
    /// Something that generations need.
    #[error("{0}")]
    Config(String),
}

/// Takes what was left, once, and the variable out of the environment. To be called before anything is opened.
pub fn take() -> Result<Option<Left>, LeftError> {
    let Some(value) = std::env::var_os(STATE_VAR) else { return Ok(None) };
    std::env::remove_var(STATE_VAR);
    let value = value.to_string_lossy().into_owned();
    let wrong = |source| LeftError::Variable { value: value.clone(), source };
    let number: RawFd =
        value.parse().ok().filter(|number| *number > 2).ok_or_else(|| wrong(io::ErrorKind::InvalidInput.into()))?;
    let mut own = fds::take([number].into_iter()).map_err(wrong)?;
    let mut document = Vec::new();
    if let Some(file) = own.pop().map(File::from) {
        file.take(MOST).read_to_end(&mut document).map_err(wrong)?;
    }
    let numbers: Vec<_> = state::header(&document)?.fds.into_iter().filter(|number| *number > 2).collect();
    let taken: Vec<OwnedFd> = fds::take(numbers.iter().copied()).map_err(wrong)?;
    Ok(Some(Left { document, passed: Passed::new(numbers.into_iter().zip(taken)) }))
}

/// Whether this process is only to try the state at its stdin.
#[must_use]
pub fn is_trial() -> bool {
    std::env::var_os(TRIAL_VAR).is_some()
}

/// Tries it: whether a service with this configuration could be gone on with. Nothing is touched.
pub fn try_state(config: &ServiceConfig) -> Result<(), LeftError> {
    let mut document = Vec::new();
    let read = io::stdin().take(MOST).read_to_end(&mut document);
    read.map_err(|error| LeftError::Config(format!("the state cannot be read: {error}")))?;
    let numbers = state::header(&document)?.fds;
    let problem = |error: &dyn std::fmt::Display| LeftError::Config(error.to_string());
    environment::for_generation(config).map_err(|error| problem(&error))?;
    Identity::resolve(config.user.as_deref(), config.group.as_deref()).map_err(|error| problem(&error))?;
    run::tls(config).map_err(|error| problem(&error))?;
    place::runtime_dir().map_err(|error| problem(&error))?;
    table::check_own_proc().map_err(|error| problem(&error))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| problem(&error))?;
    // Nothing is dropped: what it names is in use.
    runtime.block_on(async {
        Left { document, passed: Passed::placeholders(&numbers) }.read(config).map(std::mem::forget)
    })
}

impl Left {
    /// The state, if it is of this service. Within a runtime only.
    pub fn read(self, config: &ServiceConfig) -> Result<State, LeftError> {
        let state: State = state::read(&self.document, self.passed)?;
        if state.service() != config.name {
            return Err(LeftError::Service { found: state.service().to_owned(), own: config.name.clone() });
        }
        let found: Vec<_> = state.listeners().map(str::to_owned).collect();
        let own: Vec<_> = config.listeners.iter().map(|listener| listener.name.clone()).collect();
        // Without any, all that somebody above passed.
        if own.is_empty() || own == found {
            Ok(state)
        } else {
            Err(LeftError::Listeners { found, own })
        }
    }
}
