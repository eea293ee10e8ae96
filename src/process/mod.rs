//! Processes: programs, spawning, reaping, groups, output.
//!
//! | file | what it holds |
//! |---|---|
//! | [`limits`] | resource limits |
//! | [`reaper`] | the one place where children are reaped |

pub mod limits;
pub mod reaper;
