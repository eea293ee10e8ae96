//! The supervisor as a whole: real processes, real sockets, with load running where a connection could be lost.
//!
//! | file | what it is about |
//! |---|---|
//! | `load` | upgrades under load: nothing fails |
//! | `failures` | a new version that fails in any way, and what is reported |

#[path = "../common/mod.rs"]
mod common;
mod stage;

mod failures;
mod load;
