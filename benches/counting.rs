//! What it takes to count connections from outside: `zddsup::drain::connections::count`.
//!
//! `cargo bench --bench counting`. A hundred thousand need a limit of open files above that, and are left out without it.

mod common;

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::{median, ms, quartiles, ratio, Table};
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use nix::sys::time::TimeValLike;
use socket2::{Domain, Socket, Type};
use zddsup::core::GenerationId;
use zddsup::drain::connections;

/// Fewer than there are ephemeral ports.
const PER_ADDRESS: usize = 20_000;
const ROUNDS: usize = 11;
/// Fds besides the connections.
const SPARE: u64 = 100;

fn main() {
    if std::env::args().nth(1).as_deref() == Some("--hold") {
        return hold(std::env::args().nth(2).and_then(|count| count.parse().ok()).expect("how many"));
    }
    println!("# Counting connections");
    let limit = raise_nofile();
    let mut table = Table::new(
        format!("Medians of {ROUNDS}, taken in turn"),
        &["connections", "time", "half of them", "CPU", "CPU a connection", "/proc/net/tcp read only", "times that"],
    );
    for count in [0, 1_000, 10_000, 100_000] {
        if limit < count as u64 + SPARE {
            println!("{count} connections are left out: the limit of open files is {limit}");
            continue;
        }
        let mut holder = Holder::start(count);
        let connected = connect(holder.address, count);
        holder.wait();
        let [mut times, mut cpu, mut naive] = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            let (begin, cpu_before) = (Instant::now(), thread_cpu());
            let id = GenerationId(1);
            let pid = i32::try_from(holder.child.id()).expect("a pid");
            let places = connections::Places { tcp: vec![holder.address], ..Default::default() };
            let counted = connections::count(&places, vec![(id, vec![pid])]).expect("a count");
            times.push(begin.elapsed());
            cpu.push(thread_cpu().saturating_sub(cpu_before));
            assert_eq!(counted[&id].all, count as u64);

            let begin = Instant::now();
            let text = std::fs::read("/proc/net/tcp").expect("/proc/net/tcp");
            naive.push(begin.elapsed());
            assert!(text.len() > count);
        }
        drop(connected);
        let [low, high] = quartiles(&times);
        let each = u32::try_from(count).ok().filter(|count| *count > 0).map(|count| median(&cpu) / count);
        table.row(&[
            &count,
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

/// As far as it goes: root may go past the hard limit. What it is now.
fn raise_nofile() -> u64 {
    let wanted = 100_000 + SPARE;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("its own limit");
    if hard < wanted && setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_ok() {
        return wanted;
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("up to the hard limit");
    hard
}

fn connect(to: SocketAddr, count: usize) -> Vec<TcpStream> {
    let one = |index: usize| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        let last = u8::try_from(1 + index / PER_ADDRESS).expect("few addresses");
        socket.bind(&SocketAddr::from((Ipv4Addr::new(127, 0, 0, last), 0)).into())?;
        socket.connect(&to.into())?;
        Ok::<_, std::io::Error>(TcpStream::from(socket))
    };
    (0..count).map(|index| one(index).expect("a connection")).collect()
}

/// A process that accepts so many connections and keeps them.
struct Holder {
    child: Child,
    address: SocketAddr,
    said: BufReader<ChildStdout>,
}

impl Holder {
    fn start(count: usize) -> Holder {
        let mut command = Command::new(std::env::current_exe().expect("its own path"));
        // It ends with its stdin, and that with the benchmark.
        command.args(["--hold", &count.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("itself");
        let mut said = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut line = String::new();
        said.read_line(&mut line).expect("its address");
        Holder { child, address: line.trim().parse().expect("an address"), said }
    }

    fn wait(&mut self) {
        let mut line = String::new();
        self.said.read_line(&mut line).expect("it has them");
        assert_eq!(line.trim(), "held");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn hold(count: usize) {
    raise_nofile();
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a port");
    listener.listen(4096).expect("listen");
    println!("{}", listener.local_addr().expect("its address").as_socket().expect("an IP address"));
    let held: Vec<_> = (0..count).map(|_| listener.accept().expect("a connection")).collect();
    println!("held");
    let _end = std::io::stdin().read_line(&mut String::new());
    drop(held);
}
