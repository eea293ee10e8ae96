//! The tools of the other tests, without zddsup: the load sees what fails, and a puppet that is asked to stop fails nothing.

#[path = "common/load.rs"]
mod load;

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use load::{Config, Failure, Load, Target};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

const LONG: Duration = Duration::from_secs(20);

/// `cargo test` builds it; `cargo test --test tools` alone does not.
fn puppet_path() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.ancestors().nth(2).unwrap().join("examples/puppet");
    assert!(path.exists(), "{} is not there: run `cargo build --examples`", path.display());
    path
}

/// A puppet that has said READY=1, with this listener as its fd 3. Killed in the end.
struct Puppet(Child);

impl Puppet {
    fn start(listener: &TcpListener, flags: &[&str]) -> Puppet {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let notify = UnixDatagram::bind(&path).unwrap();
        notify.set_read_timeout(Some(LONG)).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", r#"export LISTEN_PID=$$; exec "$0" "$@" 3<&0 0</dev/null"#]);
        command.arg(puppet_path()).args(flags).env("LISTEN_FDS", "1").env("NOTIFY_SOCKET", &path);
        command.stdin(Stdio::from(OwnedFd::from(listener.try_clone().unwrap())));
        let puppet = Puppet(command.spawn().unwrap());
        let mut buffer = [0; 100];
        let length = notify.recv(&mut buffer).unwrap();
        assert!(buffer[..length].starts_with(b"READY=1"));
        puppet
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().try_into().unwrap()), signal).unwrap();
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn listener() -> (TcpListener, Config) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, Config::new(Target::Tcp(address)))
}

#[test]
fn a_puppet_that_is_asked_to_stop_loses_nothing() {
    let (listener, config) = listener();
    for flags in [&["--version", "old"][..], &["--version", "old", "--strict-blocking"]] {
        let mut old = Puppet::start(&listener, flags);
        let per_request = Load::start(config.clone());
        let keep_alive = Load::start(config.clone().keep_alive());
        assert!(per_request.more(100, LONG) && keep_alive.more(100, LONG));
        let new = Puppet::start(&listener, &["--version", "new"]);
        old.signal(Signal::SIGTERM);
        assert!(old.0.wait().unwrap().success());
        for load in [per_request, keep_alive] {
            assert!(load.saw("new", LONG) && load.more(100, LONG));
            let summary = load.stop();
            summary.assert_clean();
            assert_eq!(summary.order(), ["old", "new"], "{summary}");
            assert!(summary.longest_gap > Duration::ZERO && summary.latency.percentile(50) <= summary.latency.max());
        }
        drop(new);
    }
}

#[test]
fn the_load_sees_what_fails() {
    let (listener, config) = listener();
    let puppet = Puppet::start(&listener, &[]);
    let load = Load::start(config.clone().keep_alive());
    assert!(load.more(10, LONG));
    drop(puppet);
    assert!(load.wait(LONG, |seen| seen.failed() > 0));
    drop(listener);
    assert!(load.wait(LONG, |seen| seen.failures.contains_key(&Failure::Refused)));
    let summary = load.stop();
    let lost = summary.failures.keys().any(|failure| matches!(failure, Failure::Eof | Failure::Reset));
    assert!(lost, "{summary}");
}

#[test]
fn a_puppet_that_hangs_and_a_status_other_than_2xx_are_failures() {
    let (listener, config) = listener();
    let _puppet = Puppet::start(&listener, &[]);
    let load = Load::start(Config { path: "/nowhere".to_owned(), ..config.clone() });
    assert!(load.wait(LONG, |seen| seen.failures.contains_key(&Failure::BadStatus)));
    load.stop();
    let load = Load::start(Config { path: "/hang".to_owned(), timeout: Duration::from_millis(300), ..config });
    assert!(load.wait(LONG, |seen| seen.failures.contains_key(&Failure::Timeout)));
}
