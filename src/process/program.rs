//! What a generation runs: an executable, held open, so that it can be run again after its file was replaced.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{open, OFlag};
use nix::sys::stat::{fstat, FileStat, Mode, SFlag};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::state::{fds, with};

/// An executable file as it was found when a generation was resolved.
#[derive(Debug, Serialize, Deserialize)]
pub struct Program {
    #[serde(with = "with::path")]
    found: PathBuf,
    #[serde(with = "with::path")]
    path: PathBuf,
    #[serde(with = "fds::owned")]
    held: OwnedFd,
    readable: bool,
    script: bool,
    file: Mark,
    #[serde(with = "once")]
    sha256: OnceLock<String>,
}

/// A file, and a moment of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    identity: (u64, u64),
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl From<FileStat> for Mark {
    fn from(stat: FileStat) -> Mark {
        Mark {
            identity: (stat.st_dev, stat.st_ino),
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

/// Why there is nothing to run.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// A bare name is not in the PATH.
    #[error("program {name:?} is not in PATH ({path}): install it, or give its path (with a /)")]
    NotInPath {
        /// The name.
        name: OsString,
        /// Where it was looked for.
        path: String,
    },
    /// A bare name is in the PATH, but cannot be executed.
    #[error("program {0:?} is not executable: chmod +x it")]
    NotExecutable(PathBuf),
    /// A path leads nowhere.
    #[error("there is no program {0:?}: check the path, and that the new version is in place")]
    Missing(PathBuf),
    /// A directory, device, …
    #[error("{0:?} is no regular file: give the program's own path")]
    NotAFile(PathBuf),
    /// A path cannot be opened.
    #[error("cannot open program {path:?}: {source}; check its permissions and those of the directories above it")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl Program {
    /// Finds a program as execvp(3) does, with a relative path (and a relative PATH entry) meant from `directory`.
    pub fn resolve(name: &OsStr, path_var: Option<&OsStr>, directory: &Path) -> Result<Program, ProgramError> {
        let found = if name.as_bytes().contains(&b'/') {
            directory.join(name)
        } else {
            search(name, path_var.unwrap_or(OsStr::new("/usr/local/bin:/usr/bin:/bin")), directory)?
        };
        let found = if found.is_absolute() {
            found
        } else {
            std::path::absolute(&found).map_err(|source| ProgramError::Open { path: found, source })?
        };
        Program::open(found)
    }

    /// What a living process runs. Its path may be another file's by now.
    pub fn of_process(pid: Pid) -> Result<Program, ProgramError> {
        let mut program = Program::open(PathBuf::from(format!("/proc/{pid}/exe")))?;
        program.found = program.path.clone();
        Ok(program)
    }

    fn open(found: PathBuf) -> Result<Program, ProgramError> {
        // Not to wait for a FIFO's writer.
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
        let (opened, readable) = match open(&found, flags, Mode::empty()) {
            // To be executed it need not be readable.
            Err(Errno::EACCES) => (open(&found, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()), false),
            opened => (opened, true),
        };
        let checked = opened.and_then(|fd| Ok((fstat(&fd)?, fd)));
        let (file, held) = match checked {
            Ok(checked) => checked,
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Err(ProgramError::Missing(found)),
            Err(errno) => return Err(ProgramError::Open { path: found, source: errno.into() }),
        };
        if SFlag::from_bits_truncate(file.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
            return Err(ProgramError::NotAFile(found));
        }
        if file.st_mode & 0o111 == 0 {
            return Err(ProgramError::NotExecutable(found));
        }
        let path = opened_path(&held, &file).or_else(|| fs::canonicalize(&found).ok()).unwrap_or_else(|| found.clone());
        let held = File::from(held);
        let mut start = [0; 2];
        let script = readable && held.read_exact_at(&mut start, 0).is_ok() && &start == b"#!";
        Ok(Program { found, path, held: held.into(), readable, script, file: file.into(), sha256: OnceLock::new() })
    }

    /// Where its file was, symbolic links followed.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The absolute path by which it was found.
    #[must_use]
    pub fn found(&self) -> &Path {
        &self.found
    }

    /// Whether an interpreter runs it (`#!`), which needs its file.
    #[must_use]
    pub fn is_script(&self) -> bool {
        self.script
    }

    /// Its digest, if it was computed.
    #[must_use]
    pub fn sha256(&self) -> Option<String> {
        self.sha256.get().cloned()
    }

    /// Computes the digest, in hexadecimal. Blocks while it reads the file.
    pub fn digest(&self) -> io::Result<String> {
        if let Some(known) = self.sha256.get() {
            return Ok(known.clone());
        }
        let file = self.reader()?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 64 * 1024];
        let mut at = 0;
        loop {
            let read = match file.read_at(&mut buffer, at) {
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read?,
            };
            hash.update(&buffer[..read]);
            at += read as u64;
        }
        Ok(self.sha256.get_or_init(|| in_hex(&hash.finalize())).clone())
    }

    /// The open file.
    #[must_use]
    pub fn held(&self) -> BorrowedFd<'_> {
        self.held.as_fd()
    }

    /// Whether [`Program::found`] is still this file.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.is_at(&self.found)
    }

    /// A path that still is this file: the one by which it was found, or the one that it had then (a `current` link
    /// that was swapped leaves the old version's own directory in place).
    #[must_use]
    pub fn still_at(&self) -> Option<&Path> {
        [self.found(), self.path()].into_iter().find(|path| self.is_at(path))
    }

    /// Whether the other one is the same file, found the same way and not changed in between.
    #[must_use]
    pub fn is_same(&self, other: &Program) -> bool {
        (&self.found, &self.path, self.file) == (&other.found, &other.path, other.file)
    }

    /// Whether its content was changed in place, so that the version from then is lost.
    #[must_use]
    pub fn was_overwritten(&self) -> bool {
        fstat(&self.held).is_ok_and(|now| {
            let now = Mark::from(now);
            (now.size, now.modified) != (self.file.size, self.file.modified)
        })
    }

    /// Whether [`Program::found`] is still this file, with the content that it had.
    #[must_use]
    pub fn is_untouched(&self) -> bool {
        self.is_current() && !self.was_overwritten()
    }

    /// Its first bytes, as far as they can be read.
    pub(super) fn head(&self) -> Vec<u8> {
        let mut head = vec![0; 4096];
        let read = self.reader().and_then(|file| file.read_at(&mut head, 0)).unwrap_or(0);
        head.truncate(read);
        head
    }

    fn is_at(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == self.file.identity)
    }

    fn reader(&self) -> io::Result<File> {
        if !self.readable {
            return Err(Errno::EACCES.into());
        }
        self.held.try_clone().map(File::from)
    }
}

