//! Promise 10: what is refused, in one line with cause and remedy, with nothing left behind.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use crate::common::{processes_with, puppet, Setup, Supervisor, ZDDSUP};
use crate::seen::{is_installed, is_root, taken};

/// A subcommand in a directory of its own, which is its runtime directory too.
struct Place(Arc<tempfile::TempDir>);

impl Place {
    fn new() -> Place {
        Place(Arc::new(tempfile::tempdir().unwrap()))
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(ZDDSUP);
        command.args(args).env("XDG_RUNTIME_DIR", self.0.path()).current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    fn zddsup(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// `zddsup run ARGS…` must end with this code and one line with all of these words.
    #[track_caller]
    fn refused(&self, args: &[&str], code: i32, words: &[&str]) {
        let output = self.zddsup(&[&["run", "--name", "web"], args].concat());
        refusal(&output, code, words);
        self.is_clean();
    }

    /// `zddsup check ARGS…` must find it.
    #[track_caller]
    fn found(&self, args: &[&str], words: &[&str]) {
        let output = self.zddsup(&[&["check", "--name", "web"], args].concat());
        let printed = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{printed}");
        for word in words {
            assert!(printed.contains(word), "{word:?} is not in: {printed}");
        }
        self.is_clean();
    }

    /// No socket, no state, no process.
    #[track_caller]
    fn is_clean(&self) {
        let left = std::fs::read_dir(self.0.path().join("zddsup")).into_iter().flatten();
        let left: Vec<_> =
            left.map(|entry| entry.unwrap().path()).filter(|path| path.extension() != Some("lock".as_ref())).collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(processes_with(&format!("XDG_RUNTIME_DIR={}\0", self.0.path().display())), [0; 0]);
    }
}

#[track_caller]
fn refusal(output: &Output, code: i32, words: &[&str]) {
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{printed}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let line = printed.lines().next().unwrap_or_default();
    assert!(line.starts_with("zddsup: "), "{printed}");
    for word in words {
        assert!(printed.contains(word), "{word:?} is not in: {printed}");
    }
}

/// And it is the only line.
#[track_caller]
fn one_line(output: &Output) {
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(printed.lines().count(), 1, "{printed}");
}

#[test]
fn flags_that_make_no_sense() {
    let place = Place::new();
    for (args, words) in [
        (&["--lisen", ":80", "--", "sleep", "9"][..], &["--lisen", "--listen"][..]),
        (&["--bogus", "sleep", "9"], &["--bogus"]),
        (&["--ready", "maybe", "sleep", "9"], &["maybe", "notify"]),
        (&["--drain-timeout", "5", "sleep", "9"], &["5s or 5ms"]),
        (&["--limit", "files=3", "sleep", "9"], &["nofile"]),
        (&["--stop-signal", "KILL", "sleep", "9"], &["--stop-timeout 0"]),
        (&["--env", "LISTEN_FDS=3", "sleep", "9"], &["zddsup sets LISTEN_FDS"]),
        (&["--nice", "99", "sleep", "9"], &["99"]),
        (&["--umask", "999", "sleep", "9"], &["octal"]),
        (&["-l", "a=127.0.0.1:0", "-l", "a=127.0.0.1:0", "sleep", "9"], &["two listeners are called a"]),
        (&["-l", "127.0.0.1:0", "sleep", "{fd:web}"], &["{fd:web}", "known names are listener"]),
        (&["--handoff", "socket", "--compat", "einhorn", "sleep", "9"], &["--handoff auto or fds"]),
        (&["--ready", "delay:2m", "sleep", "9"], &["--start-timeout"]),
        (&[][..], &["COMMAND"]),
        (&[""], &["command is an empty text"]),
    ] {
        place.refused(args, 2, words);
        place.found(args, words);
    }
}

#[test]
fn a_name_that_is_none() {
    let place = Place::new();
    refusal(&place.zddsup(&["run", "--name", "a/b", "sleep", "9"]), 2, &["not a name"]);
    place.is_clean();
}

#[test]
fn a_commands_own_flags_are_not_zddsups() {
    let place = Place::new();
    // -l and --name come after the command, and are its own.
    let output = place.zddsup(&["run", "--restart", "never", "sh", "-c", "echo $0 $@", "-l", "--name", "--bogus"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "-l --name --bogus\n", "{output:?}");
}

#[test]
fn addresses_that_are_none() {
    let place = Place::new();
    for (address, words) in [
        ("127.0.0.1:99999", &["0 to 65535"][..]),
        ("127.0.0.1", &["127.0.0.1"]),
        ("http://127.0.0.1:80", &["http"]),
        ("example.com:80", &["example.com"]),
        (":80?nodely", &["nodely"]),
        (":80?backlog=many", &["many"]),
        ("my web=:80", &["no name for a listener"]),
    ] {
        place.refused(&["-l", address, "--", "sleep", "9"], 2, words);
    }
}

#[test]
fn what_the_service_needs_and_is_not_there() {
    let place = Place::new();
    let missing = place.path("missing");
    for (args, words) in [
        (&["--env-file", &missing, "sleep", "9"][..], &["cannot read the environment file", "missing", "with a -"][..]),
        (&["--user", "no-such-user", "sleep", "9"], &["there is no user \"no-such-user\""]),
        (&["--group", "no-such-group", "sleep", "9"], &["there is no group \"no-such-group\""]),
    ] {
        place.refused(args, 2, words);
        one_line(&place.zddsup(&[&["run"], args].concat()));
        place.found(args, words);
    }
}

#[test]
fn a_program_that_is_not_there() {
    let place = Place::new();
    let output = place.zddsup(&["run", "--log-level", "error", "no-such-program"]);
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(10), "{printed}");
    let last = printed.lines().last().unwrap();
    assert!(last.starts_with("zddsup: ") && last.contains("no-such-program") && last.contains("PATH"), "{printed}");
    place.is_clean();
    place.found(&["no-such-program"], &["no-such-program", "PATH"]);
}

#[test]
fn an_address_that_somebody_has() {
    let place = Place::new();
    let (_held, address) = taken();
    let (listen, socket) = (address.to_string(), format!("unix://{}", place.path("first")));
    // The one that was bound before is let go, with its file.
    let args = ["-l", &socket, "-l", &listen, "--", "sleep", "9"];
    let who = format!("by process {}", std::process::id());
    place.refused(&args, 1, &["cannot listen on", &listen, "in use", &who, "listen elsewhere"]);
    one_line(&place.zddsup(&[&["run"], &args[..]].concat()));
    assert!(!std::path::Path::new(&place.path("first")).exists());
    let output = place.zddsup(&[&["check"], &args[..]].concat());
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(printed.contains(&format!("{listen} is listened on now")), "{printed}");
}

#[test]
fn a_low_port_without_the_right_to_it() {
    if !is_root("another user's zddsup") || !is_installed("setpriv") {
        return;
    }
    let start: u16 =
        std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap().trim().parse().unwrap();
    if start <= 1 {
        eprintln!("skipped: everybody may bind every port here");
        return;
    }
    let place = Place::new();
    std::fs::set_permissions(place.0.path(), PermissionsExt::from_mode(0o777)).unwrap();
    // Where anybody may execute it, wherever the build directory is.
    let program = place.path("zddsup-copy");
    std::fs::copy(ZDDSUP, &program).unwrap();
    for (subcommand, code) in [("run", 1), ("check", 2)] {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid",
            "nobody",
            "--regid",
            "54321",
            "--clear-groups",
            "--inh-caps=-all",
            "--bounding-set=-all",
        ]);
        command.args([&program, subcommand, "--name", "web", "-l", "127.0.0.1:1", "--", "sleep", "9"]);
        let output =
            command.env("XDG_RUNTIME_DIR", place.0.path()).current_dir("/").stdin(Stdio::null()).output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{printed}");
        assert!(printed.contains("CAP_NET_BIND_SERVICE"), "{printed}");
    }
}

