//! What flags mean together. Nothing is opened or changed here.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::error::ConfigError;
use super::flags::{CompatWith, RunFlags};
use super::ready::{Probe, Ready, Scheme};
use super::values::Span;
use super::{start_directory, Compat, Drain, EnvFile, Handoff, ServiceConfig, Switch, NAME_MOST, SOCKET_PATH_MOST};
use crate::listener::address::Address;
use crate::listener::{ListenFlag, Listener, ListenerSpec};
use crate::proto::placeholder;

impl RunFlags {
    /// The service that these flags define.
    pub fn validate(self) -> Result<ServiceConfig, ConfigError> {
        let program = self.command.first().filter(|program| !program.is_empty()).ok_or(ConfigError::EmptyCommand)?;
        let name = self.name.unwrap_or_else(|| default_name(program));
        if let Some(path) = self.control.as_deref().filter(|path| path.as_os_str().len() > SOCKET_PATH_MOST) {
            return Err(ConfigError::ControlTooLong(path.to_owned()));
        }
        let here = start_directory();
        let mut config = ServiceConfig {
            name,
            listeners: ListenFlag::name_all(self.listen),
            handoff: self.handoff,
            switch: self.switch,
            compat: Compat {
                start_server: self.compat.contains(&CompatWith::StartServer),
                einhorn: self.compat.contains(&CompatWith::Einhorn),
            },
            ready: self.ready,
            ready_ca: self.ready_ca.map(|path| here.join(path)),
            ready_host: self.ready_host,
            probe_timeout: self.probe_timeout.0,
            start_timeout: self.start_timeout.0,
            bake: self.bake.0,
            canary: self.canary.plan()?,
            drain_timeout: self.drain_timeout.0,
            drain: self.drain,
            drain_idle: self.drain_idle.map(|idle| idle.0),
            stop_signal: self.stop_signal,
            stop_timeout: self.stop_timeout.0,
            lame_duck: self.lame_duck.0,
            max_draining: self.max_draining,
            restart: self.restart.into(),
            restart_limit: self.restart_limit.0,
            user: self.user,
            group: self.group,
            umask: self.umask,
            chdir: self.chdir,
            env: self.env,
            env_files: self.env_file.into_iter().map(|file| EnvFile { path: here.join(file.path), ..file }).collect(),
            cgroup: self.cgroup,
            limits: self.limit,
            nice: self.nice,
            oom_score_adj: self.oom_score_adj,
            watchdog: self.watchdog.map(|every| every.0).filter(|every| !every.is_zero()),
            fdstore_max: self.fdstore_max,
            control: self.control.map(|path| here.join(path)),
            pid_file: self.pid_file.map(|path| here.join(path)),
            log_format: self.log_format,
            log_level: self.log_level,
            command: self.command,
        };
        config.check()?;
        let steers = config.steers();
        config.listeners.iter_mut().for_each(|listener| listener.steered = steers && listener.address.is_tcp());
        Ok(config)
    }
}

