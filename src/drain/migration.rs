//! A queue that is moved: where `net.ipv4.tcp_migrate_req` is on while a listening socket is closed, the kernel gives what
//! waits for it to the others of its `SO_REUSEPORT` group, whichever the hash chooses (`reuseport_migrate_sock` in
//! `net/core/sock_reuseport.c`; ip-sysctl.rst). It is off by default.

use std::fs;
use std::io;

/// Of zddsup's network namespace. Since Linux 5.14.
const SWITCH: &str = "/proc/sys/net/ipv4/tcp_migrate_req";

/// Closes a socket so that its queue is moved. The switch is turned on for that moment where it is off.
///
/// # Errors
/// The queue cannot be moved here, as the kernel is older or zddsup may not turn the switch on; nothing was closed.
pub fn moving<T>(close: impl FnOnce() -> T) -> io::Result<T> {
    let was = fs::read_to_string(SWITCH)?;
    if was.trim() == "1" {
        return Ok(close());
    }
    fs::write(SWITCH, "1")?;
    let closed = close();
    if let Err(error) = fs::write(SWITCH, &was) {
        tracing::error!("cannot set net.ipv4.tcp_migrate_req to {} again: {error}", was.trim());
    }
    Ok(closed)
}
