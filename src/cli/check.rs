//! `zddsup check`: looks at everything that `run` would need, and changes nothing: binds nothing, spawns nothing.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::unistd::{access, geteuid, AccessFlags};
use procfs::net::TcpState;

use super::exit::{Exit, Failure};
use super::text;
use crate::config::flags::RunFlags;
use crate::config::{environment, start_directory, OwnCgroup, ServiceConfig};
use crate::control::place::{self, Places};
use crate::listener::address::Address;
use crate::listener::ListenerSpec;
use crate::process::cgroup::Delegated;
use crate::process::identity::Identity;
use crate::process::program::Program;
use crate::supervisor;

/// What there is to say of one thing.
#[derive(Debug)]
struct Finding {
    what: String,
    verdict: Verdict,
    words: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Fine,
    /// It may be as it should, but is worth a look.
    Note,
    Problem,
}

/// Looks, and prints what it found.
pub fn run(flags: RunFlags) -> Result<Exit, Failure> {
    let config = flags.validate().map_err(|error| Failure::with(Exit::Usage, &error))?;
    let findings = look(&config, &start_directory());
    text::print(&in_words(&config, &findings))?;
    let problems = findings.iter().filter(|finding| finding.verdict == Verdict::Problem).count();
    if problems == 0 {
        return Ok(Exit::Done);
    }
    let line = format!("{}: `zddsup run` would fail like this", text::count(problems as u64, "problem"));
    Err(Failure::Said { exit: Exit::Usage, line })
}

fn look(config: &ServiceConfig, here: &Path) -> Vec<Finding> {
    let directory = config.chdir.as_ref().map_or_else(|| here.to_owned(), |directory| here.join(directory));
    let mut findings = Findings(Vec::new());
    findings.add("directory", working_directory(&directory));
    let env = environment::for_generation(config);
    let path_var = env.as_ref().map_or_else(|_| std::env::var_os("PATH"), |env| env.get(OsStr::new("PATH")).cloned());
    findings.add("environment", env.map(|env| text::count(env.len() as u64, "variable")));
    findings.add("program", program(&config.command[0], path_var.as_deref(), &directory));
    if config.user.is_some() || config.group.is_some() {
        findings.add("user", user(config.user.as_deref(), config.group.as_deref()));
    }
    if config.cgroup == OwnCgroup::Require {
        let found = Delegated::find(&config.name, false);
        findings.add("cgroups", found.map(|delegated| format!("in {}", delegated.directory().display())));
    }
    for spec in &config.listeners {
        listener(&mut findings, spec, here);
    }
    match supervisor::run::tls(config) {
        Ok(None) => {}
        found => findings.add("TLS of the probe", found.map(|_| "what it trusts can be read".to_owned())),
    }
    control(&mut findings, config);
    if let Some(path) = &config.pid_file {
        findings.add("pid file", writable_parent(path));
    }
    findings.0
}

struct Findings(Vec<Finding>);

impl Findings {
    fn add<E: std::fmt::Display>(&mut self, what: impl Into<String>, found: Result<String, E>) {
        let (verdict, words) = match found {
            Ok(words) => (Verdict::Fine, words),
            Err(error) => (Verdict::Problem, error.to_string()),
        };
        self.0.push(Finding { what: what.into(), verdict, words });
    }

    fn note(&mut self, what: impl Into<String>, words: String) {
        self.0.push(Finding { what: what.into(), verdict: Verdict::Note, words });
    }
}

fn working_directory(directory: &Path) -> Result<String, String> {
    if !directory.is_dir() {
        return Err(format!("{} is not a directory: create it, or change --chdir", directory.display()));
    }
    let enter = access(directory, AccessFlags::X_OK);
    let shown = directory.display();
    enter.map(|()| shown.to_string()).map_err(|errno| format!("cannot enter {shown}: {errno}"))
}

