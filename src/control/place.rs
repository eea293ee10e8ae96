//! Where control sockets are: `zddsup/NAME.sock` in the runtime directory.
//!
//! | who | directory |
//! |---|---|
//! | whoever has an `XDG_RUNTIME_DIR` | `$XDG_RUNTIME_DIR/zddsup` |
//! | root | `/run/zddsup` |
//! | else | `/tmp/zddsup-UID` |
//! | a container without any of these | `/dev/shm/zddsup-UID`, which is writable where the root is not |
//!
//! A supervisor takes the first that it can have; the command line looks in all of them.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::{access, geteuid, AccessFlags, Uid};
use socket2::{Domain, SockAddr, Socket, Type};

/// Directories in which one user's control sockets may be, the preferred one first.
#[derive(Debug, Clone)]
pub struct Places {
    owner: Uid,
    directories: Vec<PathBuf>,
}

/// A control socket in one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The service.
    pub name: String,
    /// Its socket.
    pub path: PathBuf,
}

/// Why there is no place for a control socket, or none that was meant.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// None of the directories can be had.
    #[error("no directory for the control socket can be had ({}); set XDG_RUNTIME_DIR to a directory of your own, or mount a tmpfs at /tmp", tried(.0))]
    Directory(Vec<(PathBuf, io::Error)>),
    /// It cannot be a file's name.
    #[error(
        "{0:?} cannot be a service's name: it needs 1 to 64 letters, digits, '-', '_' or '.', and no '.' at its begin"
    )]
    Name(String),
    /// Nobody to talk to.
    #[error("no service is running (looked for sockets in {looked}); start one with `zddsup run`, or name its socket with --control PATH")]
    Nobody {
        /// Where.
        looked: String,
    },
    /// Not the one that was named.
    #[error("no service {name} is running{}; looked in {looked}; name its socket with --control PATH if it is elsewhere", others(.running))]
    NotThere {
        /// Its name.
        name: String,
        /// Those that are.
        running: Vec<String>,
        /// Where.
        looked: String,
    },
    /// More than one.
    #[error("several services are running ({}): choose one with --name NAME or --control PATH", .0.join(", "))]
    Several(Vec<String>),
}

fn tried(failed: &[(PathBuf, io::Error)]) -> String {
    failed.iter().map(|(path, why)| format!("{}: {why}", path.display())).collect::<Vec<_>>().join(", ")
}

fn others(running: &[String]) -> String {
    if running.is_empty() {
        String::new()
    } else {
        format!(" (running: {})", running.join(", "))
    }
}

impl Places {
    /// This process' own.
    #[must_use]
    pub fn of_this_process() -> Places {
        Places::of(geteuid(), std::env::var_os("XDG_RUNTIME_DIR").as_deref())
    }

    /// Those of a user with that `XDG_RUNTIME_DIR`. One that is relative or no directory counts as not set.
    #[must_use]
    pub fn of(owner: Uid, xdg_runtime_dir: Option<&OsStr>) -> Places {
        let xdg = xdg_runtime_dir.map(Path::new).filter(|path| path.is_absolute() && path.is_dir());
        let mut directories: Vec<PathBuf> = xdg.map(|path| path.join("zddsup")).into_iter().collect();
        if owner.is_root() {
            directories.push(PathBuf::from("/run/zddsup"));
        }
        directories.extend(["/tmp", "/dev/shm"].map(|path| PathBuf::from(format!("{path}/zddsup-{owner}"))));
        Places { owner, directories }
    }

    /// The first directory that can be had, made if need be.
    ///
    /// Nobody else can list it. Root's can be passed through, so that a service that runs as another user reaches its
    /// own notify socket in there by name; every file in it has a mode of its own.
    pub fn make(&self) -> Result<PathBuf, PlaceError> {
        let mode = if self.owner.is_root() { 0o711 } else { 0o700 };
        let mut failed = Vec::new();
        for path in &self.directories {
            match make_directory(path, mode).and_then(|()| self.check(path)).and_then(|()| is_writable(path)) {
                Ok(()) => return Ok(path.clone()),
                Err(why) => failed.push((path.clone(), why)),
            }
        }
        Err(PlaceError::Directory(failed))
    }

    /// That nobody but its owner can put a socket in there.
    fn check(&self, path: &Path) -> io::Result<()> {
        let found = fs::symlink_metadata(path)?;
        let refuse = |why: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        if !found.is_dir() {
            return refuse("it is not a directory".to_owned());
        }
        if found.uid() != self.owner.as_raw() {
            return refuse(format!("it belongs to user {}, not to user {}", found.uid(), self.owner));
        }
        if found.mode() & 0o022 != 0 {
            return refuse("others may write to it".to_owned());
        }
        Ok(())
    }

