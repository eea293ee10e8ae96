//! One real server: what it needs, how it is run, and five upgrades of it under load. What comes out is written down.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::common::load::{Config, Exchange, Summary, Target};
use crate::common::{example, real};
use crate::stage::{refuse_under_load, upgrade_under_load, Site};

/// A server, as the table has it. In all of its texts `ADDRESS` and `PORT` are where it is to listen.
#[derive(Debug)]
pub struct Server {
    /// What it is, with `VERSION` for what [`Server::probe`] says.
    pub name: &'static str,
    /// Succeeds where it is installed, and says its version.
    pub probe: &'static [&'static str],
    /// Its files: name and text.
    pub files: &'static [(&'static str, &'static str)],
    /// Run before, in the directory of its files. `EXAMPLES` is where cargo puts the examples.
    pub build: &'static [&'static str],
    /// Those of `zddsup run`.
    pub flags: &'static [&'static str],
    /// What zddsup runs.
    pub command: &'static [&'static str],
    /// Where it does not speak HTTP.
    pub exchange: Option<Exchange>,
    /// Whether it is asked by UDP.
    pub udp: bool,
    /// It cannot be upgraded like this: what a second process says before it ends.
    pub cannot: Option<&'static str>,
}

/// To begin a definition with.
pub const SERVER: Server = Server {
    name: "",
    probe: &[],
    files: &[],
    build: &[],
    flags: &[],
    command: &[],
    exchange: None,
    udp: false,
    cannot: None,
};

/// What came of a server. A line of the result file.
#[derive(Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// [`Server::name`].
    pub server: String,
    pub version: String,
    pub upgrades: u64,
    /// Requests with a connection for each.
    pub fresh: u64,
    /// Requests on connections that are used again, as long as the server allows it.
    pub kept: u64,
    /// So many.
    pub kept_connections: u64,
    pub failed: u64,
}

impl Server {
    /// Upgrades it under load, if it is installed.
    pub fn run(&self) {
        if !real::installed(self.name, self.probe) {
            return;
        }
        let site = Site::new();
        for (name, text) in self.files {
            site.write(name, text);
        }
        self.build(&site);
        let words: Vec<_> = self.flags.iter().chain(&["--"]).chain(self.command).copied().collect();
        let supervisor = site.start(&words);
        let target = if self.udp { Target::Udp(site.address) } else { Target::Tcp(site.address) };
        let load = Config { exchange: self.exchange.clone(), target, ..site.load() };
        let (upgrades, (fresh, kept)) = match self.cannot {
            Some(reason) => (0, (refuse_under_load(&supervisor, &load, reason), Summary::default())),
            None => (5, upgrade_under_load(&supervisor, &load)),
        };
        let outcome = Outcome {
            server: self.name.to_owned(),
            version: self.version(),
            upgrades,
            fresh: fresh.answered,
            kept: kept.answered,
            kept_connections: kept.connections,
            failed: fresh.failed() + kept.failed(),
        };
        outcome.append();
    }

    fn build(&self, site: &Site) {
        let [program, args @ ..] = self.build else { return };
        let puppet = example("puppet");
        let examples = puppet.parent().and_then(Path::to_str).unwrap();
        let mut build = Command::new(program);
        build.args(args.iter().map(|arg| arg.replace("EXAMPLES", examples)));
        let output = build.current_dir(site.dir.path()).env("HOME", site.dir.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// The first number with a dot that its probe says, with what follows it.
    fn version(&self) -> String {
        let [program, args @ ..] = self.probe else { panic!("{} has no probe", self.name) };
        let output = Command::new(program).args(args).env("PATH", real::path()).output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        let mut words = said.split(|c: char| !c.is_ascii_digit() && c != '.').map(|word| word.trim_matches('.'));
        let version = words.find(|word| word.contains('.'));
        version.unwrap_or_else(|| panic!("{:?} says no version: {said}", self.probe)).to_owned()
    }

    /// As it is typed.
    pub fn typed(&self) -> String {
        let words = self.flags.iter().chain(&["--"]).chain(self.command);
        let quoted = words.map(|word| match word.trim_start_matches("/usr/bin/") {
            word if word.is_empty() || word.contains([' ', ';']) => format!("'{word}'"),
            word => word.to_owned(),
        });
        let typed = quoted.collect::<Vec<_>>().join(" ");
        typed.replace("ADDRESS", "127.0.0.1:8080").replace("PORT", "8080")
    }
}

impl Outcome {
    /// Where all are: one line each, the newest last.
    pub fn file() -> PathBuf {
        Path::new(env!("CARGO_TARGET_TMPDIR")).join("servers.jsonl")
    }

    fn append(&self) {
        let line = serde_json::to_string(self).unwrap() + "\n";
        let mut file = File::options().append(true).create(true).open(Outcome::file()).unwrap();
        // One write(2) of a file that is appended to: tests that run at the same time do not mix their lines.
        file.write_all(line.as_bytes()).unwrap();
    }

    /// The newest of a server.
    pub fn newest(server: &Server) -> Option<Outcome> {
        let text = fs::read_to_string(Outcome::file()).ok()?;
        let mut newest_first = text.lines().rev().filter_map(|line| serde_json::from_str::<Outcome>(line).ok());
        newest_first.find(|outcome| outcome.server == server.name)
    }
}
