//! How a generation shows that it can serve.

pub mod notify;
pub mod probe;
