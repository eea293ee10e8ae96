//! Messages on the handoff socket, as docs/handoff.md specifies them: one JSON object a packet.
//!
//! The first message of each side is hello, with the newest version that it speaks; the older of the two is spoken.

use base64::prelude::{Engine, BASE64_STANDARD};
use serde::{Deserialize, Serialize};

use super::listen_fds::{check_name, NameError, MAX_NAME};

/// The newest version that this side speaks.
pub const VERSION: u32 = 1;

/// Environment variable with the number of the generation's end of the socket.
pub const SOCKET_VAR: &str = "ZDDSUP_SOCKET";

/// The longest packet. Below the kernel's default send buffer, so that each side can send it.
pub const MAX_PACKET: usize = 128 * 1024;
/// How many fds go with a packet at most: what the kernel allows.
pub const MAX_FDS: usize = 253;
/// The longest state that goes with something kept, before base64.
pub const MAX_STATE: usize = 64 * 1024;
/// The longest status text.
pub const MAX_STATUS: usize = 4096;
/// How much a generation may keep for the next one: so many times,
pub const MAX_KEEPS: usize = 65_536;
/// and so many bytes of state in all.
pub const MAX_KEPT_BYTES: usize = 64 * 1024 * 1024;

// A full batch of listeners fits into a packet: each name is quoted, each of its characters may be escaped.
const _: () = assert!(MAX_FDS * (2 * MAX_NAME + 3) + 64 < MAX_PACKET);
// And so does the largest thing kept, and the longest status, of which each byte may become \u0000.
const _: () = assert!(MAX_STATE.div_ceil(3) * 4 + 2 * MAX_NAME + 128 < MAX_PACKET);
const _: () = assert!(MAX_STATUS * 6 + 64 < MAX_PACKET);

/// What the supervisor says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToGeneration {
    /// Comes first.
    Hello {
        /// The newest version that it speaks.
        protocol: u32,
        /// Name of the service.
        service: String,
        /// Number of the generation that is spoken to.
        generation: u32,
    },
    /// Listening sockets, one fd a name in this order. There may be many of these, right after hello.
    Listeners {
        /// Their names.
        names: Vec<String>,
        /// Whether these are all.
        last: bool,
    },
    /// Take no new connections, finish what there is, pass on what is to be kept, and exit.
    Drain {
        /// After so many milliseconds it is stopped; never if this is missing.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        timeout_ms: Option<u64>,
        /// Whether nobody serves after it: the service is being stopped, and nothing can be passed on.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        last: bool,
        /// With `last`: older generations still drain, and what they keep meanwhile comes to this one. The same message
        /// without it follows.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        more: bool,
    },
    /// Something that a former generation passes on, with its fds.
    Kept {
        /// To be named in taken.
        id: u64,
        /// What it is called.
        name: String,
        /// Bytes that go with it.
        #[serde(default, with = "state", skip_serializing_if = "Vec::is_empty")]
        state: Vec<u8>,
    },
}

/// What a generation says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromGeneration {
    /// Comes first: this generation speaks the protocol, and is told to drain by a message instead of a signal.
    Hello {
        /// The newest version that it speaks.
        protocol: u32,
    },
    /// It can serve.
    Ready,
    /// One line for people.
    Status {
        /// The line.
        text: String,
    },
    /// To be passed on to the generation that serves after this one, with its fds.
    Keep {
        /// What it is called.
        name: String,
        /// Bytes that go with it.
        #[serde(default, with = "state", skip_serializing_if = "Vec::is_empty")]
        state: Vec<u8>,
    },
    /// It has what it was passed: the supervisor drops its copy.
    Taken {
        /// Which.
        id: u64,
    },
    /// It has finished all that it had.
    Drained,
}

/// Why a packet is not understood.
#[derive(Debug, thiserror::Error)]
pub enum HandoffError {
    /// Longer than [`MAX_PACKET`].
    #[error("a packet of more than {MAX_PACKET} bytes; send less state at once")]
    TooLong,
    /// No message of the protocol.
    #[error("a packet that is no message of version {VERSION}: {0}")]
    Json(#[from] serde_json::Error),
    /// Version 0.
    #[error("protocol version 0, which never was")]
    Version,
    /// A name that is none.
    #[error("the name {name:?}: {source}")]
    Name {
        /// Which.
        name: String,
        /// Why.
        source: NameError,
    },
    /// State longer than [`MAX_STATE`].
    #[error("{0} bytes of state, which may be {MAX_STATE}; put more into a memfd and keep that")]
    State(usize),
    /// Status longer than [`MAX_STATUS`].
    #[error("a status of {0} bytes, which may be {MAX_STATUS}")]
    Status(usize),
    /// More names than fds can go with a packet.
    #[error("{0} listeners in a packet, which may be {MAX_FDS}")]
    Listeners(usize),
    /// Fds of another number than the message names, or with one that takes none.
    #[error("{found} fds with a message that has {expected}")]
    Fds {
        /// How many came.
        found: usize,
        /// How many were to come.
        expected: usize,
    },
}

impl ToGeneration {
    /// As a packet.
    pub fn encode(&self) -> Result<Vec<u8>, HandoffError> {
        self.check()?;
        packet(self)
    }