impl ServiceConfig {
    fn check(&self) -> Result<(), ConfigError> {
        let names = self.listeners.iter().map(|listener| &listener.name);
        if let Some((_, name)) =
            names.clone().enumerate().find(|(place, name)| names.clone().take(*place).any(|other| other == *name))
        {
            return Err(ConfigError::SameName(name.clone()));
        }
        let in_words = |listener: &ListenerSpec| (listener.name.clone(), listener.address.to_string());
        if self.handoff == Handoff::Adopt {
            if self.switch == Switch::Shared {
                return Err(ConfigError::AdoptsAndShares);
            }
            if let Some(other) = self.listeners.iter().find(|listener| !listener.address.is_tcp()) {
                let (listener, address) = in_words(other);
                return Err(ConfigError::AdoptsOther { listener, address });
            }
        }
        if let Some(others) = self.listeners.iter().find(|listener| self.steers() && listener.options.reuseport) {
            let why = "has reuseport: others may listen there too, and would be steered; leave it away";
            let (listener, address) = in_words(others);
            return Err(ConfigError::CannotSteer { listener, address, why });
        }
        if self.switch == Switch::Steered {
            let is_unix = |listener: &&ListenerSpec| matches!(listener.address, Address::Unix { .. });
            if let Some(unix) = self.listeners.iter().find(is_unix) {
                let ((listener, address), why) =
                    (in_words(unix), "is a Unix socket, and Linux steers none; use --switch shared");
                return Err(ConfigError::CannotSteer { listener, address, why });
            }
        }
        let adopts = self.handoff == Handoff::Adopt || self.handoff == Handoff::Auto && self.listeners.is_empty();
        if !adopts && self.ready == Ready::Listen {
            return Err(ConfigError::NothingAdopted("--ready listen"));
        }
        let is_shared = |listener: &ListenerSpec| !self.steers() || !listener.address.is_tcp();
        let shared = self.listeners.iter().find(|listener| is_shared(listener));
        if !adopts && self.canary.is_some() && (!self.steers() || shared.is_some()) {
            return Err(ConfigError::NothingToShareOut);
        }
        if !adopts && self.drain == Drain::Observe {
            if let Some(shared) = shared {
                return Err(ConfigError::GetsNewOnes(shared.address.to_string()));
            }
        }
        let observes = match self.drain {
            Drain::Auto => adopts,
            Drain::Observe => true,
            Drain::Signal => false,
        };
        if self.drain_idle.is_some() && !observes {
            return Err(ConfigError::NotObserved);
        }
        if self.handoff == Handoff::Socket || self.handoff == Handoff::Adopt && !self.listeners.is_empty() {
            self.check_without_numbers()?;
        }
        let url = match &self.ready {
            Ready::Probe(Probe::Http(url)) => Some(url),
            _ => None,
        };
        if self.ready_ca.is_some() && url.is_none_or(|url| url.scheme != Scheme::Verified) {
            return Err(ConfigError::NoSuchProbe { flag: "--ready-ca", probe: "https://…" });
        }
        if self.ready_host.is_some() && url.is_none() {
            return Err(ConfigError::NoSuchProbe { flag: "--ready-host", probe: "http://… or https://…" });
        }
        if let (Ready::Delay(delay), Some(timeout)) = (&self.ready, self.start_timeout) {
            if *delay >= timeout {
                return Err(ConfigError::NeverReady { delay: Span(*delay), timeout: Span(timeout) });
            }
        }
        if self.listeners.is_empty() {
            // What systemd passed is known once it is taken.
            return Ok(());
        }
        self.check_against(self.listeners.iter().map(|listener| (listener.name.as_str(), &listener.address)))
    }

    /// What can be checked only with every listener at hand: for sockets that systemd passed, after they were taken.
    pub fn check_listeners(&self, listeners: &[Listener]) -> Result<(), ConfigError> {
        let cannot = |listener: &Listener, why| {
            let (listener, address) = (listener.name().to_owned(), listener.address());
            Err(ConfigError::CannotSteer { listener, address, why })
        };
        for listener in listeners {
            if listener.is_passed() && (listener.is_steered() || self.switch == Switch::Steered) {
                return cannot(
                    listener,
                    "was passed by systemd, and stays its own; use --switch shared, or let zddsup listen",
                );
            }
            if listener.is_steered() && !listener.is_shareable() {
                let why = "was made by the supervisor before to be shared; go on with --switch shared, or run \
                           `zddsup stop` first";
                return cannot(listener, why);
            }
        }
        if self.switch == Switch::Shared && self.handoff == Handoff::Auto && listeners.is_empty() {
            return Err(ConfigError::AdoptsAndShares);
        }
        self.check_against(listeners.iter().map(|listener| (listener.name(), listener.bound())))
    }