fn program(name: &OsStr, path_var: Option<&OsStr>, directory: &Path) -> Result<String, String> {
    let program = Program::resolve(name, path_var, directory).map_err(|error| error.to_string())?;
    access(program.path(), AccessFlags::X_OK)
        .map_err(|errno| format!("cannot execute {}: {errno}; check its permissions", program.path().display()))?;
    let kind = if program.is_script() { ", a script" } else { "" };
    let digest = program.digest().map(|digest| format!(", sha256 {digest}")).unwrap_or_default();
    Ok(format!("{}{kind}{digest}", program.path().display()))
}

fn user(user: Option<&str>, group: Option<&str>) -> Result<String, String> {
    let identity = Identity::resolve(user, group).map_err(|error| error.to_string())?;
    if !geteuid().is_root() && !identity.is_own() {
        return Err(
            "only root can run a service as another user: drop --user and --group, or run zddsup as root".to_owned()
        );
    }
    Ok(format!("{} ({}), group {}", identity.name, identity.uid, identity.gid))
}

fn listener(findings: &mut Findings, spec: &ListenerSpec, here: &Path) {
    let what = format!("listener {}", spec.name);
    let found = match spec.address.path() {
        Some(path) => unix_path(&here.join(path)),
        None => port_is_allowed(&spec.address),
    };
    findings.add(what.clone(), found.map(|()| spec.address.to_string()));
    if spec.address.path().is_some_and(|path| place::is_alive(&here.join(path))) {
        findings.note(what, "somebody listens there now; `run` can have it once that is gone".to_owned());
    } else if let Some(taken) = in_use(&spec.address) {
        findings.note(what, format!("{taken} is listened on now; `run` can have it once that is gone"));
    }
}

fn unix_path(path: &Path) -> Result<(), String> {
    let directory =
        path.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(PathBuf::from("."), Path::to_owned);
    if !directory.is_dir() {
        return Err(format!(
            "there is no directory {} for the socket {}: create it",
            directory.display(),
            path.display()
        ));
    }
    access(&directory, AccessFlags::W_OK | AccessFlags::X_OK)
        .map_err(|errno| format!("cannot make a socket in {}: {errno}; check its permissions", directory.display()))?;
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            Err(format!("{} exists and is not a socket: remove it, or choose another path", path.display()))
        }
        Ok(_) | Err(_) => Ok(()),
    }
}

fn port_is_allowed(address: &Address) -> Result<(), String> {
    let Address::Inet { port, .. } = *address else { return Ok(()) };
    let first_free = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let first_free = first_free.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(1024);
    if port == 0 || port >= first_free || may_bind_low_ports() {
        return Ok(());
    }
    Err(format!(
        "port {port} needs CAP_NET_BIND_SERVICE: run zddsup as root (with --user for the service), let systemd pass the \
         socket, or choose a port from {first_free} on"
    ))
}

/// capabilities(7): `CAP_NET_BIND_SERVICE` is number 10.
fn may_bind_low_ports() -> bool {
    let effective = procfs::process::Process::myself().and_then(|own| own.status()).map(|status| status.capeff);
    effective.is_ok_and(|effective| effective & (1 << 10) != 0)
}

/// A TCP socket that listens where this address would.
fn in_use(address: &Address) -> Option<SocketAddr> {
    let entries = procfs::net::tcp().into_iter().chain(procfs::net::tcp6()).flatten();
    let mut listening = entries.filter(|entry| entry.state == TcpState::Listen).map(|entry| entry.local_address);
    listening.find(|local| local.port() != 0 && address.may_answer(local.ip(), local.port()))
}

fn control(findings: &mut Findings, config: &ServiceConfig) {
    let alive = if let Some(path) = &config.control {
        findings.add("control socket", control_path(path));
        place::is_alive(path).then(|| path.clone())
    } else {
        findings.add("name", place::check_name(&config.name).map(|()| config.name.clone()));
        Places::of_this_process().find(Some(&config.name)).ok()
    };
    if let Some(path) = alive {
        let words = format!(
            "a supervisor answers on {} now: deploy with `zddsup upgrade`; a second `run` needs another --name",
            path.display()
        );
        findings.note("control socket", words);
    }
}

