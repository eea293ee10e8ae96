//! The supervisor's own log, on stderr. A stderr that nobody reads never stops the supervisor: lines are left out then.

use std::io;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::util::TryInitError;

/// Lines that wait for a slow stderr; later ones are left out.
const WAITING: usize = 4096;

/// The environment variable that says the level where `--log-level` does not.
pub const LEVEL_VAR: &str = "ZDDSUP_LOG";

/// In which form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

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

/// Writes what is still to be written when it is dropped, as long as stderr takes it.
#[derive(Debug)]
pub struct Guard {
    _writer: WorkerGuard,
}

/// Starts the log. The level is that of `--log-level`, else of `ZDDSUP_LOG`, else info.
pub fn start(format: Format, level: Option<&str>) -> Result<Guard, LogError> {
    let filter = filter(level.map(str::to_owned).or_else(|| std::env::var(LEVEL_VAR).ok()))?;
    let (writer, guard) =
        NonBlockingBuilder::default().buffered_lines_limit(WAITING).lossy(true).thread_name("log").finish(io::stderr());
    let terminal = io::IsTerminal::is_terminal(&io::stderr());
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_target(false)
        .with_span_events(FmtSpan::NONE);
    match format {
        Format::Text => subscriber.with_ansi(terminal).finish().try_init()?,
        Format::Json => subscriber.json().flatten_event(true).finish().try_init()?,
    }
    Ok(Guard { _writer: guard })
}

/// Whether a level is one, without starting anything.
pub fn check_level(level: &str) -> Result<(), LogError> {
    filter(Some(level.to_owned())).map(drop)
}

fn filter(level: Option<String>) -> Result<EnvFilter, LogError> {
    let level = level.filter(|level| !level.is_empty()).unwrap_or_else(|| "info".to_owned());
    EnvFilter::builder().parse(&level).map_err(|source| LogError::Level { level, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_filters_are_understood_and_nonsense_is_not() {
        for good in ["info", "WARN", "", "info,zddsup::control=debug", "off"] {
            check_level(good).unwrap();
        }
        let error = check_level("info=loud=x").unwrap_err().to_string();
        assert!(error.contains("use error, warn, info"), "{error}");
    }
}
