//! The one writer to zddsup's own stderr: what services write to theirs, and zddsup's log.
//!
//! ```text
//! service's stderr ──pipe──> Capture ──> Output ──queue──> a thread ──> zddsup's stderr
//!                               └─> Tail
//! ```
//!
//! A thread, because nothing else suits every kind of stderr: a terminal, a file, a socket of the journal, a pipe that
//! others have too, whose flags are not ours to change. When it is slow, the queue fills; after a moment in which a burst
//! can pass, whole lines are left out. So no service waits for it for long, and zddsup never.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::unistd::write;
use tokio::sync::Notify;
use tokio::time::timeout_at;

pub use super::capture::Capture;
pub use super::tail::Tail;

/// When this much waits to be written, services have to wait a moment.
const PLENTY: usize = 1024 * 1024;

/// What waits at most: a whole pipe's content, a dead service's last words, fits on top.
const MOST_BYTES: usize = PLENTY + 1024 * 1024 + 64 * 1024;

/// What zddsup's log has for itself, so that no service can silence it.
const RESERVE: usize = 128 * 1024;

/// What is written at once.
const CHUNK: usize = 32 * 1024;

/// How long it may stay full before something is left out. A service that writes on meanwhile has its pipe's room.
const PATIENCE: Duration = Duration::from_millis(100);

/// How long a slow stderr is waited for at the end.
pub const LAST_LINES: Duration = Duration::from_secs(1);

/// A line without an end is not waited for any longer.
const LONGEST_LINE: usize = 64 * 1024;

/// Takes what is to be written, and never blocks. A clone writes to the same place. What is still queued when the last
/// one is dropped is written if stderr takes it before the process ends: see [`Output::flush`].
#[derive(Debug, Clone)]
pub struct Output(Arc<Handle>);

/// Ends the thread with the last [`Output`].
#[derive(Debug)]
struct Handle(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Something is to be written, or nothing will be any more.
    wake: Condvar,
    /// All was written.
    idle: Condvar,
    /// There is room again.
    room: Notify,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<u8>,
    /// Bytes that found no room since the last note about it.
    left_out: u64,
    /// What is written last goes on in the same line.
    mid_line: bool,
    pressure: Pressure,
    writing: bool,
    closed: bool,
}

/// How things stand until the queue has emptied far enough.
#[derive(Debug, Clone, Copy, Default)]
enum Pressure {
    /// Well.
    #[default]
    None,
    /// Services wait for room, since then.
    Since(Instant),
    /// Waiting was of no use, and lines are left out: fewer and longer gaps, rather than one at each line.
    LeavingOut,
}

/// Where something comes from: a line of it that lost its middle loses its end too.
#[derive(Debug, Default)]
pub(super) struct Source {
    /// How much of the current line was left out.
    skipping: Option<usize>,
    is_log: bool,
}

impl Output {
    /// Writes to zddsup's stderr.
    pub fn stderr() -> io::Result<Output> {
        Output::new(io::stderr().as_fd().try_clone_to_owned()?)
    }

    /// Writes there.
    pub fn new(fd: OwnedFd) -> io::Result<Output> {
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        thread::Builder::new()
            .name("output".to_owned())
            .stack_size(128 * 1024)
            .spawn(move || of_thread.write_all(&fd))?;
        Ok(Output(Arc::new(Handle(shared))))
    }

    /// A pipe for a service's stderr, and what reads it from now on. Within a runtime only.
    pub fn capture(&self) -> io::Result<(Capture, OwnedFd)> {
        Capture::new(self)
    }

    /// Waits until all is written, but not longer than this. For the end of the process.
    pub fn flush(&self, limit: Duration) {
        let shared = &self.0 .0;
        let is_busy = |state: &mut State| !state.queue.is_empty() || state.left_out > 0 || state.writing;
        let _done_or_too_slow = shared.idle.wait_timeout_while(shared.lock(), limit, is_busy);
    }

