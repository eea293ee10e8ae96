//! UDP servers that bind for themselves. A datagram that is not answered within the tests' patience is a failure, and is not
//! sent again.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};
use zddsup::control::types::GenerationPhase;

use crate::common::{processes_with, puppet, request, Supervisor, PATIENCE};
use crate::stage::Site;

/// An address that is nobody else's: TCP has the port.
fn reserve(address: &str) -> (Socket, SocketAddr) {
    let address: SocketAddr = address.parse().unwrap();
    let reserved = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    reserved.bind(&address.into()).unwrap();
    let address = reserved.local_addr().unwrap().as_socket().unwrap();
    (reserved, address)
}

/// A puppet that answers datagrams there, and does what the file says.
fn start(site: &Site, udp: SocketAddr, flags: &[&str], more: &[&str]) -> Supervisor {
    site.write("script", "--version 1");
    let (puppet, udp) = (puppet(), udp.to_string());
    let command = ["--", &puppet, "--udp", &udp, "--script", "script"];
    let words: Vec<_> = flags.iter().chain(&command).chain(more).copied().collect();
    site.start(&words)
}

/// A client: one datagram at a time.
struct Client(UdpSocket);

impl Client {
    fn new(server: SocketAddr) -> Client {
        let socket = UdpSocket::bind(if server.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" }).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.connect(server).unwrap();
        Client(socket)
    }

    fn send(&self, text: &str) {
        self.0.send(text.as_bytes()).unwrap();
    }

    /// The version that answered.
    fn receive(&self, text: &str) -> String {
        let mut buffer = [0; 200];
        let length = self.0.recv(&mut buffer).unwrap_or_else(|error| panic!("{text}: {error}"));
        let answer = std::str::from_utf8(&buffer[..length]).unwrap();
        assert!(answer.ends_with(&format!(" {text}")), "{answer}");
        answer.strip_prefix("version=").unwrap().split(' ').next().unwrap().to_owned()
    }

    fn ask(&self, text: &str) -> String {
        self.send(text);
        self.receive(text)
    }
}

#[derive(Default)]
struct Seen {
    versions: Mutex<Vec<String>>,
    grown: Condvar,
}

/// Clients that ask one thing after the other, each from a new port now and then.
struct Load {
    seen: Arc<Seen>,
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<u64>>,
}

impl Load {
    fn start(server: SocketAddr) -> Load {
        let (seen, stop) = (Arc::<Seen>::default(), Arc::new(AtomicBool::new(false)));
        let work = |number: u64| {
            let (seen, stop) = (Arc::clone(&seen), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut client = Client::new(server);
                let mut answered = 0;
                while !stop.load(Ordering::SeqCst) {
                    let version = client.ask(&format!("{number}.{answered}"));
                    answered += 1;
                    seen.versions.lock().unwrap().push(version);
                    seen.grown.notify_all();
                    if answered % 10 == 0 {
                        client = Client::new(server);
                    }
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                answered
            })
        };
        let clients = (0..4).map(work).collect();
        Load { seen, stop, clients }
    }

    /// Waits for so many more answers, all of this version.
    fn more(&self, count: usize, version: &str) {
        let mut seen = self.seen.versions.lock().unwrap();
        // Those that were under way.
        seen.clear();
        let enough = |seen: &mut Vec<String>| seen.iter().filter(|seen| *seen == version).count() < count;
        let (seen, waited) = self.seen.grown.wait_timeout_while(seen, PATIENCE, enough).unwrap();
        assert!(!waited.timed_out(), "no answers of version {version}: {seen:?}");
    }

    /// How many were answered: all.
    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.clients.into_iter().map(|client| client.join().expect("no datagram is lost")).sum()
    }
}

fn five_upgrades(bind: &str, ask: &str, more: &[&str]) {
    let site = Site::new();
    let (_reserved, address) = reserve(bind);
    let supervisor = start(&site, address, &["--max-draining", "10"], more);
    let asked = SocketAddr::new(ask.parse().unwrap(), address.port());
    let load = Load::start(asked);
    load.more(50, "1");
    for version in ["2", "3", "4", "5", "6"] {
        site.write("script", &format!("--version {version}"));
        supervisor.upgrade();
        load.more(50, version);
    }
    supervisor.wait_settled();
    load.more(50, "6");
    println!("{} datagrams, each answered", load.stop());
    assert!(supervisor.status().listeners.iter().any(|listener| listener.address == format!("udp://{address}")));
}

#[test]
fn every_datagram_is_answered() {
    five_upgrades("127.0.0.1:0", "127.0.0.1", &[]);
}

#[test]
fn on_ipv6_too() {
    five_upgrades("[::1]:0", "::1", &[]);
}

#[test]
fn on_a_socket_for_both() {
    five_upgrades("[::]:0", "127.0.0.1", &[]);
}

#[test]
fn on_several_sockets_of_one_generation() {
    five_upgrades("127.0.0.1:0", "127.0.0.1", &["--udp-sockets", "4"]);
}

