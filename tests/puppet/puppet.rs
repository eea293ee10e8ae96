//! The server that the tests supervise. It does what it is told to, the bad things too.
//!
//! ```text
//! puppet [FLAGS] [--script FILE]      FILE has one flag a line and is read at each start
//!
//! --version V            named in each answer: "version=V pid=P generation=G"
//! --bind ADDR            where to listen when LISTEN_FDS gives nothing
//! --also-bind ADDR       one more listener of its own, with SO_REUSEPORT (for probes)
//! --also-bind-after-ms N such a listener comes that late
//! --bind unix:PATH, --bind unix:@NAME, --bind unixpacket:PATH, --unix-datagrams PATH
//! --unlinks              removes a file at its Unix sockets' paths before it binds, and again when it ends
//! --chmod MODE           of the file at the path of its Unix socket
//! --udp ADDR             a socket of its own that answers datagrams; with --udp-sockets N so many with SO_REUSEPORT
//! --udp-per-client       the first datagram of a client gets a socket of its own, until it sends "bye"
//! --healthy-after-ms N   /health is 503 until then
//! --ready HOW            notify (default), none, delay-ms=N, child (READY=1 comes from a child process)
//! --notify-raw TEXT      sends any text before READY=1; "\n" is a line's end
//! --stderr TEXT          prints a line
//! --exit-before-ready N, --crash-before-ready, --exit-after-ms N:CODE
//! --ignore-term          TERM and INT do nothing
//! --drain-ms N           takes at least so long from TERM to its exit, which has --exit-code N
//! --spawn-grandchild     double fork, setsid, sleeps; --spawn-stubborn-grandchild ignores TERM too
//! --daemonize            goes on as a child in a session of its own (MAINPID=), and the first process exits
//! --nonblocking          sets O_NONBLOCK on its listeners
//! --strict-blocking      plain blocking accept(2), to which EAGAIN is fatal (71)
//! --listen-backlog N     calls listen(2) again with its own backlog
//! --shutdown-listener    calls shutdown(2) on its listeners at TERM
//! --watchdog             WATCHDOG=1 twice an interval; --watchdog-then-hang stops after three
//! --fdstore NAME         gives a file to the fd store, with its version as content
//! --handoff-hostile HOW  once it serves: garbage, oversized, fds, before-hello, empty, hellos, flood, keep-fds,
//!                        keep-state, deaf (see hostile.rs)
//! --fork-chains N        processes in sessions of their own that fork every 20 ms and exit, so that no pid lasts
//! ```
//!
//! Paths: `/`, `/health`, `/slow?ms=N`, `/big?bytes=N`, `/env`, `/fds`, `/inherited` (what it was started with),
//! `/signals` (that came), `/stored` (what it got back from the fd store), `/grandchild` (its pid), `/stderr?text=T`,
//! `/sicken` (`/health` is 503 from then on), `/exit?code=N`, `/crash`, `/hang`, `/notify?text=T&socket=PATH&fds=N&bytes=N&times=N`,
//! `/udp?address=A` (answers datagrams there from now on), `/barrier?text=T` (answers once the supervisor has taken that text).
//!
//! TERM: it stops accepting, answers with `Connection: close`, lets an idle connection send one more request for 2 s,
//! and exits with 0.

mod children;
mod flags;
mod hostile;
mod inherited;
mod listeners;
mod notify;
mod web;

