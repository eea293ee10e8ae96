//! The supervisor's own log, on stderr, between the lines of the service.

use std::io;

use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::util::TryInitError;

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
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(move || output.clone())
        .with_target(false)
        .with_span_events(FmtSpan::NONE);
    match format {
        LogFormat::Text => subscriber.with_ansi(terminal).finish().try_init()?,
        LogFormat::Json => subscriber.json().flatten_event(true).finish().try_init()?,
    }
    Ok(())
}

fn filter(level: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::builder().parse(level).map_err(|source| LogError::Level { level: level.to_owned(), source })
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
