//! Which of the sockets that listen on one address gets a new connection.
//!
//! ```text
//!  SYN ──> group of the address ──> program ──> index ──> [ 0: generation 1 │ 1: generation 2 │ 2: generation 2 ]
//! ```
//!
//! With `SO_REUSEPORT` each generation has sockets of its own at one address, and a program that the kernel runs for each
//! new connection names the one that gets it: a switch is one system call, and no process is asked.
//!
//! | file | what it holds |
//! |---|---|
//! | [`key`] | which group a socket is in |
//! | [`group`] | the sockets of a group in the kernel's order, whose they are, and who is steered to |
//! | [`program`] | instructions from what is wanted |
//!
//! What a program can't do: it is lost when the service attaches one of its own to a socket of the group, and it is not asked
//! for a connection by a handshake that began before it was attached, which stays with its socket.

pub mod group;
pub mod key;
pub mod program;

pub use self::group::{Group, SteerError};
pub use self::key::{Key, Protocol};
pub use self::program::Origin;
