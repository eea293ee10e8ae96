//! The supervisor as a whole: real processes, real sockets, with load running where a connection could be lost.
//!
//! | file | what it is about |
//! |---|---|
//! | `load` | upgrades under load: nothing fails |
//! | `cgroups` | a cgroup for each generation |
//! | `failures` | a new version that fails in any way, and what is reported |
//! | `storms` | many requests at once, generations that overlap |
//! | `fresh` | what is resolved anew for each generation |
//! | `rollback`, `restart` | back to the version before; a service that ends by itself |
//! | `signals` | signals in every phase, PID 1, a terminal |
//! | `leftovers` | what generations and zddsup leave behind: nothing |
//! | `hostile_control`, `hostile_service` | input that is meant to do harm |
//! | `overload` | more than the service or the machine can take |
//! | `handoff` | what a generation is handed, and what it may do to it |
//! | `inherit` | what it inherits, and nothing else |
//! | `readiness` | what shows that it can serve, and what does not |
//! | `output` | stdout and stderr |
//! | `listeners` | each kind of socket, and those that systemd passes |
//! | `refusals` | what is refused, in words, with nothing left behind |
//! | `replacing` | another zddsup in the place of this one |
//! | `steered` | a socket of its own for each generation |
//! | `takeover` | zddsup killed, and the next one |
//! | `upward` | what a supervisor above this one hears |

#[path = "../common/mod.rs"]
mod common;
mod seen;
mod stage;
mod watched;

mod cgroups;
mod failures;
mod fresh;
mod handoff;
mod hostile_control;
mod hostile_service;
mod inherit;
mod leftovers;
mod listeners;
mod load;
mod output;
mod overload;
mod readiness;
mod refusals;
mod replacing;
mod restart;
mod rollback;
mod signals;
mod steered;
mod storms;
mod takeover;
mod upward;
