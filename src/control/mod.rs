//! The control API: types, server, client.