#[test]
fn a_control_socket_that_cannot_be_had() {
    let place = Place::new();
    std::fs::write(place.path("file"), "").unwrap();
    let below_a_file = place.path("file/web.sock");
    place.refused(&["--control", &below_a_file, "sleep", "9"], 1, &["control socket", "file", "--control"]);
    place.found(&["--control", &below_a_file, "sleep", "9"], &["control socket", "file"]);
    let a_file = place.path("file");
    place.refused(&["--control", &a_file, "sleep", "9"], 1, &["not a socket", "--control"]);
    place.found(&["--control", &a_file, "sleep", "9"], &["not a socket"]);
    let live = place.path("live");
    let _theirs = UnixListener::bind(&live).unwrap();
    place.refused(&["--control", &live, "sleep", "9"], 1, &["in use", "--control"]);
    assert!(std::path::Path::new(&live).exists());
}

#[test]
fn a_pid_file_that_cannot_be_written() {
    let place = Place::new();
    let nowhere = place.path("nowhere/pid");
    place.refused(&["--pid-file", &nowhere, "sleep", "9"], 1, &["pid file", "nowhere"]);
    place.found(&["--pid-file", &nowhere, "sleep", "9"], &["pid file", "nowhere"]);
}

#[test]
fn a_second_supervisor_of_a_name() {
    let supervisor = Supervisor::start(["-l", "127.0.0.1:0", "--", &puppet()]);
    let args = ["-l", "127.0.0.1:0", "--", "sleep", "9"];
    let mut second = Setup::within(Arc::clone(&supervisor.dir), args).spawn();
    assert_eq!(second.wait().code(), Some(1));
    let log = second.wait_for_log("zddsup: ");
    let pid = supervisor.pid().to_string();
    for word in ["service web is supervised already", &pid, "zddsup upgrade --name web", "another --name"] {
        assert!(log.contains(word), "{word:?} is not in: {log}");
    }
    assert_eq!(log.lines().count(), 1, "{log}");
    // The first one's files are all there, and it answers.
    supervisor.upgrade();
    let output = supervisor.cli(&["check", "--name", "web", "--", "sleep", "9"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("a supervisor answers on"), "{output:?}");
}

#[test]
fn without_a_supervisor_there_is_nobody_to_ask() {
    let place = Place::new();
    for subcommand in ["status", "upgrade", "rollback", "restart", "stop", "events"] {
        let output = place.zddsup(&[subcommand, "--name", "no-such-service"]);
        refusal(&output, 5, &["no service no-such-service is running", "--control"]);
        one_line(&output);
    }
    let output = place.zddsup(&["status", "--control", &place.path("nothing.sock")]);
    refusal(&output, 5, &["nothing.sock"]);
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let supervisor = Supervisor::start(["-l", "127.0.0.1:0", "--", &puppet()]);
    for args in ["status", "status --json", "man", "completions bash", "help"] {
        let script = format!("{{ {ZDDSUP} {args}; echo \"code $?\" >&2; }} | head -c 1 >/dev/null");
        let mut command = Command::new("sh");
        let output = command.args(["-c", &script]).env("XDG_RUNTIME_DIR", supervisor.dir.path()).output().unwrap();
        let printed = String::from_utf8_lossy(&output.stderr);
        assert_eq!(printed, "code 0\n", "zddsup {args}");
    }
    // And one that was never there.
    for args in [&["status"][..], &["man"], &["--help"], &["completions", "zsh"]] {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        drop(reader);
        let output = supervisor.cli_command(args).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "{args:?} {output:?}");
    }
}

