//! `echo_live`: clients that stay connected whatever happens to the processes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use zddsup::control::types::{GenerationPhase, Status};
use zddsup::core::GenerationId;

use crate::common::{example, wait_for, Supervisor, PATIENCE};

/// Killed when dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _gone_already = self.0.kill();
        let _reaped_already = self.0.wait();
    }
}

/// A client on one connection.
struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Client { stream: BufReader::new(stream) }
    }

    fn send(&mut self, text: &str) {
        self.stream.get_mut().write_all(text.as_bytes()).unwrap();
    }

    #[track_caller]
    fn expect(&mut self, line: &str) {
        let mut read = String::new();
        self.stream.read_line(&mut read).unwrap();
        assert_eq!(read, line);
    }

    #[track_caller]
    fn echo(&mut self, line: &str) {
        self.send(line);
        self.expect(line);
    }

    /// Nothing more comes than the end.
    #[track_caller]
    fn expect_end(&mut self) {
        let mut rest = String::new();
        self.stream.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "");
    }
}

/// Clients that send line after line, each on one connection all along, and read each line back.
struct Clients {
    stop: Arc<AtomicBool>,
    counts: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    fn start(address: SocketAddr, count: usize) -> Clients {
        let stop = Arc::new(AtomicBool::new(false));
        let counts: Vec<_> = (0..count).map(|_| Arc::new(AtomicU64::new(0))).collect();
        let spawn = |(client, count): (usize, &Arc<AtomicU64>)| {
            let (stop, count) = (Arc::clone(&stop), Arc::clone(count));
            std::thread::spawn(move || chat(client, address, &stop, &count))
        };
        let threads = counts.iter().enumerate().map(spawn).collect();
        Clients { stop, counts, threads }
    }

    /// Waits until each has read so many more lines.
    fn more(&self, lines: u64) {
        let before: Vec<_> = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        wait_for("every client has read more lines", || {
            assert!(!self.threads.iter().any(JoinHandle::is_finished), "a client failed");
            self.counts.iter().zip(&before).all(|(count, before)| count.load(Ordering::Relaxed) >= before + lines)
        });
    }

    /// Each ends its side, and reads to the end of the other one.
    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a client noticed");
        }
    }
}

