use super::*;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

/// What the program sees of a packet.
struct Packet {
    protocol: i32,
    header: Vec<u8>,
}

fn packet(from: &str) -> Packet {
    let from: SocketAddr = from.parse().unwrap();
    let (protocol, mut header) = match from.ip() {
        IpAddr::V4(ip) => (libc::ETH_P_IP, [&[0x45; 12], &ip.octets()[..], &[127, 0, 0, 1]].concat()),
        IpAddr::V6(ip) => (libc::ETH_P_IPV6, [&[0x60; 8], &ip.octets()[..], &[0; 16]].concat()),
    };
    header.extend(from.port().to_be_bytes());
    header.extend([0; 18]);
    Packet { protocol, header }
}

/// Runs a program as the kernel does, and counts its steps. `random` is what it draws.
fn run(program: &[Instruction], packet: &Packet, random: u32) -> (u32, usize) {
    let (mut a, mut x, mut at, mut steps) = (0u32, 0u32, 0, 0);
    loop {
        let Instruction { code, jt, jf, k } = program[at];
        (at, steps) = (at + 1, steps + 1);
        let bytes = |length| {
            let offset = usize::try_from(k.wrapping_sub(bits_of(libc::SKF_NET_OFF))).unwrap();
            packet.header[offset..offset + length].iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
        };
        match u32::from(code) {
            WORD if k == ancillary(libc::SKF_AD_RANDOM) => a = random,
            WORD if k == ancillary(libc::SKF_AD_PROTOCOL) => a = bits_of(packet.protocol),
            WORD => a = bytes(4),
            HALF => a = bytes(2),
            ADD => a = a.wrapping_add(k),
            AND => a &= k,
            MOD => a %= k,
            MUL => a = a.wrapping_mul(k),
            RSH => a >>= k,
            XOR_X => a ^= x,
            TAX => x = a,
            EQUAL => at += usize::from(if a == k { jt } else { jf }),
            AT_LEAST => at += usize::from(if a >= k { jt } else { jf }),
            JUMP => at += k as usize,
            RETURN => return (k, steps),
            RETURN_A => return (a, steps),
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn choice(family: Family, parts: &[(u32, &[u16])]) -> Choice {
    let parts = parts.iter().map(|(weight, slots)| Part { weight: *weight, slots: slots.to_vec() }).collect();
    Choice { family, draw: Draw::Random, rules: Vec::new(), parts }
}

/// How often each slot is chosen, for numbers that are evenly far apart.
fn shares(program: &[Instruction]) -> BTreeMap<u32, usize> {
    let mut shares = BTreeMap::new();
    for number in 0..10_000u32 {
        // Odd, so that remainders are even as well.
        *shares.entry(run(program, &packet("10.0.0.1:1"), number * 429_497).0).or_default() += 1;
    }
    shares
}

fn near(found: usize, expected: usize) {
    assert!(found.abs_diff(expected) <= 20, "{found}, not {expected}");
}

#[test]
fn one_slot_is_one_instruction() {
    let program = choice(Family::Both, &[(7, &[3])]).program().unwrap();
    assert_eq!(program.len(), 1);
    assert_eq!(run(&program, &packet("[::1]:5"), 9).0, 3);
}

#[test]
fn without_parts_the_kernel_chooses() {
    for parts in [&[][..], &[(0, &[1][..])], &[(5, &[])]] {
        assert_eq!(run(&choice(Family::V4, parts).program().unwrap(), &packet("10.0.0.1:1"), 0).0, NONE);
    }
}

#[test]
fn slots_share_evenly_however_they_lie() {
    for slots in [&[0, 1, 2, 3][..], &[4, 5, 6, 7], &[0, 2, 4, 6, 8], &[9, 1, 2, 5, 6, 1, 65535], &[0, 65535]] {
        let shares = shares(&choice(Family::V4, &[(1, slots)]).program().unwrap());
        assert_eq!(
            shares.keys().copied().collect::<Vec<_>>(),
            distinct(slots).into_iter().map(u32::from).collect::<Vec<_>>()
        );
        for share in shares.values() {
            near(*share, 10_000 / shares.len());
        }
    }
}

#[test]
fn slots_side_by_side_cost_the_same_however_many() {
    let steps = |slots: &[u16]| run(&choice(Family::V4, &[(1, slots)]).program().unwrap(), &packet("10.0.0.1:1"), 77).1;
    assert_eq!(steps(&[4, 5]), steps(&(4..400).collect::<Vec<_>>()));
}

#[test]
fn parts_are_as_great_as_their_weights_and_no_number_is_lost() {
    let shares =
        shares(&choice(Family::V4, &[(1, &[5]), (79, &[0, 1, 3]), (0, &[9]), (20, &[6, 7])]).program().unwrap());
    near(shares[&5], 100);
    for (slot, expected) in [(0, 2633), (1, 2633), (3, 2633), (6, 1000), (7, 1000)] {
        near(shares[&slot], expected);
    }
    assert_eq!(shares.len(), 6);
}

#[test]
fn the_ends_of_a_part_are_where_they_should_be() {
    let program = choice(Family::V4, &[(1, &[1]), (1, &[2])]).program().unwrap();
    let chosen = |number| run(&program, &packet("10.0.0.1:1"), number).0;
    assert_eq!([chosen(0), chosen((1 << 31) - 1), chosen(1 << 31), chosen(u32::MAX)], [1, 1, 2, 2]);
    // All but nothing.
    let program = choice(Family::V4, &[(u32::MAX, &[1]), (1, &[2])]).program().unwrap();
    assert_eq!(run(&program, &packet("10.0.0.1:1"), u32::MAX - 2).0, 1);
    assert_eq!(run(&program, &packet("10.0.0.1:1"), u32::MAX).0, 2);
}

#[test]
fn a_probe_goes_where_its_rule_says_and_nothing_else_does() {
    let near_miss_v4 = ["10.1.2.4:4000", "10.1.2.3:4001", "11.1.2.3:4000", "10.1.2.3:1"];
    let near_miss_v6 =
        ["[fd00::2]:4000", "[fd01::1]:4000", "[fd00:0:0:1::1]:4000", "[fd00:0:1::1]:4000", "[fd00::1]:4"];
    let cases = [
        (Family::V4, "10.1.2.3:4000", &near_miss_v4[..]),
        (Family::Both, "10.1.2.3:4000", &near_miss_v4),
        (Family::Both, "10.1.2.3:4000", &near_miss_v6),
        (Family::V6, "[fd00::1]:4000", &near_miss_v6),
        (Family::Both, "[fd00::1]:4000", &near_miss_v6),
        (Family::Both, "[fd00::1]:4000", &near_miss_v4),
        (Family::Both, "[::ffff:10.1.2.3]:4000", &near_miss_v4),
    ];
    for (family, probe, others) in cases {
        let from = probe.parse().unwrap();
        let rules = vec![Rule { from: Origin::socket(from), slots: vec![1] }];
        let program = Choice { rules, ..choice(family, &[(1, &[0])]) }.program().unwrap();
        let came_from = SocketAddr::new(from.ip().to_canonical(), from.port()).to_string();
        assert_eq!(run(&program, &packet(&came_from), 0).0, 1, "{family:?} {probe}");
        for other in others {
            assert_eq!(run(&program, &packet(other), 0).0, 0, "{family:?} {probe} {other}");
        }
    }
}

#[test]
fn a_rule_that_can_never_fit_costs_nothing() {
    let rule = |from, slots: &[u16]| Rule { from: Origin::network(from, 8), slots: slots.to_vec() };
    for (family, rule) in [
        (Family::V4, rule(Ipv6Addr::LOCALHOST.into(), &[1])),
        (Family::V6, rule(Ipv4Addr::LOCALHOST.into(), &[1])),
        (Family::V4, rule(Ipv4Addr::LOCALHOST.into(), &[])),
    ] {
        assert_eq!(Choice { rules: vec![rule], ..choice(family, &[(1, &[0])]) }.program().unwrap().len(), 1);
    }
}

#[test]
fn networks_count_by_their_leading_bits() {
    let cases = [
        ("10.0.0.0", 8, "10.9.9.9:1", "11.0.0.0:1"),
        ("10.64.0.0", 10, "10.127.255.255:1", "10.128.0.0:1"),
        ("10.1.2.3", 99, "10.1.2.3:1", "10.1.2.2:1"),
        ("fd00::", 8, "[fdff::1]:1", "[fe00::1]:1"),
        ("fd00:1:2:3::", 60, "[fd00:1:2:f::1]:1", "[fd00:1:2:10::1]:1"),
        ("fd00:1:2:3::", 64, "[fd00:1:2:3:4::]:1", "[fd00:1:2:4::]:1"),
    ];
    for (network, bits, inside, outside) in cases {
        let rules = vec![Rule { from: Origin::network(network.parse().unwrap(), bits), slots: vec![4, 5] }];
        let program = Choice { rules, ..choice(Family::Both, &[(1, &[0])]) }.program().unwrap();
        assert_eq!([0, 1].map(|number| run(&program, &packet(inside), number).0), [4, 5], "{network}/{bits}");
        assert_eq!(run(&program, &packet(outside), 0).0, 0, "{network}/{bits}");
    }
    let everyone = vec![Rule { from: Origin::network(Ipv4Addr::UNSPECIFIED.into(), 0), slots: vec![7] }];
    let program = Choice { rules: everyone, ..choice(Family::Both, &[(1, &[0])]) }.program().unwrap();
    assert_eq!(run(&program, &packet("203.0.113.9:9"), 0).0, 7);
    assert_eq!(run(&program, &packet("[fd00::1]:9"), 0).0, 0);
}

#[test]
fn a_sender_stays_where_it_is_and_senders_are_spread() {
    for (family, host) in
        [(Family::V4, "10.0.0.7"), (Family::V6, "[fd00::7]"), (Family::Both, "[fd00::7]"), (Family::Both, "10.0.0.7")]
    {
        let wanted = Choice { draw: Draw::Sender, ..choice(family, &[(20, &[2]), (80, &[4, 5])]) };
        let program = wanted.program().unwrap();
        let mut shares = BTreeMap::<u32, usize>::new();
        for port in 1..=10_000 {
            let packet = packet(&format!("{host}:{port}"));
            let chosen = run(&program, &packet, 1).0;
            assert_eq!(run(&program, &packet, 2).0, chosen);
            *shares.entry(chosen).or_default() += 1;
        }
        // Five sigma of a binomial distribution.
        assert!(shares[&2].abs_diff(2000) < 200 && shares[&4].abs_diff(4000) < 245, "{family:?} {shares:?}");
        assert_eq!(shares.len(), 3);
    }
}

#[test]
fn jumps_reach_further_than_a_byte_tells() {
    let scattered: Vec<u16> = (0..200).map(|slot| slot * 2).collect();
    let rules = vec![Rule { from: Origin::socket("10.0.0.1:4".parse().unwrap()), slots: scattered.clone() }];
    let wanted = Choice { rules, ..choice(Family::Both, &[(1, &scattered), (1, &[1])]) };
    let program = wanted.program().unwrap();
    assert_eq!(run(&program, &packet("10.0.0.1:4"), u32::MAX).0 % 2, 0);
    assert_eq!(run(&program, &packet("10.0.0.1:5"), u32::MAX).0, 1);
    assert_eq!(run(&program, &packet("10.0.0.1:5"), 199).0, 398);
}

#[test]
fn the_kernel_takes_every_kind() {
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.listen(1).unwrap();
    let scattered: Vec<u16> = (0..200).map(|slot| slot * 2).collect();
    for (draw, family) in [Draw::Random, Draw::Sender]
        .into_iter()
        .flat_map(|draw| [(draw, Family::V4), (draw, Family::V6), (draw, Family::Both)])
    {
        let slots = || scattered.clone();
        let from = [Origin::socket("10.0.0.1:4".parse().unwrap()), Origin::network("fd00::".parse().unwrap(), 60)];
        let rules = from.map(|from| Rule { from, slots: slots() }).to_vec();
        let wanted = Choice { draw, rules, ..choice(family, &[(1, &scattered), (2, &[1]), (3, &[4, 5])]) };
        crate::sys::steer::attach(&socket, &wanted.program().unwrap()).unwrap();
    }
    let most: Vec<u16> = (0..1364).map(|slot| slot * 2).collect();
    let program = choice(Family::V4, &[(1, &most)]).program().unwrap();
    assert!(program.len() > 4000);
    crate::sys::steer::attach(&socket, &program).unwrap();
}

#[test]
fn too_many_slots_are_refused() {
    let scattered: Vec<u16> = (0..3000).map(|slot| slot * 2).collect();
    let error = choice(Family::V4, &[(1, &scattered)]).program().unwrap_err();
    assert!(error.to_string().contains("of which Linux takes 4096"), "{error}");
}
