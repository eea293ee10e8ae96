//! Which file executes a program: the `#!` line of a script, the loader of an ELF file. When it is missing, execve(2)
//! gives ENOENT as if the program itself were.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// The interpreter that the first bytes of a program name.
pub(super) fn of(head: &[u8]) -> Option<PathBuf> {
    script(head)
        .or_else(|| elf(head))
        .filter(|path| !path.is_empty())
        .map(|path| PathBuf::from(OsStr::from_bytes(path)))
}

/// The kernel cuts at blanks, and takes a carriage return for a part of the name.
fn script(head: &[u8]) -> Option<&[u8]> {
    let line = head.strip_prefix(b"#!")?.split(|&byte| byte == b'\n').next()?;
    line.split(|byte| matches!(byte, b' ' | b'\t' | 0)).find(|word| !word.is_empty())
}

/// `PT_INTERP` of elf(5).
fn elf(head: &[u8]) -> Option<&[u8]> {
    const PT_INTERP: u64 = 3;
    let rest = head.strip_prefix(b"\x7fELF")?;
    let wide = *rest.first()? == 2;
    let little = *rest.get(1)? == 1;
    let number = |at: usize, len: usize| {
        let bytes = head.get(at..at.checked_add(len)?)?;
        let shift = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
        Some(if little { bytes.iter().rev().fold(0, shift) } else { bytes.iter().fold(0, shift) })
    };
    let index = |at, len| usize::try_from(number(at, len)?).ok();
    let (table, size, count) = if wide {
        (index(32, 8)?, index(54, 2)?, index(56, 2)?)
    } else {
        (index(28, 4)?, index(42, 2)?, index(44, 2)?)
    };
    for entry in 0..count {
        let at = table.checked_add(entry.checked_mul(size)?)?;
        if number(at, 4)? == PT_INTERP {
            let (start, len) = if wide {
                (index(at.checked_add(8)?, 8)?, index(at.checked_add(32)?, 8)?)
            } else {
                (index(at.checked_add(4)?, 4)?, index(at.checked_add(16)?, 4)?)
            };
            return head.get(start..start.checked_add(len)?)?.split(|&byte| byte == 0).next();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_scripts_and_elf_files() {
        assert_eq!(of(b"#! /usr/bin/env python3\nprint()"), Some("/usr/bin/env".into()));
        assert_eq!(of(b"#!/bin/sh\r\n"), Some("/bin/sh\r".into()));
        assert_eq!(of(b"#!\n"), None);
        assert_eq!(of(b"plain text"), None);
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        if let Some(loader) = of(&own[..4096]) {
            assert!(loader.exists(), "{loader:?}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(head in prop::collection::vec(any::<u8>(), 0..128), wide in 1u8..3, little in 1u8..3) {
            of(&head);
            let mut elf = b"\x7fELF".to_vec();
            elf.extend([wide, little]);
            elf.extend(head);
            of(&elf);
        }
    }
}
