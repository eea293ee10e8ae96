//! `zddsup unit`: prints a systemd unit for a command, with the reasons as comments.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use super::exit::{Exit, Failure};
use super::text;
use crate::config::flags::RunFlags;
use crate::config::{start_directory, Handoff, OwnCgroup, ServiceConfig};

/// Beyond zddsup's own limits: it is to be the one that acts on them.
const MARGIN: Duration = Duration::from_secs(20);

/// Checks what was given as `run` does, and prints the unit.
pub fn run(flags: RunFlags) -> Result<Exit, Failure> {
    let config = flags.validate().map_err(|error| Failure::with(Exit::Usage, &error))?;
    let own = std::env::current_exe().map_err(|source| Failure::System { step: "find zddsup's own file", source })?;
    // After `zddsup unit`, as they are: what was not given keeps its default.
    let args = std::env::args_os().skip(2).collect::<Vec<_>>();
    let unit = unit(&config, &own, &args, &start_directory())?;
    text::print(&unit)?;
    Ok(Exit::Done)
}

fn unit(config: &ServiceConfig, own: &Path, args: &[OsString], here: &Path) -> Result<String, Failure> {
    let name = &config.name;
    let own = quoted(&own.as_os_str().to_owned())?;
    let args = args.iter().map(quoted).collect::<Result<Vec<_>, _>>()?.join(" ");
    let directory = specifiers(in_utf8(&here.as_os_str().to_owned())?);
    let target = match &config.control {
        Some(path) => format!("--control {}", quoted(&path.clone().into_os_string())?),
        None => format!("--name {name}"),
    };
    // A canary may wait for somebody's word.
    let start = config.start_timeout.filter(|_| config.canary.is_none()).map(|limit| limit + config.bake);
    let stop = config.drain_timeout.map(|limit| config.lame_duck + limit + config.stop_timeout);
    let (start, stop) = (limit(start), limit(stop));
    let (hardening, delegation) = (hardening(config), delegation(config));
    Ok(format!(
        "\
# /etc/systemd/system/{name}.service, printed by `zddsup unit`
[Unit]
Description={name}, upgraded by zddsup
After=network-online.target
Wants=network-online.target

[Service]
# Started once the first version can serve.
Type=notify
NotifyAccess=main
# Relative paths mean the same as where this was printed.
WorkingDirectory={directory}
ExecStart={own} run {args}
# Waits for the result: `systemctl reload` fails when the upgrade does, and the old version serves on. From systemd 253 on,
# Type=notify-reload does without this line; but then only the status tells of a reload that failed.
ExecReload={own} upgrade {target}

# 2: a configuration that cannot become right by itself.
Restart=always
RestartPreventExitStatus=2
# SIGTERM is zddsup's alone, which lets the service finish; what is left at the end is killed.
KillMode=mixed
{delegation}# systemd holds zddsup's sockets while no zddsup is there: `systemctl restart`, a crash and SIGKILL refuse no connection.
FileDescriptorStoreMax=512
# More than --start-timeout and --bake, which a reload waits for.
TimeoutStartSec={start}
# More than --lame-duck, --drain-timeout and --stop-timeout together.
TimeoutStopSec={stop}
# Fed by zddsup's own loop. The service's watchdog is --watchdog.
WatchdogSec=30
# Control socket and state, /run/zddsup: for all services of zddsup, so that none removes it.
RuntimeDirectory=zddsup
RuntimeDirectoryPreserve=yes

{hardening}
[Install]
WantedBy=multi-user.target
"
    ))
}

/// Of the unit's cgroup.
fn delegation(config: &ServiceConfig) -> &'static str {
    match config.cgroup {
        OwnCgroup::Off => "",
        OwnCgroup::Auto | OwnCgroup::Require => {
            "\
# zddsup makes a cgroup below the unit's for each version, out of which no daemon gets. It enables no controller: pids is on
# in any case, where Delegate=yes would turn on all of them, for the units beside this one too. It takes cgroups that can be
# written to: no ProtectControlGroups=. Both are the other way round with --cgroup off.
Delegate=pids
"
        }
    }
}

