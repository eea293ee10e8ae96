//! Every `unsafe` and every raw system call, one family a file; safe, typed functions are what leaves.
#![allow(unsafe_code)]

#[cfg(feature = "cli")]
pub mod exec;
pub mod fds;
#[cfg(feature = "cli")]
pub mod memory;
#[cfg(feature = "cli")]
pub mod peek;
#[cfg(feature = "cli")]
pub mod pidfd;
pub mod readiness;
pub mod scm;
#[cfg(feature = "cli")]
pub mod seccomp;
pub mod socket;
#[cfg(feature = "cli")]
pub mod steer;
#[cfg(feature = "cli")]
pub mod view;
#[cfg(feature = "cli")]
pub mod wait;
#[cfg(feature = "cli")]
pub mod xattr;
