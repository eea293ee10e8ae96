//! What follows an address after `?`: how its socket is made.
//!
//! One table knows every option: its name, which sockets have it, how it is read and how it is shown.

use std::borrow::Cow;
use std::fmt;
use std::ops::RangeInclusive;

use percent_encoding::{percent_decode_str, utf8_percent_encode};

use super::address::{Address, Host, Transport, ENCODED};

/// How a listener's socket is made. What is not given is left as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[allow(clippy::struct_excessive_bools)] // each is a switch of its own
pub struct Options {
    /// Connections that may wait in the queue.
    pub backlog: Option<i32>,
    /// `SO_REUSEPORT`: others of the same user may bind the address too.
    pub reuseport: bool,
    /// `IPV6_V6ONLY`.
    pub v6only: Option<bool>,
    /// `SO_BINDTODEVICE`: only what comes in by this interface.
    pub device: Option<String>,
    /// `IP_FREEBIND`: the address need not be there yet.
    pub freebind: bool,
    /// `IP_TRANSPARENT`: the address need not be ours at all.
    pub transparent: bool,
    /// `O_NONBLOCK`: for servers that share the socket between processes and rely on whoever passes it to have set it.
    pub nonblock: bool,
    /// `TCP_NODELAY` on every connection.
    pub nodelay: bool,
    /// `SO_KEEPALIVE` on every connection.
    pub keepalive: bool,
    /// `TCP_FASTOPEN`: how many at once.
    pub fastopen: Option<i32>,
    /// `TCP_DEFER_ACCEPT`, in seconds.
    pub defer_accept: Option<i32>,
    /// `SO_RCVBUF`, in bytes.
    pub rcvbuf: Option<i32>,
    /// `SO_SNDBUF`, in bytes.
    pub sndbuf: Option<i32>,
    /// `SO_MARK`.
    pub mark: Option<u32>,
    /// `SO_PRIORITY`.
    pub priority: Option<u32>,
    /// `IP_TOS` and `IPV6_TCLASS`.
    pub tos: Option<u8>,
    /// Permissions of the socket's file.
    pub mode: Option<u32>,
    /// Owner of the socket's file: name or number.
    pub user: Option<String>,
    /// Group of the socket's file: name or number.
    pub group: Option<String>,
}

/// Why a text is no list of options.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// Not one of ours.
    #[error("option {key:?} is not known; {address} takes {known}")]
    Unknown {
        /// What stood there.
        key: String,
        /// Its address.
        address: String,
        /// What could stand there.
        known: String,
    },
    /// One of another kind of socket.
    #[error("option {key} has no meaning for {address}, which takes {known}")]
    Misplaced {
        /// Which.
        key: &'static str,
        /// Its address.
        address: String,
        /// What could stand there.
        known: String,
    },
    /// Twice.
    #[error("option {0} is given twice")]
    Twice(&'static str),
    /// A value that cannot be.
    #[error("option {key}: {value:?} is not {wanted}")]
    Value {
        /// Which.
        key: &'static str,
        /// What stood there.
        value: String,
        /// What could stand there.
        wanted: &'static str,
    },
}

struct Known {
    key: &'static str,
    /// What its value is, for people.
    wanted: &'static str,
    fits: fn(&Address) -> bool,
    /// Nothing if the value cannot be.
    read: fn(&mut Options, &str) -> Option<()>,
    /// Nothing if it is not set; an empty value is not shown.
    show: fn(&Options) -> Option<Cow<'_, str>>,
}

const FLAG: &str = "yes or no";
const COUNT: RangeInclusive<i64> = 1..=i32::MAX as i64;
const U32: RangeInclusive<i64> = 0..=u32::MAX as i64;

