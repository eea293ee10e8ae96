//! `zddsup run`: supervises a service to its end.

use super::exit::{Exit, Failure};
use super::{log, text};
use crate::config::flags::RunFlags;
use crate::config::ServiceConfig;
use crate::core::{End, Finish};
use crate::listener::inherit::Inherited;
use crate::process::output::{Output, LAST_LINES};
use crate::supervisor::replacing::{start, TRIAL_PASSED};
use crate::supervisor::run::{self, Ended, StartError};
use crate::supervisor::signals;
use crate::sys::memory;

/// Runs it. The exit code says how it ended (docs/exit-codes.md).
pub fn run(flags: RunFlags) -> Result<Exit, Failure> {
    let config = flags.validate().map_err(|error| Failure::with(Exit::Usage, &error))?;
    if start::is_trial() {
        return trial(&config);
    }
    // All before the first thread is made: the log has one.
    memory::keep_little();
    signals::block().map_err(|errno| Failure::System { step: "block signals", source: errno.into() })?;
    let left = start::take().map_err(|error| Failure::with(Exit::Failed, &error))?;
    let inherited = Inherited::take().map_err(|error| Failure::with(Exit::Usage, &error))?;
    let output = Output::stderr().map_err(|source| Failure::System { step: "write to stderr", source })?;
    log::start(config.log_format, &config.log_level, output.clone())
        .map_err(|error| Failure::with(Exit::Usage, &error))?;
    let name = config.name.clone();
    let ended = run::run(config, inherited, left, output.clone());
    output.flush(LAST_LINES);
    let failed = |error: StartError| Failure::with(if error.is_invalid() { Exit::Usage } else { Exit::Failed }, &error);
    finished(&name, &ended.map_err(failed)?)
}

/// Says whether this program could go on with the state of another one.
fn trial(config: &ServiceConfig) -> Result<Exit, Failure> {
    start::try_state(config).map_err(|error| Failure::with(Exit::Failed, &error))?;
    text::print(&format!("{TRIAL_PASSED}\n"))?;
    Ok(Exit::Done)
}

fn finished(name: &str, ended: &Ended) -> Result<Exit, Failure> {
    let said = |exit| Err(Failure::Said { exit, line: format!("service {name}: {}", ended.in_words()) });
    match ended.finish {
        Finish::Stopped => Ok(Exit::Done),
        Finish::StartFailed(_) => said(Exit::NeverReady),
        Finish::RestartLimit => said(Exit::RestartLimit),
        Finish::ServiceEnded(end) => {
            text::complain(&format!("service {name} {}", ended.in_words()));
            Ok(Exit::Service(own_status(end)))
        }
    }
}

/// The service's status as a shell would give it.
fn own_status(end: End) -> u8 {
    let number = match end {
        End::Exited(code) => code & 0xff,
        End::Killed { signal, .. } => 128 + signal,
        End::Unknown => 1,
    };
    u8::try_from(number).unwrap_or(u8::MAX)
}
