//! Servers as anybody would run them, which know nothing of zddsup, and a place for each to run in.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, killpg, Signal};
use nix::unistd::Pid;
use procfs::process::{all_processes, Process};
use socket2::{Domain, Socket, Type};

use super::supervised::{real, try_request, Setup, Supervisor, PATIENCE};

/// More directories to look for programs in, after those of `PATH`.
const MORE: &str = "PEERS_PATH";

/// In files and commands, `ADDRESS`, `PORT`, `SPARE` (another address), `DIR` and `RELEASE` stand for what they are.
#[derive(Debug, Clone, Copy)]
pub struct Server {
    pub name: &'static str,
    /// A program that must be there, and how to get it.
    pub needs: (&'static str, &'static str),
    pub files: &'static [(&'static str, &'static str)],
    pub command: &'static str,
    /// What it needs of `zddsup run`: its own graceful stop, where that is not TERM.
    pub flags: &'static str,
}

pub const NGINX: Server = Server {
    name: "nginx",
    needs: ("nginx", "apt-get install nginx"),
    files: &[(
        "nginx.conf",
        "daemon off; pid nginx.pid; worker_processes 2; error_log stderr error; events {}
         http {
             access_log off;
             server { listen ADDRESS; location / { return 200 'version=RELEASE\\n'; } }
         }",
    )],
    command: "nginx -p DIR -e stderr -c nginx.conf",
    flags: "--stop-signal QUIT",
};

pub const HAPROXY: Server = Server {
    name: "haproxy",
    needs: ("haproxy", "apt-get install haproxy"),
    files: &[(
        "haproxy.cfg",
        "global
           stats socket DIR/haproxy.sock mode 600 level admin expose-fd listeners
         defaults
           mode http
           timeout client 60s
           timeout server 60s
           timeout connect 60s
         frontend web
           bind ADDRESS
           http-request return status 200 content-type text/plain string version=RELEASE\n",
    )],
    command: "haproxy -W -db -f haproxy.cfg",
    flags: "--stop-signal USR1",
};

pub const CADDY: Server = Server {
    name: "caddy",
    needs: ("caddy", "apt-get install caddy"),
    files: &[("Caddyfile", "{\n admin SPARE\n auto_https off\n}\nhttp://ADDRESS {\n respond \"version=RELEASE\"\n}\n")],
    command: "caddy run --config Caddyfile",
    flags: "",
};

pub const GUNICORN: Server = Server {
    name: "gunicorn",
    needs: ("gunicorn", "apt-get install gunicorn"),
    files: &[("wsgi.py", include_str!("../../tests/real_servers/files/wsgi.py")), ("version", "RELEASE")],
    command: "gunicorn --workers 2 --threads 4 --bind ADDRESS wsgi:app",
    flags: "",
};

