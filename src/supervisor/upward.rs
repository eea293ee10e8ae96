//! What is said to a supervisor above this one, by `sd_notify(3)`. Nothing where there is none.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The one above, if `NOTIFY_SOCKET` named one.
#[derive(Debug, Default)]
pub struct Upward {
    ready: bool,
    stopping: bool,
}

impl Upward {
    /// The first generation serves.
    pub fn ready(&mut self) {
        if !self.ready {
            self.ready = true;
            say("READY=1");
        }
    }

    /// The end has begun.
    pub fn stopping(&mut self) {
        if !self.stopping {
            self.stopping = true;
            say("STOPPING=1");
        }
    }

    /// One line for people.
    pub fn status(&self, line: &str) {
        say(&format!("STATUS={line}"));
    }
}

fn say(state: &str) {
    if let Err(error) = send(state) {
        tracing::debug!("cannot notify: {error}");
    }
}

/// To a path, or to an abstract name after `@`: another zddsup above this one has such.
fn send(state: &str) -> io::Result<()> {
    let Some(place) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let address = match place.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(place)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}
