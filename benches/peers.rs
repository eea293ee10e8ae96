//! Upgrades by zddsup beside each server's own way and other supervisors': what is lost, and how long nobody is answered.
//!
//! `cargo bench --bench peers`: whatever is installed. `PEERS_UPGRADES=5` makes it shorter, names of servers after `--`
//! leave out the others, and `PEERS_PATH` has more directories with programs. docs/measured.md has what to install.
//!
//! Each server runs twice, with the same files: under `zddsup run`, and as its peer wants it. They take turns, a few
//! upgrades each, so that what else the machine does hits both. While it is a server's turn, two loads are on it: a
//! connection per request, and connections that are used a hundred times.

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::servers::{self, Plain, Server, Site};
use common::supervised::load::{Config, Failure, Load, Target};
use common::supervised::{Supervisor, PATIENCE};
use common::{median, ms, Table};
use nix::sys::signal::Signal;
use zddsup::control::types::UpgradeResult;

/// Between the beginnings of two upgrades.
const BETWEEN: Duration = Duration::from_secs(1);
/// A version that has not answered then never will.
const LONG: Duration = Duration::from_secs(20);
/// Turns of each.
const TURNS: usize = 4;
const LOADS: [&str; 2] = ["a connection per request", "keep-alive"];
const PER_CONNECTION: u64 = 100;

