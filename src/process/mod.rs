//! Processes: programs, spawning, reaping, groups, output.
//!
//! | file | what it holds |
//! |---|---|
//! | [`program`] | what is run: an executable, held open |
//! | [`identity`] | who it runs as |
//! | [`limits`] | resource limits |
//! | [`spawn`] | fork, all that a process is to be, execve |
//! | [`reaper`] | the one place where children are reaped |
//! | [`group`] | all processes of a generation |

mod failure;
pub mod group;
pub mod identity;
mod interpreter;
pub mod limits;
pub mod program;
pub mod reaper;
pub mod spawn;
mod table;
