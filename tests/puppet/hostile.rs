//! What only a broken or hostile service does.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};
use nix::unistd::{fork, ForkResult};

use super::give_up;

/// What escapes a test that fails ends by itself.
const LONGEST_WALK: Duration = Duration::from_secs(120);
const HELLO: &[u8] = br#"{"type":"hello","protocol":1}"#;

/// Does to its handoff socket what its name says, for as long as zddsup listens.
pub fn on_handoff(what: &str) {
    let number = std::env::var("ZDDSUP_SOCKET").ok().and_then(|number| number.parse::<RawFd>().ok());
    let Some(number) = number else { give_up(72, "no ZDDSUP_SOCKET") };
    // SAFETY: it is ours by the protocol, and nobody else in this process takes it.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    let fd = std::io::stderr().as_raw_fd();
    let keep = |state: usize| format!(r#"{{"type":"keep","name":"x","state":"{}"}}"#, "AAAA".repeat(state / 3));
    let said: Result<(), nix::Error> = match what {
        "garbage" => send(&socket, b"\xff\x00no json", &[]),
        "oversized" => send(&socket, &vec![b' '; 150_000], &[]),
        "fds" => send(&socket, HELLO, &[fd; 253]),
        "before-hello" => send(&socket, br#"{"type":"ready"}"#, &[]),
        "empty" => send(&socket, b"", &[]),
        "hellos" => for_ever(&socket, HELLO, &[]),
        "flood" => hello(&socket).and_then(|()| for_ever(&socket, br#"{"type":"status","text":"x"}"#, &[])),
        "keep-fds" => hello(&socket).and_then(|()| for_ever(&socket, keep(0).as_bytes(), &[fd; 253])),
        "keep-state" => hello(&socket).and_then(|()| for_ever(&socket, keep(60_000).as_bytes(), &[])),
        "deaf" => hello(&socket),
        _ => give_up(64, &format!("--handoff-hostile {what} is unknown")),
    };
    eprintln!("puppet: handoff {what}: {said:?}");
    // It neither reads nor closes.
    std::mem::forget(socket);
}

fn hello(socket: &OwnedFd) -> nix::Result<()> {
    send(socket, HELLO, &[])
}

fn for_ever(socket: &OwnedFd, packet: &[u8], fds: &[RawFd]) -> nix::Result<()> {
    loop {
        match send(socket, packet, fds) {
            // The kernel lets nobody send fds while too many are on their way.
            Err(nix::Error::ETOOMANYREFS) => std::thread::sleep(Duration::from_millis(1)),
            sent => sent?,
        }
    }
}

fn send(socket: &OwnedFd, packet: &[u8], fds: &[RawFd]) -> nix::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    let parts = [std::io::IoSlice::new(packet)];
    sendmsg::<()>(socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None).map(drop)
}

/// Processes that are never the same for long: each forks the one that goes on and is gone. Before there are threads.
pub fn walk_through_pids(chains: usize, step: Duration) {
    for _ in 0..chains {
        // SAFETY: this process has one thread.
        match unsafe { fork() } {
            Ok(ForkResult::Parent { .. }) => {}
            Ok(ForkResult::Child) => {
                let begin = Instant::now();
                while begin.elapsed() < LONGEST_WALK {
                    let _session = nix::unistd::setsid();
                    std::thread::sleep(step);
                    // SAFETY: as above.
                    match unsafe { fork() } {
                        Ok(ForkResult::Child) => {}
                        Ok(ForkResult::Parent { .. }) | Err(_) => break,
                    }
                }
                std::process::exit(0);
            }
            Err(error) => give_up(73, &format!("fork: {error}")),
        }
    }
}
