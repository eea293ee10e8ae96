//! The driver: turns the core's actions into system calls, and what happens into its events.
//!
//! | file | what it holds |
//! |---|---|
//! | [`run`] | from a configuration to the end of the service: start-up, **the loop**, the end |
//! | [`driver`] | what it holds, and the list of actions and reports |
//! | [`spawning`] | the one place where a generation's environment and fds are made |
//! | [`readiness`] | how it learns that a candidate can serve |
//! | [`adopting`] | sockets that services make themselves, and that are steered |
//! | [`caught`] | their bind(2) and listen(2): what becomes of each |
//! | [`unseen`] | sockets that were not caught |
//! | [`steered`] | who is reached at an address where several generations have sockets |
//! | [`ports`] | which ports the kernel chose for them |
//! | [`datagrams`], [`locals`] | those of UDP; Unix sockets |
//! | [`canary`] | a share of new connections before the switch, and its checks |
//! | [`leaving`] | sockets of generations that are gone, and what waits in their queues |
//! | [`switching`] | the switch, with the sockets and what is kept that go with it |
//! | [`ending`] | drain, signal, sweep, release |
//! | [`daemons`] | programs whose first process is not the one that stays |
//! | [`running`] | what is held for a generation while it lives |
//! | [`messages`] | what generations say: notify and handoff messages |
//! | [`transactions`], [`reports`] | news of upgrades, and their history |
//! | [`status`], [`counting`] | the state for people and programs; connections |
//! | [`store`] | fds and state that generations leave for the next |
//! | [`recorded`], [`takeover`] | going on after a supervisor that was killed |
//! | [`stored_above`], [`slots`] | what systemd holds for that meanwhile: sockets, and what is recorded |
//! | [`replacing`] | another program in the supervisor's place |
//! | [`answering`] | the control server beside the loop |
//! | [`signals`], [`instance`] | signals; one supervisor a name |
//! | [`upward`], [`above`] | what a supervisor above is told, and the way to it |

pub mod above;
mod adopting;
mod answering;
mod canary;
mod caught;
mod counting;
mod daemons;
mod datagrams;
pub mod driver;
mod ending;
pub mod instance;
mod leaving;
mod locals;
mod messages;
mod ports;
mod readiness;
pub mod recorded;
pub mod replacing;
pub mod reports;
pub mod run;
pub mod running;
pub mod signals;
mod slots;
mod spawning;
mod status;
mod steered;
pub mod store;
mod stored_above;
mod switching;
mod takeover;
mod transactions;
mod unseen;
pub mod upward;

pub use ending::describe;
