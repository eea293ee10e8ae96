//! Listeners: addresses, binding, inheriting.