    fn check_against<'a>(
        &self,
        listeners: impl Iterator<Item = (&'a str, &'a Address)> + Clone,
    ) -> Result<(), ConfigError> {
        if self.handoff != Handoff::Socket {
            let numbers: Vec<_> = listeners.clone().map(|(name, _)| name).zip(3..).collect();
            for (place, text) in self.texts() {
                placeholder::expand(text, &numbers, 1).map_err(|source| ConfigError::Placeholder { place, source })?;
            }
        }
        let Ready::Probe(probe) = &self.ready else { return Ok(()) };
        if self.steers() && !self.listeners.is_empty() {
            // It is steered to the new one alone.
            return Ok(());
        }
        let Some(asked) = probe.address() else { return Ok(()) };
        for (name, address) in listeners {
            if address.may_answer(asked.ip(), asked.port()) {
                let (listener, address) = (name.to_owned(), address.to_string());
                return Err(ConfigError::ProbesListener { probe: probe.to_string(), listener, address });
            }
        }
        Ok(())
    }

    fn check_without_numbers(&self) -> Result<(), ConfigError> {
        if let Some((what, _)) = self.texts().find(|(_, text)| placeholder::asks_for_fd(text)) {
            return Err(ConfigError::NoNumbers { what });
        }
        match self.compat {
            Compat { start_server: false, einhorn: false } => Ok(()),
            Compat { .. } => Err(ConfigError::NoNumbers { what: "--compat".to_owned() }),
        }
    }

    /// Where placeholders may stand.
    fn texts(&self) -> impl Iterator<Item = (String, &OsStr)> {
        let args = self.command.iter().map(|arg| (format!("argument {arg:?}"), arg.as_os_str()));
        args.chain(self.env.iter().map(|(name, value)| (format!("--env {name}"), OsStr::new(value))))
    }
}

