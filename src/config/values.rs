//! How the values of flags are written, and shown in the help.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

use super::EnvFile;
use crate::core::RestartLimit;

/// Longer is meant as "for ever", and has a word of its own.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A length of time: `5s`, `1m30s`, `500ms`, `0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

/// A length of time, or no limit: `5s`, `infinity`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UpTo(pub Option<Duration>);

/// Restarts in a time: `10/1m`, or no limit: `infinity`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(pub Option<RestartLimit>);

fn is_endless(text: &str) -> bool {
    ["infinity", "unlimited", "off"].contains(&text)
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "0" || text == "off" {
            return Ok(Span(Duration::ZERO));
        }
        match humantime::parse_duration(text) {
            Ok(duration) if duration <= LONGEST => Ok(Span(duration)),
            Ok(_) => Err("longer than ten years".to_owned()),
            Err(_) if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) => {
                Err(format!("a unit is missing: {text}s or {text}ms?"))
            }
            Err(_) => Err("not a length of time: write 5s, 1m30s or 500ms".to_owned()),
        }
    }
}

impl FromStr for UpTo {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if is_endless(text) {
            return Ok(UpTo(None));
        }
        text.parse()
            .map(|Span(duration)| UpTo(Some(duration)))
            .map_err(|error| format!("{error}; infinity is no limit"))
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if is_endless(text) {
            return Ok(Rate(None));
        }
        let (count, within) = text.split_once('/').ok_or("write N/DURATION, such as 10/1m, or infinity")?;
        let count = count.parse().ok().filter(|count| *count > 0);
        let count = count.ok_or("the number of restarts is at least 1; --restart never allows none")?;
        let Span(within) = within.parse()?;
        if within.is_zero() {
            return Err("the time in which restarts are counted is longer than 0".to_owned());
        }
        Ok(Rate(Some(RestartLimit { count, within })))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Duration::ZERO => f.write_str("0"),
            // Without spaces, which would need quotes.
            duration => f.write_str(&humantime::format_duration(duration).to_string().replace(' ', "")),
        }
    }
}

impl fmt::Display for UpTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("infinity"),
            Some(duration) => Span(duration).fmt(f),
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("infinity"),
            Some(RestartLimit { count, within }) => write!(f, "{count}/{}", Span(within)),
        }
    }
}

/// A time that has to pass: at least a moment.
pub(super) fn some_time(text: &str) -> Result<Span, String> {
    let span: Span = text.parse()?;
    if span.0.is_zero() {
        return Err("longer than 0".to_owned());
    }
    Ok(span)
}

/// The same, or no limit.
pub(super) fn some_time_or_endless(text: &str) -> Result<UpTo, String> {
    match text.parse()? {
        UpTo(Some(Duration::ZERO)) => Err("longer than 0; infinity is no limit".to_owned()),
        up_to => Ok(up_to),
    }
}

/// `TERM`, `SIGTERM` or `15`.
pub(super) fn signal(text: &str) -> Result<Signal, String> {
    let upper = text.to_ascii_uppercase();
    let named = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    let number = text.parse().ok().and_then(|number: i32| Signal::try_from(number).ok());
    match named.parse().ok().or(number) {
        Some(Signal::SIGKILL | Signal::SIGSTOP) => {
            Err("no process can act on it, so that none could drain; --stop-timeout 0 kills at once".to_owned())
        }
        Some(signal) => Ok(signal),
        None => Err("no signal; write a name or number, such as TERM".to_owned()),
    }
}

/// `022`
pub(super) fn umask(text: &str) -> Result<Mode, String> {
    let digits = !text.is_empty() && text.len() <= 5 && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    let mask = u32::from_str_radix(text, 8).ok().filter(|mask| digits && *mask <= 0o777);
    mask.map(Mode::from_bits_truncate).ok_or_else(|| "not from 000 to 777 in octal".to_owned())
}

/// `NAME=VALUE`
pub(super) fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    if name.is_empty() {
        return Err("the name before = is missing".to_owned());
    }
    if super::environment::is_for_zddsup(name.as_ref()) {
        return Err(format!("zddsup sets {name} itself, for each generation anew"));
    }
    Ok((name.to_owned(), value.to_owned()))
}