    /// Waits until there is room, or no longer.
    pub(super) async fn room(&self) {
        let shared = &self.0 .0;
        loop {
            let mut roomier = pin!(shared.room.notified());
            roomier.as_mut().enable();
            let Some(until) = shared.lock().full_until() else { return };
            if timeout_at(until.into(), roomier).await.is_err() {
                return;
            }
        }
    }

    pub(super) fn push(&self, source: &mut Source, bytes: &[u8]) {
        let shared = &self.0 .0;
        shared.lock().push(source, bytes);
        shared.wake.notify_one();
    }
}

/// For the log: each call is one record, which is written as a whole or left out.
impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(&mut Source { is_log: true, ..Source::default() }, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.wake.notify_one();
    }
}

impl State {
    fn push(&mut self, source: &mut Source, bytes: &[u8]) {
        let bytes = source.after_skipped(bytes, &mut self.left_out);
        let room = self.room(source);
        let fits = match bytes.get(..room) {
            // Up to the last end of a line that fits.
            Some(fitting) if bytes.len() > room => {
                fitting.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1)
            }
            _ => bytes.len(),
        };
        let (taken, left) = bytes.split_at(fits);
        if !taken.is_empty() {
            self.note();
            self.queue.extend(taken);
            self.mid_line = !taken.ends_with(b"\n");
        }
        self.left_out += left.len() as u64;
        if !left.is_empty() {
            self.pressure = Pressure::LeavingOut;
        }
        source.skipping = source.skipping.or((!left.is_empty() && !left.ends_with(b"\n")).then_some(0));
    }

    /// Until when to wait for room; none where there is some, or waiting was of no use.
    fn full_until(&mut self) -> Option<Instant> {
        if self.queue.len() <= PLENTY {
            return None;
        }
        let now = Instant::now();
        let since = match self.pressure {
            Pressure::None => now,
            Pressure::Since(since) => since,
            Pressure::LeavingOut => return None,
        };
        self.pressure = Pressure::Since(since);
        Some(since + PATIENCE).filter(|&until| now < until)
    }

    /// What may be taken from there.
    fn room(&mut self, source: &Source) -> usize {
        self.relax();
        match self.pressure {
            _ if source.is_log => (MOST_BYTES + RESERVE).saturating_sub(self.queue.len()),
            Pressure::LeavingOut => 0,
            Pressure::None | Pressure::Since(_) => MOST_BYTES.saturating_sub(self.queue.len()),
        }
    }

    fn relax(&mut self) {
        if self.queue.len() <= PLENTY / 2 {
            self.pressure = Pressure::None;
        }
    }

    /// Says that something is missing here.
    fn note(&mut self) {
        if self.left_out > 0 {
            let begin = if self.mid_line { "\n" } else { "" };
            let note = format!("{begin}zddsup: {} bytes of output were left out\n", self.left_out);
            self.queue.extend(note.as_bytes());
            self.left_out = 0;
            self.mid_line = false;
        }
    }
}

impl Source {
    /// What follows the line that lost its middle.
    fn after_skipped<'a>(&mut self, bytes: &'a [u8], left_out: &mut u64) -> &'a [u8] {
        let Some(before) = self.skipping else { return bytes };
        let end = bytes.iter().position(|&byte| byte == b'\n').map(|at| at + 1);
        let skipped = end.unwrap_or(bytes.len());
        let over = end.is_some() || before + skipped > LONGEST_LINE;
        self.skipping = (!over).then_some(before + skipped);
        *left_out += skipped as u64;
        &bytes[skipped..]
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: writes until nothing can come any more.
    fn write_all(&self, fd: &OwnedFd) {
        while let Some(chunk) = self.next() {
            write_chunk(fd, &chunk);
        }
    }

    fn next(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        state.writing = false;
        loop {
            if state.queue.is_empty() {
                state.note();
            }
            if !state.queue.is_empty() {
                break;
            }
            // A flood's memory is given back.
            state.queue = VecDeque::new();
            self.idle.notify_all();
            if state.closed {
                return None;
            }
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.writing = true;
        let len = state.queue.len().min(CHUNK);
        let chunk = state.queue.drain(..len).collect();
        state.relax();
        drop(state);
        self.room.notify_waiters();
        Some(chunk)
    }
}

