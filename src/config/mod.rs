//! A service's definition, from flags into one validated type.
//!
//! | file | what it holds |
//! |---|---|
//! | [`flags`], `help` | every flag of `zddsup run`, its default and its help |
//! | [`values`] | how their values are written |
//! | [`ready`] | `--ready` |
//! | [`canary`] | `--canary` and what goes with it, of `run` and of `upgrade` |
//! | [`validate`] | what flags mean together; refuses what cannot be meant, before anything is bound or spawned |
//! | [`environment`] | what a generation's environment begins with |

pub mod canary;
pub mod environment;
pub mod error;
pub mod flags;
mod help;
pub mod ready;
pub mod validate;
pub mod values;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

pub use canary::{Canary, CanaryFlags};
pub use environment::EnvError;
pub use error::ConfigError;
pub use flags::RunFlags;
pub use ready::{Probe, Ready};

use crate::core::{Policy, RestartLimit, RestartWhen};
use crate::listener::ListenerSpec;
use crate::process::limits::Limit;

/// Longest name of a service: it is part of the control socket's path.
pub const NAME_MOST: usize = 64;

/// Bytes of a path that a socket can be bound to.
const SOCKET_PATH_MOST: usize = 107;

/// A service: one command with its listeners and policies.
#[derive(Debug, Clone)]
pub struct ServiceConfig {
    /// Its name.
    pub name: String,
    /// Program and arguments, with placeholders.
    pub command: Vec<OsString>,
    /// What it listens on. None: what systemd passed.
    pub listeners: Vec<ListenerSpec>,
    /// How generations get their listeners.
    pub handoff: Handoff,
    /// Which sockets generations have.
    pub switch: Switch,
    /// Environment of other supervisors that is set as well.
    pub compat: Compat,
    /// What shows that a generation can serve.
    pub ready: Ready,
    /// Whose certificates a probe trusts; none: the system's.
    pub ready_ca: Option<PathBuf>,
    /// How a probe names the server; none: as its URL does.
    pub ready_host: Option<String>,
    /// How long one probe may take.
    pub probe_timeout: Duration,
    /// From the spawn until ready; none is no limit.
    pub start_timeout: Option<Duration>,
    /// How long the old generation stays on standby after the switch.
    pub bake: Duration,
    /// How a new version is tried before the switch; none is not at all.
    pub canary: Option<Canary>,
    /// From the drain's begin to the stop signal for all; none is no limit.
    pub drain_timeout: Option<Duration>,
    /// How a drain is begun.
    pub drain: Drain,
    /// In a drain that is observed, connections that have been still for so long count as gone; none is never.
    pub drain_idle: Option<Duration>,
    /// What tells a generation to drain and end.
    pub stop_signal: Signal,
    /// From the stop signal for all to SIGKILL.
    pub stop_timeout: Duration,
    /// How long a stop keeps serving first.
    pub lame_duck: Duration,
    /// Generations that may be on their way out while an upgrade begins.
    pub max_draining: usize,
    /// When a service that ended by itself is started again.
    pub restart: RestartWhen,
    /// Past which the supervisor gives up; none is never.
    pub restart_limit: Option<RestartLimit>,
    /// Whom it runs as: name or number.
    pub user: Option<String>,
    /// Its group: name or number.
    pub group: Option<String>,
    /// Its umask; none is zddsup's own.
    pub umask: Option<Mode>,
    /// Its working directory; none is zddsup's own.
    pub chdir: Option<PathBuf>,
    /// Variables of its environment, with placeholders.
    pub env: Vec<(String, String)>,
    /// Files with such variables, read for each generation.
    pub env_files: Vec<EnvFile>,
    /// Whether each generation has a cgroup of its own.
    pub cgroup: OwnCgroup,
    /// Its resource limits.
    pub limits: Vec<Limit>,
    /// Its nice value.
    pub nice: Option<i32>,
    /// How the kernel's out-of-memory killer sees it.
    pub oom_score_adj: Option<i32>,
    /// How often it has to show a sign of life; none is never.
    pub watchdog: Option<Duration>,
    /// Fds that it may leave for the next generation.
    pub fdstore_max: usize,
    /// Path of the control socket; none is the usual one.
    pub control: Option<PathBuf>,
    /// Where zddsup's own pid is written.
    pub pid_file: Option<PathBuf>,
    /// How the log looks.
    pub log_format: LogFormat,
    /// What goes into it.
    pub log_level: String,
}

