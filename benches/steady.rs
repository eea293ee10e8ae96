//! What a server costs under `zddsup run` at steady state, beside the same server by itself; and what the filter costs a
//! system call.
//!
//! `cargo bench --bench steady`; `STEADY_ROUNDS=4` makes it shorter, names of servers after `--` leave out the others, and
//! `calls` is the part with the system calls.
//!
//! Both run all the time and are asked in turn, in many short rounds, first the one and then the other first: what else
//! the machine does hits both. Ratios are of one round, and what is printed is their median and where half of them lie.

mod common;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use common::proc::group_cpu;
use common::servers::{self, Server, Site};
use common::supervised::load::{Config, Load, Mode, Summary, Target};
use common::supervised::{Setup, Supervisor};
use common::{median, quartiles, Table};
use nix::unistd::{getppid, read};
use socket2::{Domain, Socket, Type};

/// Of one server in one way.
const ROUND: Duration = Duration::from_millis(500);
const WORKERS: usize = 4;

fn main() {
    if std::env::args().nth(1).as_deref() == Some("--calls") {
        return call(Path::new(&std::env::args().nth(2).expect("where to")));
    }
    let rounds = std::env::var("STEADY_ROUNDS").ok().and_then(|count| count.parse().ok()).unwrap_or(20);
    println!("# Steady state, bare and under zddsup");
    if servers::is_wanted("calls") {
        calls(rounds);
    }
    served(rounds);
}

fn served(rounds: usize) {
    let mut table = Table::new(
        format!(
            "{rounds} rounds of {} ms each way, {WORKERS} clients that ask as fast as they can. Under zddsup to bare: median \
             of the rounds, and where half of them lie",
            ROUND.as_millis()
        ),
        &["server", "load", "failed", "requests a second, bare", "under zddsup", "p50", "p99", "p99.9", "CPU a request"],
    );
    for server in [servers::NGINX, servers::HAPROXY, servers::CADDY, servers::NODE, servers::GUNICORN] {
        if !servers::is_wanted(server.name) || !servers::is_there(server.needs) {
            continue;
        }
        let sites = [Site::new(), Site::new()];
        sites.iter().for_each(|site| site.publish(server.files, 1));
        let (bare, supervisor) = (sites[0].plain(server.command), sites[1].supervised(&server));
        let groups = [bare.pid().as_raw(), supervisor.serving().pid.expect("it runs")];
        for mode in [Mode::PerRequest, Mode::KeepAlive] {
            let seen: Vec<_> = (0..=rounds).map(|round| in_turn(round, &sites, groups, mode)).collect();
            // The first is to warm up.
            row(&mut table, &server, mode, &seen[1..]);
        }
    }
    table.print();
}

/// One round of one way.
struct Seen {
    summary: Summary,
    cpu: Duration,
}

fn in_turn(round: usize, sites: &[Site; 2], groups: [i32; 2], mode: Mode) -> [Seen; 2] {
    let ask = |one: usize| {
        let (target, pause) = (Target::Tcp(sites[one].address), Duration::ZERO);
        let before = group_cpu(groups[one]);
        let load = Load::start(Config { mode, pause, workers: WORKERS, ..Config::new(target) });
        std::thread::sleep(ROUND);
        let summary = load.stop();
        Seen { summary, cpu: group_cpu(groups[one]).saturating_sub(before) }
    };
    if round % 2 == 0 {
        [0, 1].map(ask)
    } else {
        let [supervised, bare] = [1, 0].map(ask);
        [bare, supervised]
    }
}

fn row(table: &mut Table, server: &Server, mode: Mode, seen: &[[Seen; 2]]) {
    let spread =
        |of: &dyn Fn(&Seen) -> f64| spread(&seen.iter().map(|[bare, under]| of(under) / of(bare)).collect::<Vec<_>>());
    let latency = |per_mille| spread(&|seen| seen.summary.latency.per_mille(per_mille).as_secs_f64());
    let all = |one: usize| seen.iter().map(move |both| &both[one]);
    // Ticks of 10 ms are too coarse for the ratio of one round.
    let cpu = |one| {
        let (answers, cpu) =
            all(one).fold((0, Duration::ZERO), |(a, c), seen| (a + seen.summary.answered, c + seen.cpu));
        cpu.as_secs_f64() / real(answers)
    };
    let failed: u64 = [0, 1].into_iter().flat_map(all).map(|seen| seen.summary.failed()).sum();
    let mut rates: Vec<_> = all(0).map(|seen| seen.summary.answered * 1000 / ms_of(seen)).collect();
    rates.sort_unstable();
    table.row(&[
        &server.name,
        &match mode {
            Mode::PerRequest => "a connection per request",
            Mode::KeepAlive => "keep-alive",
        },
        &failed,
        &median(&rates),
        &spread(&|seen| real(seen.summary.answered) / seen.summary.elapsed.as_secs_f64()),
        &latency(500),
        &latency(990),
        &latency(999),
        &format!("{:.3}", cpu(1) / cpu(0)),
    ]);
}

