//! The supervisor as a whole: real processes, real sockets, with load running where a connection could be lost.
//!
//! | file | what it is about |
//! |---|---|
//! | `load` | upgrades under load: nothing fails |
//! | `failures` | a new version that fails in any way, and what is reported |
//! | `storms` | many requests at once, generations that overlap |
//! | `fresh` | what is resolved anew for each generation |
//! | `rollback`, `restart` | back to the version before; a service that ends by itself |
//! | `signals` | signals in every phase, PID 1, a terminal |
//! | `leftovers` | what generations and zddsup leave behind: nothing |
//! | `hostile_control`, `hostile_service` | input that is meant to do harm |
//! | `overload` | more than the service or the machine can take |
//! | `takeover` | zddsup killed, and the next one |

#[path = "../common/mod.rs"]
mod common;
mod stage;
mod watched;

mod failures;
mod fresh;
mod hostile_control;
mod hostile_service;
mod leftovers;
mod load;
mod overload;
mod restart;
mod rollback;
mod signals;
mod storms;
mod takeover;