#[test]
fn help_completions_and_manual_are_there() {
    let place = Place::new();
    let printed = |args: &[&str]| {
        let output = place.zddsup(args);
        assert!(output.status.success() && output.stderr.is_empty(), "{args:?} {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let subcommands =
        ["run", "check", "status", "upgrade", "rollback", "restart", "stop", "events", "completions", "man"];
    let help = printed(&["--help"]);
    for subcommand in subcommands {
        assert!(help.contains(&format!("\n  {subcommand} ")), "{subcommand} is not in: {help}");
        assert!(printed(&[subcommand, "--help"]).contains("Usage: zddsup"), "{subcommand}");
        assert!(printed(&["man", subcommand]).contains(".TH"), "{subcommand}");
    }
    assert!(help.contains("EXIT CODES"));
    assert!(printed(&["--version"]).starts_with("zddsup "));
    assert!(printed(&["run", "-h"]).contains("--listen"));
    let scripts = [("bash", "-n"), ("zsh", "-n"), ("fish", "--no-execute")];
    for (shell, dry) in scripts {
        let script = printed(&["completions", shell]);
        assert!(script.contains("rollback") && script.contains("drain-timeout"), "{shell}");
        if is_installed(shell) {
            let file = place.path(shell);
            std::fs::write(&file, script).unwrap();
            let output = Command::new(shell).args([dry, &file]).output().unwrap();
            assert!(output.status.success(), "{shell}: {output:?}");
        }
    }
    assert!(printed(&["man"]).contains("zddsup\\-run"));
}
