//! The pure state machine. Imports nothing of the rest of the crate.

pub mod generation;
pub use generation::{End, GenerationId};
