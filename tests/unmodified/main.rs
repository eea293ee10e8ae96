//! Servers that know nothing of zddsup and bind for themselves, upgraded five times under load: no request fails, on
//! connections that are used again neither, for the old process is left alone until its last connection is gone.
//!
//! | file | what it is about |
//! |---|---|
//! | `servers` | real servers, one a test |
//! | `declared` | `--listen` in the place of what they bind |
//! | `probes` | probes on the port that both generations have |
//! | `steering` | what the kernel does with new connections in each phase, crashes, addresses that come and go |

#[path = "../common/mod.rs"]
mod common;
mod stage;

mod declared;
mod probes;
mod servers;
mod steering;