use std::io::{Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::thread::JoinHandleExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use children::DAEMON;
use flags::{Flags, Ready, Watchdog};
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use socket2::{Domain, SockRef, Socket, Type};

/// Interrupts a blocking accept(2).
const WAKE: Signal = Signal::SIGIO;
const NO_EXIT: i32 = i32::MIN;

/// One running puppet.
pub struct Puppet {
    flags: Flags,
    inherited: String,
    stored: Vec<String>,
    grandchild: Option<u32>,
    begin: Instant,
    sick: AtomicBool,
    draining: AtomicBool,
    hung: AtomicBool,
    exit: AtomicI32,
    /// Reads as ended once it drains or hangs.
    woken: UnixStream,
    waker: UnixStream,
    signals: Mutex<Vec<String>>,
    connections: Mutex<usize>,
    fewer: Condvar,
}

fn main() {
    let inherited = inherited::all();
    let mut args = std::env::args().skip(1).peekable();
    match args.peek().map(String::as_str) {
        Some("--be-middle") => return children::be_middle(args.nth(1).as_deref()),
        Some("--be-notifier") => return notify::say(&args.nth(1).unwrap_or_default()),
        _ => {}
    }
    let flags = Flags::read(args).unwrap_or_else(|error| give_up(64, &error));
    for line in &flags.stderr {
        eprintln!("{line}");
    }
    if flags.crash_before_ready {
        std::process::abort();
    }
    if let Some(code) = flags.exit_before_ready {
        std::process::exit(code);
    }
    let daemon = std::env::var_os(DAEMON).is_some();
    if flags.daemonize && !daemon {
        return children::go_on_as_child();
    }
    if daemon {
        nix::unistd::setsid().expect("a child leads no group");
    }
    let grandchild = flags.grandchild.map(children::spawn_grandchild);
    hostile::walk_through_pids(flags.fork_chains, Duration::from_millis(20));
    wait_for_signals_in_one_thread();

    let given = listeners::inherited(daemon);
    let (listeners, files): (Vec<_>, Vec<_>) =
        given.into_iter().partition(|(_, fd)| SockRef::from(fd).r#type().is_ok());
    let stored = files.into_iter().map(|(name, fd)| {
        let mut content = String::new();
        let mut file = std::fs::File::from(fd);
        let read = file.rewind().and_then(|()| file.read_to_string(&mut content));
        format!("{name}={}", read.map_or_else(|error| error.to_string(), |_| content))
    });
    unlink_as_told(&flags);
    let mut listeners: Vec<Socket> = listeners.into_iter().map(|(_, fd)| Socket::from(fd)).collect();
    if listeners.is_empty() {
        listeners.extend(flags.bind.iter().map(|address| listeners::bind(address)));
    }
    let given = listeners.len();
    let late = flags.also_bind_after;
    if late.is_zero() {
        listeners.extend(flags.also_bind.iter().map(|address| listeners::bind(address)));
    }
    if let Some(path) = &flags.unix_datagrams {
        let bound = listeners::bind_unix(path, Type::DGRAM);
        listeners.push(bound.unwrap_or_else(|error| give_up(67, &format!("cannot bind {path}: {error}"))));
    }
    if let (Some(mode), Some(path)) = (flags.chmod, flags.bind.as_deref().and_then(|bind| bind.strip_prefix("unix:"))) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
    }
    for address in flags.udp.iter().flat_map(|address| std::iter::repeat_n(address, flags.udp_sockets)) {
        let shares = flags.udp_sockets > 1 || flags.udp_per_client;
        let bound = listeners::bind_udp(address, shares);
        listeners.push(bound.unwrap_or_else(|error| give_up(67, &format!("cannot bind {address}: {error}"))));
    }

    let (woken, waker) = UnixStream::pair().expect("a socket pair");
    let puppet = Arc::new(Puppet {
        inherited,
        stored: stored.collect(),
        grandchild,
        begin: Instant::now(),
        sick: AtomicBool::new(false),
        draining: AtomicBool::new(false),
        hung: AtomicBool::new(false),
        exit: AtomicI32::new(NO_EXIT),
        woken,
        waker,
        signals: Mutex::default(),
        connections: Mutex::new(0),
        fewer: Condvar::new(),
        flags,
    });
    let listeners: Vec<_> = listeners.into_iter().map(Arc::new).collect();
    for listener in &listeners[..given] {
        puppet.prepare(listener);
    }
    let acceptors = listeners.iter().map(|listener| puppet.accept_in_thread(listener)).collect();
    if !late.is_zero() {
        let puppet = Arc::clone(&puppet);
        std::thread::spawn(move || {
            std::thread::sleep(late);
            for address in &puppet.flags.also_bind {
                puppet.accept_in_thread(&Arc::new(listeners::bind(address)));
            }
        });
    }
    puppet.tell();
    puppet.obey(&listeners, acceptors);
}

impl Puppet {
    /// Does to a shared socket what a careless server does.
    fn prepare(&self, listener: &Socket) {
        if self.flags.nonblocking {
            listener.set_nonblocking(true).expect("O_NONBLOCK");
        }
        if let Some(backlog) = self.flags.listen_backlog {
            listener.listen(backlog).expect("listen");
        }
    }

    /// Tells the supervisor what the flags say.
    fn tell(self: &Arc<Self>) {
        for text in &self.flags.notify_raw {
            notify::say(text);
        }
        for name in &self.flags.fdstore {
            notify::store(name, &self.flags.version).expect("fd store");
        }
        let main_pid = if std::env::var_os(DAEMON).is_some() {
            format!("MAINPID={}\n", std::process::id())
        } else {
            String::new()
        };
        let ready = format!("{main_pid}READY=1\nSTATUS=version {}", self.flags.version);
        match self.flags.ready {
            Ready::Notify => notify::say(&ready),
            Ready::None => {}
            Ready::Child => {
                let program = std::env::current_exe().expect("its own path");
                let child = Command::new(program).args(["--be-notifier", &ready]).status();
                child.expect("a child");
            }
            Ready::Delay(delay) => {
                std::thread::spawn(move || {
                    std::thread::sleep(delay);
                    notify::say(&ready);
                });
            }
        }
        if std::env::var_os(DAEMON).is_some() {
            // The first process waits for this line.
            println!("ready");
        }
        if let Some(what) = self.flags.handoff_hostile.clone() {
            std::thread::spawn(move || hostile::on_handoff(&what));
        }
        if let Some((after, code)) = self.flags.exit_after {
            std::thread::spawn(move || {
                std::thread::sleep(after);
                std::process::exit(code);
            });
        }
        if let Some(watchdog) = self.flags.watchdog {
            let puppet = Arc::clone(self);
            std::thread::spawn(move || puppet.feed(watchdog));
        }
    }

    fn feed(&self, watchdog: Watchdog) {
        let every = std::env::var("WATCHDOG_USEC").ok().and_then(|usec| usec.parse().ok());
        let half = Duration::from_micros(every.unwrap_or(1_000_000)) / 2;
        for fed in 0_u64.. {
            if watchdog == Watchdog::ThenHang && fed == 3 {
                self.hang();
            }
            if self.hung.load(Ordering::SeqCst) {
                return;
            }
            notify::say("WATCHDOG=1");
            std::thread::sleep(half);
        }
    }

    fn accept_in_thread(self: &Arc<Self>, listener: &Arc<Socket>) -> JoinHandle<()> {
        let (puppet, listener) = (Arc::clone(self), Arc::clone(listener));
        std::thread::spawn(move || match listener.r#type() {
            Ok(Type::DGRAM) if listener.domain().is_ok_and(|domain| domain == Domain::UNIX) => {
                puppet.echo_local(&listener);
            }
            Ok(Type::DGRAM) => puppet.echo(&listener),
            _ => puppet.accept(&listener),
        })
    }

    fn accept(self: &Arc<Self>, listener: &Socket) {
        loop {
            if !self.flags.strict_blocking {
                let _polled = web::wait(&[listener, &self.woken], None);
            }
            if self.is_draining() || self.hung.load(Ordering::SeqCst) {
                return;
            }
            match listener.accept() {
                Ok((stream, _)) => self.serve_in_thread(stream),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && self.flags.strict_blocking => {
                    give_up(71, "accept: it would block: somebody else set O_NONBLOCK");
                }
                // Taken by another generation, or by nobody: shutdown(2) was called, or a signal came.
                Err(_) => std::thread::sleep(Duration::from_micros(100)),
            }
        }
    }

    fn serve_in_thread(self: &Arc<Self>, stream: Socket) {
        *self.connections.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        let puppet = Arc::clone(self);
        let serve = move || {
            let _client_went_away = web::serve(&puppet, &stream);
            drop(stream);
            *puppet.connections.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
            puppet.fewer.notify_all();
        };
        Builder::new().stack_size(256 << 10).spawn(serve).expect("a thread");
    }

    /// Answers datagrams.
    fn echo(self: &Arc<Self>, socket: &Socket) {
        let Ok(socket) = socket.try_clone().map(std::net::UdpSocket::from) else { return };
        let one_client = socket.peer_addr().is_ok();
        let mut buffer = [0; 2048];
        loop {
            let _polled = web::wait(&[&socket, &self.woken], None);
            if self.is_draining() || self.hung.load(Ordering::SeqCst) {
                return;
            }
            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                let answer = format!("{} {text}", self.name());
                if one_client {
                    let _client_went_away = socket.send(answer.as_bytes());
                    if text == "bye" {
                        return;
                    }
                } else {
                    if self.flags.udp_per_client {
                        self.echo_to_one(&socket, from);
                    }
                    let _client_went_away = socket.send_to(answer.as_bytes(), from);
                }
            }
        }
    }

    /// The same on this machine.
    fn echo_local(&self, socket: &Socket) {
        let Ok(socket) = socket.try_clone().map(|socket| UnixDatagram::from(std::os::fd::OwnedFd::from(socket))) else {
            return;
        };
        let mut buffer = [0; 2048];
        loop {
            let _polled = web::wait(&[&socket, &self.woken], None);
            if self.is_draining() || self.hung.load(Ordering::SeqCst) {
                return;
            }
            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                let _client_went_away = socket.send_to_addr(format!("{} {text}", self.name()).as_bytes(), &from);
            }
        }
    }

    fn echo_to_one(self: &Arc<Self>, socket: &std::net::UdpSocket, client: std::net::SocketAddr) {
        let own = socket.local_addr().expect("bound").to_string();
        let connected = listeners::bind_udp(&own, true).and_then(|own| own.connect(&client.into()).map(|()| own));
        match connected {
            Ok(own) => drop(self.accept_in_thread(&Arc::new(own))),
            Err(error) => give_up(68, &format!("a socket for {client}: {error}")),
        }
    }

    /// Answers datagrams at one more address.
    fn echo_at(self: &Arc<Self>, address: &str) -> std::io::Result<()> {
        let socket = listeners::bind_udp(address, false)?;
        drop(self.accept_in_thread(&Arc::new(socket)));
        Ok(())
    }

    /// Waits for signals, and ends with the one that says so.
    fn obey(&self, listeners: &[Arc<Socket>], acceptors: Vec<JoinHandle<()>>) {
        loop {
            let signal = signals().wait().expect("sigwait");
            self.signals.lock().unwrap_or_else(PoisonError::into_inner).push(signal.as_str().to_owned());
            let stops = matches!(signal, Signal::SIGTERM | Signal::SIGINT);
            if stops && !self.flags.ignore_term && !self.hung.load(Ordering::SeqCst) {
                break;
            }
        }
        let begin = Instant::now();
        self.draining.store(true, Ordering::SeqCst);
        self.wake();
        if self.flags.shutdown_listener {
            for listener in listeners {
                let _not_listening = listener.shutdown(std::net::Shutdown::Both);
            }
        }
        for acceptor in acceptors {
            // Another generation may have taken what it was woken for: then it waits in accept(2).
            while !acceptor.is_finished() {
                // SAFETY: the thread was not joined, so its id is valid.
                let _ended_meanwhile = unsafe { libc::pthread_kill(acceptor.as_pthread_t(), WAKE as i32) };
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.fewer.wait_while(connections, |connections| *connections > 0));
        std::thread::sleep(self.flags.drain.saturating_sub(begin.elapsed()));
        unlink_as_told(&self.flags);
        std::process::exit(self.flags.exit_code);
    }

    fn wake(&self) {
        self.waker.shutdown(std::net::Shutdown::Both).expect("its own socket");
    }

    fn name(&self) -> String {
        let generation = std::env::var("ZDDSUP_GENERATION").unwrap_or_default();
        format!("version={} pid={} generation={generation}", self.flags.version, std::process::id())
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    fn is_healthy(&self) -> bool {
        self.begin.elapsed() >= self.flags.healthy_after && !self.sick.load(Ordering::SeqCst)
    }

    fn sicken(&self) {
        self.sick.store(true, Ordering::SeqCst);
    }

    /// Waits for a request; false when an idle connection has had its time.
    fn readable(&self, stream: &Socket, idle: Duration) -> std::io::Result<bool> {
        if !self.is_draining() {
            web::wait(&[stream, &self.woken], None)?;
        }
        self.park_if_hung();
        web::wait(&[stream], self.is_draining().then_some(idle))
    }

    fn signals(&self) -> Vec<String> {
        self.signals.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn want_exit(&self, code: i32) {
        self.exit.store(code, Ordering::SeqCst);
    }

    fn exit_wanted(&self) -> Option<i32> {
        Some(self.exit.load(Ordering::SeqCst)).filter(|code| *code != NO_EXIT)
    }

    fn hang(&self) {
        self.hung.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn park_if_hung(&self) {
        while self.hung.load(Ordering::SeqCst) {
            std::thread::park();
        }
    }
}

fn unlink_as_told(flags: &Flags) {
    let bound = flags.bind.as_deref().and_then(|bind| bind.strip_prefix("unix:"));
    for path in bound.into_iter().chain(flags.unix_datagrams.as_deref()).filter(|_| flags.unlinks) {
        let _not_there = std::fs::remove_file(path);
    }
}

fn give_up(code: i32, why: &str) -> ! {
    eprintln!("puppet: {why}");
    std::process::exit(code)
}

fn signals() -> SigSet {
    [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGWINCH,
        Signal::SIGALRM,
    ]
    .into_iter()
    .collect()
}

/// Blocks them for all threads that come; the main thread takes them.
fn wait_for_signals_in_one_thread() {
    extern "C" fn interrupt(_: i32) {}
    signals().thread_block().expect("a valid mask");
    let action = SigAction::new(SigHandler::Handler(interrupt), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, which is safe at any time.
    unsafe { sigaction(WAKE, &action) }.expect("a valid signal");
}
