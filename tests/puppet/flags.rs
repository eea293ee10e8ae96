//! What a puppet is told to do: by its arguments, and by a file that is read at each start, so that the next generation
//! does something else although its command line is the same.

use std::time::Duration;

/// See `puppet.rs` for what each does.
#[derive(Debug, Default)]
#[allow(clippy::struct_excessive_bools)] // Each is a flag of the command line.
pub struct Flags {
    pub version: String,
    pub bind: Option<String>,
    pub also_bind: Vec<String>,
    pub also_bind_after: Duration,
    pub unix_datagrams: Option<String>,
    pub unlinks: bool,
    pub chmod: Option<u32>,
    pub udp: Vec<String>,
    pub udp_sockets: usize,
    pub udp_per_client: bool,
    pub healthy_after: Duration,
    pub ready: Ready,
    pub notify_raw: Vec<String>,
    pub stderr: Vec<String>,
    pub exit_before_ready: Option<i32>,
    pub crash_before_ready: bool,
    pub exit_after: Option<(Duration, i32)>,
    pub exit_code: i32,
    pub ignore_term: bool,
    pub drain: Duration,
    pub grandchild: Option<Grandchild>,
    pub daemonize: bool,
    pub nonblocking: bool,
    pub strict_blocking: bool,
    pub shutdown_listener: bool,
    pub listen_backlog: Option<i32>,
    pub watchdog: Option<Watchdog>,
    pub fdstore: Vec<String>,
    pub handoff_hostile: Option<String>,
    pub fork_chains: usize,
}

/// How it says READY=1.
#[derive(Debug, Default, PartialEq)]
pub enum Ready {
    #[default]
    Notify,
    None,
    Delay(Duration),
    Child,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Grandchild {
    Plain,
    Stubborn,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Watchdog {
    Feed,
    ThenHang,
}

impl Flags {
    /// From arguments, and from the file that `--script` names. A later flag replaces an earlier one.
    pub fn read(args: impl Iterator<Item = String>) -> Result<Flags, String> {
        let mut flags = Flags { version: "1".to_owned(), udp_sockets: 1, ..Flags::default() };
        let mut args = args;
        while let Some(name) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{name} needs a value"));
            if name == "--script" {
                let path = value()?;
                let script = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
                for line in script.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
                    let (name, rest) = line.split_once(' ').unwrap_or((line, ""));
                    flags.set(name, || Ok(rest.trim().to_owned()))?;
                }
            } else {
                flags.set(&name, value)?;
            }
        }
        Ok(flags)
    }

    fn set(&mut self, name: &str, value: impl FnOnce() -> Result<String, String>) -> Result<(), String> {
        match name {
            "--version" => self.version = value()?,
            "--bind" => self.bind = Some(value()?),
            "--also-bind-after-ms" => self.also_bind_after = millis(&value()?)?,
            "--also-bind" => self.also_bind.push(value()?),
            "--unix-datagrams" => self.unix_datagrams = Some(value()?),
            "--unlinks" => self.unlinks = true,
            "--chmod" => {
                self.chmod = Some(u32::from_str_radix(&value()?, 8).map_err(|_| "--chmod is octal")?);
            }
            "--udp" => self.udp.push(value()?),
            "--udp-sockets" => self.udp_sockets = number(&value()?)?,
            "--udp-per-client" => self.udp_per_client = true,
            "--healthy-after-ms" => self.healthy_after = millis(&value()?)?,
            "--ready" => self.ready = ready(&value()?)?,
            "--notify-raw" => self.notify_raw.push(value()?.replace("\\n", "\n")),
            "--stderr" => self.stderr.push(value()?),
            "--exit-before-ready" => self.exit_before_ready = Some(number(&value()?)?),
            "--crash-before-ready" => self.crash_before_ready = true,
            "--exit-after-ms" => {
                let value = value()?;
                let (ms, code) = value.split_once(':').ok_or("--exit-after-ms is N:CODE")?;
                self.exit_after = Some((millis(ms)?, number(code)?));
            }
            "--exit-code" => self.exit_code = number(&value()?)?,
            "--ignore-term" => self.ignore_term = true,
            "--drain-ms" => self.drain = millis(&value()?)?,
            "--spawn-grandchild" => self.grandchild = Some(Grandchild::Plain),
            "--spawn-stubborn-grandchild" => self.grandchild = Some(Grandchild::Stubborn),
            "--daemonize" => self.daemonize = true,
            "--nonblocking" => self.nonblocking = true,
            "--strict-blocking" => self.strict_blocking = true,
            "--shutdown-listener" => self.shutdown_listener = true,
            "--listen-backlog" => self.listen_backlog = Some(number(&value()?)?),
            "--watchdog" => self.watchdog = Some(Watchdog::Feed),
            "--watchdog-then-hang" => self.watchdog = Some(Watchdog::ThenHang),
            "--fdstore" => self.fdstore.push(value()?),
            "--handoff-hostile" => self.handoff_hostile = Some(value()?),
            "--fork-chains" => self.fork_chains = number(&value()?)?,
            _ => return Err(format!("unknown flag {name}")),
        }
        Ok(())
    }
}

fn ready(text: &str) -> Result<Ready, String> {
    match text {
        "notify" => Ok(Ready::Notify),
        "none" => Ok(Ready::None),
        "child" => Ok(Ready::Child),
        _ => {
            let ms = text.strip_prefix("delay-ms=").ok_or("--ready is notify, none, child or delay-ms=N")?;
            Ok(Ready::Delay(millis(ms)?))
        }
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.trim().parse().map_err(|_| format!("{text:?} is no number"))
}

fn millis(text: &str) -> Result<Duration, String> {
    number(text).map(Duration::from_millis)
}