/// How a peer is told to upgrade.
#[derive(Clone, Copy)]
enum Again {
    Signal(Signal),
    Command(&'static str),
    /// No peer at all: TERM, wait for the end, start.
    StopAndStart,
}

/// A server and a peer.
struct Duel {
    server: Server,
    peer: &'static str,
    needs: (&'static str, &'static str),
    /// Of the peer.
    files: &'static [(&'static str, &'static str)],
    start: &'static str,
    again: Again,
}

const CIRCUS: &str = "
[circus]
endpoint = ipc://DIR/circus.ctl
pubsub_endpoint = ipc://DIR/circus.pub
[socket:web]
host = 127.0.0.1
port = PORT
[watcher:web]
cmd = gunicorn --workers 2 --threads 4 --bind fd://$(circus.sockets.web) wsgi:app
working_dir = DIR
use_sockets = True
copy_env = True
";

/// A systemd of its own, that knows nothing of the machine's: it needs `/run/systemd/system` to be there.
const SYSTEMD: [(&str, &str); 3] = [
    (
        "systemd.sh",
        "mount --make-rprivate / && mount -t tmpfs none /run && mkdir -p /run/systemd/system || exit 1
         exec /lib/systemd/systemd --user --log-target=console --unit=web.service",
    ),
    ("run/systemd/user/web.socket", "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=ADDRESS\n"),
    (
        "run/systemd/user/web.service",
        // By its default it gives up at the sixth start in ten seconds.
        "[Unit]\nDefaultDependencies=no\nRequires=web.socket\nAfter=web.socket\nStartLimitIntervalSec=0\n\
         [Service]\nType=notify\nKillMode=mixed\nWorkingDirectory=DIR\n\
         ExecStart=gunicorn --workers 2 --threads 4 wsgi:app\n",
    ),
];

const DUELS: [Duel; 9] = [
    Duel {
        server: servers::NGINX,
        peer: "its own reload",
        needs: servers::NGINX.needs,
        files: &[],
        start: servers::NGINX.command,
        again: Again::Command("nginx -p DIR -e stderr -c nginx.conf -s reload"),
    },
    Duel {
        server: servers::HAPROXY,
        peer: "its own reload",
        needs: servers::HAPROXY.needs,
        files: &[],
        start: servers::HAPROXY.command,
        again: Again::Signal(Signal::SIGUSR2),
    },
    Duel {
        server: servers::CADDY,
        peer: "its own reload",
        needs: servers::CADDY.needs,
        files: &[],
        start: servers::CADDY.command,
        again: Again::Command("caddy reload --config Caddyfile --address SPARE"),
    },
    Duel {
        server: servers::GUNICORN,
        peer: "its own HUP",
        needs: servers::GUNICORN.needs,
        files: &[],
        start: servers::GUNICORN.command,
        again: Again::Signal(Signal::SIGHUP),
    },
    Duel {
        server: servers::GUNICORN,
        peer: "circus",
        needs: ("circusd", "pip install circus in a venv, with its bin directory in PEERS_PATH"),
        files: &[("circus.ini", CIRCUS)],
        start: "circusd circus.ini",
        again: Again::Command("circusctl --endpoint ipc://DIR/circus.ctl reload web"),
    },
    Duel {
        server: servers::GUNICORN,
        peer: "systemd socket unit",
        needs: ("/lib/systemd/systemd", "apt-get install systemd"),
        files: &SYSTEMD,
        // Of the user's kind, in a mount namespace, which takes root.
        start: "unshare --mount --cgroup sh systemd.sh",
        again: Again::Command("systemctl --user restart web.service"),
    },
    Duel {
        server: servers::STARLET,
        peer: "start_server",
        needs: ("start_server", "apt-get install libserver-starter-perl"),
        files: &[],
        start: "start_server --port 127.0.0.1:PORT -- plackup -s Starlet -E deployment --max-workers 10 \
                --max-keepalive-reqs 1000000 --keepalive-timeout 60 app.psgi",
        again: Again::Signal(Signal::SIGHUP),
    },
    Duel {
        server: servers::NODE_CLUSTER,
        peer: "pm2",
        needs: ("pm2", "npm install --prefix DIR pm2, with DIR/node_modules/.bin in PEERS_PATH"),
        files: &[],
        start: "pm2 start server.js --name web --instances 2 --no-daemon",
        again: Again::Command("pm2 reload web"),
    },
    Duel {
        server: servers::NODE,
        peer: "stop, then start",
        needs: servers::NODE.needs,
        files: &[],
        start: servers::NODE.command,
        again: Again::StopAndStart,
    },
];

fn main() {
    let upgrades = std::env::var("PEERS_UPGRADES").ok().and_then(|count| count.parse().ok()).unwrap_or(20);
    println!("# Upgrades by zddsup and by others\n");
    let begin = Instant::now();
    let mut table = Table::new(
        format!(
            "{upgrades} upgrades of each under load, an upgrade a second: 4 clients with a connection per request, 4 with \
             connections of {PER_CONNECTION} requests"
        ),
        &[
            "server",
            "upgraded by",
            "requests",
            "failed, per request",
            "failed, keep-alive",
            "longest gap",
            "of one client",
            "asked to first answer",
        ],
    );
    let mut notes = Vec::new();
    for duel in &DUELS {
        // Both are asked for, so that all that is missing is said at once.
        let there = [duel.server.needs, duel.needs].map(servers::is_there);
        if !servers::is_wanted(duel.server.name) || there.contains(&false) {
            continue;
        }
        if duel.start.starts_with("unshare") && !nix::unistd::geteuid().is_root() {
            println!("{} is left out: it takes root", duel.peer);
            continue;
        }
        for side in fight(duel, upgrades) {
            table.row(&[
                &duel.server.name,
                &side.by,
                &side.seen.requests,
                &side.seen.failed(0),
                &side.seen.failed(1),
                &ms(side.seen.gap),
                &ms(side.seen.gap_of_one),
                &if side.seen.took.is_empty() { "never".to_owned() } else { ms(median(&side.seen.took)) },
            ]);
            notes.push(side.note(duel));
        }
    }
    table.print();
    println!("\n{}\n\nIt took {:.0?}.", notes.join("\n"), begin.elapsed());
}

fn fight(duel: &Duel, upgrades: usize) -> [Side; 2] {
    let mut sides = [Side::supervised(duel), Side::by_peer(duel)];
    let turn = upgrades.div_ceil(TURNS);
    let mut left = upgrades;
    while left > 0 {
        let now = turn.min(left);
        for side in &mut sides {
            side.turn(duel, now);
        }
        left -= now;
    }
    sides[0].check();
    sides
}

enum Running {
    Supervised(Supervisor),
    /// Always there, but for between stop and start.
    ByPeer(Option<Plain>, Again),
}

/// A server that is upgraded in one way.
struct Side {
    by: &'static str,
    running: Running,
    site: Site,
    version: usize,
    seen: Seen,
}

/// What the loads saw in all turns.
#[derive(Default)]
struct Seen {
    requests: u64,
    failures: [BTreeMap<Failure, u64>; 2],
    gap: Duration,
    gap_of_one: Duration,
    /// Until the new version answered for the first time.
    took: Vec<Duration>,
    troubles: Vec<String>,
}

impl Seen {
    fn failed(&self, load: usize) -> u64 {
        self.failures[load].values().sum()
    }
}

impl Side {
    fn supervised(duel: &Duel) -> Side {
        let site = Site::new();
        site.publish(duel.server.files, 1);
        let running = Running::Supervised(site.supervised(&duel.server));
        Side { by: "zddsup", running, site, version: 1, seen: Seen::default() }
    }

