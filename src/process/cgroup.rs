//! A cgroup for each generation (cgroups(7), version 2), below zddsup's own where that was delegated to it.
//!
//! A process is born in its parent's cgroup, and no fork(2), setsid(2), execve(2) or subreaper gets it out: only who may
//! write to the cgroup file system. So who is in a generation's cgroup is of that generation, and `cgroup.kill` ends all of
//! it at once, what is being forked too.
//!
//! ```text
//!   system.slice/zddsup@web.service     systemd's, delegated: zddsup is in it, and stays there
//!   ├─ generation-3-web                 zddsup's, in one piece the service's: it may make cgroups below
//!   └─ generation-4-web
//! ```
//!
//! No controller is enabled for them, so that the rule of no processes in inner nodes does not come into it.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::core::GenerationId;
use crate::sys::xattr;

/// Where systemd and containers have them.
const MOUNTED: &str = "/sys/fs/cgroup";

/// How systemd says that a cgroup is delegated (`docs/CGROUP_DELEGATION.md` of its sources): the first from version 251 on and for
/// everybody, the other one for root.
const MARKS: [&CStr; 2] = [c"user.delegate", c"trusted.delegate"];

/// Why generations cannot have cgroups.
#[derive(Debug, thiserror::Error)]
pub enum NoCgroup {
    /// None of version 2, or another namespace's.
    #[error(
        "{MOUNTED} does not have the cgroup that zddsup is in: it takes cgroup version 2 (the unified hierarchy), mounted \
         there, and in a container for the container itself"
    )]
    NotThere,
    /// It is somebody else's to manage.
    #[error(
        "{0:?} is not marked as delegated: set Delegate= in zddsup's unit, or say --cgroup require if it is zddsup's"
    )]
    NotDelegated(PathBuf),
    /// It cannot be used.
    #[error(
        "no cgroup can be made in {directory:?}: {source}; is it mounted read-only (ProtectControlGroups=, a container's \
         usual /sys), or not writable for zddsup's user?"
    )]
    Unusable {
        /// Zddsup's own.
        directory: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// zddsup's own cgroup, below which it may make others.
#[derive(Debug)]
pub struct Delegated {
    directory: PathBuf,
    service: String,
}

impl Delegated {
    /// Looks for it, and tries. With `marked`, one that systemd did not mark is left alone.
    pub fn find(service: &str, marked: bool) -> Result<Delegated, NoCgroup> {
        let directory = own().ok_or(NoCgroup::NotThere)?;
        if marked && !is_marked(&directory) {
            return Err(NoCgroup::NotDelegated(directory));
        }
        if let Err(source) = try_out(&directory) {
            return Err(NoCgroup::Unusable { directory, source });
        }
        Ok(Delegated { directory, service: service.to_owned() })
    }

    /// Where they are made.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes a generation's.
    pub fn make(&self, id: GenerationId) -> io::Result<Cgroup> {
        Cgroup::make(self.directory.join(format!("generation-{id}-{}", self.service)))
    }

    /// Removes those that a killed zddsup of this name has left, and that are empty.
    pub fn tidy(&self) {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| self.is_ours(&entry.file_name().to_string_lossy())) {
            remove(&entry.path());
        }
    }

    fn is_ours(&self, name: &str) -> bool {
        let parts = name.strip_prefix("generation-").and_then(|rest| rest.split_once('-'));
        parts.is_some_and(|(number, service)| number.parse::<u64>().is_ok() && service == self.service)
    }
}

/// Zddsup's own cgroup, as far as this mount has it. The path of `/proc/self/cgroup` is relative to the cgroup namespace, which
/// the mount may not be of.
fn own() -> Option<PathBuf> {
    let cgroups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let directory = Path::new(MOUNTED).join(path);
    let pid = i32::try_from(std::process::id()).ok()?;
    read_pids(&directory).ok()?.contains(&pid).then_some(directory)
}

fn is_marked(directory: &Path) -> bool {
    let Ok(path) = CString::new(directory.as_os_str().as_bytes()) else { return false };
    MARKS.iter().any(|mark| xattr::read(&path, mark).is_ok_and(|value| value == b"1"))
}

/// Everything but a process in it.
fn try_out(directory: &Path) -> io::Result<()> {
    // A process comes from here into the one below: both are written to (cgroup_procs_write_permission).
    let _may_be_left = open_to_write(&directory.join("cgroup.procs"))?;
    let trial = Cgroup::make(directory.join(format!("zddsup-trial-{}", std::process::id())))?;
    let _may_be_entered = trial.entrance()?;
    match fs::read_to_string(trial.path.join("cgroup.type"))?.trim() {
        "domain" => Ok(()),
        other => Err(io::Error::other(format!("it would be of type {other}, which no process may be in"))),
    }
}

/// A generation's cgroup. When this is dropped, it is removed if it is empty.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    inode: u64,
}

/// What a cgroup is found by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedCgroup {
    /// Where it was.
    pub path: PathBuf,
    /// Its number, which the kernel gives to no other one.
    pub inode: u64,
}

