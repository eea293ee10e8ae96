//! For supervised Rust services: listeners, ready, drain, keep.
