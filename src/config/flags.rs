//! The flags of `zddsup run`: their names, defaults and help.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum, ValueHint};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

use super::canary::CanaryFlags;
use super::help;
use super::ready::Ready;
use super::values::{self, Rate, Span, UpTo};
use super::{Drain, EnvFile, Handoff, LogFormat, OwnCgroup, Switch};
use crate::core::{Policy, RestartWhen};
use crate::listener::ListenFlag;
use crate::process::limits::Limit;

const SOCKETS: &str = "Listeners";
const UPGRADE: &str = "Upgrades";
const STOPPING: &str = "Stopping";
const FAILURES: &str = "Failures";
const PROCESS: &str = "Process";
const SUPERVISOR: &str = "Supervisor";

/// What `zddsup run` and `zddsup check` take.
#[derive(Debug, Clone, Args)]
pub struct RunFlags {
    /// Listen here; repeatable
    #[arg(short, long, value_name = "[NAME=]ADDRESS", long_help = help::LISTEN, help_heading = SOCKETS)]
    pub listen: Vec<ListenFlag>,

    /// How a generation gets its listeners
    ///
    /// {fd:NAME} in the command or in --env becomes the listener's fd number, unless this is socket.
    #[arg(long, value_enum, default_value_t = Handoff::Auto, help_heading = SOCKETS)]
    pub handoff: Handoff,

    /// Which sockets generations have, and so how new connections go from one to the next
    ///
    /// UDP sockets of --listen are shared always; Unix sockets cannot be steered.
    #[arg(long, value_enum, default_value_t = Switch::Auto, help_heading = SOCKETS)]
    pub switch: Switch,

    /// Also set the environment of another supervisor
    #[arg(long, value_enum, value_name = "SUPERVISOR", value_delimiter = ',', help_heading = SOCKETS)]
    pub compat: Vec<CompatWith>,

    /// What shows that a generation can serve: auto, notify, tcp:PORT, http://…, https://…, exec:COMMAND, delay:DURATION
    #[arg(long, value_name = "WHAT", default_value_t = Ready::Auto, long_help = help::READY, help_heading = UPGRADE)]
    pub ready: Ready,

    /// Whose certificates --ready https://… trusts: a file in PEM, read once [default: the system's]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = UPGRADE)]
    pub ready_ca: Option<PathBuf>,

    /// The Host header of an HTTP probe, and the name in the certificate [default: the host of the URL]
    #[arg(long, value_name = "NAME", value_parser = values::host, help_heading = UPGRADE)]
    pub ready_host: Option<String>,