/// The program's file name, as far as it can be part of a path.
fn default_name(program: &OsString) -> String {
    let file = Path::new(program).file_name().unwrap_or_default();
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    let name: String = file.as_bytes().iter().map(|&byte| if fits(byte) { char::from(byte) } else { '-' }).collect();
    let name = name.trim_start_matches(['.', '-']);
    match &name[..name.len().min(NAME_MOST)] {
        "" => "service".to_owned(),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::flags::tests::{config, flags};
    use crate::config::values;
    use proptest::prelude::*;

    fn refused(args: &[&str]) -> String {
        flags(args).unwrap().validate().unwrap_err().to_string()
    }

    #[test]
    fn the_command_gives_the_name() {
        for (program, name) in [
            ("/usr/sbin/nginx", "nginx"),
            ("my app", "my-app"),
            ("./.hidden", "hidden"),
            ("..", "service"),
            ("é", "service"),
        ] {
            assert_eq!(config(&[program]).name, name, "{program}");
        }
        assert!(refused(&[""]).contains("empty"));
    }

    #[test]
    fn listeners_have_names_of_their_own() {
        assert!(refused(&["-l", "a=:1", "-l", "a=:2", "true"]).contains("two listeners are called a"));
        assert!(refused(&["-l", "listener1=:1", "-l", ":2", "true"]).contains("called listener1"));
    }

    #[test]
    fn placeholders_name_listeners() {
        config(&["-l", "web=:1", "--env", "NGINX={fd:web};", "x", "fd@{fd:web}", "{\"json\": 1}"]);
        let error = refused(&["-l", "web=:1", "x", "{fd:http}"]);
        assert!(error.contains("argument \"{fd:http}\"") && error.contains("known names are web"), "{error}");
        assert!(refused(&["-l", "web=:1", "--env", "A={fd:http}", "x"]).contains("--env A"));
        // systemd may pass it.
        let inherits = config(&["x", "{fd:http}"]);
        assert!(inherits.check_listeners(&[]).is_err());
    }

    #[test]
    fn a_handoff_without_numbers_has_no_placeholders() {
        for args in [
            ["-l", "a=:1", "--handoff", "socket", "x", "{fd:a}"],
            ["--handoff", "socket", "--compat", "einhorn", "x", "y"],
        ] {
            assert!(refused(&args).contains("--handoff auto or fds"), "{args:?}");
        }
        config(&["-l", "a=:1", "--handoff", "socket", "x", "{generation}"]);
    }

    #[test]
    fn a_probe_of_a_shared_socket_is_refused() {
        for (listen, ready) in [
            (":8080", "tcp:8080"),
            ("127.0.0.1:8080", "http://localhost:8080/up"),
            ("[::]:8080", "http://[::1]:8080/"),
            ("0.0.0.0:8080", "tcp:8080"),
        ] {
            let error = refused(&["-l", listen, "--ready", ready, "true"]);
            assert!(error.contains("the old one may answer"), "{error}");
        }
        for (listen, ready) in
            [(":8080", "tcp:8081"), ("127.0.0.2:8080", "tcp:8080"), ("udp://:8080", "tcp:8080"), (":0", "tcp:80")]
        {
            config(&["-l", listen, "--ready", ready, "true"]);
        }
    }

    #[test]
    fn a_probe_of_a_socket_that_systemd_passed_is_refused_once_it_is_known() {
        let listener = Listener::bind(&"web=127.0.0.1:0".parse().unwrap()).unwrap();
        let port = listener.local().unwrap().port();
        let config = config(&["--ready", &format!("tcp:{port}"), "true"]);
        assert!(matches!(config.check_listeners(&[listener]), Err(ConfigError::ProbesListener { .. })));
    }

    #[test]
    fn what_cannot_be_steered_is_refused() {
        for (args, part) in [
            (["-l", "/run/s", "--switch", "steered", "true"].as_slice(), "is a Unix socket"),
            (&["-l", ":8?reuseport", "--handoff", "adopt", "true"], "has reuseport"),
            (&["--handoff", "adopt", "--switch", "shared", "true"], "leave one of the two away"),
            (&["-l", "udp://:8", "--handoff", "adopt", "true"], "leave it away"),
            (&["-l", ":8", "--handoff", "adopt", "x", "{fd:listener}"], "--handoff auto or fds"),
            (&["-l", ":8", "--drain", "observe", "true"], "--switch steered"),
            (&["-l", ":8", "-l", "udp://:8", "--switch", "steered", "--drain", "observe", "x"], "udp://:8"),
            (&["--ready", "http://127.0.0.1:8/", "--ready-ca", "x", "true"], "https://"),
            (&["--ready-host", "x", "true"], "http://"),
        ] {
            assert!(refused(args).contains(part), "{args:?}: {}", refused(args));
        }
        // systemd may pass something, or nothing.
        let shared = config(&["--switch", "shared", "true"]);
        assert_eq!(shared.check_listeners(&[]), Err(ConfigError::AdoptsAndShares));
        let listener = Listener::bind(&"web=127.0.0.1:0".parse().unwrap()).unwrap();
        let passed = Listener::inherited(listener.fd().try_clone().unwrap(), "web").unwrap();
        let steered = config(&["--switch", "steered", "true"]);
        assert!(matches!(steered.check_listeners(&[passed]), Err(ConfigError::CannotSteer { .. })));
        config(&["-l", ":8", "--handoff", "adopt", "true"]);
        config(&["-l", ":8", "--ready", "tcp:8", "--switch", "steered", "--drain", "observe", "true"]);
    }

    #[test]
    fn a_generation_can_become_ready() {
        assert!(refused(&["--ready", "delay:2m", "true"]).contains("--start-timeout 1m30s"));
        config(&["--ready", "delay:2m", "--start-timeout", "infinity", "true"]);
    }

    #[test]
    fn idle_connections_are_told_only_where_they_are_watched() {
        let (idle, program) = ("--drain-idle", "true");
        assert!(refused(&[idle, "5s", "-l", ":1", program]).contains("--drain observe"));
        config(&[idle, "5s", "-l", ":1", "--switch", "steered", "--drain", "observe", program]);
        assert!(refused(&[idle, "5s", "--drain", "signal", program]).contains("--drain observe"));
        assert_eq!(config(&[idle, "5s", program]).drain_idle, Some(std::time::Duration::from_secs(5)));
        assert!(flags(&[idle, "0", program]).is_err());
    }

    #[test]
    fn a_control_path_can_be_bound() {
        assert!(refused(&["--control", &"x".repeat(108), "true"]).contains("107 bytes"));
    }

    proptest! {
        #[test]
        fn every_default_name_is_a_name(program in "\\PC{1,100}") {
            prop_assert!(values::name(&default_name(&program.into())).is_ok());
        }
    }
}
