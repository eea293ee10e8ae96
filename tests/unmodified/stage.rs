//! A server that binds for itself, on a port that nobody else has.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use procfs::process::Process;
use socket2::{Domain, Socket, Type};

use crate::common::load::{Config, Load, Target};
use crate::common::{real, wait_for, Setup, Supervisor, PATIENCE};

/// Stops all threads of a process: what it is sent from now on waits.
pub fn freeze(pid: Pid) {
    kill(pid, Signal::SIGSTOP).unwrap();
    let tasks = || Process::new(pid.as_raw()).unwrap().tasks().unwrap();
    wait_for("all of its threads are stopped", || {
        tasks().all(|task| task.and_then(|task| task.stat()).is_ok_and(|stat| stat.state == 'T'))
    });
}

/// A directory for a server's files, and an address for it.
pub struct Site {
    pub dir: Arc<tempfile::TempDir>,
    pub address: SocketAddr,
    /// Bound with `SO_REUSEADDR` and never listening: the port is nobody else's, and still free for the server.
    _reserved: Socket,
}

impl Site {
    pub fn new() -> Site {
        let reserved = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        reserved.set_reuse_address(true).unwrap();
        reserved.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        let address = reserved.local_addr().unwrap().as_socket().unwrap();
        Site { dir: Arc::new(tempfile::tempdir().unwrap()), address, _reserved: reserved }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Puts a file in place at once, with `ADDRESS` and `PORT` as they are here.
    pub fn write(&self, name: &str, text: &str) {
        let beside = self.path("new");
        std::fs::write(&beside, self.filled(text)).unwrap();
        std::fs::rename(beside, self.path(name)).unwrap();
    }

    fn filled(&self, text: &str) -> String {
        text.replace("ADDRESS", &self.address.to_string()).replace("PORT", &self.address.port().to_string())
    }

    /// `zddsup run WORDS…`, until a generation serves.
    pub fn start(&self, words: &[&str]) -> Supervisor {
        let mut setup = Setup::within(Arc::clone(&self.dir), words.iter().map(|word| self.filled(word)));
        setup.command().env("PATH", real::path()).env("HOME", self.dir.path());
        setup.start()
    }

    pub fn load(&self) -> Config {
        Config { limit: PATIENCE * 3, workers: 2, ..Config::new(Target::Tcp(self.address)) }
    }

    /// Five upgrades with both kinds of load, in which nothing fails.
    pub fn upgrade_under_load(&self, supervisor: &Supervisor) {
        let loads = [Load::start(self.load()), Load::start(self.load().keep_alive())];
        for load in &loads {
            assert!(load.more(20, PATIENCE), "no answers: {}", load.so_far());
        }
        for _ in 0..5 {
            supervisor.upgrade();
            for load in &loads {
                assert!(load.more(20, PATIENCE), "no answers: {}\n{}", load.so_far(), supervisor.log());
            }
        }
        for load in loads {
            let summary = load.stop();
            println!("{summary}");
            assert_eq!(summary.failed(), 0, "{summary}\n{}", supervisor.log());
        }
        let status = supervisor.wait_settled();
        assert_eq!(status.serving.unwrap().0, 6);
    }
}
