//! What the tests against real processes share: a supervisor under test, its status, and waiting by observation.

#![allow(dead_code)] // Each test program uses its own part.

pub mod cgroup;
pub mod load;
pub mod real;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use zddsup::control::types::{Generation, GenerationPhase, Status, UpgradeReport};

/// How long a test waits for what must come: far more than it takes, also on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The program under test.
pub const ZDDSUP: &str = env!("CARGO_BIN_EXE_zddsup");

/// An example's executable; cargo builds them with the tests.
#[must_use]
pub fn example(name: &str) -> PathBuf {
    let path = Path::new(ZDDSUP).with_file_name("examples").join(name);
    assert!(
        path.exists(),
        "{} is missing: `cargo test` builds it, `cargo test --test X` needs `--examples`",
        path.display()
    );
    path
}

/// The test server with many behaviours.
#[must_use]
pub fn puppet() -> String {
    example("puppet").into_os_string().into_string().unwrap()
}

/// A `zddsup run` under test, in a runtime directory of its own. Ended with all of its processes when dropped.
pub struct Supervisor {
    child: Child,
    log: Arc<Log>,
    pub dir: Arc<tempfile::TempDir>,
}

/// Its stderr, as it comes.
#[derive(Default)]
struct Log {
    text: Mutex<String>,
    grown: Condvar,
    ended: AtomicBool,
}

/// How to start one.
pub struct Setup {
    pub dir: Arc<tempfile::TempDir>,
    command: Command,
}

impl Setup {
    /// `zddsup run --name web ARGS…` in a new directory.
    #[must_use]
    pub fn new<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Setup {
        Setup::within(Arc::new(tempfile::tempdir().unwrap()), args)
    }

    /// The same in a directory that is there already.
    #[must_use]
    pub fn within<S: AsRef<std::ffi::OsStr>>(dir: Arc<tempfile::TempDir>, args: impl IntoIterator<Item = S>) -> Setup {
        let mut command = Command::new(ZDDSUP);
        command.args(["run", "--name", "web"]).args(args).env("XDG_RUNTIME_DIR", dir.path()).current_dir(dir.path());
        command.env_remove("NOTIFY_SOCKET").env("PWD", dir.path()).stdin(Stdio::null());
        Setup { dir, command }
    }

    /// Started by another program, which execs what its arguments end with. To be called before [`Setup::command`].
    #[must_use]
    pub fn through(self, wrapper: &[&str]) -> Setup {
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).arg(self.command.get_program()).args(self.command.get_args());
        command.current_dir(self.dir.path()).env_remove("NOTIFY_SOCKET").stdin(Stdio::null());
        command.envs(self.command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        Setup { dir: self.dir, command }
    }

    /// By a link of this name in its directory, which can be made to lead to another program.
    #[must_use]
    pub fn by_link(self, name: &str) -> Setup {
        let link = self.dir.path().join(name);
        std::os::unix::fs::symlink(ZDDSUP, &link).unwrap();
        let mut command = Command::new(link);
        command.args(self.command.get_args()).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env_remove("NOTIFY_SOCKET");
        command.envs(self.command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        Setup { dir: self.dir, command }
    }

    /// To change its environment, directory, stdio.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Starts it; nothing is waited for.
    #[must_use]
    pub fn spawn(mut self) -> Supervisor {
        // Its own process group: a test's signals reach it alone.
        let mut child = self.command.process_group(0).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Log::default());
        let (stderr, into) = (child.stderr.take().unwrap(), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                into.text.lock().unwrap().push_str(&(line + "\n"));
                into.grown.notify_all();
            }
            into.ended.store(true, Ordering::SeqCst);
        });
        Supervisor { child, log, dir: self.dir }
    }

    /// Starts it and waits until a generation serves.
    #[must_use]
    pub fn start(self) -> Supervisor {
        let supervisor = self.spawn();
        supervisor.wait_until("the first generation serves", |status| status.serving.is_some());
        supervisor
    }
}

impl Supervisor {
    /// Starts `zddsup run ARGS…` and waits until a generation serves.
    #[must_use]
    pub fn start<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Supervisor {
        Setup::new(args).start()
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Its control socket.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.dir.path().join("zddsup/web.sock")
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// A subcommand, to its end.
    #[must_use]
    pub fn cli(&self, args: &[&str]) -> Output {
        self.cli_command(args).output().unwrap()
    }

    /// A subcommand, not started.
    #[must_use]
    pub fn cli_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(ZDDSUP);
        command.args(args).env("XDG_RUNTIME_DIR", self.dir.path()).stdin(Stdio::null());
        command
    }

    /// `zddsup upgrade` must succeed.
    pub fn upgrade(&self) {
        let output = self.cli(&["upgrade"]);
        assert!(output.status.success(), "{output:?}\n{}", self.log());
    }

    /// `zddsup self-upgrade` must succeed: the program is replaced, and the same process goes on.
    pub fn self_upgrade(&self) {
        let before = self.status().supervisor.replaced;
        let output = self.cli(&["self-upgrade"]);
        assert!(output.status.success(), "{output:?}\n{}", self.log());
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(said.contains(&format!("goes on as process {}", self.pid())), "{said}");
        assert_eq!(self.status().supervisor.replaced, before + 1);
    }

    /// Its status, if it answers.
    #[must_use]
    pub fn try_status(&self) -> Option<Status> {
        let mut stream = UnixStream::connect(self.control()).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"GET /v1/status HTTP/1.1\r\nHost: zddsup\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        serde_json::from_str(body).ok()
    }

    /// Its status.
    #[must_use]
    pub fn status(&self) -> Status {
        self.try_status().unwrap_or_else(|| panic!("no status\n{}", self.log()))
    }

