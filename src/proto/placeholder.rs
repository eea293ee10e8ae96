//! `{fd:NAME}` and `{generation}` in arguments and environment, for servers that take an fd number and know no protocol:
//! `fd@{fd:http}` for haproxy, `--fd {fd:listener}` for uvicorn.
//!
//! Anything else in braces is left as it is: arguments are JSON or templates at times. There is nothing to escape with.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Why a text cannot be expanded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceholderError {
    /// No listener of that name.
    #[error("there is no listener {name:?} for {{fd:{name}}}: {}", known_names(.known))]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
}

fn known_names(names: &[String]) -> String {
    match names {
        [] => "there are none at all; give --listen NAME=ADDRESS".to_owned(),
        names => format!("known names are {}", names.join(", ")),
    }
}

/// Replaces the placeholders. `fds` has the names of the listeners and the numbers that they have in the generation.
pub fn expand(text: &OsStr, fds: &[(&str, i32)], generation: u32) -> Result<OsString, PlaceholderError> {
    let mut rest = text.as_bytes();
    let mut expanded = Vec::with_capacity(rest.len());
    while let Some(open) = rest.iter().position(|&byte| byte == b'{') {
        expanded.extend_from_slice(&rest[..open]);
        rest = &rest[open..];
        let Some((value, len)) = placeholder(rest, fds, generation)? else {
            expanded.push(b'{');
            rest = &rest[1..];
            continue;
        };
        expanded.extend_from_slice(value.as_bytes());
        rest = &rest[len..];
    }
    expanded.extend_from_slice(rest);
    Ok(OsString::from_vec(expanded))
}

/// Whether there is an `{fd:…}` in it: the number of an fd matters then.
#[must_use]
pub fn asks_for_fd(text: &OsStr) -> bool {
    text.as_bytes().windows(4).any(|window| window == b"{fd:")
}

/// What stands for the placeholder that `text` begins with, and how long that is; none if it begins with none.
fn placeholder(text: &[u8], fds: &[(&str, i32)], generation: u32) -> Result<Option<(String, usize)>, PlaceholderError> {
    let Some(close) = text.iter().position(|&byte| byte == b'}') else { return Ok(None) };
    let inside = &text[1..close];
    if inside == b"generation" {
        return Ok(Some((generation.to_string(), close + 1)));
    }
    let Some(name) = inside.strip_prefix(b"fd:") else { return Ok(None) };
    match fds.iter().find(|(known, _)| known.as_bytes() == name) {
        Some((_, number)) => Ok(Some((number.to_string(), close + 1))),
        None => Err(PlaceholderError::Unknown {
            name: String::from_utf8_lossy(name).into_owned(),
            known: fds.iter().map(|(known, _)| (*known).to_owned()).collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FDS: [(&str, i32); 2] = [("http", 3), ("admin", 12)];

    fn expanded(text: &str) -> Result<String, PlaceholderError> {
        expand(text.as_ref(), &FDS, 7).map(|text| text.into_string().unwrap())
    }

    #[test]
    fn numbers_take_the_place_of_names() {
        assert_eq!(expanded("bind fd@{fd:http},fd@{fd:admin}").unwrap(), "bind fd@3,fd@12");
        assert_eq!(expanded("web-{generation}.log").unwrap(), "web-7.log");
        assert_eq!(expanded("{{fd:http}}").unwrap(), "{3}");
    }

    #[test]
    fn other_braces_stay() {
        for text in [r#"{"a": {"b": 1}}"#, "{", "{fd:http", "{}", "{name}", "${HOME}"] {
            assert_eq!(expanded(text).unwrap(), text);
        }
    }

    #[test]
    fn an_unknown_name_is_told_with_the_known_ones() {
        let error = expanded("{fd:htpp}").unwrap_err().to_string();
        assert_eq!(error, r#"there is no listener "htpp" for {fd:htpp}: known names are http, admin"#);
    }

    #[test]
    fn bytes_that_are_no_text_pass() {
        let text = OsStr::from_bytes(b"\xff{fd:http}\xfe");
        assert_eq!(expand(text, &FDS, 1).unwrap().as_bytes(), b"\xff3\xfe");
        assert!(asks_for_fd(text));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "([{}]|fd:|http|generation|.){0,40}") {
            let _either = expand(text.as_ref(), &FDS, 1);
        }

        #[test]
        fn a_text_without_braces_is_the_same(text in "[^{]*") {
            prop_assert_eq!(expanded(&text).unwrap(), text);
        }
    }
}
