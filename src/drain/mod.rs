//! How an old generation finishes what it has: its connections, counted from outside, and its sockets.

pub mod connections;
pub mod diag;
pub mod migration;
pub mod retired;