    /// How long it takes to say what its status is.
    #[track_caller]
    pub fn answers_within(&self, limit: Duration) -> Duration {
        let begin = Instant::now();
        let _any = self.status();
        let took = begin.elapsed();
        assert!(took < limit, "its status took {took:?}\n{}", self.log());
        took
    }

    /// The generation that serves.
    #[must_use]
    pub fn serving(&self) -> Generation {
        let status = self.status();
        let serving = status.serving.unwrap_or_else(|| panic!("nobody serves\n{}", self.log()));
        status.generations.into_iter().find(|generation| generation.number == serving).unwrap()
    }

    /// Where a listener is bound.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        let listeners = self.status().listeners;
        let address = &listeners.first().expect("a listener").address;
        let bare = address.split('?').next().unwrap().trim_start_matches("tcp://").trim_start_matches("udp://");
        bare.parse().unwrap_or_else(|error| panic!("{address}: {error}"))
    }

    /// Waits until the status is as told; looks again at each event, and at a clock only for what no event tells.
    pub fn wait_until(&self, what: &str, is: impl Fn(&Status) -> bool) -> Status {
        let deadline = Instant::now() + PATIENCE;
        let mut events = self.follow();
        loop {
            let status = self.try_status();
            if let Some(status) = status.filter(|status| is(status)) {
                return status;
            }
            assert!(Instant::now() < deadline, "waited in vain until {what}: {:#?}\n{}", self.try_status(), self.log());
            let next = events.as_mut().map(|events| events.read_line(&mut String::new()));
            match next {
                Some(Ok(1..) | Err(_)) => {}
                Some(Ok(0)) => events = self.follow(),
                None => {
                    // It has not bound its control socket yet, or is gone.
                    std::thread::sleep(Duration::from_millis(5));
                    events = self.follow();
                }
            }
        }
    }

    fn follow(&self) -> Option<BufReader<UnixStream>> {
        let mut stream = UnixStream::connect(self.control()).ok()?;
        // Not everything that a status shows is an event: a look now and then.
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: zddsup\r\n\r\n").ok()?;
        Some(BufReader::new(stream))
    }

    /// Waits until the newest upgrade that was asked for is over.
    pub fn wait_for_report(&self, what: &str, is: impl Fn(&UpgradeReport) -> bool) -> UpgradeReport {
        let found = |status: &Status| status.upgrades.iter().find(|report| is(report)).cloned();
        found(&self.wait_until(what, |status| found(status).is_some())).unwrap()
    }

    /// Waits until only the incumbent is left.
    pub fn wait_settled(&self) -> Status {
        self.wait_until("only the incumbent is left", |status| {
            status.pending.is_none()
                && status.upgrades.iter().all(|report| report.result.is_some())
                && status
                    .generations
                    .iter()
                    .all(|generation| matches!(generation.phase, GenerationPhase::Serving | GenerationPhase::Retired))
        })
    }

    /// Waits for a line in its log and gives the log.
    pub fn wait_for_log(&self, text: &str) -> String {
        let log = self.log.text.lock().unwrap();
        let (log, waited) = self.log.grown.wait_timeout_while(log, PATIENCE, |log| !log.contains(text)).unwrap();
        assert!(!waited.timed_out(), "no {text:?} in the log:\n{log}");
        log.clone()
    }

    /// What it wrote to stderr so far, with what the service wrote.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.text.lock().unwrap().clone()
    }

    /// Waits for its end, and for all that it wrote.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                wait_for("its stderr ends", || self.log.ended.load(Ordering::SeqCst));
                return status;
            }
            assert!(Instant::now() < deadline, "zddsup does not end\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// SIGKILL, and nothing of it is tidied up: its generations live on.
    pub fn kill_alone(mut self) -> Arc<tempfile::TempDir> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        Arc::clone(&self.dir)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let deadline = Instant::now() + Duration::from_secs(5);
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                // Twice means SIGKILL for all that it started. A signal that is sent again before the first one was read is
                // lost (signal(7)), so it is sent again and again.
                let _gone = kill(Pid::from_raw(self.pid()), Signal::SIGQUIT);
                std::thread::sleep(Duration::from_millis(5));
            }
            let _gone = self.child.kill();
            let _reaped = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- log of the supervisor ---\n{}---", self.log());
        }
    }
}

/// Pids of the processes that have this text in their environment (a directory of the test's own, say).
#[must_use]
pub fn processes_with(text: &str) -> Vec<i32> {
    let all = procfs::process::all_processes().unwrap().flatten();
    all.filter(|process| {
        let alive = process.stat().is_ok_and(|stat| stat.state != 'Z');
        let environ = std::fs::read(format!("/proc/{}/environ", process.pid)).unwrap_or_default();
        alive && environ.windows(text.len()).any(|window| window == text.as_bytes())
    })
    .map(|process| process.pid)
    .collect()
}

/// Stops all threads of a process: what it is sent from now on waits.
pub fn freeze(pid: Pid) {
    kill(pid, Signal::SIGSTOP).unwrap();
    let tasks = || procfs::process::Process::new(pid.as_raw()).unwrap().tasks().unwrap();
    wait_for("all of its threads are stopped", || {
        tasks().all(|task| task.and_then(|task| task.stat()).is_ok_and(|stat| stat.state == 'T'))
    });
}

/// Waits for something that no event tells.
pub fn wait_for(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One request on a connection of its own, which must be answered: its body.
#[must_use]
pub fn request(address: SocketAddr, path: &str) -> String {
    try_request(address, path).unwrap_or_else(|error| panic!("GET {path}: {error}"))
}

/// The same, if it is answered.
pub fn try_request(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).ok_or(std::io::ErrorKind::UnexpectedEof.into())
}
