//! Doing something in the file system as another process would: its root and working directory, its umask, its user.
//!
//! All of these are a thread's own once it has left what it shares with others (`unshare(2)` with `CLONE_FS`) and where the
//! system calls are made for it alone: `setfsuid(2)`, `setfsgid(2)`, and `setgroups(2)` without the C library, which would
//! change all threads (nptl(7)).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::panic::resume_unwind;
use std::path::Path;
use std::thread;

use nix::sched::{unshare, CloneFlags};
use nix::sys::stat::{umask, Mode};
use nix::unistd::{chroot, fchdir, geteuid, setfsgid, setfsuid, Gid, Uid};
use serde::{Deserialize, Serialize};

/// As whom, and from where.
#[derive(Debug)]
pub struct View {
    /// Its root, where that is not ours.
    root: Option<OwnedFd>,
    directory: OwnedFd,
    standing: Standing,
}

/// What counts in the file system besides where one is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    umask: libc::mode_t,
    user: libc::uid_t,
    group: libc::gid_t,
    groups: Vec<libc::gid_t>,
}

impl View {
    /// As a thread has it now.
    pub fn of(tid: i32) -> io::Result<View> {
        let status = fs::read_to_string(format!("/proc/{tid}/status"))?;
        let words = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(|line| line.split_whitespace().collect::<Vec<_>>())
        };
        let missing = || io::Error::other("its status is not as proc_pid_status(5) has it");
        // The fourth is the one that counts in the file system.
        let number = |name| words(name).and_then(|words| words.get(3)?.parse().ok()).ok_or_else(missing);
        let mask = words("Umask").and_then(|words| libc::mode_t::from_str_radix(words.first()?, 8).ok());
        let open = |what: &str| open_directory(Path::new(&format!("/proc/{tid}/{what}")));
        let root = open("root")?;
        Ok(View {
            root: if is_ours(&root, tid)? { None } else { Some(root) },
            directory: open("cwd")?,
            standing: Standing {
                umask: mask.ok_or_else(missing)?,
                user: number("Uid")?,
                group: number("Gid")?,
                groups: words("Groups").ok_or_else(missing)?.into_iter().flat_map(str::parse).collect(),
            },
        })
    }

    /// The same from another directory, as it names it.
    pub fn within(self, directory: &Path) -> io::Result<View> {
        let directory = self.act(|| open_directory(directory))??;
        Ok(View { directory, ..self })
    }

    /// One that was taken apart.
    #[must_use]
    pub fn from_parts(root: Option<OwnedFd>, directory: OwnedFd, standing: Standing) -> View {
        View { root, directory, standing }
    }

    /// Its root where that is not ours, its directory, and the rest.
    #[must_use]
    pub fn parts(&self) -> (&Option<OwnedFd>, &OwnedFd, &Standing) {
        (&self.root, &self.directory, &self.standing)
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    /// Does something there, on a thread of its own, which is waited for.
    pub fn act<T: Send>(&self, act: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter()?;
                Ok(act())
            });
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    fn enter(&self) -> io::Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        let Standing { umask: mask, user, group, groups } = &self.standing;
        let (user, group) = (Uid::from_raw(*user), Gid::from_raw(*group));
        umask(Mode::from_bits_truncate(*mask));
        if let Some(root) = &self.root {
            fchdir(root)?;
            chroot(".")?;
        }
        fchdir(&self.directory)?;
        if geteuid().is_root() {
            // SAFETY: the pointer and the length are those of a live slice; the kernel copies it.
            let result = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
            setfsgid(group);
            // It says who it was, and never fails: asked again, it is to be the new one.
            setfsuid(user);
            if setfsuid(user) != user {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
        }
        Ok(())
    }
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    Ok(File::options().read(true).custom_flags(flags).open(path)?.into())
}

/// Whether this is the root of this process too, in the same mounts.
fn is_ours(root: &OwnedFd, tid: i32) -> io::Result<bool> {
    let mounts = |who: &str| fs::read_link(format!("/proc/{who}/ns/mnt"));
    let number = |found: fs::Metadata| (found.dev(), found.ino());
    let there = File::from(root.as_fd().try_clone_to_owned()?).metadata()?;
    Ok(number(there) == number(fs::metadata("/")?) && mounts(&tid.to_string())? == mounts("self")?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::gettid;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_that_thread_has_another_umask_and_directory() {
        let dir = tempfile::tempdir().unwrap();
        let here = std::env::current_dir().unwrap();
        let view = View::of(gettid().as_raw()).unwrap().within(dir.path()).unwrap();
        let standing = Standing { umask: 0o077, ..view.standing.clone() };
        let view = View { standing, ..view };
        view.act(|| fs::write("made", "").unwrap()).unwrap();
        assert_eq!(fs::metadata(dir.path().join("made")).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::env::current_dir().unwrap(), here);
        fs::write(dir.path().join("other"), "").unwrap();
        assert_ne!(fs::metadata(dir.path().join("other")).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn only_that_thread_has_another_user_and_root() {
        if !geteuid().is_root() {
            return eprintln!("not checked: only root can be another user");
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        fs::create_dir(dir.path().join("closed")).unwrap();
        fs::set_permissions(dir.path().join("closed"), fs::Permissions::from_mode(0o700)).unwrap();
        let view = View::of(gettid().as_raw()).unwrap().within(dir.path()).unwrap();
        let root = Some(open_directory(dir.path()).unwrap());
        let standing = Standing { user: 65534, group: 65534, groups: vec![], ..view.standing.clone() };
        let view = View { root, standing, ..view };
        view.act(|| fs::write("/made", "").unwrap()).unwrap();
        let made = fs::metadata(dir.path().join("made")).unwrap();
        assert_eq!((made.uid(), made.gid()), (65534, 65534));
        let refused = view.act(|| fs::write("/closed/x", "")).unwrap().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        fs::write(dir.path().join("closed/x"), "").unwrap();
        assert_eq!(fs::metadata(dir.path().join("closed/x")).unwrap().uid(), 0);
    }
}
