//! How a generation gets its listeners: `fds` (the environment, see [`crate::proto::listen_fds`]), `socket` and `adopt`.

pub mod adopt;
pub mod channel;
