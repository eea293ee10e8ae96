//! Bytes and environment of the protocols: pure, fuzzed. Nothing here does I/O, and no input makes it panic.
//!
//! | file | protocol |
//! |---|---|
//! | [`notify`] | what a service says on `NOTIFY_SOCKET` (`sd_notify(3)`) |
//! | [`handoff`] | messages on the handoff socket (docs/handoff.md) |
//! | [`listen_fds`] | `LISTEN_FDS` (`sd_listen_fds(3)`) |
//! | [`compat`] | what `start_server` and einhorn tell their workers |
//! | [`placeholder`] | `{fd:NAME}` in arguments and environment |

pub mod compat;
#[cfg(feature = "service")]
pub mod handoff;
pub mod listen_fds;
pub mod notify;
pub mod placeholder;
