//! What is written down for the supervisor after this one, should this one be killed: who runs, with which sockets.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::core::GenerationId;
use crate::process::cgroup::RecordedCgroup;

/// Version of the file's format. Another one is not read.
const FORMAT: u32 = 1;

/// A supervisor's state, as far as the next one can go on from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    format: u32,
    /// Generations that live.
    pub generations: Vec<RecordedGeneration>,
    /// Sockets that they have.
    pub listeners: Vec<RecordedListener>,
}

/// A generation that lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedGeneration {
    /// Its number.
    pub number: GenerationId,
    /// Its first process, which leads its process group …
    pub pid: i32,
    /// … and when that was started, in clock ticks since boot.
    pub start_ticks: u64,
    /// Its main process, where it named another one (MAINPID) …
    pub main_pid: i32,
    /// … and when that was started.
    pub main_start_ticks: u64,
    /// Its `ZDDSUP_MARKER`.
    pub marker: String,
    /// Its cgroup.
    #[serde(default)]
    pub cgroup: Option<RecordedCgroup>,
    /// What it was doing.
    pub role: Role,
}

/// What a generation was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The incumbent.
    Serving,
    /// A candidate that was not ready.
    Starting,
    /// A candidate that was ready, and had a share.
    Canary,
    /// On standby, or on its way out.
    Leaving,
}

/// A socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedListener {
    /// Its name; none of one that the service chose for itself.
    pub name: String,
    /// Its inode in sockfs.
    pub inode: u64,
    /// The generation whose own it is, where generations do not share it; each address in the kernel's order.
    #[serde(default)]
    pub adopted_from: Option<GenerationId>,
    /// Those of one address.
    #[serde(default)]
    pub group: String,
    /// Whether the kernel chose its port: the next generation is to get the same one.
    #[serde(default)]
    pub any_port: bool,
    /// Of a Unix socket that it made: its file.
    #[serde(default)]
    pub file: Option<RecordedFile>,
}

/// The file of a Unix socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedFile {
    /// Where it is.
    pub directory: PathBuf,
    /// What it is called there …
    pub name: String,
    /// … and by its second name.
    pub hidden: String,
}

impl Recorded {
    /// A state to be written.
    #[must_use]
    pub fn new(generations: Vec<RecordedGeneration>, listeners: Vec<RecordedListener>) -> Self {
        Recorded { format: FORMAT, generations, listeners }
    }

    /// Writes it over what stood there, in one call: no reader finds half of it, killed or not.
    ///
    /// Not a new file and a rename(2): on a busy disk, taking the old one away waits for its blocks to be written, for
    /// many seconds, and so would the supervisor's loop.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(path)?;
        let mut bytes = self.bytes()?;
        // Spaces cover the rest of what was longer.
        let before = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        bytes.resize(bytes.len().max(before), b' ');
        file.write_all_at(&bytes, 0)
    }

    /// As it is written.
    pub fn bytes(&self) -> io::Result<Vec<u8>> {
        Ok(serde_json::to_vec(self)?)
    }

    /// What a supervisor left, if it did and it can be read. A file of another user or format is none.
    #[must_use]
    pub fn read(path: &Path) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        let owner = fs::symlink_metadata(path).ok()?.uid();
        if owner != nix::unistd::geteuid().as_raw() {
            return None;
        }
        Self::parse(&fs::read(path).ok()?)
    }

    /// The content of such a file. Another format, and what is none, is nothing.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let recorded: Recorded = serde_json::from_slice(bytes).ok()?;
        (recorded.format == FORMAT).then_some(recorded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_back_as_written_and_garbage_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.state");
        let recorded = Recorded::new(
            vec![RecordedGeneration {
                number: GenerationId(7),
                pid: 1,
                start_ticks: 2,
                main_pid: 1,
                main_start_ticks: 2,
                marker: "m".to_owned(),
                cgroup: Some(RecordedCgroup { path: "/c".into(), inode: 3 }),
                role: Role::Serving,
            }],
            vec![RecordedListener {
                name: "http".to_owned(),
                inode: 9,
                adopted_from: Some(GenerationId(7)),
                group: "g".to_owned(),
                any_port: true,
                file: Some(RecordedFile { directory: "/run".into(), name: "a".to_owned(), hidden: "b".to_owned() }),
            }],
        );
        recorded.write(&path).unwrap();
        assert_eq!(Recorded::read(&path), Some(recorded));
        // Over what is longer.
        let nobody = Recorded::new(Vec::new(), Vec::new());
        nobody.write(&path).unwrap();
        assert_eq!(Recorded::read(&path), Some(nobody));
        fs::write(&path, b"{\"format\":99}").unwrap();
        assert_eq!(Recorded::read(&path), None);
    }
}
