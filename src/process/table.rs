//! What `/proc` says of a process (proc(5)), as far as it matters here.

use std::fs;
use std::io::{self, Read};

use nix::unistd::Pid;

use super::group::Member;

/// `PF_KTHREAD` among a process' flags (include/linux/sched.h).
const OF_KERNEL: u32 = 0x0020_0000;

/// A line of `/proc/PID/stat`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stat {
    pub(super) member: Member,
    pub(super) lives: bool,
    /// One of the kernel's own threads, which have no environment.
    pub(super) of_kernel: bool,
    pub(super) parent: i32,
    pub(super) group: i32,
    pub(super) session: i32,
}

impl Stat {
    pub(super) fn read(pid: i32) -> io::Result<Stat> {
        // A line is a few hundred bytes: one read, where fs::read takes six. All of /proc is read at each look.
        let mut line = [0; 2048];
        let length = fs::File::open(format!("/proc/{pid}/stat"))?.read(&mut line)?;
        Stat::parse(pid, &line[..length]).ok_or_else(|| io::Error::other(format!("cannot read /proc/{pid}/stat")))
    }

    pub(super) fn parse(pid: i32, line: &[u8]) -> Option<Stat> {
        // The name may have blanks and parentheses in it; nothing after it has.
        let name_end = line.iter().rposition(|&byte| byte == b')')?;
        let rest = std::str::from_utf8(line.get(name_end + 1..)?).ok()?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        // Numbered from 3 in proc(5).
        let field = |number: usize| fields.get(number - 3).copied();
        let threads: u64 = field(20)?.parse().ok()?;
        let lives = match field(3)? {
            "X" | "x" => false,
            // Its first thread may be gone while others run on.
            "Z" => threads > 1,
            _ => true,
        };
        Some(Stat {
            member: Member { pid, start_ticks: field(22)?.parse().ok()? },
            lives,
            of_kernel: field(9)?.parse::<u32>().ok()? & OF_KERNEL != 0,
            parent: field(4)?.parse().ok()?,
            group: field(5)?.parse().ok()?,
            session: field(6)?.parse().ok()?,
        })
    }
}

/// That `/proc` is there, and that of our own PID namespace: without it zddsup is blind.
pub fn check_own_proc() -> io::Result<()> {
    let found = fs::read_link("/proc/self")?;
    if found.as_os_str() == Pid::this().to_string().as_str() {
        return Ok(());
    }
    Err(io::Error::other(format!("it calls this process {}, which is process {}", found.display(), Pid::this())))
}

/// Whether a process was started with a variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Marked {
    Yes,
    /// Also when we may not look into it.
    No,
    /// It is in the middle of execve(2), and its environment not in its place yet; or in the middle of its end.
    Unknown,
}

/// Looks for `NAME=value` in what a process was started with.
pub(super) fn is_marked(pid: i32, pair: &[u8]) -> Marked {
    match fs::read(format!("/proc/{pid}/environ")) {
        Ok(environ) if environ.is_empty() && !has_environment(pid) => Marked::Unknown,
        Ok(environ) if environ.split(|&byte| byte == 0).any(|one| one == pair) => Marked::Yes,
        Err(error) if error.kind() != io::ErrorKind::PermissionDenied => Marked::Unknown,
        Ok(_) | Err(_) => Marked::No,
    }
}

/// Whether its environment has its place, be it empty: field 51 of `/proc/PID/stat`, where that ends. execve(2) sets it last
/// (`create_elf_tables` in `fs/binfmt_elf.c`).
pub(super) fn has_environment(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace();
    fields.nth(51 - 3).is_some_and(|env_end| env_end != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_names_with_blanks_and_parentheses() {
        let line = b"42 (a) b (c)) S 1 2 3 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 777 0 0";
        let stat = Stat::parse(42, line).unwrap();
        assert_eq!(stat.member, Member { pid: 42, start_ticks: 777 });
        assert_eq!((stat.parent, stat.group, stat.session, stat.lives), (1, 2, 3, true));
        for len in 0..line.len() {
            let _never_panics = Stat::parse(42, &line[..len]);
        }
    }

    #[test]
    fn tells_what_a_process_was_started_with() {
        let own = nix::unistd::Pid::this().as_raw();
        let (name, value) = std::env::vars().next().unwrap();
        assert_eq!(is_marked(own, format!("{name}={value}").as_bytes()), Marked::Yes);
        assert_eq!(is_marked(own, b"ZDDSUP_MARKER=nobody"), Marked::No);
        assert_eq!(is_marked(-1, b"ZDDSUP_MARKER=nobody"), Marked::Unknown);
        let stat = Stat::read(own).unwrap();
        assert!(stat.lives && !stat.of_kernel);
    }

    #[test]
    fn one_with_an_empty_environment_is_not_in_the_middle_of_execve() {
        let mut child = std::process::Command::new("sleep").arg("60").env_clear().spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        // spawn(3) returns once execve(2) is past the point where it fails, which is before the environment is there.
        let begin = std::time::Instant::now();
        while is_marked(pid, b"ZDDSUP_MARKER=1") != Marked::No {
            assert!(begin.elapsed().as_secs() < 60);
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
