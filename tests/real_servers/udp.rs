//! A UDP server: both generations read from one socket while one takes the place of the other, and every datagram is
//! answered.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::common::real::installed;
use crate::common::PATIENCE;
use crate::stage::Site;

const COMMAND: &str = "--listen udp://127.0.0.1:8080 --ready notify -- /usr/bin/python3 udp_echo.py";
const CLIENTS: usize = 4;

#[test]
fn every_datagram_is_answered() {
    if !installed("python3", &["/usr/bin/python3", "--version"]) {
        return;
    }
    let site = Site::new();
    site.write("udp_echo.py", include_str!("files/udp_echo.py"));
    site.write("version", "1");
    let any_port = |word: &str| if word.starts_with("udp:") { "udp://127.0.0.1:0" } else { word }.to_owned();
    let supervisor = site.start(COMMAND, any_port);
    let address = supervisor.address();
    let (stop, (answers, versions)) = (Arc::new(AtomicBool::new(false)), channel());
    let clients: Vec<JoinHandle<u64>> = (0..CLIENTS)
        .map(|_| {
            let (stop, answers) = (Arc::clone(&stop), answers.clone());
            std::thread::spawn(move || ask(address, &stop, &answers))
        })
        .collect();
    drop(answers);
    wait_for_version(&versions, "1");
    for version in ["2", "3", "4", "5", "6"] {
        site.write("version", version);
        supervisor.upgrade();
        wait_for_version(&versions, version);
        supervisor.wait_settled();
    }
    stop.store(true, Ordering::Relaxed);
    let answered: u64 = clients.into_iter().map(|client| client.join().expect("no datagram is lost")).sum();
    println!("{answered} datagrams, each answered");
    assert!(answered > 100, "{answered}");
}

/// Sends one datagram after the other; each must be answered, and not twice.
fn ask(address: SocketAddr, stop: &AtomicBool, answers: &Sender<String>) -> u64 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE / 6)).unwrap();
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        socket.send(format!("number={number}").as_bytes()).unwrap();
        let mut buffer = [0; 100];
        let length = socket.recv(&mut buffer).unwrap_or_else(|error| panic!("datagram {number}: {error}"));
        let answer = std::str::from_utf8(&buffer[..length]).unwrap();
        let (version, echo) = answer.strip_prefix("version=").unwrap().split_once(' ').unwrap();
        assert_eq!(echo, format!("number={number}"));
        answers.send(version.to_owned()).unwrap();
        number += 1;
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    number
}

fn wait_for_version(versions: &Receiver<String>, wished: &str) {
    while versions.recv_timeout(PATIENCE).expect("answers") != wished {}
}
