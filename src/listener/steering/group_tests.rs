use super::*;
use crate::sys::socket::{is_readable, queue_length};
use socket2::{Domain, Protocol as Transport, Socket, Type};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

const ONE: GenerationId = GenerationId(1);
const TWO: GenerationId = GenerationId(2);
const THREE: GenerationId = GenerationId(3);

/// A group and its address, with some convenience for its sockets.
struct Place {
    group: Group,
    address: SocketAddr,
    transport: Option<Transport>,
}

fn open(address: SocketAddr, kind: Type, transport: Option<Transport>) -> Arc<OwnedFd> {
    let socket = Socket::new(Domain::for_address(address), kind, transport).unwrap();
    if address.is_ipv6() {
        socket.set_only_v6(false).unwrap();
    }
    socket.set_reuse_port(true).unwrap();
    socket.bind(&address.into()).unwrap();
    if kind == Type::STREAM {
        socket.listen(4096).unwrap();
    }
    Arc::new(socket.into())
}

impl Place {
    /// Where the first generation has a socket.
    fn new(address: &str) -> (Place, Arc<OwnedFd>) {
        Place::with(address, Type::STREAM, None)
    }

    fn with(address: &str, kind: Type, transport: Option<Transport>) -> (Place, Arc<OwnedFd>) {
        let socket = open(address.parse().unwrap(), kind, transport);
        let key = Key::of(&*socket).unwrap().unwrap();
        let mut place = Place { address: key.local(), group: Group::new(key), transport };
        assert_eq!(place.group.join(ONE, &socket).unwrap(), 0);
        (place, socket)
    }

    fn join(&mut self, owner: GenerationId) -> Arc<OwnedFd> {
        let kind = match self.group.key().protocol() {
            Protocol::Tcp => Type::STREAM,
            Protocol::Udp => Type::DGRAM,
        };
        let socket = open(self.address, kind, self.transport);
        assert_eq!(Key::of(&*socket).unwrap().as_ref(), Some(self.group.key()));
        self.group.join(owner, &socket).unwrap();
        socket
    }

    /// From any of a machine's own addresses.
    fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).unwrap()
    }

    /// Connects so often, and gives how many came to each.
    fn arrive(&self, times: u32, sockets: &[&Arc<OwnedFd>]) -> Vec<u32> {
        let before = queues(sockets);
        (0..times).for_each(|_| drop(self.connect()));
        await_sum(sockets, before.iter().sum::<u32>() + times);
        queues(sockets).iter().zip(before).map(|(now, before)| now - before).collect()
    }
}

fn queues(sockets: &[&Arc<OwnedFd>]) -> Vec<u32> {
    sockets.iter().map(|socket| queue_length(&***socket).unwrap().unwrap_or(0)).collect()
}

fn await_sum(sockets: &[&Arc<OwnedFd>], expected: u32) {
    let until = Instant::now() + Duration::from_secs(20);
    while queues(sockets).iter().sum::<u32>() < expected {
        assert!(Instant::now() < until, "{:?} of {expected}", queues(sockets));
        thread::yield_now();
    }
}

#[test]
fn everything_arrives_where_it_is_steered_to() {
    for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
        let (mut place, first) = Place::new(address);
        place.group.pin().unwrap();
        let second = place.join(TWO);
        let both = [&first, &second];
        assert_eq!(place.arrive(50, &both), [50, 0], "{address}: pinned");
        place.group.steer_to(TWO).unwrap();
        assert_eq!(place.arrive(200, &both), [0, 200], "{address}");
        place.group.steer_to(ONE).unwrap();
        assert_eq!(place.arrive(200, &both), [200, 0], "{address}: back");
    }
}

#[test]
fn both_versions_are_steered_on_one_socket() {
    let (mut place, first) = Place::new("[::]:0");
    place.group.pin().unwrap();
    let second = place.join(TWO);
    place.group.steer_to(TWO).unwrap();
    place.address.set_ip("127.0.0.1".parse().unwrap());
    assert_eq!(place.arrive(50, &[&first, &second]), [0, 50]);
}

