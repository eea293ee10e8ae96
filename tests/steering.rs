//! Generation follows generation on one address while clients connect in a loop, and nobody is lost.
#![cfg(feature = "cli")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sched::{unshare, CloneFlags};
use socket2::{Domain, Socket, Type};
use zddsup::core::GenerationId;
use zddsup::drain::retired::Retired;
use zddsup::listener::steering::{Group, Key};

fn listen(at: std::net::SocketAddr) -> Arc<OwnedFd> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&at.into()).unwrap();
    socket.listen(4096).unwrap();
    Arc::new(socket.into())
}

/// A generation: a thread that answers each connection with its number until its socket is closed. It is so slow that some
/// wait in its queue at all times.
fn serve(socket: &Arc<OwnedFd>, number: u8) -> thread::JoinHandle<()> {
    let listener = TcpListener::from(socket.try_clone().unwrap());
    thread::spawn(move || {
        while let Ok((mut client, _)) = listener.accept() {
            thread::sleep(Duration::from_micros(500));
            let _told_by_the_client = client.write_all(&[number]);
        }
    })
}

/// Clients connect in a loop while generation follows generation, each with so many sockets. Gives how many connections
/// each answered. One that was begun after a switch is never answered by a generation before it, and none by a candidate.
fn upgrades_under_load(generations: u8, sockets_each: usize) -> BTreeMap<u8, usize> {
    let first = listen("127.0.0.1:0".parse().unwrap());
    let key = Key::of(&*first).unwrap().unwrap();
    let address = key.local();
    let mut group = Group::new(key);
    let mut servers = Vec::new();
    let mut join = |group: &mut Group, number: u8, socket: &Arc<OwnedFd>| {
        group.join(GenerationId(number.into()), socket).unwrap();
        servers.push(serve(socket, number));
    };
    join(&mut group, 1, &first);
    let mut incumbent = vec![first];

    let (done, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    // Who may be steered to, and who certainly is.
    let (switching, switched) = (AtomicU8::new(1), AtomicU8::new(1));
    let client = || {
        let mut by = BTreeMap::<u8, usize>::new();
        while !done.load(Ordering::SeqCst) {
            let oldest = switched.load(Ordering::SeqCst);
            let mut byte = [0];
            TcpStream::connect(address).unwrap().read_exact(&mut byte).unwrap();
            let newest = switching.load(Ordering::SeqCst);
            assert!((oldest..=newest).contains(&byte[0]), "{oldest} <= {} <= {newest}", byte[0]);
            *by.entry(byte[0]).or_default() += 1;
            answered.fetch_add(1, Ordering::SeqCst);
        }
        by
    };
    let await_more = |scope: &[thread::ScopedJoinHandle<_>]| {
        let before = answered.load(Ordering::SeqCst);
        while answered.load(Ordering::SeqCst) < before + 50 && !scope.iter().any(thread::ScopedJoinHandle::is_finished)
        {
            thread::yield_now();
        }
    };
    let by = thread::scope(|scope| {
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(client)).collect();
        for number in 2..=generations {
            await_more(&clients);
            group.pin().unwrap();
            let candidate: Vec<_> = (0..sockets_each).map(|_| listen(address)).collect();
            candidate.iter().for_each(|socket| join(&mut group, number, socket));
            await_more(&clients);
            switching.store(number, Ordering::SeqCst);
            group.steer_to(GenerationId(number.into())).unwrap();
            switched.store(number, Ordering::SeqCst);
            for socket in std::mem::replace(&mut incumbent, candidate) {
                let mut retired = Retired::new(Arc::clone(&socket)).unwrap();
                while !retired.look().unwrap().is_nothing() {
                    thread::yield_now();
                }
                group.leave(&socket).unwrap();
            }
        }
        await_more(&clients);
        assert_eq!(group.members().count(), sockets_each, "those of before are all closed");
        done.store(true, Ordering::SeqCst);
        let mut by = BTreeMap::<u8, usize>::new();
        for (number, count) in clients.into_iter().flat_map(|client| client.join().unwrap()) {
            *by.entry(number).or_default() += count;
        }
        by
    });
    incumbent.iter().for_each(|socket| assert!(group.leave(socket).unwrap()));
    servers.into_iter().for_each(|server| server.join().unwrap());
    by
}

#[test]
fn closing_a_retired_socket_under_load_loses_nobody() {
    let by = upgrades_under_load(20, 1);
    assert_eq!(by.keys().copied().collect::<Vec<_>>(), (1..=20).collect::<Vec<_>>(), "{by:?}");
}

#[test]
fn generations_with_several_sockets_each_lose_nobody() {
    let by = upgrades_under_load(12, 3);
    assert_eq!(by.keys().copied().collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>(), "{by:?}");
}

/// In a network of its own, with these settings.
fn alone(settings: &[(&str, &str)], work: impl FnOnce() + Send + 'static) {
    let settings: Vec<_> = settings.iter().map(|(name, value)| format!("net.ipv4.{name}={value}")).collect();
    let thread = thread::spawn(move || {
        let ran = |program: &str, arguments: &[&str]| {
            Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
        };
        if unshare(CloneFlags::CLONE_NEWNET).is_err() || !ran("ip", &["link", "set", "lo", "up"]) {
            return eprintln!("not checked: no network of its own (root, and iproute2)");
        }
        for setting in &settings {
            if !ran("sysctl", &["-w", setting]) {
                return eprintln!("not checked: cannot set {setting}");
            }
        }
        work();
    });
    thread.join().unwrap();
}

#[test]
fn handshakes_without_a_memory_end_at_the_new_generation() {
    // 2: a cookie for each; 0: never one.
    for cookies in ["0", "2"] {
        alone(&[("tcp_syncookies", cookies)], || drop(upgrades_under_load(8, 2)));
    }
}

#[test]
fn migrating_requests_changes_no_index() {
    alone(&[("tcp_migrate_req", "1")], || drop(upgrades_under_load(8, 2)));
}
