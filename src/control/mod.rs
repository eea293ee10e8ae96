//! The control API: HTTP/1.1 with JSON on a Unix socket (docs/control.md).
//!
//! | file | what it holds |
//! |---|---|
//! | [`types`] | what travels |
//! | [`place`] | where the socket is |
//! | [`server`], [`answers`] | the supervisor's end: connections and their limits; what each path answers |
//! | [`client`] | the command line's end |
//! | [`sse`] | events as text (server-sent events) |
//! | [`metrics`] | the state as `OpenMetrics` text |

pub mod answers;
pub mod client;
#[cfg(test)]
pub(crate) mod fixture;
pub mod metrics;
pub mod place;
pub mod server;
pub mod sse;
#[cfg(test)]
mod tests;
pub mod types;
