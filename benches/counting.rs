//! What it takes to count connections from outside: `zddsup::drain::connections::count`.
//!
//! `cargo bench --bench counting`. A limit of open files is one of a process, so there are as many processes as it takes:
//! those that accept are counted like the workers of one generation. A hundred thousand connections are two hundred thousand
//! sockets without anything in their buffers. As root it has a network namespace of its own: nobody else's ports are used up.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::{median, ms, quartiles, ratio, Table};
use nix::sched::{unshare, CloneFlags};
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use nix::sys::time::TimeValLike;
use socket2::{Domain, Socket, Type};
use zddsup::core::GenerationId;
use zddsup::drain::connections;

/// Connections of a process. Each process of clients connects to an address of its own; beyond half of the ephemeral ports,
/// the kernel looks for a free one for long.
const MOST: usize = 10_000;
const ROUNDS: usize = 11;
/// Fds besides the connections.
const SPARE: u64 = 100;

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--accept", count] => return accept(count.parse().expect("how many")),
        ["--connect", count, to] => return connect(count.parse().expect("how many"), to.parse().expect("an address")),
        _ => {}
    }
    println!("# Counting connections");
    if unshare(CloneFlags::CLONE_NEWNET).is_ok() {
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
        assert!(up.is_ok_and(|status| status.success()), "its own network namespace needs ip(8)");
    }
    let most = usize::try_from(raise_nofile().saturating_sub(SPARE)).expect("a number").min(MOST);
    let mut table = Table::new(
        format!("Medians of {ROUNDS}, taken in turn"),
        &[
            "connections",
            "processes",
            "time",
            "half of them",
            "CPU",
            "CPU a connection",
            "/proc/net/tcp read only",
            "times that",
        ],
    );
    for count in [0, 1_000, 10_000, 100_000] {
        let connected = Connected::new(count, most);
        let [mut times, mut cpu, mut naive] = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            let (begin, cpu_before) = (Instant::now(), thread_cpu());
            let id = GenerationId(1);
            let places = connections::Places { tcp: vec![connected.to], ..Default::default() };
            let counted = connections::count(&places, vec![(id, connected.pids())]).expect("a count");
            times.push(begin.elapsed());
            cpu.push(thread_cpu().saturating_sub(cpu_before));
            assert_eq!(counted[&id].all, count as u64);

            let begin = Instant::now();
            let text = std::fs::read("/proc/net/tcp").expect("/proc/net/tcp");
            naive.push(begin.elapsed());
            assert!(text.len() > count);
        }
        let [low, high] = quartiles(&times);
        let each = u32::try_from(count).ok().filter(|count| *count > 0).map(|count| median(&cpu) / count);
        table.row(&[
            &count,
            &connected.pids().len(),
            &ms(median(&times)),
            &format!("{} to {}", ms(low), ms(high)),
            &ms(median(&cpu)),
            &each.map_or_else(|| "-".to_owned(), |each| format!("{} ns", each.as_nanos())),
            &ms(median(&naive)),
            &ratio(median(&times), median(&naive)),
        ]);
    }
    table.print();
}

fn thread_cpu() -> Duration {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_THREAD).expect("its own usage");
    let us = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Duration::from_micros(u64::try_from(us).expect("time goes on"))
}

/// As far as it goes. What it is now.
fn raise_nofile() -> u64 {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("its own limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("up to the hard limit");
    hard
}

/// So many connections, between processes of their own.
struct Connected {
    to: SocketAddr,
    accepting: Vec<Holder>,
    _connecting: Vec<Holder>,
}

impl Connected {
    fn new(count: usize, most: usize) -> Connected {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        listener.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)).into()).expect("a port");
        listener.listen(4096).expect("listen");
        let listener = TcpListener::from(listener);
        let to = listener.local_addr().expect("its address");
        let parts: Vec<_> = (0..count.div_ceil(most).max(1)).map(|part| most.min(count - part * most)).collect();
        let accept = |part: &usize| {
            let listener = OwnedFd::from(listener.try_clone().expect("an fd"));
            Holder::start(&["--accept", &part.to_string()], listener.into())
        };
        let connect = |(index, part): (usize, &usize)| {
            let to = SocketAddr::from((Ipv4Addr::new(127, 0, 0, u8::try_from(1 + index).expect("few")), to.port()));
            Holder::start(&["--connect", &part.to_string(), &to.to_string()], Stdio::null())
        };
        let mut accepting: Vec<_> = parts.iter().map(accept).collect();
        let mut connecting: Vec<_> = parts.iter().enumerate().map(connect).collect();
        connecting.iter_mut().chain(&mut accepting).for_each(Holder::wait);
        Connected { to, accepting, _connecting: connecting }
    }

    fn pids(&self) -> Vec<i32> {
        self.accepting.iter().map(|holder| i32::try_from(holder.child.id()).expect("a pid")).collect()
    }
}

/// A process that has its connections until it is dropped.
struct Holder {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Holder {
    fn start(args: &[&str], stdin: Stdio) -> Holder {
        let mut command = Command::new(std::env::current_exe().expect("its own path"));
        let mut child = command.args(args).stdin(stdin).stdout(Stdio::piped()).spawn().expect("itself");
        let said = BufReader::new(child.stdout.take().expect("a pipe"));
        Holder { child, said }
    }

    fn wait(&mut self) {
        let mut line = String::new();
        self.said.read_line(&mut line).expect("it says so");
        assert_eq!(line.trim(), "held");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// From the listener that is stdin.
fn accept(count: usize) {
    raise_nofile();
    let listener = TcpListener::from(std::io::stdin().as_fd().try_clone_to_owned().expect("a listener as stdin"));
    let one = |_| {
        let (mut stream, _) = listener.accept()?;
        stream.write_all(b".")?;
        Ok::<_, std::io::Error>(stream)
    };
    hold((0..count).map(|index| one(index).expect("a connection")).collect::<Vec<_>>());
}

fn connect(count: usize, to: SocketAddr) {
    raise_nofile();
    let one = |_| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        // Whoever binds one of its ports may, if he wants that too.
        socket.set_reuse_address(true)?;
        socket.connect(&to.into())?;
        // Its end is a reset: a hundred thousand in TIME_WAIT would be in the next bench's way for a minute.
        socket.set_linger(Some(Duration::ZERO))?;
        // One at a time: the queue must not overflow.
        (&socket).read_exact(&mut [0])?;
        Ok::<_, std::io::Error>(socket)
    };
    hold((0..count).map(|index| one(index).expect("a connection")).collect::<Vec<_>>());
}

fn hold<T>(held: T) {
    println!("held");
    // Until the benchmark kills it, or is gone itself.
    let parent = nix::unistd::getppid();
    while nix::unistd::getppid() == parent {
        std::thread::sleep(Duration::from_millis(200));
    }
    drop(held);
}