    /// How long one probe may take
    #[arg(
        long, value_name = "DURATION", default_value_t = Span(Duration::from_secs(5)),
        value_parser = values::some_time, help_heading = UPGRADE
    )]
    pub probe_timeout: Span,

    /// A generation that is not ready by then has failed; infinity is no limit
    #[arg(
        long, value_name = "DURATION", default_value_t = UpTo(Policy::default().start_timeout),
        value_parser = values::some_time_or_endless, help_heading = UPGRADE
    )]
    pub start_timeout: UpTo,

    /// Keep the old generation on standby for so long after the switch
    ///
    /// If the new one ends meanwhile, or on `zddsup rollback`, the old one is back at once.
    #[arg(long, value_name = "DURATION", default_value_t = Span(Policy::default().bake), help_heading = UPGRADE)]
    pub bake: Span,

    #[command(flatten)]
    pub(super) canary: CanaryFlags,

    /// Generations that may be on their way out when an upgrade begins; past that it waits
    #[arg(
        long, value_name = "N", default_value_t = Policy::default().max_draining,
        value_parser = at_least_one, help_heading = UPGRADE
    )]
    pub max_draining: usize,

    /// Fds that a generation may store for the next one (FDSTORE=1)
    #[arg(long, value_name = "N", default_value_t = 512, help_heading = UPGRADE)]
    pub fdstore_max: usize,

    /// How a generation that was switched away from learns that it is to end
    ///
    /// observe needs a new generation that gets all new connections: --handoff adopt, or --switch steered.
    #[arg(long, value_enum, default_value_t = Drain::Auto, help_heading = STOPPING)]
    pub drain: Drain,

    /// In a drain that is observed, a TCP connection that has been still for so long counts as gone [default: never]
    ///
    /// Still: nothing was sent or received, and nothing is unread or not acknowledged. A request that takes the server
    /// longer than this to answer looks the same: choose more than the slowest answer takes.
    #[arg(long, value_name = "DURATION", value_parser = values::some_time, help_heading = STOPPING)]
    pub drain_idle: Option<Span>,

    /// How long a generation may finish what it has; infinity is no limit
    #[arg(
        long, value_name = "DURATION", default_value_t = UpTo(Policy::default().drain_timeout), help_heading = STOPPING
    )]
    pub drain_timeout: UpTo,

    /// Tells a generation to finish what it has and end
    #[arg(
        long, value_name = "SIGNAL", default_value = "TERM", value_parser = values::signal, help_heading = STOPPING
    )]
    pub stop_signal: Signal,

    /// From the stop signal for all of a generation's processes to SIGKILL
    #[arg(
        long, value_name = "DURATION", default_value_t = Span(Policy::default().stop_timeout), help_heading = STOPPING
    )]
    pub stop_timeout: Span,

    /// On TERM, serve on for so long before draining: load balancers take a while to notice
    #[arg(
        long, value_name = "DURATION", default_value_t = Span(Policy::default().lame_duck), help_heading = STOPPING
    )]
    pub lame_duck: Span,

    /// Start the service again when it ends by itself
    #[arg(
        long, value_enum, value_name = "WHEN", default_value_t = When::from(Policy::default().restart),
        help_heading = FAILURES
    )]
    pub restart: When,

    /// Give up after so many restarts in that time; infinity is never
    #[arg(
        long, value_name = "N/DURATION", default_value_t = Rate(Policy::default().restart_limit), help_heading = FAILURES
    )]
    pub restart_limit: Rate,

    /// A generation that sends no WATCHDOG=1 for so long has failed [default: off]
    #[arg(long, value_name = "DURATION", help_heading = FAILURES)]
    pub watchdog: Option<Span>,

    /// Run as this user, with its groups; name or number
    #[arg(short, long, value_name = "USER", value_hint = ValueHint::Username, help_heading = PROCESS)]
    pub user: Option<String>,

    /// Run as this group; name or number
    #[arg(short, long, value_name = "GROUP", help_heading = PROCESS)]
    pub group: Option<String>,

    /// Mask of permissions, in octal [default: zddsup's own]
    #[arg(long, value_name = "MASK", value_parser = values::umask, help_heading = PROCESS)]
    pub umask: Option<Mode>,

    /// Working directory, found anew for each generation [default: zddsup's own]
    #[arg(short = 'C', long, value_name = "DIRECTORY", value_hint = ValueHint::DirPath, help_heading = PROCESS)]
    pub chdir: Option<PathBuf>,

    /// Set a variable; repeatable
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = values::variable, help_heading = PROCESS)]
    pub env: Vec<(String, String)>,

    /// Read variables from a file, anew for each generation; -PATH may be missing; repeatable
    #[arg(
        long, value_name = "[-]PATH", value_parser = values::env_file, allow_hyphen_values = true,
        value_hint = ValueHint::FilePath, help_heading = PROCESS
    )]
    pub env_file: Vec<EnvFile>,

    /// Whether each generation has a cgroup of its own, out of which none of its processes gets
    #[arg(long, value_enum, default_value_t = OwnCgroup::Auto, help_heading = PROCESS)]
    pub cgroup: OwnCgroup,

    /// Limit a resource, as in nofile=65536, nofile=1024:65536, core=unlimited; repeatable
    #[arg(long, value_name = "RESOURCE=[SOFT:]HARD", help_heading = PROCESS)]
    pub limit: Vec<Limit>,

    /// Scheduling priority
    #[arg(
        long, value_name = "-20..19", value_parser = clap::value_parser!(i32).range(-20..=19),
        allow_negative_numbers = true, help_heading = PROCESS
    )]
    pub nice: Option<i32>,

    /// How readily the kernel kills it when memory runs out
    #[arg(
        long, value_name = "-1000..1000", value_parser = clap::value_parser!(i32).range(-1000..=1000),
        allow_negative_numbers = true, help_heading = PROCESS
    )]
    pub oom_score_adj: Option<i32>,

    /// The service's name [default: the command's file name]
    #[arg(short, long, value_parser = values::name, help_heading = SUPERVISOR)]
    pub name: Option<String>,

    /// Control socket.
    #[arg(
        long,
        value_name = "PATH",
        value_hint = ValueHint::FilePath,
        help = "Control socket [default: $XDG_RUNTIME_DIR/zddsup/NAME.sock; for root /run/zddsup/NAME.sock]",
        help_heading = SUPERVISOR
    )]
    pub control: Option<PathBuf>,

    /// Write zddsup's own pid here
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath, help_heading = SUPERVISOR)]
    pub pid_file: Option<PathBuf>,

    /// How zddsup's log looks; it goes to stderr
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text, help_heading = SUPERVISOR)]
    pub log_format: LogFormat,

    /// What goes into it
    #[arg(
        long, value_name = "LEVEL", default_value = "info", help_heading = SUPERVISOR,
        value_parser = PossibleValuesParser::new(["error", "warn", "info", "debug", "trace"])
    )]
    pub log_level: String,

    /// The program and its arguments; looked up in PATH anew for each generation
    #[arg(
        required = true, value_name = "COMMAND", trailing_var_arg = true,
        value_hint = ValueHint::CommandWithArguments
    )]
    pub command: Vec<OsString>,
}