    fn by_peer(duel: &Duel) -> Side {
        let site = Site::new();
        site.publish(duel.server.files, 1);
        site.publish(duel.files, 1);
        let running = Running::ByPeer(Some(site.plain(duel.start)), duel.again);
        Side { by: duel.peer, running, site, version: 1, seen: Seen::default() }
    }

    /// So many upgrades under load.
    fn turn(&mut self, duel: &Duel, upgrades: usize) {
        let config = Config {
            limit: PATIENCE * 10,
            per_connection: PER_CONNECTION,
            ..Config::new(Target::Tcp(self.site.address))
        };
        let loads = [Load::start(config.clone()), Load::start(config.keep_alive())];
        if loads.iter().any(|load| !load.more(20, LONG)) {
            self.seen.troubles.push(format!("version {} does not answer", self.version));
        }
        for _ in 0..upgrades {
            let begin = Instant::now();
            self.version += 1;
            self.site.publish(duel.server.files, self.version);
            self.upgrade(duel);
            if loads[0].saw(&self.version.to_string(), LONG) {
                self.seen.took.push(begin.elapsed());
            } else {
                self.seen.troubles.push(format!("version {} never answered", self.version));
            }
            std::thread::sleep(BETWEEN.saturating_sub(begin.elapsed()));
        }
        for (load, failures) in loads.into_iter().zip(&mut self.seen.failures) {
            let summary = load.stop();
            self.seen.requests += summary.requests();
            for (failure, count) in summary.failures {
                *failures.entry(failure).or_default() += count;
            }
            self.seen.gap = self.seen.gap.max(summary.longest_gap);
            self.seen.gap_of_one = self.seen.gap_of_one.max(summary.worker_gaps.into_iter().max().unwrap_or_default());
        }
    }

    fn upgrade(&mut self, duel: &Duel) {
        match &mut self.running {
            Running::Supervised(supervisor) => supervisor.signal(Signal::SIGHUP),
            Running::ByPeer(plain, again) => match *again {
                Again::Signal(signal) => plain.as_ref().expect("it runs").signal(signal),
                Again::Command(words) => {
                    let mut command = self.site.command(words);
                    let status = command.stdout(self.site.log_file()).stderr(self.site.log_file()).status();
                    if !status.as_ref().is_ok_and(std::process::ExitStatus::success) {
                        self.seen.troubles.push(format!("version {}: {words}: {status:?}", self.version));
                    }
                }
                Again::StopAndStart => {
                    plain.take().expect("it runs").stop();
                    *plain = Some(Plain::start(&self.site, duel.start));
                }
            },
        }
    }

    /// What zddsup itself says of it.
    fn check(&mut self) {
        let Running::Supervised(supervisor) = &self.running else { return };
        let upgrades = supervisor.wait_settled().upgrades;
        let failed = upgrades.iter().filter(|upgrade| upgrade.result != Some(UpgradeResult::Succeeded));
        self.seen.troubles.extend(failed.map(|upgrade| format!("{upgrade:?}")));
        if self.seen.failed(0) + self.seen.failed(1) > 0 || !self.seen.troubles.is_empty() {
            println!("{}", supervisor.log());
        }
    }

    /// Its commands, and how what failed did.
    fn note(&self, duel: &Duel) -> String {
        let Server { name, flags, command, .. } = duel.server;
        let how = match &self.running {
            Running::Supervised(_) => {
                let words: Vec<_> = "zddsup run".split(' ').chain(flags.split_whitespace()).collect();
                format!("`{} -- {command}`, then HUP", words.join(" "))
            }
            Running::ByPeer(_, Again::Signal(signal)) => {
                format!("`{}`, then {}", duel.start, signal.as_str().trim_start_matches("SIG"))
            }
            Running::ByPeer(_, Again::Command(again)) => format!("`{}`, then `{again}`", duel.start),
            Running::ByPeer(_, Again::StopAndStart) => {
                format!("`{}`, then TERM, and when it has ended the same again", duel.start)
            }
        };
        let lost = LOADS.iter().zip(&self.seen.failures).filter(|(_, failures)| !failures.is_empty());
        let lost = lost.map(|(load, failures)| {
            let kinds: Vec<_> = failures.iter().map(|(failure, count)| format!("{count} {failure:?}")).collect();
            format!(" Failed, {load}: {}.", kinds.join(", "))
        });
        let troubles = self.seen.troubles.iter().map(|trouble| format!("\n  {trouble}"));
        let more: String = lost.chain(troubles).collect();
        format!("- {name}, {}: {how}.{more}", self.by)
    }
}