    /// From a packet that came with so many fds.
    pub fn decode(packet: &[u8], fds: usize) -> Result<Self, HandoffError> {
        let message: Self = parse(packet)?;
        message.check()?;
        match &message {
            ToGeneration::Listeners { names, .. } => expect(fds, names.len())?,
            ToGeneration::Kept { .. } => {}
            ToGeneration::Hello { .. } | ToGeneration::Drain { .. } => expect(fds, 0)?,
        }
        Ok(message)
    }

    fn check(&self) -> Result<(), HandoffError> {
        match self {
            ToGeneration::Hello { protocol, service: _, generation: _ } => check_version(*protocol),
            ToGeneration::Listeners { names, last: _ } if names.len() > MAX_FDS => {
                Err(HandoffError::Listeners(names.len()))
            }
            ToGeneration::Listeners { names, last: _ } => names.iter().try_for_each(|name| check_named(name)),
            ToGeneration::Drain { timeout_ms: _, last: _, more: _ } => Ok(()),
            ToGeneration::Kept { id: _, name, state } => check_kept(name, state),
        }
    }
}

impl FromGeneration {
    /// As a packet.
    pub fn encode(&self) -> Result<Vec<u8>, HandoffError> {
        self.check()?;
        packet(self)
    }

    /// From a packet that came with so many fds.
    pub fn decode(packet: &[u8], fds: usize) -> Result<Self, HandoffError> {
        let message: Self = parse(packet)?;
        message.check()?;
        if !matches!(message, FromGeneration::Keep { .. }) {
            expect(fds, 0)?;
        }
        Ok(message)
    }

    fn check(&self) -> Result<(), HandoffError> {
        match self {
            FromGeneration::Hello { protocol } => check_version(*protocol),
            FromGeneration::Keep { name, state } => check_kept(name, state),
            FromGeneration::Status { text } if text.len() > MAX_STATUS => Err(HandoffError::Status(text.len())),
            FromGeneration::Status { .. }
            | FromGeneration::Ready
            | FromGeneration::Taken { .. }
            | FromGeneration::Drained => Ok(()),
        }
    }
}

fn packet(message: &impl Serialize) -> Result<Vec<u8>, HandoffError> {
    let packet = serde_json::to_vec(message)?;
    if packet.len() > MAX_PACKET {
        return Err(HandoffError::TooLong);
    }
    Ok(packet)
}

fn parse<'a, M: Deserialize<'a>>(packet: &'a [u8]) -> Result<M, HandoffError> {
    if packet.len() > MAX_PACKET {
        return Err(HandoffError::TooLong);
    }
    Ok(serde_json::from_slice(packet)?)
}

fn check_version(protocol: u32) -> Result<(), HandoffError> {
    if protocol == 0 {
        return Err(HandoffError::Version);
    }
    Ok(())
}

fn check_named(name: &str) -> Result<(), HandoffError> {
    check_name(name).map_err(|source| HandoffError::Name { name: name.chars().take(64).collect(), source })
}

fn check_kept(name: &str, state: &[u8]) -> Result<(), HandoffError> {
    if state.len() > MAX_STATE {
        return Err(HandoffError::State(state.len()));
    }
    check_named(name)
}

fn expect(found: usize, expected: usize) -> Result<(), HandoffError> {
    if found == expected {
        Ok(())
    } else {
        Err(HandoffError::Fds { found, expected })
    }
}

/// Bytes as base64 (RFC 4648, with padding).
pub(crate) mod state {
    use super::{Deserialize, Engine, BASE64_STANDARD};
    use serde::{Deserializer, Serializer};
    use std::borrow::Cow;

    pub fn serialize<S: Serializer>(state: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(state))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        BASE64_STANDARD.decode(text.as_bytes()).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NAME: &str = "[ -9;-~]{1,255}";

    fn to_generation() -> impl Strategy<Value = ToGeneration> {
        let state = proptest::collection::vec(any::<u8>(), 0..2000);
        prop_oneof![
            (1..u32::MAX, any::<String>(), any::<u32>())
                .prop_map(|(protocol, service, generation)| ToGeneration::Hello { protocol, service, generation }),
            (proptest::collection::vec(NAME, 0..20), any::<bool>())
                .prop_map(|(names, last)| ToGeneration::Listeners { names, last }),
            (any::<Option<u64>>(), any::<bool>(), any::<bool>())
                .prop_map(|(timeout_ms, last, more)| ToGeneration::Drain { timeout_ms, last, more }),
            (any::<u64>(), NAME, state).prop_map(|(id, name, state)| ToGeneration::Kept { id, name, state }),
        ]
    }