/// How generations get their listeners.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Handoff {
    /// By number and by message, or not at all.
    #[value(help = "Both fds and socket; adopt where there is no listener")]
    Auto,
    /// Open from fd 3 on, by systemd's protocol.
    #[value(help = "Open from fd 3 on, with LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES (systemd's protocol)")]
    Fds,
    /// By messages on a socket (docs/handoff.md).
    #[value(help = "By messages on the socket whose fd number is ZDDSUP_SOCKET (docs/handoff.md)")]
    Socket,
    /// Not at all: an unmodified program makes its own, and new connections are steered (docs/architecture.md).
    #[value(help = "Not at all: an unmodified program binds for itself, and new connections are steered")]
    Adopt,
}

/// Which sockets generations have, and how new connections go from one to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    /// As suits the handoff.
    #[value(help = "steered with --handoff adopt, else shared")]
    Auto,
    /// All the same ones.
    #[value(help = "All generations have the same sockets: the old one must stop accepting when it is told to")]
    Shared,
    /// Each its own.
    #[value(
        help = "Each has its own TCP sockets, and the kernel steers: who is not ready, or is old, gets nothing new"
    )]
    Steered,
}

/// How a drain is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Drain {
    /// As suits the handoff.
    #[value(help = "observe where programs bind for themselves, else signal")]
    Auto,
    /// It is told to drain.
    #[value(help = "It is told: the stop signal, or a message on the handoff socket")]
    Signal,
    /// Its connections are watched.
    #[value(help = "The stop signal comes once its last connection is gone, for programs that cannot stop gracefully")]
    Observe,
}

/// Whether each generation has a cgroup of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum OwnCgroup {
    /// Where zddsup's is delegated.
    #[value(help = "Where zddsup's own cgroup is marked as delegated (systemd: Delegate=)")]
    Auto,
    /// No.
    #[value(help = "No")]
    Off,
    /// Always.
    #[value(help = "Yes, marked or not: it is zddsup's. Where that cannot be, zddsup does not start")]
    Require,
}

/// Environment of other supervisors that is set as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Compat {
    /// `SERVER_STARTER_PORT` and `SERVER_STARTER_GENERATION`.
    pub start_server: bool,
    /// `EINHORN_FD_0`, … and `EINHORN_FD_COUNT`.
    pub einhorn: bool,
}

/// A file with variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvFile {
    /// Where.
    pub path: PathBuf,
    /// Whether it may be missing.
    pub optional: bool,
}

/// How the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

impl ServiceConfig {
    /// Whether each generation has a socket of its own at the TCP addresses of `--listen`.
    #[must_use]
    pub fn steers(&self) -> bool {
        match self.switch {
            Switch::Auto => self.handoff == Handoff::Adopt,
            Switch::Shared => false,
            Switch::Steered => true,
        }
    }

    /// What the core goes by.
    #[must_use]
    pub fn policy(&self, jitter_seed: u64) -> Policy {
        Policy {
            start_timeout: self.start_timeout,
            bake: self.bake,
            drain_timeout: self.drain_timeout,
            stop_timeout: self.stop_timeout,
            lame_duck: self.lame_duck,
            max_draining: self.max_draining,
            restart: self.restart,
            restart_limit: self.restart_limit,
            jitter_seed,
            ..Policy::default()
        }
    }
}

/// The directory that zddsup was started in, by the name that the shell knows, so that a `current` symlink in it is
/// followed anew for each generation, and one that was deleted and made again is found.
#[must_use]
pub fn start_directory() -> PathBuf {
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    let same = |named: &PathBuf| named.is_absolute() && named.canonicalize().is_ok_and(|path| path == here);
    std::env::var_os("PWD").map(PathBuf::from).filter(same).unwrap_or(here)
}
