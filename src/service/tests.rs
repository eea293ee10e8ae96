use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use nix::poll::{poll, PollFd, PollFlags};
use nix::sys::signal::{kill, Signal};
use nix::sys::socket::{socketpair, AddressFamily, SockFlag, SockType};
use nix::sys::stat::fstat;
use nix::unistd::Pid;

use super::*;
use crate::proto::handoff::{ToGeneration, MAX_PACKET};

/// The supervisor's end, blocking.
struct Supervisor(OwnedFd);

impl Supervisor {
    fn says(&self, message: &ToGeneration, fds: &[BorrowedFd<'_>]) {
        scm::send(self.0.as_fd(), &message.encode().unwrap(), fds).unwrap();
    }

    fn hears(&self) -> (FromGeneration, Vec<OwnedFd>) {
        let mut buffer = vec![0; MAX_PACKET];
        poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], 10_000_u16).unwrap();
        let received = scm::receive(self.0.as_fd(), &mut buffer).unwrap().expect("nothing was said");
        (FromGeneration::decode(&buffer[..received.len], received.fds.len()).unwrap(), received.fds)
    }
}

fn supervised(listeners: &[(&str, BorrowedFd<'_>)]) -> (Service, Supervisor) {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let supervisor = Supervisor(ours);
    supervisor.says(&ToGeneration::Hello { protocol: 1, service: "web".to_owned(), generation: 4 }, &[]);
    // In two packets, as with very many.
    let (first, second) = listeners.split_at(listeners.len() / 2);
    for (part, last) in [(first, false), (second, true)] {
        let names = part.iter().map(|(name, _)| (*name).to_owned()).collect();
        let fds: Vec<_> = part.iter().map(|(_, fd)| *fd).collect();
        supervisor.says(&ToGeneration::Listeners { names, last }, &fds);
    }
    let service = Service::new(Given { socket: Some(theirs), ..Given::default() }).unwrap();
    assert_eq!(supervisor.hears().0, FromGeneration::Hello { protocol: 1 });
    (service, supervisor)
}

fn alone() -> Service {
    Service::new(Given::default()).unwrap()
}

fn tcp() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[test]
fn listeners_come_by_name_and_as_the_type_that_is_asked_for() {
    let (http, address) = tcp();
    let dns = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (service, _supervisor) = supervised(&[("http", http.as_fd()), ("dns", dns.as_fd())]);
    assert_eq!((service.name(), service.generation()), (Some("web"), Some(4)));
    let error = service.listener::<TcpListener>("dns").unwrap_err().to_string();
    assert!(error.contains("is an Internet datagram socket, not a TCP listener"), "{error}");
    let error = service.listener_or_bind::<TcpListener>("htpp", "127.0.0.1:0").unwrap_err().to_string();
    assert!(error.contains("only http, dns"), "{error}");
    assert_eq!(service.listener::<TcpListener>("http").unwrap().local_addr().unwrap(), address);
    assert!(service.listener::<TcpListener>("http").is_err());
    service.listener::<UdpSocket>("dns").unwrap();
    assert!(service.listener_names().is_empty());
}

#[test]
fn a_lone_listener_without_a_name_has_any() {
    let (listener, address) = tcp();
    let (service, _supervisor) = supervised(&[("listener", listener.as_fd())]);
    assert_eq!(service.listener::<TcpListener>("http").unwrap().local_addr().unwrap(), address);
}

#[test]
fn the_same_socket_by_both_protocols_is_one() {
    let (listener, address) = tcp();
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let supervisor = Supervisor(ours);
    supervisor.says(&ToGeneration::Hello { protocol: 9, service: "web".to_owned(), generation: 1 }, &[]);
    supervisor.says(&ToGeneration::Listeners { names: vec!["http".to_owned()], last: true }, &[listener.as_fd()]);
    let copy = OwnedFd::from(listener.try_clone().unwrap());
    let fds = vec![("http".to_owned(), copy), ("admin".to_owned(), tcp().0.into())];
    let service = Service::new(Given { socket: Some(theirs), fds, notify: None }).unwrap();
    assert_eq!(service.listener_names(), ["http", "admin"]);
    assert_eq!(service.listener::<TcpListener>("http").unwrap().local_addr().unwrap(), address);
}

#[test]
fn alone_it_binds_and_says_nothing_to_nobody() {
    let service = alone();
    assert!(matches!(service.listener::<TcpListener>("http"), Err(ServiceError::NotPassed(_))));
    service.listener_or_bind::<TcpListener>("http", "127.0.0.1:0").unwrap();
    let error = service.listener_or_bind::<TcpListener>("http", "127.0.0.1:99999").unwrap_err().to_string();
    assert!(error.starts_with("cannot bind 127.0.0.1:99999"), "{error}");
    service.ready().unwrap();
    service.drained().unwrap();
    assert!(matches!(service.keep("x", b"", &[]), Err(ServiceError::NothingKeeps)));
    assert!(service.wait_kept().is_none());
}

#[tokio::test]
async fn tokio_types_and_the_word_to_drain() {
    let (listener, address) = tcp();
    let (service, supervisor) = supervised(&[("http", listener.as_fd())]);
    let listener: tokio::net::TcpListener = service.listener("http").unwrap();
    let _client = tokio::net::TcpStream::connect(address).await.unwrap();
    listener.accept().await.unwrap();
    assert!(!service.is_draining());
    let waiting = service.draining();
    supervisor.says(&ToGeneration::Drain { timeout_ms: Some(60_000), last: false, more: false }, &[]);
    let left = waiting.await.time_left().unwrap();
    assert!(left <= Duration::from_secs(60) && left > Duration::from_secs(30));
    // It stays said.
    service.draining().await;
    service.wait_draining().unwrap();
    service.drained().unwrap();
    assert_eq!(supervisor.hears().0, FromGeneration::Drained);
}

#[test]
fn a_server_with_threads_accepts_until_the_drain() {
    let (listener, address) = tcp();
    let (service, supervisor) = supervised(&[("http", listener.as_fd())]);
    let listener: TcpListener = service.listener("http").unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    let (mut stream, _) = service.accept(&listener).unwrap().unwrap();
    // The connection blocks as one of std does.
    client.write_all(b"x").unwrap();
    stream.read_exact(&mut [0; 1]).unwrap();
    let accepting = std::thread::spawn({
        let service = service.clone();
        move || service.accept(&listener).unwrap().is_none()
    });
    supervisor.says(&ToGeneration::Drain { timeout_ms: None, last: false, more: false }, &[]);
    assert_eq!(service.wait_draining().unwrap().deadline, None);
    assert!(accepting.join().unwrap());
}

#[test]
fn what_it_says_reaches_the_supervisor() {
    let (service, supervisor) = supervised(&[]);
    service.ready().unwrap();
    service.status("two\nlines").unwrap();
    assert_eq!(supervisor.hears().0, FromGeneration::Ready);
    assert_eq!(supervisor.hears().0, FromGeneration::Status { text: "two lines".to_owned() });
    let (near, _far) = UnixDatagram::pair().unwrap();
    service.keep("pair", b"state", &[near.as_fd()]).unwrap();
    let (message, fds) = supervisor.hears();
    assert_eq!(message, FromGeneration::Keep { name: "pair".to_owned(), state: b"state".to_vec() });
    assert_eq!(fstat(&fds[0]).unwrap().st_ino, fstat(&near).unwrap().st_ino);
    assert!(matches!(service.keep("x", b"", &[near.as_fd(); 254]), Err(ServiceError::TooManyFds(254))));
    assert!(matches!(
        service.keep("x", &vec![0; 65_537], &[]),
        Err(ServiceError::Handoff(HandoffError::State(65_537)))
    ));
}

#[test]
fn nothing_is_kept_when_the_service_is_stopped() {
    let (service, supervisor) = supervised(&[]);
    assert!(service.can_keep());
    supervisor.says(&ToGeneration::Drain { timeout_ms: Some(60_000), last: true, more: true }, &[]);
    let drain = service.wait_draining().unwrap();
    assert!(drain.last && drain.time_left().is_some());
    assert!(!service.can_keep());
    assert!(matches!(service.keep("x", b"", &[]), Err(ServiceError::NobodyFollows)));
    // What is on its way still comes.
    supervisor.says(&ToGeneration::Kept { id: 1, name: "late".to_owned(), state: Vec::new() }, &[]);
    assert_eq!(service.wait_kept().unwrap().name, "late");
    supervisor.says(&ToGeneration::Drain { timeout_ms: Some(60_000), last: true, more: false }, &[]);
    assert!(service.wait_kept().is_none());
}

#[test]
fn an_upgrade_may_turn_into_a_stop() {
    let (service, supervisor) = supervised(&[]);
    supervisor.says(&ToGeneration::Drain { timeout_ms: Some(60_000), last: false, more: false }, &[]);
    let deadline = service.wait_draining().unwrap().deadline;
    assert!(service.can_keep());
    supervisor.says(&ToGeneration::Drain { timeout_ms: Some(5), last: true, more: false }, &[]);
    while service.can_keep() {
        std::thread::yield_now();
    }
    assert_eq!(service.wait_draining().unwrap(), Drain { deadline, last: true });
}

#[tokio::test]
async fn what_was_kept_is_acknowledged_once_it_is_asked_for() {
    let (service, supervisor) = supervised(&[]);
    let (near, far) = UnixDatagram::pair().unwrap();
    for (id, name) in [(7, "first"), (8, "second")] {
        let kept = ToGeneration::Kept { id, name: name.to_owned(), state: vec![1, 2] };
        supervisor.says(&kept, &[near.as_fd()]);
    }
    let kept = service.kept().await.unwrap();
    assert_eq!((kept.name.as_str(), kept.state.as_slice()), ("first", &[1, 2][..]));
    assert_eq!(supervisor.hears().0, FromGeneration::Taken { id: 7 });
    UnixDatagram::from(kept.fds.into_iter().next().unwrap()).send(b"hi").unwrap();
    assert_eq!(far.recv(&mut [0; 8]).unwrap(), 2);
    let service = tokio::task::spawn_blocking(move || {
        assert_eq!(service.wait_kept().unwrap().name, "second");
        service
    })
    .await
    .unwrap();
    assert_eq!(supervisor.hears().0, FromGeneration::Taken { id: 8 });
    // Without its supervisor a service goes on; there is nothing more to come.
    drop(supervisor);
    assert!(service.kept().await.is_none());
    service.ready().unwrap();
    assert!(!service.is_draining());
    assert!(matches!(service.keep("x", b"", &[]), Err(ServiceError::Gone)));
}

#[test]
fn without_a_handoff_socket_it_notifies() {
    let name = format!("zddsup-test-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let socket = UnixDatagram::bind_addr(&address).unwrap();
    let service = Service::new(Given { notify: Some(format!("@{name}").into()), ..Given::default() }).unwrap();
    let mut buffer = [0; 64];
    let mut heard = || {
        let len = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..len]).into_owned()
    };
    service.ready().unwrap();
    assert_eq!(heard(), "READY=1");
    service.status("busy").unwrap();
    assert_eq!(heard(), "STATUS=busy");
    service.notify("WATCHDOG=1").unwrap();
    assert_eq!(heard(), "WATCHDOG=1");
}

#[test]
fn sigterm_is_the_word_too() {
    let service = alone();
    service.drain_at_sigterm().unwrap();
    kill(Pid::this(), Signal::SIGTERM).unwrap();
    assert_eq!(service.wait_draining().unwrap().deadline, None);
}

#[test]
fn dropped_it_closes_the_socket_after_what_was_said() {
    let (service, supervisor) = supervised(&[]);
    service.drained().unwrap();
    drop(service);
    assert_eq!(supervisor.hears().0, FromGeneration::Drained);
    poll(&mut [PollFd::new(supervisor.0.as_fd(), PollFlags::POLLIN)], 10_000_u16).unwrap();
    assert_eq!(scm::receive(supervisor.0.as_fd(), &mut [0; 8]).unwrap().unwrap().len, 0);
}

#[test]
fn what_is_no_handoff_socket_is_said() {
    for value in ["x", "", "-1", "2", "99999999"] {
        let error = link::inherited(value.as_ref()).unwrap_err().to_string();
        assert!(error.starts_with(&format!("ZDDSUP_SOCKET={value} is no handoff socket")), "{error}");
    }
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    scm::send(ours.as_fd(), b"nonsense", &[]).unwrap();
    let error = Service::new(Given { socket: Some(theirs), ..Given::default() }).unwrap_err();
    assert!(matches!(error, ServiceError::Handoff(_)));
}
