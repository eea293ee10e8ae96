//! Servers that know nothing of zddsup and bind for themselves, upgraded five times under load: no request fails, on
//! connections that are used again neither, for the old process is left alone until its last connection is gone.
//!
//! | file | what it is about |
//! |---|---|
//! | `servers` | real servers, one a test |
//! | `datagrams` | UDP: every datagram is answered |
//! | `locals` | Unix sockets |
//! | `steering` | what the kernel does with new connections in each phase, crashes, addresses that come and go |

#[path = "../common/mod.rs"]
mod common;
mod stage;

mod datagrams;
mod locals;
mod servers;
mod steering;