#[test]
fn a_probe_reaches_the_candidate_alone() {
    for (listen, to, from, others) in [
        ("0.0.0.0:0", "127.0.0.1", "127.0.0.1", "127.0.0.2"),
        ("[::1]:0", "::1", "::1", "::1"),
        ("[::]:0", "::1", "::1", "::1"),
        ("[::]:0", "127.0.0.1", "127.0.0.1", "127.0.0.2"),
    ] {
        let (mut place, first) = Place::new(listen);
        place.group.pin().unwrap();
        let candidate = place.join(TWO);
        let (from, others): (IpAddr, IpAddr) = (from.parse().unwrap(), others.parse().unwrap());
        place.address.set_ip(to.parse().unwrap());
        let bound = |ip, port| {
            let socket = Socket::new(Domain::for_address(place.address), Type::STREAM, None).unwrap();
            socket.bind(&SocketAddr::new(ip, port).into()).unwrap();
            socket
        };
        let probe = bound(from, 0);
        let origin = probe.local_addr().unwrap().as_socket().unwrap();
        place.group.divert(Origin::socket(origin), TWO).unwrap();
        probe.connect(&place.address.into()).unwrap();
        await_sum(&[&candidate], 1);
        if others != from {
            // The same port, from elsewhere.
            bound(others, origin.port()).connect(&place.address.into()).unwrap();
            await_sum(&[&first], 1);
        }
        let before = queues(&[&first])[0];
        assert_eq!(place.arrive(50, &[&first, &candidate]), [50, 0], "{listen}");
        assert_eq!(queues(&[&first, &candidate]), [before + 50, 1]);
        place.group.end_divert(Origin::socket(origin)).unwrap();
        let again = bound(from, 0);
        again.connect(&place.address.into()).unwrap();
        await_sum(&[&first], before + 51);
        // Nobody has to be pinned for it.
        assert_eq!(queues(&[&candidate]), [1]);
    }
}

#[test]
fn whoever_leaves_steering_is_right() {
    for leaver in 0..4 {
        for target in (0..4).filter(|target| *target != leaver) {
            let (mut place, first) = Place::new("127.0.0.1:0");
            place.group.pin().unwrap();
            let mut sockets = vec![first];
            sockets.extend((2..5).map(|generation| place.join(GenerationId(generation))));
            let generation = |index: usize| GenerationId(u32::try_from(index).unwrap() + 1);
            place.group.steer_to(generation(target)).unwrap();
            // The one at the end is steered to: who leaves waits for another.
            let closed = place.group.leave(&sockets[leaver]).unwrap();
            assert_eq!(closed, target != 3, "{leaver} leaves, {target} is steered to");
            let others: Vec<_> = sockets.iter().enumerate().filter(|(index, _)| *index != leaver).collect();
            let living: Vec<_> = others.iter().map(|(_, socket)| *socket).collect();
            for (index, _) in &others {
                place.group.steer_to(generation(*index)).unwrap();
                let arrived = place.arrive(20, &living);
                let expected: Vec<_> = others.iter().map(|(own, _)| if own == index { 20 } else { 0 }).collect();
                assert_eq!(arrived, expected, "{leaver} left, {index} is steered to");
            }
            assert_eq!(queue_length(&*sockets[leaver]).unwrap(), None);
            assert!(place.group.leave(&sockets[leaver]).unwrap());
            let last = place.join(GenerationId(9));
            place.group.steer_to(GenerationId(9)).unwrap();
            assert_eq!(place.arrive(20, &[&last]), [20]);
        }
    }
}

