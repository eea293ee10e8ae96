//! Files of Unix sockets: a stale one is replaced, a live one refused, our own removed at the end.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use socket2::{Domain, SockAddr, Socket, Type};

use super::address::Address;
use super::error::Why;
use super::holder;

/// The file of a socket that we bound. Removed when this is dropped, if it is still the same.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    /// The file that stands there now.
    pub(super) fn at(path: &Path) -> io::Result<SocketFile> {
        let found = fs::symlink_metadata(path)?;
        if !found.file_type().is_socket() {
            return Err(io::Error::other("it is not a socket"));
        }
        Ok(SocketFile { path: path.to_owned(), identity: (found.dev(), found.ino()) })
    }

    fn is_still_there(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.identity)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_still_there() {
            let _gone_already = fs::remove_file(&self.path);
        }
    }
}

/// Makes room at a path: removes a socket on which nobody listens.
pub(super) fn make_room(address: &Address, path: &Path, kind: Type) -> Result<(), Why> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Why::System { step: "looking at what is there", source }),
    };
    if !found.file_type().is_socket() {
        return Err(Why::NotASocket(path.to_owned()));
    }
    if is_live(path, kind)? {
        return Err(Why::Live { holder: holder::of(address) });
    }
    tracing::info!("removing {path:?}: a socket on which nobody listens any more");
    let stale = SocketFile { path: path.to_owned(), identity: (found.dev(), found.ino()) };
    drop(stale);
    Ok(())
}

fn is_live(path: &Path, kind: Type) -> Result<bool, Why> {
    let look = || {
        let socket = Socket::new(Domain::UNIX, kind, None)?;
        socket.set_nonblocking(true)?;
        socket.connect(&SockAddr::unix(path)?)
    };
    match look() {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(false),
            // A full queue; a socket of another kind; one that talks to its peer only.
            Some(Errno::EAGAIN | Errno::EPROTOTYPE | Errno::EPERM) => Ok(true),
            _ => Err(Why::System { step: "finding out whether the socket that is there is in use", source: error }),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    fn room(path: &Path) -> Result<(), Why> {
        let address = format!("unix://{}", path.display()).parse().unwrap();
        make_room(&address, path, Type::STREAM)
    }

    #[test]
    fn a_stale_file_is_removed_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        room(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        let error = room(&path).unwrap_err();
        assert!(matches!(&error, Why::Live { holder: Some(holder) } if holder.contains("this zddsup")), "{error}");
        drop(listener);
        assert!(path.exists());
        room(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_or_of_another_kind_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(room(&path), Err(Why::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        fs::remove_file(&path).unwrap();
        let _datagrams = UnixDatagram::bind(&path).unwrap();
        assert!(matches!(room(&path), Err(Why::Live { .. })));
        assert!(path.exists());
    }

    #[test]
    fn only_our_own_file_is_removed_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _first = UnixListener::bind(&path).unwrap();
        let ours = SocketFile::at(&path).unwrap();
        // Both exist at once, so that the inode cannot be the same by chance.
        let other = dir.path().join("t");
        let _second = UnixListener::bind(&other).unwrap();
        fs::rename(&other, &path).unwrap();
        drop(ours);
        assert!(path.exists());
        drop(SocketFile::at(&path).unwrap());
        assert!(!path.exists());
    }
}
