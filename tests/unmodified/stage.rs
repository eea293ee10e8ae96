//! A server that binds for itself, on a port that nobody else has.

use std::collections::VecDeque;
use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use socket2::{Domain, Socket, Type};

use crate::common::load::{Config, Load, Summary, Target};
use crate::common::{real, Setup, Supervisor, PATIENCE};

/// A directory for a server's files, and an address for it.
pub struct Site {
    pub dir: Arc<tempfile::TempDir>,
    pub address: SocketAddr,
    /// Bound with `SO_REUSEADDR` and never listening: the port is nobody else's, and still free for the server.
    _reserved: Socket,
}

fn reserve(address: SocketAddr) -> std::io::Result<Socket> {
    let reserved = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    reserved.set_reuse_address(true)?;
    reserved.bind(&address.into())?;
    Ok(reserved)
}

impl Site {
    pub fn new() -> Site {
        Site::at("127.0.0.1")
    }

    /// With a port that nobody else has at the second address either, as long as what is given with it is held.
    pub fn and_at(second: &str) -> (Site, Socket) {
        let both = || {
            let site = Site::new();
            let reserved = reserve(SocketAddr::new(second.parse().unwrap(), site.address.port())).ok()?;
            Some((site, reserved))
        };
        std::iter::repeat_with(both).flatten().next().unwrap()
    }

    /// At another address of this machine.
    pub fn at(ip: &str) -> Site {
        let reserved = reserve(SocketAddr::new(ip.parse().unwrap(), 0)).unwrap();
        let address = reserved.local_addr().unwrap().as_socket().unwrap();
        let dir = tempfile::tempdir().unwrap();
        // For servers that become another user.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        Site { dir: Arc::new(dir), address, _reserved: reserved }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Puts a file in place at once, with `ADDRESS` and `PORT` as they are here.
    pub fn write(&self, name: &str, text: &str) {
        let beside = self.path("new");
        fs::write(&beside, self.filled(text)).unwrap();
        fs::rename(beside, self.path(name)).unwrap();
    }

    fn filled(&self, text: &str) -> String {
        text.replace("ADDRESS", &self.address.to_string()).replace("PORT", &self.address.port().to_string())
    }

    /// `zddsup run WORDS…`, until a generation serves.
    pub fn start(&self, words: &[&str]) -> Supervisor {
        let supervisor = self.spawn(words);
        supervisor.wait_until("the first generation serves", |status| status.serving.is_some());
        supervisor
    }

    /// The same, and nothing is waited for.
    pub fn spawn(&self, words: &[&str]) -> Supervisor {
        let mut setup = Setup::within(Arc::clone(&self.dir), words.iter().map(|word| self.filled(word)));
        setup.command().env("PATH", real::path()).env("HOME", self.dir.path());
        setup.spawn()
    }

    pub fn load(&self) -> Config {
        Config { limit: PATIENCE * 3, workers: 2, ..Config::new(Target::Tcp(self.address)) }
    }
}

/// Five upgrades in which nothing fails: what a load with a connection per request saw, and what the others saw on
/// connections that are used again. Each generation has one of those, for three upgrades: so many may drain at once.
pub fn upgrade_under_load(supervisor: &Supervisor, load: &Config) -> (Summary, Summary) {
    let kept = || Load::start(Config { workers: 1, ..load.clone().keep_alive() });
    let mut reused = Summary::default();
    let mut over = |load: Load| {
        let summary = load.stop();
        assert_eq!(summary.failed(), 0, "{summary}\n{}", supervisor.log());
        reused.answered += summary.answered;
        reused.connections += summary.connections;
    };
    let fresh = Load::start(load.clone());
    let mut loads = VecDeque::from([kept()]);
    for upgrade in 0..=5 {
        for load in loads.iter().chain([&fresh]) {
            let so_far = || format!("{}\n{}", load.so_far(), supervisor.log());
            assert!(load.more(20, PATIENCE), "no answers: {}", so_far());
        }
        if upgrade == 5 {
            break;
        }
        if loads.len() == 3 {
            loads.pop_front().map(&mut over);
        }
        supervisor.upgrade();
        loads.push_back(kept());
    }
    loads.into_iter().for_each(&mut over);
    let fresh = fresh.stop();
    println!("{fresh}\non connections that were used again: {} answered", reused.answered);
    assert_eq!(fresh.failed(), 0, "{fresh}\n{}", supervisor.log());
    let status = supervisor.wait_settled();
    assert_eq!(status.serving.unwrap().0, 6);
    (fresh, reused)
}

/// An upgrade that fails for this reason, of which the load sees nothing.
pub fn refuse_under_load(supervisor: &Supervisor, load: &Config, reason: &str) -> Summary {
    let load = Load::start(load.clone());
    assert!(load.more(20, PATIENCE), "no answers: {}\n{}", load.so_far(), supervisor.log());
    let output = supervisor.cli(&["upgrade"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains(reason), "{said}");
    supervisor.wait_settled();
    assert!(load.more(20, PATIENCE), "no answers: {}\n{}", load.so_far(), supervisor.log());
    let summary = load.stop();
    summary.assert_clean();
    summary
}