impl Cgroup {
    /// Makes it. One that is there already is somebody else's.
    pub fn make(path: PathBuf) -> io::Result<Cgroup> {
        DirBuilder::new().mode(0o755).create(&path)?;
        let inode = fs::metadata(&path)?.ino();
        Ok(Cgroup { path, inode })
    }

    /// That very one, if it is still there.
    #[must_use]
    pub fn recorded(recorded: RecordedCgroup) -> Option<Cgroup> {
        let RecordedCgroup { path, inode } = recorded;
        let is_it = fs::metadata(&path).is_ok_and(|found| found.ino() == inode) && path.join("cgroup.procs").exists();
        is_it.then_some(Cgroup { path, inode })
    }

    /// What it is found by.
    #[must_use]
    pub fn record(&self) -> RecordedCgroup {
        RecordedCgroup { path: self.path.clone(), inode: self.inode }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A process that writes 0 there is in it.
    pub fn entrance(&self) -> io::Result<OwnedFd> {
        open_to_write(&self.path.join("cgroup.procs"))
    }

    /// All that live in it and in those that they made below.
    #[must_use]
    pub fn pids(&self) -> BTreeSet<i32> {
        // Gone meanwhile; or of type threaded, whose processes are those of the one above.
        tree(&self.path).iter().filter_map(|directory| read_pids(directory).ok()).flatten().collect()
    }

    /// Whether nobody lives in it or below.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        is_unpopulated(&self.path)
    }

    /// SIGKILL to all of them at once, and to what they fork. Before Linux 5.14 an error.
    pub fn kill(&self) -> io::Result<()> {
        use io::Write;
        OpenOptions::new().write(true).open(self.path.join("cgroup.kill"))?.write_all(b"1")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// For `Option<Cgroup>`: as what it is found by.
pub mod recorded {
    use super::{Cgroup, RecordedCgroup};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// Writes that.
    #[allow(clippy::ref_option)] // As serde calls it.
    pub fn serialize<S: Serializer>(cgroup: &Option<Cgroup>, to: S) -> Result<S::Ok, S::Error> {
        cgroup.as_ref().map(Cgroup::record).serialize(to)
    }

    /// Finds it. None, too, where it is gone.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Cgroup>, D::Error> {
        Ok(Option::<RecordedCgroup>::deserialize(from)?.and_then(Cgroup::recorded))
    }
}

fn is_unpopulated(path: &Path) -> bool {
    let events = fs::read_to_string(path.join("cgroup.events"));
    // One that was removed was empty.
    events.map_or(true, |events| events.lines().any(|line| line == "populated 0"))
}

fn open_to_write(path: &Path) -> io::Result<OwnedFd> {
    Ok(OpenOptions::new().write(true).open(path)?.into())
}

/// Those that this one has, without those below. 0 is somebody whom our namespace of pids does not have.
fn read_pids(directory: &Path) -> io::Result<Vec<i32>> {
    let procs = fs::read_to_string(directory.join("cgroup.procs"))?;
    Ok(procs.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).collect())
}

/// A cgroup and all below, each after the one that it is in.
fn tree(top: &Path) -> Vec<PathBuf> {
    let mut all = vec![top.to_owned()];
    let mut next = 0;
    while let Some(directory) = all.get(next) {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let below: Vec<_> = entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .collect();
        all.extend(below);
        next += 1;
    }
    all
}

/// From the bottom up. One that somebody lives in stays (EBUSY), and so does what it is in.
fn remove(top: &Path) {
    // One that somebody lives in below may just be filling others.
    if !is_unpopulated(top) {
        return;
    }
    for directory in tree(top).iter().rev() {
        let _lived_in_or_gone = fs::remove_dir(directory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_those_of_the_very_service_are_tidied_up() {
        let delegated = Delegated { directory: PathBuf::new(), service: "web-2".to_owned() };
        assert!(delegated.is_ours("generation-17-web-2"));
        for other in ["generation-17-web", "generation-2", "generation-x-web-2", "web-2", "generation-1-api-web-2"] {
            assert!(!delegated.is_ours(other), "{other}");
        }
    }

    #[test]
    fn a_tree_is_removed_from_the_bottom_up_as_far_as_it_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        fs::create_dir_all(top.join("a/b/c")).unwrap();
        fs::create_dir_all(top.join("d/e")).unwrap();
        fs::write(top.join("d/lived in"), "").unwrap();
        remove(&top);
        assert!(top.join("d").is_dir() && !top.join("d/e").exists() && !top.join("a").exists());
        fs::remove_file(top.join("d/lived in")).unwrap();
        remove(&top);
        assert!(!top.exists());
    }

    #[test]
    fn another_one_of_the_same_name_is_not_the_recorded_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.procs"), "").unwrap();
        let inode = fs::metadata(dir.path()).unwrap().ino();
        let recorded = RecordedCgroup { path: dir.path().to_owned(), inode: inode + 1 };
        assert!(Cgroup::recorded(recorded.clone()).is_none());
        let found = Cgroup::recorded(RecordedCgroup { inode, ..recorded }).unwrap();
        // Nothing but its directory is taken away, and that has something in it.
        drop(found);
        assert!(dir.path().exists());
    }
}
