//! `LISTEN_FDS`, `LISTEN_PID` and `LISTEN_FDNAMES`: open sockets from fd 3 on (`sd_listen_fds(3)`).

/// Number of the first fd.
pub const FIRST_FD: i32 = 3;

/// How many fds.
pub const COUNT_VAR: &str = "LISTEN_FDS";
/// Which process they are meant for.
pub const PID_VAR: &str = "LISTEN_PID";
/// Their names, separated by colons.
pub const NAMES_VAR: &str = "LISTEN_FDNAMES";
/// All variables of the protocol, the one for pidfds too; a process that took its fds removes them.
pub const VARS: [&str; 4] = [COUNT_VAR, PID_VAR, NAMES_VAR, "LISTEN_PIDFDID"];

/// What systemd calls an fd that has no name.
pub const UNNAMED: &str = "unknown";

/// The longest name.
pub const MAX_NAME: usize = 255;

/// More are not believed.
pub const MAX_COUNT: usize = 65_536;

/// Why something is no name of an fd.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing in it.
    #[error("a name has at least one character")]
    Empty,
    /// Longer than [`MAX_NAME`].
    #[error("a name has at most {MAX_NAME} characters, not {0}")]
    TooLong(usize),
    /// A character that no name has.
    #[error("a name has printable ASCII characters without ':' only, not {0:?}")]
    Character(char),
}

/// Why the variables cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ListenFdsError {
    /// No number.
    #[error("{key}={value:?} is not a number; unset it, or start this process from what sets it")]
    Number {
        /// Which variable.
        key: &'static str,
        /// What it is.
        value: String,
    },
    /// More than [`MAX_COUNT`].
    #[error("LISTEN_FDS={0} is more than {MAX_COUNT}")]
    TooMany(usize),
    /// Names and count differ.
    #[error("LISTEN_FDNAMES has {names} names, but LISTEN_FDS says {count}")]
    Names {
        /// How many names.
        names: usize,
        /// How many fds.
        count: usize,
    },
    /// One of the names is none.
    #[error("LISTEN_FDNAMES has {name:?}: {source}")]
    Name {
        /// Which.
        name: String,
        /// Why.
        source: NameError,
    },
}

/// Whether something can name an fd: the rules of systemd, and not empty.
pub fn check_name(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    match name.chars().find(|&c| !matches!(c, ' '..='~') || c == ':') {
        Some(character) => Err(NameError::Character(character)),
        None if name.len() > MAX_NAME => Err(NameError::TooLong(name.len())),
        None => Ok(()),
    }
}

/// The variables for fds of these names, in their order from [`FIRST_FD`] on. `LISTEN_PID` is not among them: only the
/// spawned process knows it.
#[must_use]
pub fn encode<N: AsRef<str>>(names: &[N]) -> [(&'static str, String); 2] {
    let joined = names.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(":");
    [(COUNT_VAR, names.len().to_string()), (NAMES_VAR, joined)]
}

/// Names of the fds that are meant for process `pid`: fd [`FIRST_FD`] has the first one. Empty when there are none, or
/// when they are meant for another process.
pub fn decode(variable: impl Fn(&str) -> Option<String>, pid: u32) -> Result<Vec<String>, ListenFdsError> {
    let (Some(count), Some(meant_for)) = (variable(COUNT_VAR), variable(PID_VAR)) else {
        return Ok(Vec::new());
    };
    let not_a_number = |key| move |value: &String| ListenFdsError::Number { key, value: value.clone() };
    if meant_for.parse::<u32>().map_err(|_| not_a_number(PID_VAR)(&meant_for))? != pid {
        return Ok(Vec::new());
    }
    let count: usize = count.parse().map_err(|_| not_a_number(COUNT_VAR)(&count))?;
    if count > MAX_COUNT {
        return Err(ListenFdsError::TooMany(count));
    }
    let names = match variable(NAMES_VAR) {
        Some(names) if count > 0 => names.split(':').map(str::to_owned).collect(),
        _ => vec![UNNAMED.to_owned(); count],
    };
    if names.len() != count {
        return Err(ListenFdsError::Names { names: names.len(), count });
    }
    for name in names.iter().filter(|name| !name.is_empty()) {
        check_name(name).map_err(|source| ListenFdsError::Name { name: name.clone(), source })?;
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode_pairs(pairs: &[(&str, &str)], pid: u32) -> Result<Vec<String>, ListenFdsError> {
        decode(|key| pairs.iter().find(|pair| pair.0 == key).map(|pair| pair.1.to_owned()), pid)
    }

    #[test]
    fn fds_for_another_process_are_none() {
        assert_eq!(decode_pairs(&[("LISTEN_FDS", "1"), ("LISTEN_PID", "7")], 7).unwrap(), ["unknown"]);
        assert!(decode_pairs(&[("LISTEN_FDS", "1"), ("LISTEN_PID", "7")], 8).unwrap().is_empty());
        assert!(decode_pairs(&[("LISTEN_FDS", "1")], 8).unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let with =
            |count, names| decode_pairs(&[("LISTEN_FDS", count), ("LISTEN_PID", "7"), ("LISTEN_FDNAMES", names)], 7);
        assert_eq!(with("2", "a").unwrap_err(), ListenFdsError::Names { names: 1, count: 2 });
        assert!(matches!(with("-1", "a").unwrap_err(), ListenFdsError::Number { key: "LISTEN_FDS", .. }));
        assert_eq!(with("4294967295", "a").unwrap_err(), ListenFdsError::TooMany(4_294_967_295));
        assert!(matches!(with("1", "\u{e4}").unwrap_err(), ListenFdsError::Name { .. }));
        assert!(with("0", "").unwrap().is_empty());
    }

    #[test]
    fn the_rules_of_names() {
        assert_eq!(check_name("http and more"), Ok(()));
        assert_eq!(check_name(""), Err(NameError::Empty));
        assert_eq!(check_name("a:b"), Err(NameError::Character(':')));
        assert_eq!(check_name("a\n"), Err(NameError::Character('\n')));
        assert_eq!(check_name(&"x".repeat(256)), Err(NameError::TooLong(256)));
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(names in proptest::collection::vec("[ -9;-~]{1,20}", 0..20)) {
            let mut pairs = encode(&names).to_vec();
            pairs.push((PID_VAR, "7".to_owned()));
            let decoded = decode(|key| pairs.iter().find(|pair| pair.0 == key).map(|pair| pair.1.clone()), 7);
            prop_assert_eq!(decoded.unwrap(), names);
        }

        #[test]
        fn no_environment_makes_it_panic(count in any::<String>(), pid in any::<String>(), names in any::<String>()) {
            let _either = decode_pairs(&[("LISTEN_FDS", &count), ("LISTEN_PID", "7"), ("LISTEN_FDNAMES", &names)], 7);
            let _or = decode_pairs(&[("LISTEN_FDS", "2"), ("LISTEN_PID", &pid), ("LISTEN_FDNAMES", &names)], 7);
        }
    }
}
