//! How long it takes to count many connections. A process of its own, because it takes all the fds that it may have.
#![cfg(feature = "cli")]

use std::collections::BTreeMap;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use nix::sys::resource::{getrlimit, setrlimit, Resource};
use zddsup::core::GenerationId;
use zddsup::drain::{connections, diag};

/// The best of some, so that another test's load is not what is measured.
fn best<T>(mut work: impl FnMut() -> T) -> (T, Duration) {
    let timed = (0..5).map(|_| {
        let begin = Instant::now();
        let result = work();
        (result, begin.elapsed())
    });
    timed.min_by_key(|(_, time)| *time).unwrap()
}

#[test]
fn counting_ten_thousand_connections() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let wanted = most.saturating_sub(100).min(20_000) / 2;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let own = i32::try_from(std::process::id()).unwrap();
    let one = GenerationId(1);
    let places = connections::Places { tcp: vec![address], ..Default::default() };

    let (_, none) = best(|| connections::count(&places, vec![(one, vec![own])]).unwrap());
    let both_ends: Vec<_> = (0..wanted)
        .map(|_| {
            let client = TcpStream::connect(address).unwrap();
            (client, listener.accept().unwrap())
        })
        .collect();
    let (counted, many) = best(|| connections::count(&places, vec![(one, vec![own])]).unwrap());
    assert_eq!(counted, BTreeMap::from([(one, connections::Count { all: wanted, still: 0 })]));
    let client = &both_ends[0].0;
    let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
    let (found, lookup) = best(|| diag::far_side(local, remote).unwrap());
    let (listed, list) = best(|| {
        let mut listed = 0;
        diag::connections(&[address], |_| listed += 1).unwrap();
        listed
    });
    assert_eq!(listed, wanted);
    println!(
        "none: {none:.1?}; {wanted} connections ({} fds): {many:.1?}, of which the kernel's list is {list:.1?}",
        2 * wanted
    );
    println!("the far side of one of them: {lookup:.1?}");
    assert!(found.is_some_and(|found| found.inode != 0));
}
