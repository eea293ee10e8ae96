//! The control API: types, server, client.

pub mod types;
