//! Processes: programs, spawning, reaping, groups, output.
//!
//! | file | what it holds |
//! |---|---|
//! | [`limits`] | resource limits |

pub mod limits;
