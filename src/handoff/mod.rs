//! How a generation gets its listeners: `fds`, `socket`.