fn chat(number: usize, address: SocketAddr, stop: &AtomicBool, count: &AtomicU64) {
    let mut client = Client::connect(address);
    for line in 0.. {
        // Several at once and some in halves, so that there is something on its way at any time.
        let lines: Vec<_> = (0..4).map(|part| format!("client {number}, line {line}.{part}\n")).collect();
        let text = lines.concat();
        let (first, second) = text.split_at(text.len() / 3);
        client.send(first);
        client.send(second);
        lines.iter().for_each(|line| client.expect(line));
        count.fetch_add(4, Ordering::Relaxed);
        if stop.load(Ordering::Relaxed) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    client.stream.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    client.expect_end();
}

/// `zddsup run --listen 127.0.0.1:0 FLAGS… -- echo_live`, which nothing but its own end ends.
fn start(flags: &[&str]) -> Supervisor {
    let echo = example("echo_live").display().to_string();
    let mut args = vec!["--listen", "127.0.0.1:0", "--ready", "notify"];
    if !flags.contains(&"--drain-timeout") {
        args.extend(["--drain-timeout", "1h"]);
    }
    args.extend(flags.iter().chain(&["--", &echo]));
    Supervisor::start(args)
}

fn phase(status: &Status, number: u32) -> Option<GenerationPhase> {
    status.generations.iter().find(|generation| generation.number.0 == number).map(|generation| generation.phase)
}

fn send(supervisor: &Supervisor, number: u32, signal: Signal) {
    let status = supervisor.status();
    let generation = status.generations.iter().find(|generation| generation.number.0 == number).unwrap();
    kill(Pid::from_raw(generation.pid.unwrap()), signal).unwrap();
}

fn twenty_clients_never_notice(flags: &[&str]) {
    let supervisor = start(flags);
    let clients = Clients::start(supervisor.address(), 20);
    clients.more(20);
    for _ in 0..5 {
        supervisor.upgrade();
        // The old process is gone although all of its clients are there.
        supervisor.wait_settled();
        clients.more(20);
    }
    // And without rest in between.
    for _ in 0..5 {
        supervisor.upgrade();
    }
    supervisor.wait_settled();
    clients.more(20);
    clients.stop();
    assert_eq!(supervisor.status().restarts, 0);
}

#[test]
fn twenty_clients_never_notice_ten_upgrades() {
    twenty_clients_never_notice(&[]);
}

#[test]
fn nor_with_the_handoff_socket_alone() {
    twenty_clients_never_notice(&["--handoff", "socket"]);
}

/// What is under way between generations goes on, too, when zddsup itself is another one: their handoff sockets are the same.
#[test]
fn nor_when_zddsup_is_replaced_in_the_middle_of_it() {
    let supervisor = start(&[]);
    let clients = Clients::start(supervisor.address(), 20);
    clients.more(20);
    for round in 1..=5 {
        supervisor.signal(Signal::SIGHUP);
        supervisor.signal(Signal::SIGUSR2);
        supervisor.wait_until("both are done", |status| {
            status.supervisor.replaced == round
                && status.serving.is_some_and(|serving| u64::from(serving.0) == round + 1)
        });
        supervisor.wait_settled();
        clients.more(20);
    }
    clients.stop();
    assert_eq!(supervisor.status().restarts, 0);
}

#[test]
fn a_line_of_which_half_was_read_is_passed_on_too() {
    let supervisor = start(&[]);
    let mut client = Client::connect(supervisor.address());
    client.send("one\ntw");
    client.expect("one\n");
    supervisor.upgrade();
    supervisor.wait_settled();
    client.send("o\n");
    client.expect("two\n");
}

#[test]
fn without_a_handoff_socket_the_old_process_finishes_what_it_has() {
    let supervisor = start(&["--handoff", "fds"]);
    let mut old = Client::connect(supervisor.address());
    old.echo("before\n");
    supervisor.upgrade();
    supervisor.wait_until("the old one drains", |status| phase(status, 1) == Some(GenerationPhase::Draining));
    let mut new = Client::connect(supervisor.address());
    new.echo("new\n");
    old.echo("after\n");
    drop(old);
    supervisor.wait_settled();
    new.echo("new still\n");
}

#[test]
fn alone_it_binds_and_finishes_at_a_sigterm() {
    let mut alone =
        Ended(Command::new(example("echo_live")).arg("127.0.0.1:0").stderr(Stdio::piped()).spawn().unwrap());
    let (mut line, mut stderr) = (String::new(), BufReader::new(alone.0.stderr.take().unwrap()));
    stderr.read_line(&mut line).unwrap();
    let address = line.trim_end().rsplit(' ').next().unwrap().parse().unwrap_or_else(|error| panic!("{line}: {error}"));
    let mut client = Client::connect(address);
    client.echo("one\n");
    kill(Pid::from_raw(alone.0.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    wait_for("it accepts no more", || TcpStream::connect(address).is_err());
    client.echo("two\n");
    drop(client);
    assert!(alone.0.wait().unwrap().success());
}

#[test]
fn a_stop_waits_for_live_connections() {
    let mut supervisor = start(&[]);
    let mut client = Client::connect(supervisor.address());
    client.echo("one\n");
    supervisor.upgrade();
    supervisor.signal(Signal::SIGTERM);
    // The client is on its way from the first one to the second one now, and stays with either.
    supervisor.wait_until("the last one drains", |status| phase(status, 2) == Some(GenerationPhase::Draining));
    for line in 0..20 {
        client.echo(&format!("{line}\n"));
    }
    drop(client);
    assert!(supervisor.wait().success(), "{}", supervisor.log());
    assert!(!supervisor.log().contains("killed"), "{}", supervisor.log());
}

#[test]
fn a_stop_waits_no_longer_than_the_drain_time() {
    let mut supervisor = start(&["--drain-timeout", "5s"]);
    let mut client = Client::connect(supervisor.address());
    client.echo("one\n");
    supervisor.signal(Signal::SIGTERM);
    client.expect_end();
    assert!(supervisor.wait().success(), "{}", supervisor.log());
    // By itself, before it would have been stopped.
    assert!(supervisor.log().contains("exited with status 0"), "{}", supervisor.log());
}

/// Generations become ready when a file is there, so that what happens before can be arranged.
struct Gated {
    supervisor: Supervisor,
}

impl Gated {
    fn start(flags: &[&str]) -> Gated {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let gate = dir.path().join("gate").display().to_string();
        std::fs::write(format!("{gate}-1"), "").unwrap();
        let ready = format!("exec:test -e {gate}-$ZDDSUP_GENERATION");
        let echo = example("echo_live").display().to_string();
        let mut args = vec!["--listen", "127.0.0.1:0", "--drain-timeout", "1h", "--ready", &ready];
        args.extend(flags.iter().chain(&["--", &echo]));
        Gated { supervisor: crate::common::Setup::within(dir, args).start() }
    }

    fn open(&self, number: u32) {
        std::fs::write(self.supervisor.dir.path().join(format!("gate-{number}")), "").unwrap();
    }

    /// Begins an upgrade to generation 2, which waits at its gate and has said hello.
    fn begin_upgrade(&self) {
        self.supervisor.signal(Signal::SIGHUP);
        let status = self.supervisor.wait_until("the new one starts", |status| {
            status.generations.iter().any(|generation| generation.number.0 == 2 && generation.pid.is_some())
        });
        let pid = status.generations.iter().find(|generation| generation.number.0 == 2).unwrap().pid.unwrap();
        // The library's thread is made once both sides have said hello.
        wait_for("it has said hello", || {
            let tasks = std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task")).unwrap();
            let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            tasks.flatten().any(|task| name(task).trim_end() == "zddsup")
        });
    }
}

#[test]
fn what_a_crashed_generation_never_took_goes_to_the_next() {
    let gated = Gated::start(&[]);
    let supervisor = &gated.supervisor;
    let mut client = Client::connect(supervisor.address());
    client.send("one\ntw");
    client.expect("one\n");
    gated.begin_upgrade();
    send(supervisor, 2, Signal::SIGSTOP);
    gated.open(2);
    supervisor.wait_until("the first one has passed on its client, and is gone", |status| {
        phase(status, 1) == Some(GenerationPhase::Retired)
    });
    client.send("o\n");
    gated.open(3);
    send(supervisor, 2, Signal::SIGKILL);
    client.expect("two\n");
    let status = supervisor.wait_settled();
    assert_eq!((status.serving, status.restarts), (Some(GenerationId(3)), 1));
    client.echo("three\n");
}

#[test]
fn an_upgrade_that_becomes_a_stop_leaves_no_client_to_nobody() {
    let gated = Gated::start(&[]);
    let mut client = Client::connect(gated.supervisor.address());
    client.echo("one\n");
    gated.begin_upgrade();
    // It hears the word to drain after the service was stopped.
    send(&gated.supervisor, 1, Signal::SIGSTOP);
    gated.open(2);
    let mut supervisor = gated.supervisor;
    supervisor.wait_until("the new one serves", |status| status.serving == Some(GenerationId(2)));
    supervisor.signal(Signal::SIGTERM);
    supervisor.wait_until("the new one drains", |status| phase(status, 2) == Some(GenerationPhase::Draining));
    send(&supervisor, 1, Signal::SIGCONT);
    client.echo("two\n");
    assert_eq!(phase(&supervisor.status(), 1), Some(GenerationPhase::Draining), "{}", supervisor.log());
    client.echo("three\n");
    drop(client);
    assert!(supervisor.wait().success(), "{}", supervisor.log());
}
