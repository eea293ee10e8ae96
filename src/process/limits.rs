//! Resource limits (setrlimit(2)) of a generation, and zddsup's own limit of open files.

use std::fmt;
use std::io;
use std::str::FromStr;

use nix::sys::resource::{getrlimit, rlim_t, setrlimit, Resource, RLIM_INFINITY};

/// What a limit is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Bytes,
    Count,
}

/// Every resource that can be limited, by the name that setrlimit(2) has for it.
const RESOURCES: [(&str, Resource, Unit); 16] = [
    ("as", Resource::RLIMIT_AS, Unit::Bytes),
    ("core", Resource::RLIMIT_CORE, Unit::Bytes),
    ("cpu", Resource::RLIMIT_CPU, Unit::Count),
    ("data", Resource::RLIMIT_DATA, Unit::Bytes),
    ("fsize", Resource::RLIMIT_FSIZE, Unit::Bytes),
    ("locks", Resource::RLIMIT_LOCKS, Unit::Count),
    ("memlock", Resource::RLIMIT_MEMLOCK, Unit::Bytes),
    ("msgqueue", Resource::RLIMIT_MSGQUEUE, Unit::Bytes),
    ("nice", Resource::RLIMIT_NICE, Unit::Count),
    ("nofile", Resource::RLIMIT_NOFILE, Unit::Count),
    ("nproc", Resource::RLIMIT_NPROC, Unit::Count),
    ("rss", Resource::RLIMIT_RSS, Unit::Bytes),
    ("rtprio", Resource::RLIMIT_RTPRIO, Unit::Count),
    ("rttime", Resource::RLIMIT_RTTIME, Unit::Count),
    ("sigpending", Resource::RLIMIT_SIGPENDING, Unit::Count),
    ("stack", Resource::RLIMIT_STACK, Unit::Bytes),
];

/// A limit: `nofile=65536`, `nofile=1024:65536`, `core=unlimited`, `memlock=64M`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// What is limited.
    pub resource: Resource,
    /// What holds; the process may raise it up to `hard`.
    pub soft: rlim_t,
    /// Up to where.
    pub hard: rlim_t,
}

/// Why a text is no limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// There is no `=`.
    #[error("{0:?} is no limit: write RESOURCE=VALUE or RESOURCE=SOFT:HARD, as in nofile=65536")]
    Form(String),
    /// The kernel has no such limit.
    #[error("there is no limit for {0:?}: use one of {known}", known = names())]
    Resource(String),
    /// No number.
    #[error("{value:?} is no value for {resource}: write a number{suffixes}, or unlimited")]
    Value {
        /// Of which resource.
        resource: &'static str,
        /// What was given.
        value: String,
        /// Whether sizes may be written.
        suffixes: &'static str,
    },
    /// The soft limit is above the hard one.
    #[error("{0}: the soft limit is above the hard limit; the first value is the soft one")]
    Order(Limit),
}

impl FromStr for Limit {
    type Err = LimitError;

    fn from_str(text: &str) -> Result<Self, LimitError> {
        let (name, value) = text.split_once('=').ok_or_else(|| LimitError::Form(text.to_owned()))?;
        let name = name.trim().to_ascii_lowercase();
        let wanted = name.strip_prefix("rlimit_").unwrap_or(&name);
        let &(name, resource, unit) = RESOURCES
            .iter()
            .find(|(name, ..)| *name == wanted)
            .ok_or_else(|| LimitError::Resource(wanted.to_owned()))?;
        let number = |value: &str| {
            let suffixes = if unit == Unit::Bytes { " of bytes, with K, M, G or T if you like" } else { "" };
            let error = || LimitError::Value { resource: name, value: value.to_owned(), suffixes };
            parse_value(value.trim(), unit).ok_or_else(error)
        };
        let (soft, hard) = match value.split_once(':') {
            Some((soft, hard)) => (number(soft)?, number(hard)?),
            None => (number(value)?, number(value)?),
        };
        let limit = Limit { resource, soft, hard };
        if soft > hard {
            return Err(LimitError::Order(limit));
        }
        Ok(limit)
    }
}

fn parse_value(text: &str, unit: Unit) -> Option<rlim_t> {
    if matches!(text, "unlimited" | "infinity") {
        return Some(RLIM_INFINITY);
    }
    let (digits, shift) = match text.as_bytes().last()?.to_ascii_uppercase() {
        _ if unit == Unit::Count => (text, 0),
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        b'T' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    // RLIM_INFINITY itself is said by its name only.
    digits.parse::<rlim_t>().ok()?.checked_mul(1 << shift).filter(|&value| value != RLIM_INFINITY)
}

fn names() -> String {
    RESOURCES.map(|(name, ..)| name).join(", ")
}

impl Limit {
    /// Its resource's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        RESOURCES.iter().find(|(_, resource, _)| *resource == self.resource).map_or("unknown", |(name, ..)| name)
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = |value: rlim_t| match value {
            RLIM_INFINITY => "unlimited".to_owned(),
            value => value.to_string(),
        };
        write!(f, "{}={}", self.name(), value(self.soft))?;
        if self.soft != self.hard {
            write!(f, ":{}", value(self.hard))?;
        }
        Ok(())
    }
}

/// Raises zddsup's own soft limit of open files to the hard one, for it holds fds for many. Gives the limit from before,
/// which generations get back: a program that uses select(2) breaks above 1024. None where nothing was to be raised.
pub fn raise_nofile() -> io::Result<Option<Limit>> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft == hard {
        return Ok(None);
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(Some(Limit { resource: Resource::RLIMIT_NOFILE, soft, hard }))
}

/// How many files this process may have open.
#[must_use]
pub fn own_nofile() -> usize {
    // It cannot fail for a resource that there is.
    getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| usize::try_from(soft).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_and_shows_each_form() {
        for (text, shown) in [
            ("nofile=65536", "nofile=65536"),
            ("nofile=1024:65536", "nofile=1024:65536"),
            ("core=unlimited", "core=unlimited"),
            ("core=0:infinity", "core=0:unlimited"),
            ("RLIMIT_MEMLOCK=64M", "memlock=67108864"),
            ("stack=8m:1G", "stack=8388608:1073741824"),
            ("nproc=7:7", "nproc=7"),
        ] {
            assert_eq!(text.parse::<Limit>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn refuses_what_is_no_limit_and_says_what_would_be() {
        for (text, part) in [
            ("nofile", "RESOURCE=VALUE"),
            ("files=3", "nofile"),
            ("nofile=3K", "write a number"),
            ("nofile=", "write a number"),
            ("nofile=-1", "write a number"),
            ("nofile=+1", "write a number"),
            ("core=1Q", "with K, M"),
            ("core=K", "with K, M"),
            ("core=ö", "with K, M"),
            ("core=99999999999999T", "with K, M"),
            ("core=18446744073709551615", "unlimited"),
            ("nofile=2:1", "above the hard"),
        ] {
            let error = text.parse::<Limit>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn never_panics_and_what_is_shown_reads_back(text in "(nofile|core|x)?=?[0-9KMG:é]{0,24}") {
            if let Ok(limit) = text.parse::<Limit>() {
                prop_assert_eq!(limit.to_string().parse::<Limit>(), Ok(limit));
            }
        }
    }
}
