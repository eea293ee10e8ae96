//! One `--listen`: `[NAME=]ADDRESS[?OPTION[=VALUE]&…]`.

use std::fmt;
use std::str::FromStr;

use super::address::{Address, AddressError};
use super::options::{OptionError, Options};

/// Longest name, as systemd has it (`sd_listen_fds(3)`).
const NAME_MOST: usize = 255;

/// A listener as it was asked for, perhaps without a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenFlag {
    /// Its name.
    pub name: Option<String>,
    /// Where.
    pub address: Address,
    /// How.
    pub options: Options,
}

/// A listener to be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerSpec {
    /// Its name: what generations know it by.
    pub name: String,
    /// Where.
    pub address: Address,
    /// How.
    pub options: Options,
    /// Whether each generation has a socket of its own there.
    pub steered: bool,
}

/// Why a text is no listener.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Its name.
    #[error("{0:?} is no name for a listener: letters, digits and . _ - + @ (not first), at most {NAME_MOST}")]
    Name(String),
    /// Its address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Its options.
    #[error(transparent)]
    Option(#[from] OptionError),
}

/// Whether generations can know a listener by this name: in `LISTEN_FDNAMES`, in `{fd:NAME}`, in an address.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let byte_fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+@".contains(&byte);
    (1..=NAME_MOST).contains(&text.len()) && !text.starts_with('@') && text.bytes().all(byte_fits)
}

impl FromStr for ListenFlag {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, rest) = match text.split_once('=') {
            // No address has an = before one of these.
            Some((before, rest)) if !before.contains([':', '/', '?', '[']) && !before.starts_with('@') => {
                if !is_name(before) {
                    return Err(SpecError::Name(before.to_owned()));
                }
                (Some(before.to_owned()), rest)
            }
            Some(_) | None => (None, text),
        };
        let (address, query) = match rest.split_once('?') {
            Some((address, query)) => (address, Some(query)),
            None => (rest, None),
        };
        let address = address.parse()?;
        let options = query.map_or(Ok(Options::default()), |query| Options::read(query, &address))?;
        Ok(ListenFlag { name, address, options })
    }
}

impl ListenFlag {
    /// Gives names to those that have none: `listener` to the only one, else `listener0`, `listener1`, … by their place.
    #[must_use]
    pub fn name_all(flags: Vec<ListenFlag>) -> Vec<ListenerSpec> {
        let alone = flags.len() == 1;
        let named = |(place, flag): (usize, ListenFlag)| {
            let name =
                flag.name.unwrap_or_else(|| if alone { "listener".to_owned() } else { format!("listener{place}") });
            ListenerSpec { name, address: flag.address, options: flag.options, steered: false }
        };
        flags.into_iter().enumerate().map(named).collect()
    }
}

impl FromStr for ListenerSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let ListenFlag { name, address, options } = text.parse()?;
        Ok(ListenerSpec { name: name.unwrap_or_else(|| "listener".to_owned()), address, options, steered: false })
    }
}

impl fmt::Display for ListenerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}{}", self.name, self.address, self.options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flag(text: &str) -> ListenFlag {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_is_what_stands_before_an_address() {
        assert_eq!(flag("http=:80").name.as_deref(), Some("http"));
        assert_eq!(flag("web@1.socket=/run/a?mode=0600").name.as_deref(), Some("web@1.socket"));
        assert_eq!(flag("8080?backlog=5").name, None);
        assert_eq!(flag("unix:@a=b").name, None);
        assert_eq!(flag("@a=b").name, None);
        assert_eq!(flag("/run/a=b").name, None);
        assert!(matches!("my web=:80".parse::<ListenFlag>(), Err(SpecError::Name(name)) if name == "my web"));
        assert!(matches!("=:80".parse::<ListenFlag>(), Err(SpecError::Name(_))));
    }

    #[test]
    fn the_nameless_get_names_by_their_place() {
        let names = |flags: &[&str]| -> Vec<String> {
            let flags = flags.iter().map(|text| flag(text)).collect();
            ListenFlag::name_all(flags).into_iter().map(|spec| spec.name).collect()
        };
        assert_eq!(names(&[":80"]), ["listener"]);
        assert_eq!(names(&[":80", "admin=:81", ":82"]), ["listener0", "admin", "listener2"]);
    }

    #[test]
    fn a_question_mark_needs_options() {
        assert!(matches!(":80?".parse::<ListenFlag>(), Err(SpecError::Option(OptionError::Unknown { .. }))));
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_is_shown_is_read_back(
            text in "([a-z=@]{0,5}=)?(tcp://|udp://|unix:|unixgram:///|/|)(127.0.0.1|\\[::1\\]|[a-z%?=&]{0,8})?(:[0-9]{1,5})?(\\?(backlog=[0-9]{1,3}|reuseport|v6only=no|tos=0x1f|mode=0[0-7]{3}|user=[a-z%@é]{1,4}|rcvbuf=9)(&(nodelay|device=lo|sndbuf=1|group=7))?)?"
        ) {
            if let Ok(spec) = text.parse::<ListenerSpec>() {
                prop_assert_eq!(spec.to_string().parse::<ListenerSpec>(), Ok(spec));
            }
        }

        #[test]
        fn no_garbage_panics(text in "\\PC{0,60}") {
            let _either = text.parse::<ListenFlag>();
        }
    }
}