/// What the handoff still allows.
fn hardening(config: &ServiceConfig) -> String {
    let adopts = config.handoff == Handoff::Adopt || config.handoff == Handoff::Auto && config.listeners.is_empty();
    let (mut capabilities, mut calls) = (
        "# CHOWN, FOWNER, DAC_OVERRIDE: sockets for other users. SETUID, SETGID, SETPCAP: --user, and servers that change\n\
         # their user themselves. KILL: their signals.\n\
         CapabilityBoundingSet=CAP_CHOWN CAP_FOWNER CAP_DAC_OVERRIDE CAP_SETUID CAP_SETGID CAP_SETPCAP CAP_KILL\n\
         CapabilityBoundingSet=CAP_NET_BIND_SERVICE CAP_SYS_RESOURCE\n"
            .to_owned(),
        "SystemCallFilter=@system-service\n",
    );
    if adopts {
        calls = "\
# Beyond @system-service, programs that bind for themselves (--handoff adopt) need seccomp, by which their calls are caught, and
# pidfd_getfd, by which zddsup takes copies of their sockets.
SystemCallFilter=@system-service seccomp pidfd_getfd
";
        capabilities +=
            "# For pidfd_getfd(2) of a service that runs as another user.\nCapabilityBoundingSet=CAP_SYS_PTRACE\n";
    }
    if config.nice.is_some_and(|nice| nice < 0) {
        capabilities += "# For --nice.\nCapabilityBoundingSet=CAP_SYS_NICE\n";
    }
    // Read-only is what they are made by it.
    let cgroups = if config.cgroup == OwnCgroup::Off { "ProtectControlGroups=yes\n" } else { "" };
    format!(
        "\
# Hardening. It is the service's too: leave out what that cannot do with.
# No setuid programs.
NoNewPrivileges=yes
LockPersonality=yes
ProtectClock=yes
{cgroups}ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
# /usr, /boot and /etc are read-only.
ProtectSystem=full
PrivateDevices=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
# AF_NETLINK: zddsup counts connections by sock_diag(7).
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
{calls}SystemCallErrorNumber=EPERM
{capabilities}# Tighter still, where the service allows it:
#ProtectSystem=strict
#ReadWritePaths=
#ProtectHome=yes
#PrivateTmp=yes
#UMask=0077
#SystemCallArchitectures=native
# Not for programs that compile at run time (Node, Java):
#MemoryDenyWriteExecute=yes
"
    )
}

fn limit(limit: Option<Duration>) -> String {
    limit.map_or_else(|| "infinity".to_owned(), |limit| (limit + MARGIN).as_secs().to_string())
}

fn in_utf8(word: &OsString) -> Result<&str, Failure> {
    let why = || format!("{} is not UTF-8, and a unit has to be: rename it", word.to_string_lossy());
    word.to_str().ok_or_else(|| Failure::Said { exit: Exit::Usage, line: why() })
}

/// `%` begins a specifier (`systemd.unit(5)`).
fn specifiers(text: &str) -> String {
    text.replace('%', "%%")
}