#[test]
fn one_that_binds_and_is_not_ready_gets_nothing() {
    let site = Site::new();
    let (_reserved, address) = reserve("127.0.0.1:0");
    let supervisor = start(&site, address, &["--ready", "notify", "--start-timeout", "2s"], &[]);
    let load = Load::start(address);
    load.more(50, "1");
    site.write("script", "--version 2\n--ready none\n");
    let mut upgrade = supervisor.cli_command(&["upgrade"]).spawn().unwrap();
    while upgrade.try_wait().unwrap().is_none() {
        load.more(10, "1");
        assert!(!load.seen.versions.lock().unwrap().contains(&"2".to_owned()));
    }
    assert_eq!(upgrade.wait().unwrap().code(), Some(3));
    supervisor.wait_settled();
    load.more(50, "1");
    site.write("script", "--version 3");
    supervisor.upgrade();
    load.more(50, "3");
    load.stop();
}

#[test]
fn what_waits_for_a_dead_one_is_answered_by_the_next() {
    let site = Site::new();
    let (_reserved, address) = reserve("127.0.0.1:0");
    let supervisor = start(&site, address, &[], &["--udp-sockets", "2"]);
    let first = Pid::from_raw(supervisor.serving().pid.unwrap());
    crate::common::freeze(first);
    let clients: Vec<_> = (0..50).map(|_| Client::new(address)).collect();
    for client in &clients {
        client.send("waits");
    }
    site.write("script", "--version 2\n");
    kill(first, Signal::SIGKILL).unwrap();
    for client in &clients {
        assert_eq!(client.receive("waits"), "2");
    }
    // Its sockets are as good as its own.
    site.write("script", "--version 3\n");
    supervisor.upgrade();
    supervisor.wait_settled();
    for client in &clients {
        assert_eq!(client.ask("new"), "3");
    }
}

#[test]
fn one_that_was_bound_late_is_upgraded_too() {
    let site = Site::new();
    let (_reserved, address) = reserve("127.0.0.1:0");
    site.write("script", "--version 1");
    let puppet = puppet();
    let supervisor = site.start(&["--", &puppet, "--bind", "ADDRESS", "--script", "script"]);
    assert!(request(site.address, &format!("/udp?address={address}")).contains("version=1"));
    let load = Load::start(address);
    load.more(50, "1");
    for version in ["2", "3"] {
        site.write("script", &format!("--version {version}\n--udp {address}\n"));
        supervisor.upgrade();
        load.more(50, version);
        supervisor.wait_settled();
    }
    load.stop();
}

#[test]
fn a_client_with_a_socket_of_its_own_stays_with_its_generation() {
    let site = Site::new();
    let (_reserved, address) = reserve("127.0.0.1:0");
    let flags = ["--ready", "notify", "--start-timeout", "2s"];
    let supervisor = start(&site, address, &flags, &["--udp-per-client"]);
    let new_ones_reach = |version| {
        for number in 0..30 {
            let client = Client::new(address);
            assert_eq!(client.ask(&format!("new {number}")), version);
            assert_eq!(client.ask("bye"), version);
        }
    };
    let old: Vec<_> = (0..3).map(|_| Client::new(address)).collect();
    for client in &old {
        assert_eq!(client.ask("hello"), "1");
    }
    site.write("script", "--version 2\n--ready none\n");
    let mut upgrade = supervisor.cli_command(&["upgrade"]).spawn().unwrap();
    while upgrade.try_wait().unwrap().is_none() {
        new_ones_reach("1");
    }
    site.write("script", "--version 3\n");
    supervisor.upgrade();
    new_ones_reach("3");
    let drains = |connections| {
        move |status: &zddsup::control::types::Status| {
            let mut generations = status.generations.iter();
            generations.any(|g| g.phase == GenerationPhase::Draining && g.connections == Some(connections))
        }
    };
    supervisor.wait_until("its clients are counted", drains(3));
    for (client, left) in old.iter().zip((0..3).rev()) {
        assert_eq!(client.ask("still here"), "1");
        assert_eq!(client.ask("bye"), "1");
        if left > 0 {
            supervisor.wait_until("it is gone", drains(left));
        }
    }
    supervisor.wait_settled();
    new_ones_reach("3");
}

#[test]
fn a_killed_supervisor_is_succeeded() {
    let site = Site::new();
    let (_reserved, address) = reserve("127.0.0.1:0");
    let first = start(&site, address, &[], &[]);
    let load = Load::start(address);
    load.more(50, "1");
    let pid = first.serving().pid.unwrap();
    first.kill_alone();
    assert!(processes_with(&site.dir.path().display().to_string()).contains(&pid));
    load.more(50, "1");
    let second = start(&site, address, &[], &[]);
    second.wait_settled();
    site.write("script", "--version 2\n");
    second.upgrade();
    load.more(50, "2");
    load.stop();
}

#[test]
fn in_a_canary_each_client_is_one_version_s() {
    let site = Site::new();
    let (_reserved, address) = reserve("127.0.0.1:0");
    let supervisor = start(&site, address, &[], &[]);
    let load = Load::start(address);
    for (decision, after) in [("abort", "1"), ("promote", "2")] {
        site.write("script", "--version 2");
        let output = supervisor.cli(&["upgrade", "--wait=canary", "--canary", "50%"]);
        assert!(output.status.success(), "{output:?}\n{}", supervisor.log());
        load.more(50, "1");
        load.more(50, "2");
        let client = Client::new(address);
        let version = client.ask("first");
        for _ in 0..20 {
            assert_eq!(client.ask("again"), version);
        }
        let output = supervisor.cli(&[decision]);
        assert!(output.status.success(), "{output:?}\n{}", supervisor.log());
        load.more(50, after);
        supervisor.wait_settled();
    }
    assert!(load.stop() > 0);
}
