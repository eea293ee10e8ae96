//! How a generation gets its listeners: `fds` (the environment, see [`crate::proto::listen_fds`]) and `socket`.

pub mod channel;
