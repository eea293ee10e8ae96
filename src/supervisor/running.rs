//! What is held for a generation while it lives. Dropped when it is released, and everything of it with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::unistd::Uid;
use serde::{Deserialize, Serialize};
use tokio::task::{AbortHandle, JoinHandle};

use crate::core::{End, GenerationId, Source};
use crate::handoff::channel::Channel;
use crate::process::cgroup::Cgroup;
use crate::process::group::{Group, Member};
use crate::process::output::Capture;
use crate::process::program::Program;
use crate::ready::notify::NotifySocket;
use crate::state::{fds, with};
use crate::sys::pidfd::PidFd;
use crate::sys::seccomp::Notifier;

/// A generation's process and all that serves it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Running {
    /// Its number.
    pub id: GenerationId,
    /// Which program it was to run.
    pub source: Source,
    /// What it runs; none where it could not be resolved.
    #[serde(skip)]
    pub program: Option<Arc<Program>>,
    /// By which its processes are found.
    pub marker: String,
    /// Whom it runs as.
    #[serde(with = "uid")]
    pub uid: Uid,
    /// When its spawn began.
    #[serde(with = "with::moment")]
    pub since: Instant,
    /// When its program was executed.
    #[serde(with = "with::moment_option", default)]
    pub executed: Option<Instant>,
    /// The process whose end is the generation's; none while it is spawned, and once it was reaped.
    pub main: Option<Main>,
    /// Its cgroup, until it has processes: then it is its group's.
    #[serde(skip)]
    pub cgroup: Option<Cgroup>,
    /// All of its processes, once there is one.
    pub group: Option<Arc<Group>>,
    /// Where it says READY=1; none for one that was taken over.
    pub notify: Option<Arc<NotifySocket>>,
    /// Its bind(2) and listen(2), where they are caught.
    #[serde(with = "notifier")]
    pub notifier: Option<Arc<Notifier>>,
    /// How often it called listen(2).
    pub listens: u32,
    /// Whether it listens wherever the one before does, or what is missing was given up.
    pub has_listened: bool,
    /// Whether its probe has succeeded.
    pub probed: bool,
    /// Whether its drain ended by itself; none while it does not drain.
    pub drained: Option<bool>,
    /// Its drain is observed, and what was seen last.
    pub seen: Option<Seen>,
    /// The supervisor's end of its handoff socket.
    #[serde(skip)]
    pub channel: Option<Channel>,
    /// Its stderr.
    #[serde(skip)]
    pub capture: Option<Capture>,
    /// What its last drain message said: last, and more.
    pub told_to_drain: Option<(bool, bool)>,
    /// What it said of itself.
    pub said: Said,
    /// Whether it was switched to once.
    pub ready: bool,
    /// Connections that it had when they were counted last.
    pub connections: Option<u64>,
    /// Why its probe has not succeeded yet.
    pub why_not: Option<String>,
    /// Why it could not be spawned.
    pub spawn_error: Option<String>,
    /// How its main process ended.
    pub end: Option<End>,
    /// The listeners' status flags before it could touch them.
    #[serde(with = "flags")]
    pub flags_before: Vec<OFlag>,
    /// Its watchdog.
    pub watchdog: Watchdog,
    /// Tasks that end with it.
    #[serde(skip)]
    pub tasks: Tasks,
}

/// What a look at a generation has shown, the drain of which is observed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seen {
    /// It has something to finish, or was not looked at yet.
    Busy,
    /// All looks since this one have found nothing.
    QuietSince(#[serde(with = "with::moment")] Instant),
}

/// A generation's main process.
#[derive(Debug, Serialize, Deserialize)]
pub struct Main {
    /// Which.
    pub member: Member,
    /// The process itself.
    #[serde(with = "fds::owned")]
    pub pidfd: PidFd,
    /// Reports its end; none until [`super::driver::Driver`] watches it.
    #[serde(skip)]
    pub watch: Option<AbortHandle>,
}