    /// Services whose supervisor answers, by name.
    #[must_use]
    pub fn running(&self) -> Vec<Found> {
        let mut found = Vec::new();
        for directory in &self.directories {
            if self.check(directory).is_err() {
                continue;
            }
            let Ok(entries) = fs::read_dir(directory) else { continue };
            for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
                let name = path.file_name().and_then(OsStr::to_str).and_then(|name| name.strip_suffix(".sock"));
                if let Some(name) = name.filter(|_| is_alive(&path)) {
                    found.push(Found { name: name.to_owned(), path: path.clone() });
                }
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    /// The socket of the service of that name, or of the only one that is running.
    pub fn find(&self, name: Option<&str>) -> Result<PathBuf, PlaceError> {
        if let Some(name) = name {
            check_name(name)?;
        }
        let running = self.running();
        let mut meant = running.iter().filter(|found| name.is_none_or(|name| found.name == name));
        match (meant.next(), meant.next()) {
            (Some(one), None) => Ok(one.path.clone()),
            (None, _) => Err(match name {
                Some(name) => PlaceError::NotThere {
                    name: name.to_owned(),
                    running: running.into_iter().map(|found| found.name).collect(),
                    looked: self.looked(),
                },
                None => PlaceError::Nobody { looked: self.looked() },
            }),
            (Some(_), Some(_)) => {
                let all = running.iter().filter(|found| name.is_none_or(|name| found.name == name));
                Err(PlaceError::Several(all.map(|found| found.path.display().to_string()).collect()))
            }
        }
    }

    fn looked(&self) -> String {
        let all: Vec<_> = self.directories.iter().map(|path| path.display().to_string()).collect();
        all.join(", ")
    }
}

/// The directory for sockets, locks and state of this process' user, made if need be.
pub fn runtime_dir() -> Result<PathBuf, PlaceError> {
    Places::of_this_process().make()
}

/// A service's control socket in there.
pub fn socket_in(directory: &Path, name: &str) -> Result<PathBuf, PlaceError> {
    check_name(name)?;
    Ok(directory.join(format!("{name}.sock")))
}

/// Whether a name can be part of a file's.
pub fn check_name(name: &str) -> Result<(), PlaceError> {
    let fits = (1..=64).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if fits {
        Ok(())
    } else {
        Err(PlaceError::Name(name.to_owned()))
    }
}

/// Makes a directory with this mode, whatever the umask, unless it is there.
pub(super) fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(mode)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// A directory may be there, be ours, and lie in an image that is mounted read-only.
fn is_writable(path: &Path) -> io::Result<()> {
    Ok(access(path, AccessFlags::W_OK | AccessFlags::X_OK)?)
}

/// Whether somebody listens on a Unix socket. Never waits.
#[must_use]
pub fn is_alive(path: &Path) -> bool {
    let connect = || Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?.connect(&SockAddr::unix(path)?);
    match connect() {
        Ok(()) => true,
        // A full queue, or one that is not for us: there is somebody.
        Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::PermissionDenied),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn places(directory: &Path) -> Places {
        Places { owner: geteuid(), directories: vec![directory.join("zddsup")] }
    }

    #[test]
    fn the_runtime_directory_comes_first_where_there_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let some = Places::of(Uid::from_raw(1000), Some(dir.path().as_os_str()));
        assert_eq!(
            some.directories,
            [dir.path().join("zddsup"), PathBuf::from("/tmp/zddsup-1000"), PathBuf::from("/dev/shm/zddsup-1000"),]
        );
        let none = Places::of(Uid::from_raw(0), Some(dir.path().join("gone").as_os_str()));
        let expected = ["/run/zddsup", "/tmp/zddsup-0", "/dev/shm/zddsup-0"].map(PathBuf::from);
        assert_eq!(none.directories, expected);
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());
        let made = places.make().unwrap();
        assert_eq!(fs::metadata(&made).unwrap().mode() & 0o066, 0);
        fs::set_permissions(&made, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(places.make().unwrap_err().to_string().contains("others may write"));
        fs::remove_dir(&made).unwrap();
        std::os::unix::fs::symlink("/", &made).unwrap();
        assert!(places.make().unwrap_err().to_string().contains("not a directory"));
    }

    #[test]
    fn the_only_one_is_found_and_several_must_be_named() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());
        assert!(matches!(places.find(None), Err(PlaceError::Nobody { .. })));
        let made = places.make().unwrap();
        let _a = UnixListener::bind(socket_in(&made, "a").unwrap()).unwrap();
        drop(UnixListener::bind(socket_in(&made, "dead").unwrap()).unwrap());
        assert_eq!(places.find(None).unwrap(), made.join("a.sock"));
        let _b = UnixListener::bind(socket_in(&made, "b").unwrap()).unwrap();
        assert!(matches!(places.find(None), Err(PlaceError::Several(names)) if names.len() == 2));
        assert_eq!(places.find(Some("b")).unwrap(), made.join("b.sock"));
        let error = places.find(Some("dead")).unwrap_err().to_string();
        assert!(error.contains("no service dead is running (running: a, b)"), "{error}");
    }

    #[test]
    fn names_that_are_no_file_names_are_refused() {
        for bad in ["", ".", "../x", "a/b", "a b", ".hidden", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        check_name("web-1.api_v2").unwrap();
    }
}
