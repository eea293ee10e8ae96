//! The driver: turns the core's actions into system calls, and what happens into its events.
//!
//! | file | what it holds |
//! |---|---|
//! | [`run`] | from a configuration to the end of the service: start-up, **the loop**, shut-down |
//! | [`driver`] | performs each action |
//! | [`spawning`] | the one place where a generation's environment and fds are made |
//! | [`running`] | what is held for a generation while it lives |
//! | [`messages`] | what generations say: notify and handoff messages |
//! | [`reports`] | the history of transactions |
//! | [`status`] | the state for people and programs |
//! | [`store`] | fds and state that generations leave for the next |
//! | [`recorded`], [`takeover`] | going on after a supervisor that was killed |
//! | [`signals`], [`instance`] | signals; one supervisor a name |

pub mod instance;
pub mod recorded;
pub mod reports;
pub mod signals;
pub mod store;
