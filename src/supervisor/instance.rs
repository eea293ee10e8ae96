//! One supervisor a name: the lock, and the pid file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// Held as long as this supervisor lives; the kernel lets go of it when it dies.
#[derive(Debug)]
pub struct Lock {
    held: Flock<File>,
}

/// Why a name cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody has it.
    #[error(
        "service {service} is supervised already, by process {pid}: deploy with `zddsup upgrade --name {service}`, \
         or give this one another --name"
    )]
    Taken {
        /// The service.
        service: String,
        /// Pid of its supervisor, as far as it is known.
        pid: String,
    },
    /// The file cannot be made.
    #[error("cannot lock {path:?}: {source}; check the directory's permissions, or set XDG_RUNTIME_DIR")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl Lock {
    /// Takes the name, or says who has it.
    pub fn take(path: &Path, service: &str) -> Result<Lock, LockError> {
        let failed = |source| LockError::File { path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path).map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut held) => {
                let write = |file: &mut File| {
                    file.set_len(0)?;
                    file.rewind()?;
                    writeln!(file, "{}", std::process::id())
                };
                write(&mut held).map_err(failed)?;
                Ok(Lock { held })
            }
            Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
                let mut pid = String::new();
                let _unknown = file.read_to_string(&mut pid);
                let pid = match pid.trim() {
                    "" => "unknown".to_owned(),
                    pid => pid.to_owned(),
                };
                Err(LockError::Taken { service: service.to_owned(), pid })
            }
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }
}

impl Lock {
    /// The lock of the program in whose place this one is: it is the same process'.
    pub fn resume(held: OwnedFd) -> io::Result<Lock> {
        let held = Flock::lock(File::from(held), FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
        Ok(Lock { held })
    }

    /// Its file, which holds it as long as it is open.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.held
    }
}

/// A file with zddsup's pid, removed at the end if it is still ours.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
}

impl PidFile {
    /// Writes it beside and renames, so that a reader never finds half of it.
    pub fn write(path: &Path) -> io::Result<PidFile> {
        let path = std::path::absolute(path)?;
        replace(&path, format!("{}\n", std::process::id()).as_bytes(), 0o644)?;
        Ok(PidFile { path })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let ours = fs::read_to_string(&self.path).is_ok_and(|text| text.trim() == std::process::id().to_string());
        if ours {
            let _gone_already = fs::remove_file(&self.path);
        }
    }
}

/// Puts a file in place as a whole.
fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(mode);
    options.open(&beside)?.write_all(bytes)?;
    fs::rename(&beside, path)
}
