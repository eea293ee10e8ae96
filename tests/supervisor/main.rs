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
//! | `leftovers` | no process, zombie, fd is left behind |
//! | `hostile` | bad input on every socket |
//! | `overload` | full queues, busy processors, everybody at once |
//! | `takeover` | zddsup killed, and the next one |

#[path = "../common/mod.rs"]
mod common;
mod stage;

mod failures;
mod fresh;
mod hostile;
mod leftovers;
mod load;
mod overload;
mod restart;
mod rollback;
mod signals;
mod storms;
mod takeover;