/// Writes, however long it takes. What cannot be written (the terminal is gone) is lost, and nobody is stopped by it.
fn write_chunk(fd: &OwnedFd, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match write(fd, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::EINTR) => {}
            // Somebody who shares it made it non-blocking.
            Err(Errno::EAGAIN) => {
                let _looked_at_again = poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE);
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};

    fn pipe() -> (File, OwnedFd) {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        (read.into(), write)
    }

    fn rest_of(mut read: File) -> String {
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn all_arrives_in_order() {
        let (read, write) = pipe();
        let mut output = Output::new(write).unwrap();
        for number in 0..1000 {
            writeln!(output, "{number}").unwrap();
        }
        output.flush(Duration::from_secs(60));
        drop(output);
        let wanted: String = (0..1000).fold(String::new(), |text, number| format!("{text}{number}\n"));
        assert_eq!(rest_of(read), wanted);
    }

    #[test]
    fn when_nobody_reads_whole_lines_are_left_out_and_counted() {
        let (read, write) = pipe();
        let output = Output::new(write).unwrap();
        let (mut source, mut sent) = (Source::default(), 0);
        // Chunks that end anywhere in a line.
        let line = format!("{}\n", "x".repeat(99));
        let flood = line.repeat(40_000);
        for chunk in flood.as_bytes().chunks(777) {
            output.push(&mut source, chunk);
            sent += chunk.len();
        }
        output.flush(Duration::ZERO);
        drop(output);
        let (mut arrived, mut left_out) = (0, 0);
        for line in rest_of(read).lines() {
            if let Some(rest) = line.strip_prefix("zddsup: ") {
                left_out += rest.split(' ').next().unwrap().parse::<usize>().unwrap();
                assert!(rest.ends_with(" bytes of output were left out"));
            } else if line.len() == 99 {
                arrived += line.len() + 1;
            } else {
                // The beginning of a line whose end found no room, before a note.
                arrived += line.len();
            }
        }
        assert!(left_out > 0);
        assert_eq!(arrived + left_out, sent);
    }

    #[test]
    fn it_goes_on_after_a_flood() {
        let mut state = State::default();
        let mut source = Source::default();
        state.push(&mut source, &vec![b'x'; MOST_BYTES]);
        state.push(&mut source, b"of the same line");
        assert_eq!((state.queue.len(), state.left_out), (MOST_BYTES, 16));
        // Not before there is a lot of room.
        state.queue.drain(..100);
        state.push(&mut Source::default(), b"other\n");
        assert_eq!(state.left_out, 22);
        // The log has its say all the same.
        state.push(&mut Source { is_log: true, ..Source::default() }, b"log\n");
        state.push(&mut Source::default(), b"another\n");
        state.queue.drain(..MOST_BYTES - 100);
        state.push(&mut source, b", its end\nnext\n");
        let text = String::from_utf8(state.queue.into()).unwrap();
        let wanted =
            "\nzddsup: 22 bytes of output were left out\nlog\nzddsup: 18 bytes of output were left out\nnext\n";
        assert_eq!(text, wanted);
    }

    #[test]
    fn a_line_without_an_end_is_not_skipped_for_ever() {
        let mut left_out = 0;
        let mut source = Source { skipping: Some(0), ..Source::default() };
        assert_eq!(source.after_skipped(&vec![b'x'; LONGEST_LINE], &mut left_out), b"");
        assert_eq!(source.after_skipped(b"x", &mut left_out), b"");
        assert_eq!(source.after_skipped(b"shown", &mut left_out), b"shown");
    }

    #[test]
    fn a_stderr_that_is_gone_stops_nobody() {
        let (read, write) = pipe();
        drop(read);
        let mut output = Output::new(write).unwrap();
        output.write_all(b"lost\n").unwrap();
        output.flush(Duration::from_secs(60));
        output.write_all(b"lost too\n").unwrap();
        output.flush(Duration::from_secs(60));
    }
}
