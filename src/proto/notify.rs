//! What a service says on its `NOTIFY_SOCKET` (`sd_notify(3)`).

use super::listen_fds::check_name;

/// The longest message that is read, as in systemd.
pub const MAX_LEN: usize = 4096;

/// One line of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Field {
    /// `READY=1`
    Ready,
    /// `STATUS=`: one line for people.
    Status(String),
    /// `ERRNO=`: why it failed.
    Errno(i32),
    /// `BUSERROR=`: why it failed, as D-Bus names it.
    BusError(String),
    /// `STOPPING=1`
    Stopping,
    /// `RELOADING=1`
    Reloading,
    /// `MONOTONIC_USEC=`: goes with RELOADING=1.
    MonotonicUsec(u64),
    /// `MAINPID=`
    MainPid(i32),
    /// `WATCHDOG=1`: a sign of life.
    Watchdog,
    /// `WATCHDOG=trigger`: treat me as one that gave none.
    WatchdogTrigger,
    /// `WATCHDOG_USEC=`: a new interval.
    WatchdogUsec(u64),
    /// `EXTEND_TIMEOUT_USEC=`
    ExtendTimeoutUsec(u64),
    /// `FDSTORE=1`
    FdStore,
    /// `FDSTOREREMOVE=1`
    FdStoreRemove,
    /// `FDNAME=`
    FdName(String),
    /// `FDPOLL=`: whether stored fds are dropped when their other end hangs up.
    FdPoll(bool),
    /// `BARRIER=1`
    Barrier,
    /// Anything else, by its name.
    Unknown(String),
}

/// Why a message is ignored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotifyError {
    /// No field in it.
    #[error("it is empty; send lines of KEY=value, such as READY=1")]
    Empty,
    /// Longer than [`MAX_LEN`].
    #[error("it is longer than {MAX_LEN} bytes; shorten STATUS=")]
    TooLong,
    /// More fds than the kernel sends in a message, or than zddsup may open.
    #[error("some of its fds were lost: send fewer in a message, or raise zddsup's limit of open files")]
    LostFds,
    /// A NUL byte inside.
    #[error("it has a NUL byte at {at}; fields are separated by newlines")]
    Nul {
        /// Where.
        at: usize,
    },
    /// Not text.
    #[error("it is not UTF-8 from byte {at} on")]
    NotUtf8 {
        /// Where.
        at: usize,
    },
    /// A value that its key does not have.
    #[error("{key}={value} is not {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// What was sent, shortened.
        value: String,
        /// What it has to be.
        expected: &'static str,
    },
}

/// Reads a message. One trailing NUL is allowed, as C strings are sent with it at times.
pub fn parse(bytes: &[u8]) -> Result<Vec<Field>, NotifyError> {
    if bytes.len() > MAX_LEN {
        return Err(NotifyError::TooLong);
    }
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
        return Err(NotifyError::Nul { at });
    }
    let text = std::str::from_utf8(bytes).map_err(|error| NotifyError::NotUtf8 { at: error.valid_up_to() })?;
    let fields = text.split('\n').filter(|line| !line.is_empty()).map(field).collect::<Result<Vec<_>, _>>()?;
    if fields.is_empty() {
        return Err(NotifyError::Empty);
    }
    Ok(fields)
}