const KNOWN: &[Known] = &[
    Known {
        key: "backlog",
        wanted: "a number from 1",
        fits: Address::takes_connections,
        read: |options, text| set(&mut options.backlog, number(text, COUNT)),
        show: |options| shown(options.backlog),
    },
    Known {
        key: "reuseport",
        wanted: FLAG,
        fits: is_inet,
        read: |options, text| flag(text).map(|on| options.reuseport = on),
        show: |options| shown_flag(options.reuseport),
    },
    Known {
        key: "v6only",
        wanted: FLAG,
        fits: is_v6,
        read: |options, text| set(&mut options.v6only, flag(text)),
        show: |options| options.v6only.map(|on| if on { "" } else { "no" }.into()),
    },
    Known {
        key: "device",
        wanted: "the name of a network interface",
        fits: is_inet,
        read: |options, text| set(&mut options.device, interface(text)),
        show: |options| options.device.as_deref().map(Cow::from),
    },
    Known {
        key: "freebind",
        wanted: FLAG,
        fits: is_inet,
        read: |options, text| flag(text).map(|on| options.freebind = on),
        show: |options| shown_flag(options.freebind),
    },
    Known {
        key: "transparent",
        wanted: FLAG,
        fits: is_inet,
        read: |options, text| flag(text).map(|on| options.transparent = on),
        show: |options| shown_flag(options.transparent),
    },
    Known {
        key: "nonblock",
        wanted: FLAG,
        fits: |_| true,
        read: |options, text| flag(text).map(|on| options.nonblock = on),
        show: |options| shown_flag(options.nonblock),
    },
    Known {
        key: "nodelay",
        wanted: FLAG,
        fits: is_tcp,
        read: |options, text| flag(text).map(|on| options.nodelay = on),
        show: |options| shown_flag(options.nodelay),
    },
    Known {
        key: "keepalive",
        wanted: FLAG,
        fits: is_tcp,
        read: |options, text| flag(text).map(|on| options.keepalive = on),
        show: |options| shown_flag(options.keepalive),
    },
    Known {
        key: "fastopen",
        wanted: "a number from 1: how many at once",
        fits: is_tcp,
        read: |options, text| set(&mut options.fastopen, number(text, COUNT)),
        show: |options| shown(options.fastopen),
    },
    Known {
        key: "defer-accept",
        wanted: "a number of seconds from 1",
        fits: is_tcp,
        read: |options, text| set(&mut options.defer_accept, number(text, COUNT)),
        show: |options| shown(options.defer_accept),
    },
    Known {
        key: "rcvbuf",
        wanted: "a number of bytes",
        fits: |_| true,
        read: |options, text| set(&mut options.rcvbuf, number(text, COUNT)),
        show: |options| shown(options.rcvbuf),
    },
    Known {
        key: "sndbuf",
        wanted: "a number of bytes",
        fits: |_| true,
        read: |options, text| set(&mut options.sndbuf, number(text, COUNT)),
        show: |options| shown(options.sndbuf),
    },
    Known {
        key: "mark",
        wanted: "a number",
        fits: is_inet,
        read: |options, text| set(&mut options.mark, number(text, U32)),
        show: |options| shown(options.mark),
    },
    Known {
        key: "priority",
        wanted: "a number",
        fits: is_inet,
        read: |options, text| set(&mut options.priority, number(text, 0..=i64::from(i32::MAX))),
        show: |options| shown(options.priority),
    },
    Known {
        key: "tos",
        wanted: "a number from 0 to 255",
        fits: is_inet,
        read: |options, text| set(&mut options.tos, number(text, 0..=255)),
        show: |options| shown(options.tos),
    },
    Known {
        key: "mode",
        wanted: "permissions in octal, such as 0660",
        fits: is_file,
        read: |options, text| set(&mut options.mode, mode(text)),
        show: |options| options.mode.map(|mode| format!("{mode:04o}").into()),
    },
    Known {
        key: "user",
        wanted: "a user's name or number",
        fits: is_file,
        read: |options, text| set(&mut options.user, account(text)),
        show: |options| options.user.as_deref().map(Cow::from),
    },
    Known {
        key: "group",
        wanted: "a group's name or number",
        fits: is_file,
        read: |options, text| set(&mut options.group, account(text)),
        show: |options| options.group.as_deref().map(Cow::from),
    },
];

fn is_inet(address: &Address) -> bool {
    matches!(address, Address::Inet { .. })
}

fn is_tcp(address: &Address) -> bool {
    matches!(address, Address::Inet { transport: Transport::Tcp, .. })
}

fn is_v6(address: &Address) -> bool {
    matches!(address, Address::Inet { host: Host::Any | Host::V6 { .. }, .. })
}

fn is_file(address: &Address) -> bool {
    address.path().is_some()
}

fn set<T>(place: &mut Option<T>, value: Option<T>) -> Option<()> {
    *place = Some(value?);
    Some(())
}

fn number<T: TryFrom<i64>>(text: &str, range: RangeInclusive<i64>) -> Option<T> {
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let number = u32::from_str_radix(digits, radix).ok().filter(|_| !digits.starts_with('+'))?;
    Some(i64::from(number)).filter(|number| range.contains(number)).and_then(|number| T::try_from(number).ok())
}

fn flag(text: &str) -> Option<bool> {
    match text {
        "" | "yes" | "true" | "on" | "1" => Some(true),
        "no" | "false" | "off" | "0" => Some(false),
        _ => None,
    }
}

fn mode(text: &str) -> Option<u32> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|_| !text.starts_with('+'))?;
    (mode <= 0o777).then_some(mode)
}

