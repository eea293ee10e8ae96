//! The file of a Unix socket that a service makes. Linux steers nothing there: whoever is at the path gets what is new. So
//! each generation's socket has a second, hidden name, and the switch is a rename(2) of that over the path:
//!
//! ```text
//!  web.sock              ─┐                     ┌─ web.sock
//!  .zddsup-7-1-0          ┴─ generation 1       │  .zddsup-7-1-0 ─── generation 1: what waits in its queue, it accepts
//!  .zddsup-7-2-1 ─────────── generation 2       └─ .zddsup-7-2-1 ┬─ generation 2
//! ```
//!
//! All of it is done as the service itself would ([`View`]), so that nothing is allowed that is not allowed to it.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{lchown, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};
use socket2::{SockAddr, SockRef};

use crate::sys::view::View;

/// Which file it is, whatever the path to its directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Location {
    device: u64,
    directory: u64,
    name: OsString,
}

/// A path at which a socket is, or will be, as its service sees it.
#[derive(Debug, Serialize, Deserialize)]
pub struct SocketFile {
    #[serde(with = "view")]
    view: View,
    location: Location,
    /// The second name.
    hidden: OsString,
    /// As its bind(2) made it.
    made: Option<Look>,
    /// How the one before was at the path when this was bound beside it.
    before: Option<Look>,
}

/// How a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Look {
    /// Device and inode.
    identity: (u64, u64),
    mode: u32,
    owner: (u32, u32),
    changed: (i64, i64),
}

