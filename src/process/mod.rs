//! Processes: programs, spawning, reaping, groups, output.
//!
//! | file | what it holds |
//! |---|---|
//! | [`program`] | what is run: an executable, held open |
//! | [`identity`] | who it runs as |
//! | [`limits`] | resource limits |
//! | [`reaper`] | the one place where children are reaped |

pub mod identity;
pub mod limits;
pub mod program;
pub mod reaper;
