//! What zddsup itself costs: memory, CPU and wake-ups at idle, fds, its start.
//!
//! `cargo bench --bench footprint`; `UPGRADES=50` makes it shorter.

mod common;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::clocked::{self, Ear, CLOCK_VAR};
use common::proc::{fds, threads, Activity, Memory};
use common::supervised::{puppet, Setup, Supervisor, ZDDSUP};
use common::{mib, now_ns, quartiles, ratio, Control, Table};

/// How long it is watched while it has nothing to do.
const IDLE: Duration = Duration::from_secs(10);
/// How long it may take to come to rest after the last request.
const REST: Duration = Duration::from_secs(60);
const STARTS: usize = 20;

fn main() {
    clocked::be_server_if_told();
    common::build_examples(&["puppet"]);
    let upgrades = std::env::var("UPGRADES").ok().and_then(|count| count.parse().ok()).unwrap_or(1000);
    println!("# Footprint");
    start_up();
    idle_and_upgraded(upgrades);
}

/// What it is at one moment, and what it does in the time after that.
struct State {
    upgrades: usize,
    memory: Memory,
    fds: usize,
    threads: Vec<String>,
    idle: Activity,
}

fn idle_and_upgraded(upgrades: usize) {
    let supervisor = Supervisor::start(["--listen", "127.0.0.1:0", "--", &puppet()]);
    let control = Control::of(&supervisor);
    let mut states = vec![watch(&supervisor, 0)];
    let begin = Instant::now();
    let mut done = 0;
    for until in [upgrades / 10, upgrades] {
        for _ in done..until {
            let _succeeded = control.upgrade();
        }
        done = until;
        supervisor.wait_settled();
        states.push(watch(&supervisor, until));
    }
    let took = begin.elapsed();

    let mut table = Table::new(
        "Memory and fds of the supervisor",
        &["after upgrades", "resident", "anonymous", "private", "proportional", "fds", "threads"],
    );
    for state in &states {
        let Memory { resident, anonymous, private, proportional } = state.memory;
        table.row(&[
            &state.upgrades,
            &mib(resident),
            &mib(anonymous),
            &mib(private),
            &mib(proportional),
            &state.fds,
            &state.threads.len(),
        ]);
    }
    table.print();
    println!("\nthreads: {}", states.last().expect("a state").threads.join(", "));
    println!("{upgrades} upgrades, with the rests in between, took {took:.1?}");

    let title = format!("At idle, in {IDLE:?}");
    let mut table = Table::new(title, &["after upgrades", "wake-ups", "preemptions", "CPU time", "ticks of 10 ms"]);
    for state in &states {
        let Activity { cpu_ns, ticks, voluntary, involuntary } = state.idle;
        table.row(&[&state.upgrades, &voluntary, &involuntary, &format!("{cpu_ns} ns"), &ticks]);
    }
    table.print();
}

/// Waits until a second passes in which it does nothing, and then watches it.
fn watch(supervisor: &Supervisor, upgrades: usize) -> State {
    let pid = supervisor.pid();
    let begin = Instant::now();
    loop {
        let before = Activity::of(pid);
        std::thread::sleep(Duration::from_secs(1));
        if Activity::of(pid) == before {
            break;
        }
        assert!(begin.elapsed() < REST, "it never rests: {:?} in a second", Activity::of(pid).since(before));
    }
    let before = Activity::of(pid);
    std::thread::sleep(IDLE);
    let idle = Activity::of(pid).since(before);
    State { upgrades, memory: Memory::of(pid), fds: fds(pid), threads: threads(pid), idle }
}

fn start_up() {
    let own = std::env::current_exe().expect("its own path").display().to_string();
    let [mut truths, mut children, mut bare, mut answers] = [const { Vec::new() }; 4];
    for _ in 0..STARTS {
        let begin = now_ns();
        let status = Command::new("/bin/true").stdin(Stdio::null()).status().expect("/bin/true");
        truths.push(since(begin));
        assert!(status.success());

        let dir = tempfile::tempdir().expect("a directory");
        let mut ear = Ear::new(dir.path());
        let begin = now_ns();
        // Not to be answered by anybody: it is only to reach its main.
        let mut child = Command::new(&own).arg("--clocked").env(CLOCK_VAR, &ear.path).spawn().expect("itself");
        bare.push(Duration::from_nanos(ear.hear("main", |_| true).at_ns - begin));
        child.kill().expect("it waits for that");
        child.wait().expect("its end");

        let mut setup = Setup::new(["--listen", "127.0.0.1:0", "--", &own, "--clocked"]);
        setup.command().env(CLOCK_VAR, &ear.path);
        let begin = now_ns();
        let supervisor = setup.spawn();
        let answered = common::until("it answers", || supervisor.try_status().is_some());
        let _ = answered;
        answers.push(since(begin));
        children.push(Duration::from_nanos(ear.hear("main", |_| true).at_ns - begin));
    }
    let mut table = Table::new(
        format!("Start, medians of {STARTS}, taken in turn"),
        &["from spawn to", "median", "half of them", "times /bin/true"],
    );
    for (what, times) in [
        ("the end of /bin/true", &truths),
        ("main of a small server, spawned directly", &bare),
        ("main of the same server as the first generation of `zddsup run`", &children),
        ("the first answer to a status request", &answers),
    ] {
        let [low, high] = quartiles(times);
        let median = common::median(times);
        let half = format!("{} to {}", common::ms(low), common::ms(high));
        table.row(&[&what, &common::ms(median), &half, &ratio(median, common::median(&truths))]);
    }
    table.print();
    let size = std::fs::metadata(ZDDSUP).expect("the program").len();
    println!("\nzddsup is {} on disk", mib(size / 1024));
}

fn since(begin: u64) -> Duration {
    Duration::from_nanos(now_ns() - begin)
}