/// A word of a command line, by the rules of `systemd.service(5)`.
fn quoted(word: &OsString) -> Result<String, Failure> {
    let text = specifiers(in_utf8(word)?).replace('$', "$$");
    let plain = |c: char| !c.is_whitespace() && !c.is_control() && !"\"'\\;".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return Ok(text);
    }
    let mut inside = String::new();
    for c in text.chars() {
        match c {
            '"' | '\\' => inside.extend(['\\', c]),
            '\n' => inside += "\\n",
            '\t' => inside += "\\t",
            c if c.is_ascii_control() => {
                // Writing to a String cannot fail.
                let _written = write!(inside, "\\x{:02x}", u32::from(c));
            }
            c => inside.push(c),
        }
    }
    Ok(format!("\"{inside}\""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn printed(args: &[&str]) -> String {
        let cli = super::super::Cli::try_parse_from([&["zddsup", "unit"], args].concat()).unwrap();
        let super::super::Command::Unit(flags) = cli.command else { panic!("another subcommand") };
        let args: Vec<_> = args.iter().map(OsString::from).collect();
        unit(&flags.validate().unwrap(), Path::new("/bin/zddsup"), &args, Path::new("/srv/50%")).unwrap()
    }

    fn lines(unit: &str) -> Vec<&str> {
        unit.lines().filter(|line| !line.starts_with('#') && line.contains('=')).collect()
    }

    #[test]
    fn limits_are_above_the_services_own() {
        let unit = printed(&["-l", "8080", "--bake", "1m", "--lame-duck", "5s", "--", "server", "a b"]);
        assert!(
            unit.contains("\nExecStart=/bin/zddsup run -l 8080 --bake 1m --lame-duck 5s -- server \"a b\"\n"),
            "{unit}"
        );
        assert!(unit.contains("\nExecReload=/bin/zddsup upgrade --name server\n"), "{unit}");
        assert!(unit.contains("\nTimeoutStartSec=170\n") && unit.contains("\nTimeoutStopSec=335\n"), "{unit}");
        assert!(unit.contains("\nWorkingDirectory=/srv/50%%\n"), "{unit}");
        let unit = printed(&["-l", "8080", "--drain-timeout", "infinity", "--control", "/run/c d", "--", "server"]);
        assert!(unit.contains("\nTimeoutStopSec=infinity\n"), "{unit}");
        assert!(unit.contains("upgrade --control \"/run/c d\"\n"), "{unit}");
    }

    #[test]
    fn only_what_the_handoff_needs_is_allowed() {
        let (adopts, listens) = (printed(&["--", "server"]), printed(&["-l", "8080", "--", "server"]));
        for needed in ["pidfd_getfd", "seccomp", "CAP_SYS_PTRACE"] {
            assert!(lines(&adopts).iter().any(|line| line.contains(needed)), "{needed}");
            assert!(!lines(&listens).iter().any(|line| line.contains(needed)), "{needed}");
        }
    }

    #[test]
    fn cgroups_are_delegated_or_protected() {
        let (delegated, off) = (printed(&["--", "server"]), printed(&["--cgroup", "off", "--", "server"]));
        let has = |unit: &str, start| lines(unit).iter().any(|line| line.starts_with(start));
        assert!(has(&delegated, "Delegate=") && !has(&delegated, "ProtectControlGroups="), "{delegated}");
        assert!(!has(&off, "Delegate=") && has(&off, "ProtectControlGroups="), "{off}");
    }

    /// Which is tested under a real systemd.
    #[test]
    fn the_template_is_hardened_in_the_same_way() {
        let template = include_str!("../../systemd/zddsup@.service");
        let unit = printed(&["--", "server"]);
        let kinds = ["Delegate", "Protect", "Private", "Restrict", "System", "Capability", "NoNew", "Lock", "Kill"];
        let of = |text| lines(text).into_iter().filter(|line| kinds.iter().any(|kind| line.starts_with(kind)));
        let of = |text| of(text).map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
        assert_eq!(of(template), of(&unit));
    }

    #[test]
    fn words_reach_the_program_as_they_were_given() {
        let word = |text: &str| quoted(&OsString::from(text)).unwrap();
        assert_eq!(word("--flag=x"), "--flag=x");
        assert_eq!(word("100%"), "100%%");
        assert_eq!(word("$HOME"), "$$HOME");
        assert_eq!(word(""), "\"\"");
        assert_eq!(word(";"), "\";\"");
        assert_eq!(word("a \"b\" \\ 'c'\n"), "\"a \\\"b\\\" \\\\ 'c'\\n\"");
    }

    #[test]
    fn what_is_no_text_is_refused() {
        use std::os::unix::ffi::OsStringExt;
        assert!(quoted(&OsString::from_vec(vec![b'a', 0xff])).is_err());
    }
}
