//! Listeners: addresses, binding, inheriting.

pub mod address;
pub mod options;
pub mod spec;

pub use spec::{ListenFlag, ListenerSpec};