/// As sha256sum(1) shows a digest.
#[must_use]
pub fn in_hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _always_fits = write!(text, "{byte:02x}");
        text
    })
}

mod once {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::sync::OnceLock;

    pub fn serialize<S: Serializer>(value: &OnceLock<String>, to: S) -> Result<S::Ok, S::Error> {
        value.get().serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<OnceLock<String>, D::Error> {
        let value = Option::<String>::deserialize(from)?;
        Ok(value.map_or_else(OnceLock::new, OnceLock::from))
    }
}

fn search(name: &OsStr, path_var: &OsStr, directory: &Path) -> Result<PathBuf, ProgramError> {
    let mut all = which::which_in_all(name, Some(path_var), directory).into_iter().flatten();
    if let Some(found) = all.next() {
        return Ok(directory.join(found));
    }
    let lacks_permission = std::env::split_paths(path_var).map(|entry| directory.join(entry).join(name));
    if let Some(path) = lacks_permission.into_iter().find(|path| !name.is_empty() && path.is_file()) {
        return Err(ProgramError::NotExecutable(path));
    }
    Err(ProgramError::NotInPath { name: name.to_owned(), path: path_var.to_string_lossy().into_owned() })
}

/// The path of what is open, and not of what has its name a moment later.
fn opened_path(held: &OwnedFd, file: &FileStat) -> Option<PathBuf> {
    let path = fs::read_link(format!("/proc/self/fd/{}", held.as_raw_fd())).ok()?;
    let now = fs::metadata(&path).ok()?;
    ((now.dev(), now.ino()) == (file.st_dev, file.st_ino)).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{symlink, PermissionsExt};

    fn file(path: &Path, content: &str, mode: u32) {
        fs::write(path, content).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn finds_by_path_and_in_the_path_and_relative_to_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        fs::create_dir(root.join("bin")).unwrap();
        file(&root.join("bin/tool"), "#!/bin/sh\n", 0o755);
        for (name, path_var) in [("bin/tool", ""), ("./bin/tool", ""), ("tool", "/nowhere:bin:/bin"), ("tool", "./bin")]
        {
            let program = Program::resolve(name.as_ref(), Some(path_var.as_ref()), &root).unwrap();
            assert_eq!(program.path(), root.join("bin/tool"), "{name} {path_var}");
            assert!(program.found().is_absolute() && program.is_script() && program.is_current());
        }
        let sh = Program::resolve("sh".as_ref(), None, &root).unwrap();
        assert!(!sh.is_script() && sh.found().ends_with("bin/sh"));
    }

    #[test]
    fn says_why_there_is_nothing_to_run() {
        let dir = tempfile::tempdir().unwrap();
        file(&dir.path().join("plain"), "", 0o644);
        nix::unistd::mkfifo(&dir.path().join("fifo"), Mode::from_bits_truncate(0o755)).unwrap();
        for (name, path_var, part) in [
            ("./none", None, "there is no program"),
            ("./plain/none", None, "there is no program"),
            ("./plain", None, "chmod +x"),
            ("./fifo", None, "no regular file"),
            ("/", None, "no regular file"),
            ("", None, "is not in PATH"),
            ("no-such-program", None, "is not in PATH"),
            ("plain", Some("."), "chmod +x"),
        ] {
            let path_var = path_var.map(OsStr::new);
            let error = Program::resolve(name.as_ref(), path_var, dir.path()).unwrap_err().to_string();
            assert!(error.contains(part), "{name}: {error}");
        }
    }

    #[test]
    fn knows_the_same_file_again() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        file(&root.join("tool"), "#!/bin/sh\n", 0o755);
        let resolve = || Program::resolve("./tool".as_ref(), None, &root).unwrap();
        let program = resolve();
        assert!(program.is_same(&resolve()));
        // As it was deployed by some: in place, with the same length.
        file(&root.join("tool"), "#!/bin/ed\n", 0o755);
        assert!(!program.is_same(&resolve()));
        let program = resolve();
        file(&root.join("other"), "#!/bin/ed\n", 0o755);
        fs::rename(root.join("other"), root.join("tool")).unwrap();
        assert!(!program.is_same(&resolve()));
    }

