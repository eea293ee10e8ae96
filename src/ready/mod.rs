//! How a generation shows that it can serve.

pub mod divert;
pub mod notify;
pub mod probe;
pub mod tls;
