//! The program of a group: from what is wanted to instructions of classic BPF. Pure.
//!
//! It runs for each SYN, and for each UDP datagram, with the packet's IP header at `SKF_NET_OFF`, and returns an index:
//!
//! ```text
//!  rules      from this network, from this port?  ──yes──>  one of the rule's slots
//!    │ no
//!  parts      a number is drawn; whose part of all numbers is it in?
//!    │
//!  slots      of those of the part, the remainder says which
//! ```

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::sys::steer::Instruction;

/// Of a reuseport program (`BPF_MAXINSNS`).
const MOST_INSTRUCTIONS: usize = 4096;

/// Names no socket, as no group has so many: the kernel's hash chooses.
const NONE: u32 = u32::MAX;

const ADD: u32 = libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const MOD: u32 = libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K;
const MUL: u32 = libc::BPF_ALU | libc::BPF_MUL | libc::BPF_K;
const RSH: u32 = libc::BPF_ALU | libc::BPF_RSH | libc::BPF_K;
const XOR_X: u32 = libc::BPF_ALU | libc::BPF_XOR | libc::BPF_X;
const TAX: u32 = libc::BPF_MISC | libc::BPF_TAX;
const WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const JUMP: u32 = libc::BPF_JMP | libc::BPF_JA;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
const RETURN_A: u32 = libc::BPF_RET | libc::BPF_A;

/// The IP versions that reach a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Of IPv4 sockets, and of IPv6 ones that are bound to an IPv4 address.
    V4,
    /// Of IPv6 sockets.
    V6,
    /// Of sockets at `[::]` without `IPV6_V6ONLY`.
    Both,
}

/// How one of many is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Draw {
    /// At random: TCP, where a connection is chosen for once.
    Random,
    /// By the sender's address and port: UDP, where each datagram asks anew and those of a sender belong together. As long
    /// as the parts and slots stay as they are, it reaches the same one.
    Sender,
}

/// Where something comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    network: IpAddr,
    /// Leading bits of it that count.
    bits: u8,
    port: Option<u16>,
}

/// Those of one origin have slots of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Whose.
    pub from: Origin,
    /// They share them.
    pub slots: Vec<u16>,
}

/// Slots that get a part of what no rule is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// How great it is, beside the other parts' weights.
    pub weight: u32,
    /// They share it evenly.
    pub slots: Vec<u16>,
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// What reaches the group.
    pub family: Family,
    /// How one of many is chosen.
    pub draw: Draw,
    /// The first that fits counts.
    pub rules: Vec<Rule>,
    /// For the rest. Without any, the kernel's hash chooses among all sockets of the group.
    pub parts: Vec<Part>,
}

/// More than the kernel takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("its program would have {0} instructions, of which Linux takes {MOST_INSTRUCTIONS}")]
pub struct TooLong(usize);

impl Origin {
    /// One socket: the connections of a probe, which has bound its own end before.
    #[must_use]
    pub fn socket(address: SocketAddr) -> Origin {
        let network = address.ip().to_canonical();
        Origin { network, bits: width(network), port: Some(address.port()) }
    }

    /// A network, of which so many leading bits count.
    #[must_use]
    pub fn network(network: IpAddr, bits: u8) -> Origin {
        Origin { network, bits: bits.min(width(network)), port: None }
    }

