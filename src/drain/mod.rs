//! How an old generation finishes what it has: its connections, counted from outside.

pub mod connections;
pub mod diag;