    #[test]
    fn knows_what_became_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (one, two, current, next) = (root.join("1"), root.join("2"), root.join("current"), root.join("next"));
        file(&one, "#!one", 0o755);
        file(&two, "#!two", 0o755);
        symlink(&one, &current).unwrap();
        let program = Program::resolve(current.as_os_str(), None, Path::new("/")).unwrap();
        assert_eq!((program.found(), program.path()), (current.as_path(), one.as_path()));
        assert_eq!(program.still_at(), Some(current.as_path()));
        symlink(&two, &next).unwrap();
        fs::rename(&next, &current).unwrap();
        assert!(!program.is_current());
        assert_eq!(program.still_at(), Some(one.as_path()));
        fs::rename(&two, &one).unwrap();
        assert_eq!(program.still_at(), None);
        assert!(!program.was_overwritten());

        let program = Program::resolve(one.as_os_str(), None, Path::new("/")).unwrap();
        fs::write(&one, "#!changed in place").unwrap();
        assert!(program.is_current() && program.was_overwritten());
    }

    #[test]
    fn digests_as_sha256sum_does() {
        let dir = tempfile::tempdir().unwrap();
        file(&dir.path().join("abc"), "abc", 0o755);
        let program = Program::resolve("./abc".as_ref(), None, dir.path()).unwrap();
        let digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(program.sha256(), None);
        assert_eq!(program.digest().unwrap(), digest);
        assert_eq!(program.sha256().as_deref(), Some(digest));
    }
}