fn interface(text: &str) -> Option<String> {
    let name =
        (1..libc::IFNAMSIZ).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
    name.then(|| text.to_owned())
}

fn account(text: &str) -> Option<String> {
    let name = !text.is_empty() && !text.chars().any(|char| char.is_control() || char == ':');
    name.then(|| text.to_owned())
}

fn shown<T: ToString>(value: Option<T>) -> Option<Cow<'static, str>> {
    value.map(|value| value.to_string().into())
}

fn shown_flag(on: bool) -> Option<Cow<'static, str>> {
    on.then_some(Cow::Borrowed(""))
}

impl Options {
    /// Reads what follows the `?` of an address.
    pub fn read(query: &str, address: &Address) -> Result<Options, OptionError> {
        let known = || {
            let keys = KNOWN.iter().filter(|known| (known.fits)(address)).map(|known| known.key);
            keys.collect::<Vec<_>>().join(", ")
        };
        let mut options = Options::default();
        let mut seen = Vec::new();
        for part in query.split('&') {
            let (key, text) = part.split_once('=').unwrap_or((part, ""));
            let Some(option) = KNOWN.iter().find(|known| known.key == key) else {
                return Err(OptionError::Unknown { key: key.to_owned(), address: address.to_string(), known: known() });
            };
            let key = option.key;
            if !(option.fits)(address) {
                return Err(OptionError::Misplaced { key, address: address.to_string(), known: known() });
            }
            if seen.contains(&key) {
                return Err(OptionError::Twice(key));
            }
            seen.push(key);
            let value = percent_decode_str(text).decode_utf8_lossy();
            if (option.read)(&mut options, &value).is_none() {
                return Err(OptionError::Value { key, value: value.into_owned(), wanted: option.wanted });
            }
        }
        Ok(options)
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = '?';
        for known in KNOWN {
            let Some(value) = (known.show)(self) else { continue };
            write!(f, "{before}{}", known.key)?;
            if !value.is_empty() {
                write!(f, "={}", utf8_percent_encode(&value, ENCODED))?;
            }
            before = '&';
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(address: &str, query: &str) -> Result<Options, OptionError> {
        Options::read(query, &address.parse().unwrap())
    }

    #[test]
    fn options_are_read() {
        let options = read(":80", "backlog=10&reuseport&v6only=no&defer-accept=3&tos=0x10&device=eth0").unwrap();
        assert_eq!(options.backlog, Some(10));
        assert!(options.reuseport);
        assert_eq!(options.v6only, Some(false));
        assert_eq!(options.defer_accept, Some(3));
        assert_eq!(options.tos, Some(16));
        assert_eq!(options.device.as_deref(), Some("eth0"));
        let options = read("/run/a", "mode=0660&user=www-data&group=33").unwrap();
        assert_eq!(
            (options.mode, options.user.as_deref(), options.group.as_deref()),
            (Some(0o660), Some("www-data"), Some("33"))
        );
    }

    #[test]
    fn unknown_and_misplaced_ones_are_refused_with_those_that_are_known() {
        let error = read(":80", "backlogg=1").unwrap_err().to_string();
        assert!(
            error.contains("\"backlogg\"") && error.contains("backlog, reuseport") && !error.contains("mode"),
            "{error}"
        );
        let error = read(":80", "mode=0660").unwrap_err().to_string();
        assert!(error.contains("no meaning for tcp://:80"), "{error}");
        for (address, query) in [
            ("127.0.0.1:80", "v6only"),
            ("udp://:80", "backlog=1"),
            ("udp://:80", "nodelay"),
            ("unix:@web", "mode=0660"),
            ("unixgram:///run/a", "backlog=1"),
            ("/run/a", "reuseport"),
        ] {
            assert!(matches!(read(address, query), Err(OptionError::Misplaced { .. })), "{address} {query}");
        }
    }

    #[test]
    fn values_that_cannot_be_are_refused() {
        for (address, query) in [
            (":80", "backlog=0"),
            (":80", "backlog="),
            (":80", "backlog=+5"),
            (":80", "backlog=99999999999"),
            (":80", "reuseport=maybe"),
            (":80", "tos=256"),
            (":80", "device=a-name-that-is-too-long"),
            ("/run/a", "mode=0999"),
            ("/run/a", "mode=4755"),
            ("/run/a", "user="),
        ] {
            assert!(matches!(read(address, query), Err(OptionError::Value { .. })), "{address} {query}");
        }
        assert_eq!(read(":80", "backlog=1&backlog=2"), Err(OptionError::Twice("backlog")));
    }
}