fn ms_of(seen: &Seen) -> u64 {
    u64::try_from(seen.summary.elapsed.as_millis()).expect("it is short").max(1)
}

#[allow(clippy::cast_precision_loss)]
fn real(count: u64) -> f64 {
    count as f64
}

fn spread(ratios: &[f64]) -> String {
    // Six digits of them, as whole numbers, which have an order.
    #[allow(clippy::cast_possible_truncation)]
    let ratios: Vec<_> = ratios.iter().map(|ratio| (ratio * 1e6) as i64).collect();
    #[allow(clippy::cast_precision_loss)]
    let [low, middle, high] = {
        let [low, high] = quartiles(&ratios);
        [low, median(&ratios), high].map(|ratio| ratio as f64 / 1e6)
    };
    format!("{middle:.3} ({low:.3} to {high:.3})")
}

/// What is called, and how often in a batch.
const CALLS: [(&str, u32); 4] = [
    ("getppid", 200_000),
    ("read, a byte of /dev/zero", 100_000),
    ("socket and close", 20_000),
    ("socket, bind and close", 500),
];

/// The system calls of a process by itself and of one under the filter, in turn.
fn calls(rounds: usize) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("calls");
    let listener = UnixListener::bind(&path).expect("a socket");
    let own = std::env::current_exe().expect("its own path");
    let mut bare = Bare(Command::new(&own).arg("--calls").arg(&path).spawn().expect("itself"));
    let mut asked = vec![Asked::of(&listener)];
    let args = ["--ready", "listen", "--"].map(std::ffi::OsString::from);
    let command = [own.into_os_string(), "--calls".into(), path.into_os_string()];
    let supervisor: Supervisor = Setup::new(args.into_iter().chain(command)).start();
    asked.push(Asked::of(&listener));

    let mut times: [Vec<[f64; 2]>; CALLS.len()] = [const { Vec::new() }; CALLS.len()];
    for round in 0..=rounds {
        let mut both = [Vec::new(), Vec::new()];
        for one in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
            both[one] = asked[one].batch();
        }
        for (times, (bare, trapped)) in times.iter_mut().zip(both[0].iter().zip(&both[1])).filter(|_| round > 0) {
            times.push([*bare, *trapped]);
        }
    }
    drop(asked);
    drop(supervisor);
    bare.end();

    let mut table = Table::new(
        format!("System calls: medians of {rounds} rounds, taken in turn. The last one is what the filter is for"),
        &["call", "a second, bare", "under zddsup", "ns, bare", "ns, under zddsup", "ns more", "times"],
    );
    for ((name, _), times) in CALLS.iter().zip(&times) {
        let of = |of: &dyn Fn(&[f64; 2]) -> f64| {
            let mut all: Vec<_> = times.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        let (bare, trapped) = (of(&|both| both[0]), of(&|both| both[1]));
        let ratios: Vec<_> = times.iter().map(|[bare, trapped]| trapped / bare).collect();
        table.row(&[
            name,
            &format!("{:.0}", 1e9 / bare),
            &format!("{:.0}", 1e9 / trapped),
            &format!("{bare:.1}"),
            &format!("{trapped:.1}"),
            &format!("{:+.1}", of(&|[bare, trapped]| trapped - bare)),
            &spread(&ratios),
        ]);
    }
    table.print();
}

/// The one that runs by itself; it ends when nobody asks it any more.
struct Bare(Child);

impl Bare {
    fn end(&mut self) {
        let _reaped = self.0.wait();
    }
}

/// A process that calls, from here.
struct Asked(BufReader<UnixStream>);

impl Asked {
    /// The next one to come.
    fn of(listener: &UnixListener) -> Asked {
        Asked(BufReader::new(listener.accept().expect("a process").0))
    }

    /// Nanoseconds of each call.
    fn batch(&mut self) -> Vec<f64> {
        self.0.get_mut().write_all(b"go\n").expect("it lives");
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer");
        line.split_whitespace().map(|word| word.parse().expect("a number")).collect()
    }
}

/// The process that calls.
fn call(path: &Path) {
    // zddsup takes it for ready when it listens.
    let _listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let zero = std::fs::File::open("/dev/zero").expect("/dev/zero");
    let mut asked = BufReader::new(UnixStream::connect(path).expect("the benchmark listens"));
    let mut line = String::new();
    while asked.read_line(&mut line).is_ok_and(|length| length > 0) {
        line.clear();
        for (index, (_, count)) in CALLS.into_iter().enumerate() {
            let begin = Instant::now();
            for _ in 0..count {
                match index {
                    0 => {
                        std::hint::black_box(getppid());
                    }
                    1 => {
                        let _one = read(&zero, &mut [0]).expect("a byte");
                    }
                    2 => drop(Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket")),
                    _ => {
                        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
                        socket.bind(&std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a port");
                    }
                }
            }
            let each = begin.elapsed().as_secs_f64() * 1e9 / f64::from(count);
            write!(line, "{each} ").expect("a string");
        }
        line.push('\n');
        if asked.get_mut().write_all(line.as_bytes()).is_err() {
            return;
        }
        line.clear();
    }
}