impl Look {
    fn at(name: &OsStr) -> Option<Look> {
        let found = fs::symlink_metadata(name).ok()?;
        Some(Look {
            identity: (found.dev(), found.ino()),
            mode: found.mode(),
            owner: (found.uid(), found.gid()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

impl SocketFile {
    /// What a service that is to be seen so calls `path`. The second name has to be one that nobody has.
    pub fn locate(view: View, path: &Path, hidden: &str) -> io::Result<SocketFile> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let view = view.within(parent)?;
        let directory = fstat(view.directory())?;
        let location = Location { device: directory.st_dev, directory: directory.st_ino, name };
        Ok(SocketFile { view, location, hidden: hidden.into(), made: None, before: None })
    }

    /// One that a supervisor before had: its directory, its name, its second name.
    pub fn found(view: View, directory: &Path, name: &str, hidden: &str) -> io::Result<SocketFile> {
        let mut file = SocketFile::locate(view, &directory.join(name), hidden)?;
        file.made = file.view.act(|| Look::at(&file.hidden))?;
        Ok(file)
    }

    /// As whom what is done to it is done.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Puts it at the path if nothing is there. On a thread that has its view already. Gives whether it did.
    pub fn link_from_here(&self) -> io::Result<bool> {
        match fs::hard_link(&self.hidden, &self.location.name) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            // A service may have removed the second name, which getsockname(2) gave it.
            Err(error) if error.kind() == io::ErrorKind::NotFound && Look::at(&self.location.name).is_some() => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// The same on any thread.
    pub fn put_back(&self) -> io::Result<bool> {
        self.view.act(|| self.link_from_here())?
    }

    /// Which it is.
    #[must_use]
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// Its directory as this process sees it, its name, and its second name: for the supervisor after this one.
    #[must_use]
    pub fn names(&self) -> Option<(String, String, String)> {
        let text = |text: &OsStr| text.to_str().map(str::to_owned);
        let directory = fs::read_link(self.directory_path()).ok()?;
        Some((text(directory.as_os_str())?, text(&self.location.name)?, text(&self.hidden)?))
    }

    /// A path to its directory, for this process.
    #[must_use]
    pub fn directory_path(&self) -> PathBuf {
        use std::os::fd::AsRawFd;
        format!("/proc/self/fd/{}", self.view.directory().as_fd().as_raw_fd()).into()
    }

    /// Binds a socket to the path as the service gave it, from where it is (`from`), and gives the file its second name.
    /// Without that (a file system without hard links) it cannot be put back when somebody removes it.
    pub fn bind(&mut self, socket: &OwnedFd, from: &View, path: &Path) -> io::Result<()> {
        from.act(|| SockRef::from(socket).bind(&SockAddr::unix(path)?))??;
        let named = self.view.act(|| {
            let made = Look::at(&self.location.name);
            fs::hard_link(&self.location.name, &self.hidden).map(|()| made)
        })?;
        match named {
            Ok(made) => self.made = made,
            Err(error) => tracing::warn!(
                "{self}: it cannot have a second name ({error}): removed by a version that ends, it is gone"
            ),
        }
        Ok(())
    }

    /// Binds a socket beside the one at the path, to the second name alone. A service that removes at its end what
    /// getsockname(2) gives removes that.
    pub fn bind_beside(&mut self, socket: &OwnedFd, from: &View, path: &Path) -> io::Result<()> {
        let bind = |path: &Path| SockRef::from(socket).bind(&SockAddr::unix(path)?);
        let beside = path.with_file_name(&self.hidden);
        if SockAddr::unix(&beside).is_ok() {
            from.act(|| bind(&beside))??;
        } else {
            // Longer than a socket's address may be.
            self.view.act(|| bind(Path::new(&self.hidden)))??;
        }
        let (made, before) = self.view.act(|| (Look::at(&self.hidden), Look::at(&self.location.name)))?;
        (self.made, self.before) = (made, before);
        Ok(())
    }

    /// Whether it is at the path. None: nothing is there.
    pub fn is_in_place(&self) -> io::Result<Option<bool>> {
        let there = self.view.act(|| Look::at(&self.location.name))?;
        Ok(there.map(|there| self.made.is_some_and(|made| made.identity == there.identity)))
    }

    /// Puts it at the path, in the place of whatever is there. If the service gave the one `before` this another mode or
    /// owner at the path, it meant this one.
    pub fn put_in_place(&self, before: Option<&SocketFile>) -> io::Result<()> {
        let made_before = before.and_then(|before| before.made);
        self.view.act(|| {
            let name = &self.location.name;
            if let (Some(once), Some(now)) = (self.before, Look::at(name)) {
                let as_made = made_before.is_some_and(|made| (made.mode, made.owner) == (now.mode, now.owner));
                if once.identity == now.identity && !(as_made && once.changed == now.changed) {
                    if self.made.is_some_and(|made| made.owner != now.owner) {
                        lchown(&self.hidden, Some(now.owner.0), Some(now.owner.1))?;
                    }
                    fs::set_permissions(&self.hidden, fs::Permissions::from_mode(now.mode & 0o7777))?;
                }
            }
            let mut moving = self.hidden.clone();
            moving.push("-moving");
            let _left_by_nobody = fs::remove_file(&moving);
            fs::hard_link(&self.hidden, &moving)?;
            fs::rename(&moving, name)?;
            // rename(2) leaves both where both are the same file.
            let _moved = fs::remove_file(&moving);
            Ok(())
        })?
    }

    /// Removes the second name, and the path where it is still this one's and nobody follows.
    pub fn remove(&self, from_path_too: bool) -> io::Result<()> {
        let in_place = self.is_in_place()? == Some(true);
        self.view.act(|| {
            if in_place && from_path_too {
                fs::remove_file(&self.location.name)?;
            }
            match fs::remove_file(&self.hidden) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other,
            }
        })?
    }
}

impl std::fmt::Display for SocketFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let directory = fs::read_link(self.directory_path()).unwrap_or_default();
        write!(f, "unix://{}", directory.join(&self.location.name).display())
    }
}

mod view {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::os::fd::OwnedFd;

    use crate::state::fds;
    use crate::sys::view::{Standing, View};

    #[derive(Serialize)]
    struct Written<'a> {
        #[serde(with = "fds::owned_option")]
        root: &'a Option<OwnedFd>,
        #[serde(with = "fds::owned")]
        directory: &'a OwnedFd,
        standing: &'a Standing,
    }

    #[derive(Deserialize)]
    struct Read {
        #[serde(with = "fds::owned_option")]
        root: Option<OwnedFd>,
        #[serde(with = "fds::owned")]
        directory: OwnedFd,
        standing: Standing,
    }

    pub fn serialize<S: Serializer>(view: &View, to: S) -> Result<S::Ok, S::Error> {
        let (root, directory, standing) = view.parts();
        Written { root, directory, standing }.serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<View, D::Error> {
        Read::deserialize(from).map(|read| View::from_parts(read.root, read.directory, read.standing))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::gettid;
    use socket2::{Domain, Socket, Type};
    use std::os::unix::net::{UnixListener, UnixStream};

    fn view() -> View {
        View::of(gettid().as_raw()).unwrap()
    }

    fn locate(path: &Path, hidden: &str) -> SocketFile {
        SocketFile::locate(view(), path, hidden).unwrap()
    }

    fn socket() -> OwnedFd {
        Socket::new(Domain::UNIX, Type::STREAM, None).unwrap().into()
    }

    /// Who answers at the path.
    fn accepted_by(path: &Path, listener: &OwnedFd) -> bool {
        let listener = UnixListener::from(listener.try_clone().unwrap());
        listener.set_nonblocking(true).unwrap();
        let _client = UnixStream::connect(path).unwrap();
        listener.accept().is_ok()
    }

    fn names(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn one_takes_the_place_of_the_other_and_gives_it_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.sock");
        let [one, two] = [socket(), socket()];
        let mut first = locate(&path, ".one");
        first.bind(&one, &view(), &path).unwrap();
        let mut second = locate(&path, ".two");
        assert_eq!(first.location(), second.location());
        second.bind_beside(&two, &view(), &path).unwrap();
        for socket in [&one, &two] {
            SockRef::from(socket).listen(9).unwrap();
        }
        assert!(accepted_by(&path, &one));
        second.put_in_place(Some(&first)).unwrap();
        assert!(accepted_by(&path, &two));
        assert_eq!((first.is_in_place().unwrap(), second.is_in_place().unwrap()), (Some(false), Some(true)));
        first.put_in_place(None).unwrap();
        assert!(accepted_by(&path, &one));
        // Removed by somebody, and put back; when it is there, nothing changes.
        fs::remove_file(&path).unwrap();
        assert_eq!(first.is_in_place().unwrap(), None);
        assert!(first.put_back().unwrap() && !second.put_back().unwrap());
        for _ in 0..2 {
            first.put_in_place(None).unwrap();
            assert!(accepted_by(&path, &one));
        }
        assert_eq!(names(dir.path()), [".one", ".two", "web.sock"]);
        fs::remove_file(dir.path().join(".one")).unwrap();
        assert!(!first.put_back().unwrap());
        second.remove(true).unwrap();
        first.remove(true).unwrap();
        assert_eq!(names(dir.path()), [""; 0]);
    }

    #[test]
    fn what_the_service_does_to_the_file_at_the_path_is_meant_for_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.sock");
        let mode = || fs::metadata(&path).unwrap().mode() & 0o777;
        let (mut first, mut second, mut third) = (locate(&path, ".1"), locate(&path, ".2"), locate(&path, ".3"));
        first.bind(&socket(), &view(), &path).unwrap();
        let natural = mode();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).unwrap();
        second.bind_beside(&socket(), &view(), &path).unwrap();
        assert_eq!(fs::metadata(dir.path().join(".2")).unwrap().mode() & 0o777, natural);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).unwrap();
        second.put_in_place(Some(&first)).unwrap();
        assert_eq!(mode(), 0o660);
        // One that leaves it as it was made.
        let other = dir.path().join("other.sock");
        let mode = || fs::metadata(&other).unwrap().mode() & 0o777;
        let mut first = locate(&other, ".4");
        first.bind(&socket(), &view(), &other).unwrap();
        third.location.name = "other.sock".into();
        third.bind_beside(&socket(), &view(), &other).unwrap();
        third.put_in_place(Some(&first)).unwrap();
        assert_eq!(mode(), natural);
    }

    #[test]
    fn a_path_that_is_taken_is_refused_as_by_the_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.sock");
        fs::write(&path, "precious").unwrap();
        let error = locate(&path, ".1").bind(&socket(), &view(), &path).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EADDRINUSE));
        assert_eq!(locate(&path, ".1").is_in_place().unwrap(), Some(false));
        locate(&path, ".1").remove(true).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        assert!(SocketFile::locate(view(), Path::new("/"), ".1").is_err());
        assert!(SocketFile::locate(view(), Path::new("/nonexistent/x"), ".1").is_err());
    }
}
