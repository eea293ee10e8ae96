//! A real server under zddsup: its files, its port, and five upgrades under load.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use socket2::{Domain, Socket, Type};

use crate::common::load::{Config, Failure, Load, Summary, Target};
use crate::common::{real, Setup, Supervisor, PATIENCE};

/// What users read. Each command in it is run by a test, and each test's command is in it.
const DOCUMENTED: &str = include_str!("../../docs/servers.md");
/// Where the documented commands and files listen; a test puts its own address in its place.
const USUAL: &str = "127.0.0.1:8080";

const UPGRADES: u64 = 5;
const WORKERS: u64 = 4;

/// A directory with a server's files, and an address for it.
pub struct Site {
    dir: Arc<tempfile::TempDir>,
    address: std::net::SocketAddr,
    /// Bound with `SO_REUSEADDR` and never listening: the port is nobody else's, and still free for the server.
    _reserved: Socket,
}

impl Site {
    pub fn new() -> Site {
        let reserved = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        reserved.set_reuse_address(true).unwrap();
        reserved.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        let address = reserved.local_addr().unwrap().as_socket().unwrap();
        Site { dir: Arc::new(tempfile::tempdir().unwrap()), address, _reserved: reserved }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Puts a file in place at once.
    pub fn write(&self, name: &str, text: &str) {
        let beside = self.path("new");
        std::fs::write(&beside, text.replace(USUAL, &self.address.to_string())).unwrap();
        std::fs::rename(beside, self.path(name)).unwrap();
    }

    /// Runs `zddsup run` as in docs/servers.md, with words of it changed, until a generation serves.
    pub fn start(&self, command: &str, change: impl Fn(&str) -> String) -> Supervisor {
        assert!(DOCUMENTED.contains(&format!("`{command}`")), "docs/servers.md does not have {command:?}");
        let words = words(command);
        let words = words.iter().map(|word| change(&word.replace(USUAL, &self.address.to_string())));
        let mut setup = Setup::within(Arc::clone(&self.dir), words);
        setup.command().env("PATH", real::path()).env("HOME", self.dir.path());
        setup.start()
    }

    /// An upgrade that must fail, with all of this in what it prints.
    #[track_caller]
    pub fn upgrade_fails(&self, supervisor: &Supervisor, words: &[&str]) {
        let load = Load::start(Config::new(Target::Tcp(self.address)));
        assert!(load.more(50, PATIENCE), "no answers: {}", load.so_far());
        let output = supervisor.cli(&["upgrade"]);
        let printed = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{printed}");
        for word in words {
            assert!(printed.contains(word), "{word:?} is not in: {printed}");
        }
        assert!(load.more(50, PATIENCE));
        let summary = load.stop();
        summary.assert_clean();
        assert_eq!(summary.order(), ["1"]);
    }

    /// Five upgrades, version 1 to 6, with both kinds of load from before the first until after the last.
    pub fn upgrade_under_load(&self, supervisor: Supervisor, publish: impl Fn(&str)) -> Outcome {
        let config = Config {
            workers: usize::try_from(WORKERS).unwrap(),
            limit: PATIENCE * 3,
            ..Config::new(Target::Tcp(self.address))
        };
        let loads = [Load::start(config.clone()), Load::start(config.keep_alive())];
        for load in &loads {
            assert!(load.more(50, PATIENCE), "no answers: {}", load.so_far());
        }
        for version in 2..=UPGRADES + 1 {
            let version = version.to_string();
            publish(&version);
            supervisor.upgrade();
            for load in &loads {
                assert!(load.saw(&version, PATIENCE), "version {version} does not answer: {}", load.so_far());
            }
            // The old generation has stopped, under load.
            supervisor.wait_settled();
        }
        let [per_request, keep_alive] = loads.map(Load::stop);
        for summary in [&per_request, &keep_alive] {
            assert_eq!(summary.order(), ["1", "2", "3", "4", "5", "6"], "{summary}");
        }
        println!("a connection per request: {per_request}\nkeep-alive: {keep_alive}");
        Outcome { per_request, keep_alive, _supervisor: supervisor }
    }
}

/// What the load saw.
pub struct Outcome {
    pub per_request: Summary,
    pub keep_alive: Summary,
    /// Shows its log when what follows fails.
    _supervisor: Supervisor,
}

/// Connections were used again: otherwise a keep-alive load shows nothing.
#[track_caller]
pub fn was_kept(summary: &Summary) {
    let (answered, connections) = (summary.answered, summary.connections);
    assert!(answered >= 10 * connections, "{answered} requests on {connections} connections");
}

/// For a server that closes idle connections without a word when it stops: it loses those, and nothing else.
#[track_caller]
pub fn lost_idle_ones_at_most(summary: &Summary) {
    lost_unread_ones_at_most(summary);
    let used = |message: &String| message.contains("on a connection that was used before");
    assert!(summary.messages.iter().all(used), "{summary}");
}

/// For a server that also closes new connections whose request it has not read: at each stop it loses no more than the
/// requests that are under way, one for each worker of the load. Nobody is refused, and nothing hangs.
#[track_caller]
pub fn lost_unread_ones_at_most(summary: &Summary) {
    assert!(summary.failures.keys().all(|failure| matches!(failure, Failure::Reset | Failure::Eof)), "{summary}");
    assert!(summary.failed() <= UPGRADES * WORKERS, "{summary}");
}

/// A command line as the shell reads it.
fn words(line: &str) -> Vec<String> {
    let output = Command::new("sh").args(["-c", &format!("printf '%s\\0' {line}")]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_terminator('\0').map(str::to_owned).collect()
}