/// Another supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CompatWith {
    /// `start_server` of `Server::Starter`.
    #[value(name = "start_server", alias = "start-server", help = "SERVER_STARTER_PORT, SERVER_STARTER_GENERATION")]
    StartServer,
    /// Einhorn.
    #[value(help = "EINHORN_FD_COUNT, EINHORN_FD_0, …")]
    Einhorn,
}

/// When a service that ended by itself is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// Whatever its exit status
    Always,
    /// Unless it exited with status 0
    OnFailure,
    /// Never: zddsup ends with it, with its exit status
    Never,
}

impl From<RestartWhen> for When {
    fn from(when: RestartWhen) -> When {
        match when {
            RestartWhen::Always => When::Always,
            RestartWhen::OnFailure => When::OnFailure,
            RestartWhen::Never => When::Never,
        }
    }
}

impl From<When> for RestartWhen {
    fn from(when: When) -> RestartWhen {
        match when {
            When::Always => RestartWhen::Always,
            When::OnFailure => RestartWhen::OnFailure,
            When::Never => RestartWhen::Never,
        }
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| "a number from 1".to_owned())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::config::ServiceConfig;
    use clap::{CommandFactory, Parser};

    #[derive(Debug, Parser)]
    #[command(name = "zddsup run")]
    struct Run {
        #[command(flatten)]
        flags: RunFlags,
    }

    pub fn flags(args: &[&str]) -> Result<RunFlags, clap::Error> {
        Run::try_parse_from(std::iter::once(&"run").chain(args)).map(|run| run.flags)
    }

    /// What these flags come to.
    pub fn config(args: &[&str]) -> ServiceConfig {
        flags(args).unwrap().validate().unwrap()
    }

    #[test]
    fn clap_finds_nothing_wrong() {
        Run::command().debug_assert();
    }

    #[test]
    fn defaults_are_the_cores() {
        let config = config(&["true"]);
        assert_eq!(config.policy(0), Policy::default());
        assert_eq!(config.stop_signal, Signal::SIGTERM);
        assert_eq!(config.drain_idle, None);
        assert_eq!((config.handoff, &config.ready, config.watchdog), (Handoff::Auto, &Ready::Auto, None));
    }