pub const STARLET: Server = Server {
    name: "Starlet",
    needs: ("plackup", "apt-get install libplack-perl starlet"),
    files: &[
        ("version", "RELEASE"),
        (
            "app.psgi",
            "open my $file, '<', 'DIR/version' or die; my $version = <$file>;
             sub { [200, ['Content-Type' => 'text/plain', 'Content-Length' => 8 + length $version], [\"version=$version\"]] };",
        ),
    ],
    command: "plackup -s Starlet -E deployment --host 127.0.0.1 --port PORT --max-workers 10 \
              --max-keepalive-reqs 1000000 --keepalive-timeout 60 app.psgi",
    flags: "",
};

const NODE_JS: [(&str, &str); 2] = [
    ("version", "RELEASE"),
    (
        "server.js",
        "const version = require('fs').readFileSync(__dirname + '/version', 'utf8').trim();
         require('http').createServer((_, response) => response.end(`version=${version}\\n`)).listen(PORT, '127.0.0.1');",
    ),
];

pub const NODE: Server = Server {
    name: "node",
    needs: ("node", "apt-get install nodejs"),
    files: &NODE_JS,
    command: "node server.js",
    flags: "",
};

pub const NODE_CLUSTER: Server = Server {
    name: "node cluster",
    files: &[
        NODE_JS[0],
        NODE_JS[1],
        (
            "cluster.js",
            "const cluster = require('cluster');
             if (cluster.isPrimary) { cluster.fork(); cluster.fork(); } else require('./server.js');",
        ),
    ],
    command: "node cluster.js",
    ..NODE
};

/// The same for all benchmarks of servers: names of servers, as arguments, leave out the others.
#[must_use]
pub fn is_wanted(name: &str) -> bool {
    let mut names = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).peekable();
    names.peek().is_none() || names.any(|wanted| wanted == name)
}

/// Where programs are looked for.
fn path() -> String {
    format!("{}:{}", real::path(), std::env::var(MORE).unwrap_or_default())
}

/// Whether this program is there; says how to get it if not.
#[must_use]
pub fn is_there((program, how): (&str, &str)) -> bool {
    let there = which::which_in(program, Some(path()), ".").is_ok();
    if !there {
        println!("{program} is not installed: {how}");
    }
    there
}

/// A directory and an address for one server.
pub struct Site {
    dir: Arc<tempfile::TempDir>,
    pub address: SocketAddr,
    spare: SocketAddr,
    /// Bound with `SO_REUSEADDR` and never listening: the ports are nobody else's, and still free for the server.
    _reserved: [Socket; 2],
}

impl Site {
    #[must_use]
    pub fn new() -> Site {
        let reserve = || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            socket.set_reuse_address(true).expect("an option");
            socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
            socket
        };
        let reserved = [reserve(), reserve()];
        let [address, spare] =
            [0, 1].map(|one: usize| reserved[one].local_addr().ok().and_then(|at| at.as_socket()).expect("an address"));
        Site { dir: Arc::new(tempfile::tempdir().expect("a directory")), address, spare, _reserved: reserved }
    }

    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Puts files in place, each at once.
    pub fn publish(&self, files: &[(&str, &str)], version: usize) {
        for (name, text) in files {
            let (beside, place) = (self.dir().join("new"), self.dir().join(name));
            fs::create_dir_all(place.parent().expect("a directory")).expect("a directory");
            fs::write(&beside, self.filled(text).replace("RELEASE", &version.to_string())).expect("a file");
            fs::rename(beside, place).expect("a file");
        }
    }

    fn filled(&self, text: &str) -> String {
        let dir = self.dir().display().to_string();
        let [address, spare] = [self.address, self.spare].map(|address| address.to_string());
        let text = text.replace("ADDRESS", &address).replace("SPARE", &spare).replace("DIR", &dir);
        text.replace("PORT", &self.address.port().to_string())
    }

    /// A command to be run here, as [`Site::publish`] was told to fill it.
    #[must_use]
    pub fn command(&self, words: &str) -> Command {
        let words = self.filled(words);
        let mut words = words.split_whitespace();
        let program = words.next().expect("a program");
        let program = which::which_in(program, Some(path()), ".").unwrap_or_else(|error| panic!("{program}: {error}"));
        let mut command = Command::new(program);
        command.args(words).current_dir(self.dir()).stdin(Stdio::null());
        command.env("PATH", path()).env("HOME", self.dir()).env("PM2_HOME", self.dir().join("pm2"));
        command.env("XDG_RUNTIME_DIR", self.dir().join("run"));
        command
    }

    /// `zddsup run FLAGS… -- COMMAND…`, until it answers.
    #[must_use]
    pub fn supervised(&self, server: &Server) -> Supervisor {
        let words = self.filled(&format!("{} -- {}", server.flags, server.command));
        let mut setup = Setup::within(Arc::clone(&self.dir), words.split_whitespace());
        setup.command().env("PATH", path()).env("HOME", self.dir());
        let supervisor = setup.start();
        self.wait_for_answer();
        supervisor
    }

    /// A command by itself, until something answers.
    #[must_use]
    pub fn plain(&self, words: &str) -> Plain {
        let plain = Plain::start(self, words);
        self.wait_for_answer();
        plain
    }

    fn wait_for_answer(&self) {
        let begin = Instant::now();
        while try_request(self.address, "/").is_err() {
            assert!(begin.elapsed() < PATIENCE, "no answer: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What was written to stdout and stderr here, by what was started by itself.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir().join("log")).unwrap_or_default()
    }

    /// Where it writes.
    #[must_use]
    pub fn log_file(&self) -> fs::File {
        fs::OpenOptions::new().append(true).create(true).open(self.dir().join("log")).expect("a file")
    }
}

impl Drop for Site {
    /// What was left behind here: some peers give each server a session of its own.
    fn drop(&mut self) {
        let left = all_processes().expect("/proc").flatten().filter(|process| is_in(process, self.dir()));
        for process in left {
            let _gone = kill(Pid::from_raw(process.pid()), Signal::SIGKILL);
        }
    }
}

fn is_in(process: &Process, dir: &Path) -> bool {
    process.cwd().is_ok_and(|cwd| cwd == dir)
}

/// A server, or its peer of zddsup, started by nobody but the benchmark.
pub struct Plain {
    child: Child,
}

impl Plain {
    /// Nothing is waited for.
    #[must_use]
    pub fn start(site: &Site, words: &str) -> Plain {
        let mut command = site.command(words);
        command.process_group(0).stdout(site.log_file()).stderr(site.log_file());
        Plain { child: command.spawn().expect("it starts") }
    }

    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"))
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("it lives");
    }

    /// Asks it to stop, and waits for that.
    pub fn stop(&mut self) {
        self.signal(Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _gone = killpg(self.pid(), Signal::SIGKILL);
        let _reaped = self.child.wait();
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.stop();
        }
    }
}