#[test]
fn who_would_do_harm_waits_until_another_joins() {
    let (mut place, first) = Place::new("127.0.0.1:0");
    place.group.pin().unwrap();
    let second = place.join(TWO);
    let third = place.join(THREE);
    place.group.steer_to(THREE).unwrap();
    assert!(!place.group.leave(&first).unwrap());
    assert!(place.group.of(ONE).is_empty());
    assert_eq!(place.arrive(20, &[&first, &second, &third]), [0, 0, 20]);
    let fourth = place.join(GenerationId(4));
    assert_eq!(queue_length(&*first).unwrap(), None);
    assert_eq!((place.group.of(GenerationId(4)), place.group.of(THREE)), (vec![0], vec![2]));
    assert_eq!(place.arrive(20, &[&second, &third, &fourth]), [0, 20, 0]);
}

#[test]
fn nobody_takes_the_place_of_one_that_nobody_follows() {
    let (mut place, first) = Place::new("127.0.0.1:0");
    place.group.pin().unwrap();
    let candidate = place.join(TWO);
    assert!(!place.group.leave(&first).unwrap());
    assert_eq!(place.arrive(20, &[&first, &candidate]), [20, 0]);
    place.group.steer_to(TWO).unwrap();
    assert_eq!(queue_length(&*first).unwrap(), None);
    assert_eq!(place.arrive(20, &[&candidate]), [20]);
    assert!(place.group.leave(&candidate).unwrap());
    assert_eq!(place.group.members().count(), 0);
    TcpStream::connect(place.address).unwrap_err();
}

#[test]
fn several_sockets_of_a_generation_share_wherever_they_are() {
    let (mut place, a) = Place::new("127.0.0.1:0");
    place.group.pin().unwrap();
    let b = place.join(TWO);
    // A worker that is started again, and one of the new generation.
    let c = place.join(ONE);
    let d = place.join(TWO);
    let all = [&a, &b, &c, &d];
    let split = |place: &Place| {
        let arrived = place.arrive(400, &all);
        // Five sigma of a binomial distribution.
        assert!([arrived[0] + arrived[2], arrived[1] + arrived[3]].contains(&400), "{arrived:?}");
        arrived.iter().filter(|&&one| one > 0).for_each(|one| assert!(one.abs_diff(200) < 50, "{arrived:?}"));
        arrived[1] > 0
    };
    assert!(!split(&place));
    place.group.steer_to(TWO).unwrap();
    assert!(split(&place));
    // D moves into A's place, and is not steered to meanwhile.
    assert!(place.group.leave(&a).unwrap());
    assert_eq!((place.group.of(ONE), place.group.of(TWO)), (vec![2], vec![0, 1]));
    assert_eq!(place.arrive(100, &[&b, &c, &d])[1], 0);
    assert!(place.group.leave(&c).unwrap());
    assert_eq!(place.arrive(100, &[&b, &d]).iter().sum::<u32>(), 100);
}

#[test]
fn parts_are_as_great_as_asked() {
    let (mut place, first) = Place::new("127.0.0.1:0");
    place.group.pin().unwrap();
    let second = place.join(TWO);
    // THREE has no socket here.
    place.group.steer_weighted(&[(TWO, 20), (ONE, 80), (THREE, 50)]).unwrap();
    let arrived = place.arrive(2000, &[&first, &second]);
    // Five sigma: 5 · √(2000 · 0.2 · 0.8).
    assert!(arrived[1].abs_diff(400) < 90, "{arrived:?}");
    assert_eq!(place.group.weights(), [(TWO, 20), (ONE, 80), (THREE, 50)]);
}