    #[test]
    fn every_flag_arrives() {
        let config = config(&[
            "-l",
            "http=:8080?backlog=9",
            "--handoff",
            "fds",
            "--switch",
            "steered",
            "--compat",
            "start_server,einhorn",
            "--ready",
            "delay:5s",
            "--start-timeout",
            "infinity",
            "--bake",
            "1m",
            "--drain-timeout",
            "0",
            "--stop-signal",
            "QUIT",
            "--stop-timeout",
            "3s",
            "--lame-duck",
            "4s",
            "--max-draining",
            "7",
            "--restart",
            "on-failure",
            "--restart-limit",
            "3/10s",
            "--user",
            "nobody",
            "--group",
            "1",
            "--umask",
            "027",
            "--chdir",
            "/",
            "--env",
            "A=1",
            "--env-file",
            "-/x",
            "--limit",
            "nofile=10:20",
            "--nice",
            "-5",
            "--oom-score-adj",
            "-900",
            "--name",
            "web",
            "--control",
            "c",
            "--pid-file",
            "p",
            "--log-format",
            "json",
            "--log-level",
            "warn",
            "--watchdog",
            "2s",
            "--fdstore-max",
            "8",
            "--probe-timeout",
            "1s",
            "--",
            "prog",
            "--listen",
            "-x",
        ]);
        assert_eq!(config.listeners[0].to_string(), "http=tcp://:8080?backlog=9");
        assert_eq!(config.command, ["prog", "--listen", "-x"]);
        assert!(config.compat.start_server && config.compat.einhorn);
        assert_eq!((config.start_timeout, config.drain_timeout), (None, Some(Duration::ZERO)));
        assert_eq!((config.nice, config.oom_score_adj, config.fdstore_max), (Some(-5), Some(-900), 8));
        assert_eq!((config.restart, config.max_draining), (RestartWhen::OnFailure, 7));
        assert_eq!(config.umask, Some(Mode::from_bits_truncate(0o027)));
        assert_eq!(config.env_files, [EnvFile { path: "/x".into(), optional: true }]);
        assert!(config.listeners[0].steered);
        assert_eq!(config.watchdog, Some(Duration::from_secs(2)));
        assert_eq!((config.name.as_str(), config.log_level.as_str()), ("web", "warn"));
    }

    #[test]
    fn flags_after_the_command_are_the_commands() {
        let config = config(&["-l", "8080", "prog", "-l", "9090", "--", "x"]);
        assert_eq!(config.listeners.len(), 1);
        assert_eq!(config.command, ["prog", "-l", "9090", "--", "x"]);
    }

    #[test]
    fn a_bad_value_names_the_flag_and_the_remedy() {
        for (args, parts) in [
            (["--bake", "5"], ["--bake", "5s or 5ms"]),
            (["--listen", "localhost:80"], ["--listen", "127.0.0.1"]),
            (["--max-draining", "0"], ["--max-draining", "from 1"]),
            (["--stop-signal", "KILL"], ["--stop-signal", "--stop-timeout 0"]),
            (["--name", "a/b"], ["--name", "letters"]),
            (["--ready", "tcp"], ["--ready", "old generation"]),
        ] {
            let error = flags(&[args[0], args[1], "true"]).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        assert!(flags(&[]).unwrap_err().to_string().contains("COMMAND"));
    }

    #[derive(Debug, Parser)]
    enum Sub {
        /// About the one
        One(RunFlags),
        /// About the other
        Other(RunFlags),
    }

    #[test]
    fn a_subcommand_has_its_own_first_line() {
        let mut command = Sub::command();
        for (name, about) in [("one", "About the one"), ("other", "About the other")] {
            let help = command.find_subcommand_mut(name).unwrap().render_long_help().to_string();
            assert!(help.starts_with(about), "{help}");
        }
    }

    #[test]
    fn help_has_headings_and_defaults() {
        let help = Run::command().term_width(80).render_long_help().to_string();
        for part in [
            "Listeners:",
            "Upgrades:",
            "Stopping:",
            "[default: 1m30s]",
            "[default: 5m]",
            "[default: 10/1m]",
            "[default: TERM]",
        ] {
            assert!(help.contains(part), "{part} is not in\n{help}");
        }
        // The tables of the long ones are not broken.
        for line in [super::help::LISTEN, super::help::READY].iter().flat_map(|help| help.lines()) {
            let in_table = line.starts_with("  ");
            assert!(!in_table || help.contains(line), "{line:?} is not in\n{help}");
        }
    }
}