/// Its directory is made if its parent is there.
fn control_path(path: &Path) -> Result<String, String> {
    match path.parent() {
        Some(directory) if !directory.exists() => writable_parent(directory)?,
        Some(_) | None => writable_parent(path)?,
    };
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            Err(format!("{} exists and is not a socket: give another --control PATH", path.display()))
        }
        Ok(_) | Err(_) => Ok(path.display().to_string()),
    }
}

fn writable_parent(path: &Path) -> Result<String, String> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    let fine = access(parent, AccessFlags::W_OK | AccessFlags::X_OK);
    match fine {
        Ok(()) if parent.is_dir() => Ok(path.display().to_string()),
        Ok(()) => Err(format!("{} is not a directory: choose another path", parent.display())),
        Err(errno) => {
            Err(format!("cannot make {}: {errno}; create its directory, or choose another path", path.display()))
        }
    }
}

fn in_words(config: &ServiceConfig, findings: &[Finding]) -> String {
    let mut shown = format!("Service {}\n", config.name);
    for Finding { what, verdict, words } in findings {
        let mark = match verdict {
            Verdict::Fine => "ok",
            Verdict::Note => "note",
            Verdict::Problem => "PROBLEM",
        };
        // Writing to a String cannot fail.
        let _written = writeln!(shown, "  {mark:<8} {what:<16} {}", text::harmless(words));
    }
    shown.push_str("Not tried: binding the sockets, running the program, its readiness.\n");
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Flags {
        #[command(flatten)]
        flags: RunFlags,
    }

    fn looked(args: &[&str]) -> Vec<Finding> {
        let flags = Flags::try_parse_from(std::iter::once(&"check").chain(args)).unwrap().flags;
        look(&flags.validate().unwrap(), Path::new("/"))
    }

    fn problems(args: &[&str]) -> Vec<String> {
        let findings = looked(args).into_iter().filter(|finding| finding.verdict == Verdict::Problem);
        findings.map(|finding| format!("{}: {}", finding.what, finding.words)).collect()
    }

    #[test]
    fn what_would_work_has_no_problem_and_nothing_is_changed() {
        let dir = tempfile::tempdir().unwrap();
        let socket = format!("unix://{}/web.sock", dir.path().display());
        assert_eq!(problems(&["-l", &socket, "-l", "127.0.0.1:0", "--", "sh", "-c", "exit {fd:listener0}"]), [""; 0]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn each_problem_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let file = file.to_str().unwrap();
        for (args, what, words) in [
            (vec!["no-such-program"], "program", "PATH"),
            (vec![file], "program", "chmod +x"),
            (vec!["--chdir", file, "sh"], "directory", "not a directory"),
            (vec!["--env-file", "/nonexistent/env", "sh"], "environment", "/nonexistent/env"),
            (vec!["--user", "no-such-user", "sh"], "user", "no user"),
            (vec!["-l", "unix:///nonexistent/web.sock", "sh"], "listener listener", "no directory"),
            (vec!["--ready", "https://[::1]/", "--ready-ca", "/nonexistent", "sh"], "TLS of the probe", "/nonexistent"),
        ] {
            let found = problems(&args);
            let named = found.iter().any(|line| line.starts_with(what) && line.contains(words));
            assert!(found.len() == 1 && named, "{args:?}: {found:?}");
        }
        let taken = format!("unix://{file}");
        assert!(problems(&["-l", &taken, "sh"])[0].contains("not a socket"));
    }

    #[test]
    fn a_port_that_is_listened_on_is_a_note() {
        let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = held.local_addr().unwrap().to_string();
        let found = looked(&["-l", &address, "sh"]);
        let note = found.iter().find(|finding| finding.verdict == Verdict::Note).unwrap();
        assert!(note.words.contains(&address), "{found:?}");
    }
}