#[test]
fn one_that_is_not_there_is_not_steered_to() {
    let (mut place, first) = Place::new("127.0.0.1:0");
    place.group.pin().unwrap();
    let probe = Origin::socket("127.0.0.1:9".parse().unwrap());
    for error in [
        place.group.steer_to(TWO),
        place.group.steer_weighted(&[(ONE, 0), (TWO, 1)]),
        place.group.steer_weighted(&[]),
        place.group.divert(probe, TWO),
    ] {
        assert!(matches!(error, Err(SteerError::Nobody { .. })));
    }
    assert_eq!(place.group.weights(), [(ONE, 1)]);
    assert_eq!(place.arrive(5, &[&first]), [5]);
    // nginx calls listen(2) twice.
    assert_eq!(place.group.join(ONE, &first).unwrap(), 0);
    assert_eq!(place.group.members().count(), 1);
}

#[test]
fn a_copy_that_somebody_forgot_is_closed_too() {
    let (mut place, first) = Place::new("127.0.0.1:0");
    let forgotten = first.try_clone().unwrap();
    place.group.pin().unwrap();
    let second = place.join(TWO);
    place.group.steer_to(TWO).unwrap();
    assert!(place.group.leave(&first).unwrap());
    drop(first);
    assert_eq!(place.arrive(50, &[&second]), [50]);
    assert_eq!(queue_length(&forgotten).unwrap(), None);
    let third = place.join(THREE);
    place.group.steer_to(THREE).unwrap();
    assert_eq!(place.arrive(50, &[&second, &third]), [0, 50]);
}

#[test]
fn sockets_that_the_service_shut_down_are_noticed() {
    let (mut place, first) = Place::new("127.0.0.1:0");
    place.group.pin().unwrap();
    let second = place.join(TWO);
    let third = place.join(THREE);
    place.group.steer_to(THREE).unwrap();
    assert_eq!(place.group.survey().unwrap(), []);
    let shut = |socket: &Arc<OwnedFd>| SockRef::from(&**socket).shutdown(Shutdown::Both).unwrap();
    shut(&first);
    assert_eq!(place.group.survey().unwrap(), [ONE]);
    assert_eq!(place.group.of(THREE), [0]);
    assert_eq!(place.arrive(50, &[&second, &third]), [0, 50]);
    let fourth = place.join(GenerationId(4));
    let fifth = place.join(GenerationId(5));
    [&fourth, &fifth].into_iter().for_each(shut);
    assert_eq!(place.group.survey().unwrap(), [GenerationId(5), GenerationId(4)]);
    let sixth = place.join(GenerationId(6));
    assert_eq!(place.arrive(50, &[&second, &third, &sixth]), [0, 50, 0]);
    let seventh = place.join(GenerationId(7));
    [&second, &third].into_iter().for_each(shut);
    assert!(matches!(place.group.survey(), Err(SteerError::Disorder { .. })));
    shut(&sixth);
    assert_eq!(place.group.survey().unwrap().len(), 3);
    place.group.steer_to(GenerationId(7)).unwrap();
    assert_eq!(place.arrive(50, &[&seventh]), [50]);
}

/// Why [`attach`] is never called with a socket that has yet to listen. Should Linux change that, nothing breaks.
#[test]
fn a_program_before_listen_makes_a_group_of_its_own() {
    let (place, _first) = Place::new("127.0.0.1:0");
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&place.address.into()).unwrap();
    attach(&socket, &place.group.choice().program().unwrap()).unwrap();
    assert_eq!(socket.listen(5).unwrap_err().raw_os_error(), Some(Errno::EADDRINUSE as i32));
}

#[test]
fn multipath_tcp_is_steered_through_a_neighbour_or_refused() {
    let Ok(_) = Socket::new(Domain::IPV4, Type::STREAM, Some(Transport::MPTCP)) else {
        return eprintln!("not checked: this Linux has no Multipath TCP");
    };
    let (mut place, first) = Place::with("127.0.0.1:0", Type::STREAM, Some(Transport::MPTCP));
    let error = place.group.pin().unwrap_err();
    assert!(error.to_string().contains("GODEBUG=multipathtcp=0"), "{error}");
    place.transport = None;
    let second = place.join(TWO);
    place.group.steer_to(ONE).unwrap();
    assert_eq!(place.arrive(20, &[&first, &second]), [20, 0]);
    place.group.steer_to(TWO).unwrap();
    assert!(place.group.leave(&first).unwrap());
    assert_eq!(place.arrive(20, &[&second]), [20]);
}

