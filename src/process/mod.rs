//! Processes: programs, spawning, reaping, groups, output.
//!
//! | file | what it holds |
//! |---|---|
//! | [`program`] | what is run: an executable, held open |
//! | [`identity`], [`limits`] | who it runs as, and with which resource limits |
//! | [`spawn`] | fork, all that a process is to be, execve |
//! | `failure`, `interpreter` | why that did not work, in words |
//! | [`reaper`] | the one place where children are reaped |
//! | [`group`], [`table`] | all processes of a generation, and what `/proc` says of one |
//! | [`cgroup`] | a cgroup for each generation, where one is delegated |
//! | [`orphans`] | daemons that hid where they come from |
//! | [`output`], `capture`, `tail` | the way of a service's stderr |

pub mod capture;
pub mod cgroup;
mod failure;
pub mod group;
pub mod identity;
mod interpreter;
pub mod limits;
pub mod orphans;
pub mod output;
pub mod program;
pub mod reaper;
pub mod spawn;
pub mod table;
mod tail;
