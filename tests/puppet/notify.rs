//! The service's side of `sd_notify(3)`, able to send what a decent one would not.

use std::fs::File;
use std::io::{IoSlice, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::sys::socket::{sendmsg, socket, AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr};

/// Sends to the supervisor's socket. Nothing where there is none.
pub fn say(text: &str) {
    if let Ok(path) = std::env::var("NOTIFY_SOCKET") {
        if let Err(error) = send(&path, text.as_bytes(), &[]) {
            eprintln!("puppet: cannot notify {path}: {error}");
        }
    }
}

/// Sends anything anywhere.
pub fn send(path: &str, bytes: &[u8], fds: &[RawFd]) -> nix::Result<()> {
    let address = match path.strip_prefix('@') {
        Some(name) => UnixAddr::new_abstract(name.as_bytes())?,
        None => UnixAddr::new(path)?,
    };
    let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    sendmsg(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, Some(&address))?;
    Ok(())
}

/// Sends a text, then `BARRIER=1`, and waits until the supervisor closes what came with it (`sd_notify_barrier(3)`).
pub fn barrier(text: &str) -> std::io::Result<bool> {
    let path = std::env::var("NOTIFY_SOCKET").map_err(std::io::Error::other)?;
    send(&path, text.as_bytes(), &[])?;
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    send(&path, b"BARRIER=1", &[write.as_raw_fd()])?;
    drop(write);
    super::web::wait(&[&read], Some(std::time::Duration::from_secs(60)))
}

/// Gives a file with this content to the supervisor to keep.
pub fn store(name: &str, content: &str) -> std::io::Result<()> {
    let mut file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?);
    file.write_all(content.as_bytes())?;
    file.rewind()?;
    let file = OwnedFd::from(file);
    if let Ok(path) = std::env::var("NOTIFY_SOCKET") {
        send(&path, format!("FDSTORE=1\nFDNAME={name}").as_bytes(), &[file.as_raw_fd()])?;
    }
    Ok(())
}