/// Sends so many datagrams, each from a port of its own, and gives how many came to each.
fn send(to: SocketAddr, times: usize, sockets: &[&Arc<OwnedFd>]) -> Vec<usize> {
    let sockets = sockets.iter().map(|socket| UdpSocket::from(socket.try_clone().unwrap())).collect::<Vec<_>>();
    let mut arrived = vec![0; sockets.len()];
    for _ in 0..times {
        let sender = UdpSocket::bind(if to.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" }).unwrap();
        for _twice in 0..2 {
            sender.send_to(b"x", to).unwrap();
        }
        let at = loop {
            if let Some(at) = sockets.iter().position(|socket| is_readable(socket).unwrap()) {
                break at;
            }
        };
        arrived[at] += 1;
        // A sender's datagrams stay together.
        (0..2).for_each(|_| assert_eq!(sockets[at].recv(&mut [0; 9]).unwrap(), 1));
    }
    arrived
}

#[test]
fn udp_is_steered_too() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let (mut place, first) = Place::with(address, Type::DGRAM, None);
        place.group.pin().unwrap();
        let second = place.join(TWO);
        let all = [&first, &second];
        assert_eq!(send(place.address, 50, &all), [50, 0]);
        place.group.steer_to(TWO).unwrap();
        assert_eq!(send(place.address, 200, &all), [0, 200]);
        place.group.steer_weighted(&[(ONE, 50), (TWO, 50)]).unwrap();
        let arrived = send(place.address, 400, &all);
        assert!(arrived[0].abs_diff(200) < 50, "{arrived:?}");
        place.group.steer_to(TWO).unwrap();
        assert!(place.group.leave(&first).unwrap());
        drop(first);
        assert_eq!(send(place.address, 50, &[&second]), [50]);
    }
}

#[test]
fn one_that_was_connected_to_a_client_gets_nobody_elses() {
    let (mut place, first) = Place::with("127.0.0.1:0", Type::DGRAM, None);
    place.group.pin().unwrap();
    let client_s = open(place.address, Type::DGRAM, None);
    let later = Instant::now() + Duration::from_secs(60);
    place.group.join_from(ONE, &client_s, Some(later)).unwrap();
    assert!(place.group.refresh(Instant::now()).unwrap());
    assert_eq!(send(place.address, 20, &[&first, &client_s]), [20, 0], "not asked yet");
    SockRef::from(&*client_s).connect(&"127.0.0.1:9".parse::<SocketAddr>().unwrap().into()).unwrap();
    assert!(!place.group.refresh(Instant::now()).unwrap());
    assert_eq!(place.group.of(ONE), [0]);
    // One more beside it, which has to say that it shares the address as that does.
    let second = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    second.set_reuse_port(true).unwrap();
    second.set_reuse_address(true).unwrap();
    second.bind(&place.address.into()).unwrap();
    let second = Arc::new(OwnedFd::from(second));
    assert_eq!(place.group.join(TWO, &second).unwrap(), 1);
    assert_eq!(send(place.address, 50, &[&first, &second]), [50, 0]);
    place.group.steer_to(TWO).unwrap();
    assert_eq!(send(place.address, 50, &[&first, &second]), [0, 50]);
    drop(client_s);
    // And one that stays open to all.
    let third = open(place.address, Type::DGRAM, None);
    place.group.join_from(TWO, &third, Some(later)).unwrap();
    assert!(!place.group.refresh(later).unwrap());
    assert_eq!(place.group.of(TWO), [1, 2]);
    place.group.steer_to(ONE).unwrap();
    assert_eq!(send(place.address, 50, &[&first, &second]), [50, 0]);
}