    /// Its address in 32-bit words, each with what of it counts.
    fn words(&self) -> Vec<(u32, u32)> {
        let bytes = match self.network {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let words = bytes.chunks_exact(4).map(|word| u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
        let mut bits = u32::from(self.bits);
        let mut counted = Vec::new();
        for word in words {
            let here = bits.min(32);
            bits -= here;
            if let Some(mask) = u32::MAX.checked_shl(32 - here) {
                counted.push((word & mask, mask));
            }
        }
        counted
    }
}

fn width(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

impl Choice {
    /// The program.
    pub fn program(&self) -> Result<Vec<Instruction>, TooLong> {
        let mut program: Vec<_> = self.rules.iter().flat_map(|rule| self.rule(rule)).collect();
        program.extend(self.shared());
        if program.len() > MOST_INSTRUCTIONS {
            return Err(TooLong(program.len()));
        }
        Ok(program)
    }

    /// The slots of each rule and of each part.
    pub(super) fn slots(&self) -> impl Iterator<Item = &Vec<u16>> {
        self.rules.iter().map(|rule| &rule.slots).chain(self.parts.iter().map(|part| &part.slots))
    }

    /// The same without one of them.
    pub(super) fn without(mut self, slot: u16) -> Choice {
        let slots = self.rules.iter_mut().map(|rule| &mut rule.slots);
        slots
            .chain(self.parts.iter_mut().map(|part| &mut part.slots))
            .for_each(|slots| slots.retain(|own| *own != slot));
        self
    }

    fn rule(&self, rule: &Rule) -> Vec<Instruction> {
        let (source, port, protocol) = match (rule.from.network, self.family) {
            (IpAddr::V4(_), Family::V4 | Family::Both) => (V4_SOURCE, V4_PORT, libc::ETH_P_IP),
            (IpAddr::V6(_), Family::V6 | Family::Both) => (V6_SOURCE, V6_PORT, libc::ETH_P_IPV6),
            // It can't come from there.
            (IpAddr::V4(_), Family::V6) | (IpAddr::V6(_), Family::V4) => return Vec::new(),
        };
        if rule.slots.is_empty() {
            return Vec::new();
        }
        let slots = distinct(&rule.slots);
        let mut code = if slots.len() > 1 { self.draw() } else { Vec::new() };
        code.extend(among(&slots));
        // Built from the end, as each test jumps over what follows. The port is tested first: it differs most often.
        for (index, (word, mask)) in rule.from.words().into_iter().enumerate().rev() {
            code = run_if(EQUAL, word, true, code);
            if mask != u32::MAX {
                code.insert(0, op(AND, mask));
            }
            code.insert(0, op(WORD, source + 4 * u32::try_from(index).unwrap_or_default()));
        }
        if let Some(number) = rule.from.port {
            code = run_if(EQUAL, number.into(), true, code);
            code.insert(0, op(HALF, port));
        }
        if self.family == Family::Both {
            code = run_if(EQUAL, bits_of(protocol), true, code);
            code.insert(0, op(WORD, ancillary(libc::SKF_AD_PROTOCOL)));
        }
        code
    }

    fn shared(&self) -> Vec<Instruction> {
        let parts = self.parts.iter().filter(|part| part.weight > 0 && !part.slots.is_empty());
        let mut parts: Vec<_> = parts.map(|part| (u64::from(part.weight), distinct(&part.slots))).collect();
        let all: u64 = parts.iter().map(|(weight, _)| weight).sum();
        let Some((_, last)) = parts.pop() else { return vec![op(RETURN, NONE)] };
        let mut code = if parts.is_empty() && last.len() == 1 { Vec::new() } else { self.draw() };
        let mut below = 0;
        for (weight, slots) in parts {
            below += weight;
            // Of 2^32 numbers, as many as the weights so far are of all. It is less than all, and so it fits.
            let bound = u32::try_from((u128::from(below) << 32) / u128::from(all)).unwrap_or(u32::MAX);
            code.extend(run_if(AT_LEAST, bound, false, among(&slots)));
        }
        code.extend(among(&last));
        code
    }

    /// Leaves a number of 32 bits.
    fn draw(&self) -> Vec<Instruction> {
        match (self.draw, self.family) {
            (Draw::Random, _) => vec![op(WORD, ancillary(libc::SKF_AD_RANDOM))],
            (Draw::Sender, Family::V4) => hash(V4_SOURCE, 1, V4_PORT),
            (Draw::Sender, Family::V6) => hash(V6_SOURCE, 4, V6_PORT),
            (Draw::Sender, Family::Both) => {
                let v6 = hash(V6_SOURCE, 4, V6_PORT);
                let mut v4 = hash(V4_SOURCE, 1, V4_PORT);
                v4.push(op(JUMP, length(&v6)));
                let mut code = vec![op(WORD, ancillary(libc::SKF_AD_PROTOCOL))];
                code.extend(run_if(EQUAL, bits_of(libc::ETH_P_IP), true, v4));
                code.extend(v6);
                code
            }
        }
    }
}

/// Where the source address and port are. Options of IPv4 and extension headers of IPv6, which nearly nobody sends, move the
/// port: such a packet is no probe's, and its sender is hashed by something else that stays the same.
const V4_SOURCE: u32 = bits_of(libc::SKF_NET_OFF) + 12;
const V4_PORT: u32 = bits_of(libc::SKF_NET_OFF) + 20;
const V6_SOURCE: u32 = bits_of(libc::SKF_NET_OFF) + 8;
const V6_PORT: u32 = bits_of(libc::SKF_NET_OFF) + 40;

/// The kernel's constants are signed, an operand is not.
const fn bits_of(number: i32) -> u32 {
    u32::from_ne_bytes(number.to_ne_bytes())
}

fn ancillary(what: i32) -> u32 {
    bits_of(libc::SKF_AD_OFF + what)
}

fn op(code: u32, k: u32) -> Instruction {
    jump(code, k, 0, 0)
}

fn jump(code: u32, k: u32, jt: u8, jf: u8) -> Instruction {
    // Every code of classic BPF fits into a byte.
    Instruction { code: u16::try_from(code).unwrap_or_default(), jt, jf, k }
}

fn length(code: &[Instruction]) -> u32 {
    // A program that is too long by far is refused as a whole.
    u32::try_from(code.len()).unwrap_or(u32::MAX)
}

/// The code, to be run if the test comes out as said, and jumped over otherwise.
fn run_if(test: u32, k: u32, outcome: bool, code: Vec<Instruction>) -> Vec<Instruction> {
    let mut tested = match u8::try_from(code.len()) {
        Ok(over) if outcome => vec![jump(test, k, 0, over)],
        Ok(over) => vec![jump(test, k, over, 0)],
        // Further than a conditional jump goes.
        Err(_) if outcome => vec![jump(test, k, 1, 0), op(JUMP, length(&code))],
        Err(_) => vec![jump(test, k, 0, 1), op(JUMP, length(&code))],
    };
    tested.extend(code);
    tested
}

fn distinct(slots: &[u16]) -> Vec<u16> {
    let mut slots = slots.to_vec();
    slots.sort_unstable();
    slots.dedup();
    slots
}

/// Returns one of the slots, which are in order, by the number that was drawn.
fn among(slots: &[u16]) -> Vec<Instruction> {
    if let [slot] = slots {
        return vec![op(RETURN, (*slot).into())];
    }
    let mut code = vec![op(MOD, length_of(slots))];
    let mut rest = slots;
    let mut before = 0;
    while let Some(&first) = rest.first() {
        // Slots side by side are one step.
        let beside =
            rest.iter().zip(u32::from(first)..).take_while(|(slot, expected)| u32::from(**slot) == *expected).count();
        let (run, others) = rest.split_at(beside);
        let mut step = match u32::from(first).wrapping_sub(before) {
            0 => Vec::new(),
            offset => vec![op(ADD, offset)],
        };
        step.push(op(RETURN_A, 0));
        before += length_of(run);
        code.extend(if others.is_empty() { step } else { run_if(AT_LEAST, before, false, step) });
        rest = others;
    }
    code
}

fn length_of(slots: &[u16]) -> u32 {
    // There are 65,536 different ones.
    u32::try_from(slots.len()).unwrap_or(u32::MAX)
}

/// A hash of the sender, of which the high and the low bits are equally good (the steps of `MurmurHash3`).
fn hash(source: u32, words: u32, port: u32) -> Vec<Instruction> {
    const MIX: [u32; 2] = [0x85eb_ca6b, 0xc2b2_ae35];
    let mut code = vec![op(WORD, source), op(MUL, MIX[0])];
    for word in 1..words {
        code.extend([op(TAX, 0), op(WORD, source + 4 * word), op(XOR_X, 0), op(MUL, MIX[0])]);
    }
    code.extend([op(TAX, 0), op(HALF, port), op(XOR_X, 0), op(MUL, MIX[0])]);
    code.extend([op(TAX, 0), op(RSH, 13), op(XOR_X, 0), op(MUL, MIX[1])]);
    code.extend([op(TAX, 0), op(RSH, 16), op(XOR_X, 0)]);
    code
}

#[cfg(test)]
#[path = "program_tests.rs"]
mod tests;