/// `PATH`, or `-PATH` for one that need not be there.
pub(super) fn env_file(text: &str) -> Result<EnvFile, String> {
    let (path, optional) = text.strip_prefix('-').map_or((text, false), |path| (path, true));
    if path.is_empty() {
        return Err("the path is missing".to_owned());
    }
    Ok(EnvFile { path: PathBuf::from(path), optional })
}

/// A name that files, metrics and log lines can have.
pub(super) fn name(text: &str) -> Result<String, String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if text.is_empty() || text.len() > super::NAME_MOST || !text.bytes().all(fits) || text.starts_with(['.', '-']) {
        return Err(format!(
            "not a name: letters, digits and _ . - (the last two not first), at most {}",
            super::NAME_MOST
        ));
    }
    Ok(text.to_owned())
}

/// A host's name, as it stands in a certificate.
pub(super) fn host(text: &str) -> Result<String, String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if text.is_empty() || !text.bytes().all(fits) {
        return Err("a name has letters, digits, . - and _; no port".to_owned());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_have_units() {
        assert_eq!("1m 30s".parse(), Ok(Span(Duration::from_secs(90))));
        assert_eq!("500ms".parse(), Ok(Span(Duration::from_millis(500))));
        assert_eq!("0".parse(), Ok(Span(Duration::ZERO)));
        assert_eq!("infinity".parse(), Ok(UpTo(None)));
        assert!("5".parse::<Span>().unwrap_err().contains("5s or 5ms"));
        assert!("-1s".parse::<Span>().is_err() && "soon".parse::<Span>().is_err() && "".parse::<Span>().is_err());
        assert!("11years".parse::<Span>().unwrap_err().contains("ten years"));
        assert!(some_time("0").is_err() && some_time_or_endless("0s").is_err());
    }

    #[test]
    fn rates_have_a_number_and_a_time() {
        let limit = RestartLimit { count: 10, within: Duration::from_secs(60) };
        assert_eq!("10/1m".parse(), Ok(Rate(Some(limit))));
        assert_eq!("off".parse(), Ok(Rate(None)));
        for bad in ["10", "0/1m", "10/0", "10/", "/1m", "-1/1m", "10/60"] {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["TERM", "SIGTERM", "term", "15"] {
            assert_eq!(signal(text), Ok(Signal::SIGTERM), "{text}");
        }
        assert!(signal("KILL").unwrap_err().contains("--stop-timeout 0"));
        assert!(signal("HELLO").is_err() && signal("0").is_err() && signal("").is_err());
    }

    #[test]
    fn masks_are_octal() {
        assert_eq!(umask("022"), Ok(Mode::from_bits_truncate(0o022)));
        assert_eq!(umask("0"), Ok(Mode::empty()));
        assert!(umask("888").is_err() && umask("1777").is_err() && umask("+22").is_err() && umask("").is_err());
    }

    #[test]
    fn variables_of_zddsup_are_not_for_others_to_set() {
        assert_eq!(variable("A=b=c"), Ok(("A".to_owned(), "b=c".to_owned())));
        assert_eq!(variable("A="), Ok(("A".to_owned(), String::new())));
        assert!(variable("A").is_err() && variable("=b").is_err());
        assert!(variable("LISTEN_FDS=3").unwrap_err().contains("zddsup sets LISTEN_FDS"));
    }

    #[test]
    fn names_are_fit_for_files() {
        assert!(name("web-1.2_x").is_ok());
        for bad in ["", "a/b", "..", ".a", "-a", "a b", &"x".repeat(65)] {
            assert!(name(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_back(seconds in 0u64..300_000_000, millis in 0u32..1000, count in 1usize..1000) {
            let duration = Duration::new(seconds, millis * 1_000_000);
            prop_assert_eq!(Span(duration).to_string().parse(), Ok(Span(duration)));
            prop_assert_eq!(UpTo(Some(duration)).to_string().parse(), Ok(UpTo(Some(duration))));
            prop_assume!(!duration.is_zero());
            let rate = Rate(Some(RestartLimit { count, within: duration }));
            prop_assert_eq!(rate.to_string().parse(), Ok(rate));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,40}", like in "-?[0-9]{0,30}(/)?[0-9]{0,30}[a-zµ]{0,8}") {
            for text in [text, like] {
                let _either = (text.parse::<Span>(), text.parse::<UpTo>(), text.parse::<Rate>());
                let _either = (signal(&text), umask(&text), variable(&text), env_file(&text), name(&text));
                let _either = (some_time(&text), some_time_or_endless(&text));
            }
        }
    }
}