/// What a generation said of itself by notify messages.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Said {
    /// Whether it said anything at all.
    pub anything: bool,
    /// STATUS=
    pub status: Option<String>,
    /// ERRNO=
    pub errno: Option<i32>,
    /// BUSERROR=
    pub bus_error: Option<String>,
    /// STOPPING=1
    pub stopping: bool,
}

/// When a generation must have shown a sign of life.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Watchdog {
    /// How often; none is never.
    pub every: Option<Duration>,
    /// By when; none until it is ready.
    #[serde(with = "with::moment_option")]
    pub due: Option<Instant>,
}

impl Watchdog {
    /// It lives: the next sign is due a full interval from now.
    pub fn fed(&mut self, now: Instant) {
        self.due = self.every.map(|every| now + every);
    }

    /// As [`Watchdog::fed`], unless it is not watched yet, or no more.
    pub fn fed_if_due(&mut self, now: Instant) {
        if self.due.is_some() {
            self.fed(now);
        }
    }
}

/// Tasks that are aborted when this is dropped.
#[derive(Debug, Default)]
pub struct Tasks(Vec<AbortHandle>);

impl Tasks {
    /// Ties a task to this.
    pub fn add<T>(&mut self, task: &JoinHandle<T>) {
        self.0.retain(|task| !task.is_finished());
        self.0.push(task.abort_handle());
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

impl Drop for Main {
    fn drop(&mut self) {
        self.watch.iter().for_each(AbortHandle::abort);
    }
}

impl Running {
    /// The last lines of its stderr.
    #[must_use]
    pub fn last_words(&self) -> Vec<String> {
        let Some(capture) = &self.capture else { return Vec::new() };
        capture.catch_up();
        capture.tail().lines()
    }

    /// Whether it said hello on its handoff socket, and so hears what it is told there.
    #[must_use]
    pub fn hears(&self) -> bool {
        self.channel.as_ref().is_some_and(Channel::has_spoken)
    }

    /// Where its program lies, for the log.
    #[must_use]
    pub fn program_path(&self) -> String {
        self.program.as_ref().map_or_else(String::new, |program| program.path().display().to_string())
    }

    /// Its cgroup, where it has one.
    #[must_use]
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.group.as_ref().map_or(self.cgroup.as_ref(), |group| group.cgroup())
    }

    /// Pid of its main process.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.main.as_ref().map(|main| main.member.pid)
    }
}

mod uid {
    use nix::unistd::Uid;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[allow(clippy::trivially_copy_pass_by_ref)] // As serde calls it.
    pub fn serialize<S: Serializer>(uid: &Uid, to: S) -> Result<S::Ok, S::Error> {
        uid.as_raw().serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Uid, D::Error> {
        Deserialize::deserialize(from).map(Uid::from_raw)
    }
}

mod flags {
    use nix::fcntl::OFlag;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(flags: &[OFlag], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(flags.iter().map(OFlag::bits))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<OFlag>, D::Error> {
        Ok(Vec::deserialize(from)?.into_iter().map(OFlag::from_bits_retain).collect())
    }
}

mod notifier {
    use std::os::fd::OwnedFd;
    use std::sync::Arc;

    use serde::{de::Error, Deserialize, Deserializer, Serialize, Serializer};

    use crate::state::fds;
    use crate::sys::seccomp::Notifier;

    #[derive(Deserialize)]
    struct Held(#[serde(deserialize_with = "fds::owned::deserialize")] OwnedFd);

    #[derive(Serialize)]
    struct Lent<'a>(#[serde(serialize_with = "fds::owned::serialize")] &'a Notifier);

    #[allow(clippy::ref_option)] // As serde calls it.
    pub fn serialize<S: Serializer>(notifier: &Option<Arc<Notifier>>, to: S) -> Result<S::Ok, S::Error> {
        notifier.as_deref().map(Lent).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Arc<Notifier>>, D::Error> {
        let held = Option::<Held>::deserialize(from)?;
        held.map(|Held(fd)| Notifier::resume(fd).map(Arc::new).map_err(D::Error::custom)).transpose()
    }
}