    fn from_generation() -> impl Strategy<Value = FromGeneration> {
        let state = proptest::collection::vec(any::<u8>(), 0..2000);
        prop_oneof![
            (1..u32::MAX).prop_map(|protocol| FromGeneration::Hello { protocol }),
            Just(FromGeneration::Ready),
            "\\PC{0,200}".prop_map(|text| FromGeneration::Status { text }),
            (NAME, state).prop_map(|(name, state)| FromGeneration::Keep { name, state }),
            any::<u64>().prop_map(|id| FromGeneration::Taken { id }),
            Just(FromGeneration::Drained),
        ]
    }

    proptest! {
        #[test]
        fn what_the_supervisor_says_arrives(message in to_generation()) {
            let fds = if let ToGeneration::Listeners { names, .. } = &message { names.len() } else { 0 };
            let decoded = ToGeneration::decode(&message.encode().unwrap(), fds).unwrap();
            prop_assert_eq!(decoded, message);
        }

        #[test]
        fn what_a_generation_says_arrives(message in from_generation()) {
            let decoded = FromGeneration::decode(&message.encode().unwrap(), 0).unwrap();
            prop_assert_eq!(decoded, message);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..500), fds in 0_usize..300) {
            let _either = ToGeneration::decode(&bytes, fds);
            let _or = FromGeneration::decode(&bytes, fds);
        }

        #[test]
        fn no_json_makes_it_panic(json in r#"\{("type":"(keep|kept|listeners|status)"|"(names|state|id|text)":(\[\]|"[a-zA-Z=]*"|-?[0-9]{1,25}|null)|,){0,8}\}"#) {
            let _either = ToGeneration::decode(json.as_bytes(), 0);
            let _or = FromGeneration::decode(json.as_bytes(), 0);
        }
    }

    #[test]
    fn the_bytes_are_those_of_the_document() {
        let hello = ToGeneration::Hello { protocol: 1, service: "web".to_owned(), generation: 3 };
        assert_eq!(hello.encode().unwrap(), br#"{"type":"hello","protocol":1,"service":"web","generation":3}"#);
        assert_eq!(FromGeneration::Ready.encode().unwrap(), br#"{"type":"ready"}"#);
        let keep = FromGeneration::Keep { name: "echo".to_owned(), state: b"hi".to_vec() };
        assert_eq!(keep.encode().unwrap(), br#"{"type":"keep","name":"echo","state":"aGk="}"#);
        let drain = ToGeneration::decode(br#"{"type":"drain","later":[1]}"#, 0).unwrap();
        assert_eq!(drain, ToGeneration::Drain { timeout_ms: None, last: false, more: false });
        assert_eq!(drain.encode().unwrap(), br#"{"type":"drain"}"#);
        let stop = ToGeneration::Drain { timeout_ms: Some(5), last: true, more: false };
        assert_eq!(stop.encode().unwrap(), br#"{"type":"drain","timeout_ms":5,"last":true}"#);
    }

    #[test]
    fn limits_are_kept_in_both_directions() {
        let state = vec![0; MAX_STATE];
        let keep = FromGeneration::Keep { name: "\\".repeat(MAX_NAME), state };
        assert_eq!(FromGeneration::decode(&keep.encode().unwrap(), 1).unwrap(), keep);
        let more = FromGeneration::Keep { name: "x".to_owned(), state: vec![0; MAX_STATE + 1] };
        assert!(matches!(more.encode(), Err(HandoffError::State(_))));
        let listeners = ToGeneration::Listeners { names: vec!["\"".repeat(MAX_NAME); MAX_FDS], last: true };
        assert!(listeners.encode().is_ok());
        let longest = FromGeneration::Status { text: "\u{1}".repeat(MAX_STATUS) };
        assert!(longest.encode().is_ok());
        assert!(matches!(FromGeneration::decode(&vec![b' '; MAX_PACKET + 1], 0), Err(HandoffError::TooLong)));
    }

    #[test]
    fn fds_that_do_not_belong_are_refused() {
        let packet = FromGeneration::Ready.encode().unwrap();
        assert!(matches!(FromGeneration::decode(&packet, 1), Err(HandoffError::Fds { found: 1, expected: 0 })));
        let packet = ToGeneration::Listeners { names: vec!["a".to_owned()], last: true }.encode().unwrap();
        assert!(matches!(ToGeneration::decode(&packet, 2), Err(HandoffError::Fds { found: 2, expected: 1 })));
        assert!(FromGeneration::decode(br#"{"type":"hello","protocol":0}"#, 0).is_err());
    }
}
