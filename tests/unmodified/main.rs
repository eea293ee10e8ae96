//! Servers that know nothing of zddsup and bind for themselves, upgraded five times under load: no request fails, on
//! connections that are used again neither, for the old process is left alone until its last connection is gone.
//!
//! | file | what it is about |
//! |---|---|
//! | `canary` | a share for the new version first: by number, by network, in steps; what ends it |
//! | `servers` | real servers, one a test |
//! | `steering` | what the kernel does with new connections in each phase, crashes, addresses that come and go |

#[path = "../common/mod.rs"]
mod common;
mod stage;

mod canary;
mod servers;
mod steering;