fn field(line: &str) -> Result<Field, NotifyError> {
    // systemd looks at whole lines too: READY=0 says nothing.
    match line {
        "READY=1" => return Ok(Field::Ready),
        "STOPPING=1" => return Ok(Field::Stopping),
        "RELOADING=1" => return Ok(Field::Reloading),
        "WATCHDOG=1" => return Ok(Field::Watchdog),
        "WATCHDOG=trigger" => return Ok(Field::WatchdogTrigger),
        "FDSTORE=1" => return Ok(Field::FdStore),
        "FDSTOREREMOVE=1" => return Ok(Field::FdStoreRemove),
        "FDPOLL=0" => return Ok(Field::FdPoll(false)),
        "FDPOLL=1" => return Ok(Field::FdPoll(true)),
        "BARRIER=1" => return Ok(Field::Barrier),
        _ => {}
    }
    let (key, value) = line.split_once('=').unwrap_or((line, ""));
    Ok(match key {
        "STATUS" => Field::Status(value.to_owned()),
        "BUSERROR" => Field::BusError(value.to_owned()),
        "ERRNO" => Field::Errno(number("ERRNO", value, "an errno", |&errno| errno >= 0)?),
        "MAINPID" => Field::MainPid(number("MAINPID", value, "a process id", |&pid| pid > 0)?),
        "WATCHDOG_USEC" => Field::WatchdogUsec(number("WATCHDOG_USEC", value, "a number of microseconds", |_| true)?),
        "EXTEND_TIMEOUT_USEC" => {
            Field::ExtendTimeoutUsec(number("EXTEND_TIMEOUT_USEC", value, "a number of microseconds", |_| true)?)
        }
        "MONOTONIC_USEC" => {
            Field::MonotonicUsec(number("MONOTONIC_USEC", value, "a number of microseconds", |_| true)?)
        }
        "FDNAME" => match check_name(value) {
            Ok(()) => Field::FdName(value.to_owned()),
            Err(_) => return Err(wrong("FDNAME", value, "a name: up to 255 printable ASCII characters without ':'")),
        },
        _ => Field::Unknown(shortened(key)),
    })
}

fn number<N: std::str::FromStr>(
    key: &'static str,
    value: &str,
    expected: &'static str,
    allowed: impl Fn(&N) -> bool,
) -> Result<N, NotifyError> {
    value.parse().ok().filter(allowed).ok_or_else(|| wrong(key, value, expected))
}

fn wrong(key: &'static str, value: &str, expected: &'static str) -> NotifyError {
    NotifyError::Value { key, value: shortened(value), expected }
}

/// Goes into the log, so it is kept short and without control characters.
fn shortened(text: &str) -> String {
    text.chars().take(64).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_of_many_fields() {
        let fields = parse(b"READY=1\nSTATUS=at work = busy\nMAINPID=42\nWATCHDOG_USEC=5000000\nX_MINE=1\n").unwrap();
        assert_eq!(
            fields,
            [
                Field::Ready,
                Field::Status("at work = busy".to_owned()),
                Field::MainPid(42),
                Field::WatchdogUsec(5_000_000),
                Field::Unknown("X_MINE".to_owned()),
            ]
        );
    }

    #[test]
    fn the_fd_store() {
        let fields = parse(b"FDSTORE=1\nFDNAME=cache\nFDPOLL=0\0").unwrap();
        assert_eq!(fields, [Field::FdStore, Field::FdName("cache".to_owned()), Field::FdPoll(false)]);
    }

    #[test]
    fn ready_is_said_by_1_only() {
        assert_eq!(parse(b"READY=0").unwrap(), [Field::Unknown("READY".to_owned())]);
        assert_eq!(parse(b"READY").unwrap(), [Field::Unknown("READY".to_owned())]);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        assert_eq!(parse(b"").unwrap_err(), NotifyError::Empty);
        assert_eq!(parse(b"\n\n").unwrap_err(), NotifyError::Empty);
        assert_eq!(parse(b"READY=1\0STATUS=x").unwrap_err(), NotifyError::Nul { at: 7 });
        assert_eq!(parse(b"STATUS=\xff").unwrap_err(), NotifyError::NotUtf8 { at: 7 });
        assert_eq!(parse(&[b'x'; MAX_LEN + 1]).unwrap_err(), NotifyError::TooLong);
        assert_eq!(parse(b"MAINPID=-1").unwrap_err().to_string(), "MAINPID=-1 is not a process id");
        assert!(parse(b"FDNAME=a:b").is_err());
        assert!(parse(b"WATCHDOG_USEC=99999999999999999999999").is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..MAX_LEN + 2)) {
            let _either = parse(&bytes);
        }

        #[test]
        fn no_line_of_a_known_key_makes_it_panic(
            key in "READY|STATUS|ERRNO|MAINPID|WATCHDOG|WATCHDOG_USEC|FDNAME|FDPOLL",
            value in any::<String>(),
        ) {
            let _either = parse(format!("{key}={value}").as_bytes());
        }

        #[test]
        fn a_status_arrives_as_it_was_sent(text in "[^\0\n]{0,300}") {
            let message = format!("STATUS={text}");
            prop_assert_eq!(parse(message.as_bytes()).unwrap(), vec![Field::Status(text)]);
        }
    }
}
