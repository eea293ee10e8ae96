//! zddsup: upgrade any server without refusing, resetting or delaying a connection.
//!
//! What a supervised Rust service uses is `zddsup::service`; the rest is the program, laid open so that
//! tests, benchmarks and fuzz targets reach it, and is no stable interface.
//!
//! ```text
//!  cli ──> config ──> supervisor ──> core          the pure state machine: what to do next
//!   │                     │
//!   └──> control          ├──> listener            addresses, binding, inheriting
//!        (HTTP, both      ├──> process             spawn, reap, groups, output
//!         ends)           ├──> handoff, ready, drain
//!                         └──> proto               bytes of the protocols, pure
//!                         └──> state               what a supervisor leaves to the program in its place
//!                                   sys            every unsafe and every raw system call
//! ```
#![deny(unsafe_code)]

#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "cli")]
pub mod config;
#[cfg(feature = "cli")]
pub mod control;
#[cfg(feature = "cli")]
pub mod core;
#[cfg(feature = "cli")]
pub mod doctor;
#[cfg(feature = "cli")]
pub mod drain;
#[cfg(feature = "cli")]
pub mod handoff;
#[cfg(feature = "cli")]
pub mod listener;
#[cfg(feature = "cli")]
pub mod process;
pub mod proto;
#[cfg(feature = "cli")]
pub mod ready;
pub mod service;
#[cfg(feature = "cli")]
pub mod state;
#[cfg(feature = "cli")]
pub mod supervisor;
pub mod sys;
