//! The supervisor's own log, on stderr, between the lines of the service.

use std::io;

use tracing_subscriber::filter::{ParseError, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{fmt, registry};

use crate::config::LogFormat;
use crate::process::output::Output;

/// The environment variable with a filter that stands in for `--log-level`, as in `info,zddsup::control=debug`.
pub const FILTER_VAR: &str = "ZDDSUP_LOG";

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// It is no level.
    #[error("log level {level:?} is not understood ({source}): use error, warn, info, debug or trace, or a filter such as info,zddsup::control=debug")]
    Level {
        /// What was given.
        level: String,
        /// Why not.
        source: ParseError,
    },
    /// There is one already.
    #[error("the log was started already: {0}")]
    Started(#[from] TryInitError),
}

/// Starts the log. `ZDDSUP_LOG`, where it is set, says more precisely what `--log-level` says.
pub fn start(format: LogFormat, level: &str, output: Output) -> Result<(), LogError> {
    let filter = match std::env::var(FILTER_VAR) {
        Ok(precise) if !precise.is_empty() => filter(&precise)?,
        Ok(_) | Err(_) => filter(level)?,
    };
    let terminal = io::IsTerminal::is_terminal(&io::stderr());
    let lines = fmt::layer().with_writer(move || output.clone()).with_target(false);
    match format {
        LogFormat::Text => registry().with(filter).with(lines.with_ansi(terminal)).try_init()?,
        LogFormat::Json => registry().with(filter).with(lines.json().flatten_event(true)).try_init()?,
    }
    Ok(())
}

/// No `EnvFilter`: its regular expressions would be an eighth of the program.
fn filter(level: &str) -> Result<Targets, LogError> {
    level.parse().map_err(|source| LogError::Level { level: level.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_filters_are_understood_and_nonsense_is_not() {
        for good in ["info", "WARN", "info,zddsup::control=debug", "off"] {
            filter(good).unwrap();
        }
        let error = filter("info=loud=x").unwrap_err().to_string();
        assert!(error.contains("use error, warn, info"), "{error}");
    }
}
