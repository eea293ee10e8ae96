//! What is recorded, in memory that outlives zddsup because the one above holds it (`memfd_create(2)`). Written in place, by
//! turns into one of two slots, each with its length and digest: whoever is killed while it writes leaves the other one.
//!
//! ```text
//! 0           SEQUENCE LENGTH SHA256\n{…}
//! SLOT        SEQUENCE LENGTH SHA256\n{…}     read: the one with the higher number of those that are whole
//! ```

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::sys::stat::{fstat, SFlag};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::process::program::in_hex;

/// Where the second one begins; what a state has room for.
const SLOT: usize = 4 * 1024 * 1024;

/// The first line of a slot at most: two numbers and a digest.
const HEAD: usize = 128;

/// Two slots.
#[derive(Debug, Serialize, Deserialize)]
pub struct Slots {
    #[serde(with = "crate::state::fds::owned")]
    memory: File,
    /// The number of what was written last; its slot is the one of this parity.
    sequence: u64,
}

impl Slots {
    /// New ones, with nothing in them.
    pub fn new() -> io::Result<Slots> {
        let memory = memfd_create("zddsup-state", MFdFlags::MFD_CLOEXEC)?;
        Ok(Slots { memory: memory.into(), sequence: 0 })
    }

    /// Those of a supervisor before this one, and what they have. None: they are not such slots, or nothing in them is whole.
    #[must_use]
    pub fn found(memory: OwnedFd) -> Option<(Slots, Vec<u8>)> {
        let kind = SFlag::from_bits_truncate(fstat(&memory).ok()?.st_mode) & SFlag::S_IFMT;
        if kind != SFlag::S_IFREG {
            return None;
        }
        let memory = File::from(memory);
        let (sequence, bytes) =
            [0, SLOT].into_iter().filter_map(|at| read(&memory, at)).max_by_key(|(number, _)| *number)?;
        Some((Slots { memory, sequence }, bytes))
    }

    /// Puts this in the place of what was written the time before last.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() > SLOT - HEAD {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than 4 MiB"));
        }
        let sequence = self.sequence + 1;
        let mut slot = format!("{sequence} {} {}\n", bytes.len(), digest(bytes)).into_bytes();
        slot.extend_from_slice(bytes);
        self.memory.write_all_at(&slot, place(sequence))?;
        self.sequence = sequence;
        Ok(())
    }

    /// The same memory.
    pub fn try_clone(&self) -> io::Result<Slots> {
        Ok(Slots { memory: self.memory.try_clone()?, sequence: self.sequence })
    }

    /// To be stored.
    #[must_use]
    pub fn memory(&self) -> &File {
        &self.memory
    }
}

fn place(sequence: u64) -> u64 {
    (sequence % 2) * SLOT as u64
}

fn digest(bytes: &[u8]) -> String {
    in_hex(&Sha256::digest(bytes))
}

fn read(memory: &File, at: usize) -> Option<(u64, Vec<u8>)> {
    let mut head = [0; HEAD];
    let there = memory.read_at(&mut head, at as u64).ok()?;
    let end = head[..there].iter().position(|&byte| byte == b'\n')?;
    let mut words = std::str::from_utf8(&head[..end]).ok()?.split(' ');
    let sequence: u64 = words.next()?.parse().ok()?;
    let length = words.next()?.parse().ok().filter(|&length: &usize| length <= SLOT - HEAD)?;
    let said = words.next()?;
    let mut bytes = vec![0; length];
    memory.read_exact_at(&mut bytes, (at + end + 1) as u64).ok()?;
    let is_whole = digest(&bytes) == said && place(sequence) == at as u64;
    is_whole.then_some((sequence, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn again(slots: &Slots) -> Option<Vec<u8>> {
        Slots::found(slots.memory().try_clone().unwrap().into()).map(|(_, bytes)| bytes)
    }

    #[test]
    fn the_last_that_was_written_comes_back_also_over_what_is_longer() {
        let mut slots = Slots::new().unwrap();
        assert_eq!(again(&slots), None);
        for text in ["one", "two is longer", "three", ""] {
            slots.write(text.as_bytes()).unwrap();
            assert_eq!(again(&slots).unwrap(), text.as_bytes());
        }
        let (mut after, _) = Slots::found(slots.memory().try_clone().unwrap().into()).unwrap();
        after.write(b"by the next one").unwrap();
        assert_eq!(again(&slots).unwrap(), b"by the next one");
        assert!(slots.write(&vec![0; SLOT]).is_err());
    }

    #[test]
    fn of_a_write_that_was_cut_off_the_one_before_stands() {
        let mut slots = Slots::new().unwrap();
        slots.write(b"{\"generations\":1}").unwrap();
        slots.write(&[b'x'; 10_000]).unwrap();
        let (whole, before) = (place(3), again(&slots).unwrap());
        slots.write(&[b'y'; 10_000]).unwrap();
        assert_eq!(again(&slots).unwrap(), [b'y'; 10_000]);
        // The second page was not written any more.
        slots.memory().write_all_at(&[b'z'; 4096], whole + 4096).unwrap();
        assert_eq!(again(&slots).unwrap(), before);
    }

    #[test]
    fn garbage_is_nothing() {
        use std::io::Write;
        let found = |bytes: &[u8]| {
            let mut memory = tempfile::tempfile().unwrap();
            memory.write_all(bytes).unwrap();
            Slots::found(memory.into()).is_some()
        };
        let digest = digest(b"x");
        assert!(found(format!("2 1 {digest}\nx").as_bytes()));
        for garbage in [
            String::new(),
            "\n".to_owned(),
            "\0".repeat(9000),
            "{\"format\":1}".to_owned(),
            "2 1 abc\nx".to_owned(),
            format!("2 99999999999 {digest}\nx"),
            format!("2 7 {digest}\nx"),
            // Of the other slot.
            format!("3 1 {digest}\nx"),
        ] {
            assert!(!found(garbage.as_bytes()), "{garbage:?}");
        }
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert!(Slots::found(pipe).is_none());
        let directory = File::open("/").unwrap();
        assert!(Slots::found(directory.into()).is_none());
    }
}
