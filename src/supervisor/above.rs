//! The socket of a supervisor above this one, where `NOTIFY_SOCKET` says that it is (`sd_notify(3)`).
//!
//! It may lie outside of this virtual machine (`vsock:CID:PORT`, vsock(7)). There each message is a connection, which may
//! take a while: a thread of its own makes them, one after the other.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::Interest;

use crate::sys::readiness::Awaited;
use crate::sys::scm;

/// One that does not read holds the loop up no longer than this.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// How long the end is held up until everything is heard: as long as systemd-notify(1) waits.
const LONGEST_BARRIER: Duration = Duration::from_secs(5);

/// Messages on their way out of the virtual machine. Those that do not fit are lost.
const ON_THE_WAY: usize = 64;

/// What kinds of vsock(7) sockets are tried, in this order, where the address names none.
const ANY_KIND: &[Type] = &[Type::DGRAM, Type::SEQPACKET, Type::STREAM];

/// Who connects from a port below 1024 has the right to, as on the internet.
const PRIVILEGED_PORTS: std::ops::RangeInclusive<u32> = 1..=1023;

/// Where it is.
#[derive(Debug, Clone)]
enum Place {
    Local(SocketAddr),
    Outside(Vsock),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Vsock {
    kinds: &'static [Type],
    cid: u32,
    port: u32,
}

/// Why nobody is told anything.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// No address of any kind.
    #[error("it is none of /PATH, @NAME and vsock:CID:PORT")]
    Unknown,
    /// No numbers.
    #[error("the context id and the port of {0} are not numbers: it has to be vsock:CID:PORT")]
    Numbers(String),
    /// A path that is no address.
    #[error(transparent)]
    Path(#[from] io::Error),
}

/// A way to it.
#[derive(Debug)]
pub enum Above {
    /// On this machine.
    Local(SocketAddr),
    /// By the thread that makes the connections.
    Outside(SyncSender<Outgoing>),
}

/// What that thread is given.
#[derive(Debug)]
pub enum Outgoing {
    /// A message.
    State(String),
    /// To be closed when everything before it was sent.
    Barrier(OwnedFd),
}

impl Above {
    /// By the value of `NOTIFY_SOCKET`.
    pub fn new(place: &OsStr) -> Result<Above, PlaceError> {
        match parse(place)? {
            Place::Local(address) => Ok(Above::Local(address)),
            Place::Outside(vsock) => {
                let (sender, receiver) = sync_channel(ON_THE_WAY);
                let place = place.to_string_lossy().into_owned();
                std::thread::Builder::new()
                    .name("notify".to_owned())
                    .spawn(move || vsock.send_all(&place, &receiver))?;
                Ok(Above::Outside(sender))
            }
        }
    }

    /// Says it. One that has no room for it is waited for, a little, if `patient`.
    pub fn say(&self, state: &str, patient: bool) -> io::Result<()> {
        match self {
            Above::Local(address) => {
                let socket = UnixDatagram::unbound()?;
                socket.set_nonblocking(!patient)?;
                socket.set_write_timeout(Some(PATIENCE))?;
                socket.send_to_addr(state.as_bytes(), address).map(drop).map_err(|error| match error.kind() {
                    io::ErrorKind::WouldBlock => io::Error::other("it does not read what it is sent"),
                    _ => error,
                })
            }
            Above::Outside(sender) => {
                if sender.try_send(Outgoing::State(state.to_owned())).is_err() {
                    // The thread says why.
                    tracing::debug!("lost on its way out: {state}");
                }
                Ok(())
            }
        }
    }

    /// Asks for a sign that everything that was said has been heard.
    pub fn barrier(&self) -> io::Result<Barrier> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        match self {
            Above::Local(address) => {
                let socket = UnixDatagram::unbound()?;
                socket.connect_addr(address)?;
                scm::send(socket.as_fd(), b"BARRIER=1", &[write.as_fd()])?;
            }
            Above::Outside(sender) => {
                sender.try_send(Outgoing::Barrier(write)).map_err(|_full| io::ErrorKind::WouldBlock)?;
            }
        }
        Ok(Barrier(read))
    }
}

/// A pipe(2), of which the one above has the other end, and closes it once it has heard everything before it.
#[derive(Debug)]
pub struct Barrier(OwnedFd);

impl Barrier {
    /// Waits for that, but not for ever. Within a runtime only.
    pub async fn passed(self) -> io::Result<()> {
        let hung_up = Awaited::new(self.0, Interest::READABLE)?;
        let passed = tokio::time::timeout(LONGEST_BARRIER, hung_up.readable()).await;
        passed.map_err(|_elapsed| io::Error::from(io::ErrorKind::TimedOut))?.map(drop)
    }
}

/// A way to one on this machine, for what goes with open files.
pub(super) fn connect(place: &OsStr) -> io::Result<UnixDatagram> {
    let Ok(Place::Local(address)) = parse(place) else { return Err(io::ErrorKind::Unsupported.into()) };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

/// Whether it is on this machine, and so can be given open files.
pub(super) fn is_local(place: &OsStr) -> bool {
    matches!(parse(place), Ok(Place::Local(_)))
}

/// As systemd reads it.
fn parse(place: &OsStr) -> Result<Place, PlaceError> {
    match place.as_bytes() {
        [b'@', name @ ..] => return Ok(Place::Local(SocketAddr::from_abstract_name(name)?)),
        [b'/', ..] => return Ok(Place::Local(SocketAddr::from_pathname(place)?)),
        _ => {}
    }
    let text = place.to_str().ok_or(PlaceError::Unknown)?;
    let (kind, address) = text.split_once(':').ok_or(PlaceError::Unknown)?;
    let kinds = match kind {
        "vsock" => ANY_KIND,
        "vsock-dgram" => &[Type::DGRAM],
        "vsock-seqpacket" => &[Type::SEQPACKET],
        "vsock-stream" => &[Type::STREAM],
        _ => return Err(PlaceError::Unknown),
    };
    let numbers = || PlaceError::Numbers(text.to_owned());
    let (cid, port) = address.split_once(':').ok_or_else(numbers)?;
    let number = |text: &str| text.parse().map_err(|_| numbers());
    Ok(Place::Outside(Vsock { kinds, cid: number(cid)?, port: number(port)? }))
}

impl Vsock {
    fn send_all(self, place: &str, messages: &Receiver<Outgoing>) {
        let mut warned = false;
        for message in messages {
            let Outgoing::State(state) = message else { continue };
            match self.send(&state) {
                Err(error) if !warned => {
                    warned = true;
                    tracing::warn!("{}", cannot(place, &error));
                }
                _ => {}
            }
        }
    }

    fn send(self, state: &str) -> io::Result<()> {
        let mut refused = io::Error::from(io::ErrorKind::Unsupported);
        for &kind in self.kinds {
            match self.connect(kind) {
                Ok(socket) => return deliver(&socket, kind, state),
                Err(error) if is_of_no_such_kind(&error) => refused = error,
                Err(error) => return Err(error),
            }
        }
        Err(refused)
    }

    fn connect(self, kind: Type) -> io::Result<Socket> {
        let socket = Socket::new(Domain::VSOCK, kind, None)?;
        // Without the right to, it is from any port.
        let _any = PRIVILEGED_PORTS
            .rev()
            .map(|port| socket.bind(&SockAddr::vsock(libc::VMADDR_CID_ANY, port)))
            .find(|bound| !matches!(bound, Err(error) if error.kind() == io::ErrorKind::AddrInUse));
        // The kernel gives it up after two seconds (SO_VM_SOCKETS_CONNECT_TIMEOUT in vsock(7)).
        socket.connect(&SockAddr::vsock(self.cid, self.port))?;
        Ok(socket)
    }
}

/// One message on a connection. What is no datagram ends with its sender's half, and is heard when the other one ends.
fn deliver(socket: &Socket, kind: Type, state: &str) -> io::Result<()> {
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut left = state.as_bytes();
    while !left.is_empty() {
        let sent = socket.send_with_flags(left, libc::MSG_NOSIGNAL)?;
        left = &left[sent..];
    }
    if kind != Type::DGRAM {
        socket.shutdown(std::net::Shutdown::Write)?;
        io::Read::read(&mut &*socket, &mut [0])?;
    }
    Ok(())
}

/// QEMU has no datagrams, and others no packets.
fn is_of_no_such_kind(error: &io::Error) -> bool {
    [libc::ENODEV, libc::ESOCKTNOSUPPORT, libc::EPROTONOSUPPORT, libc::EOPNOTSUPP]
        .into_iter()
        .any(|errno| error.raw_os_error() == Some(errno))
}

/// In words, for the log.
#[must_use]
pub fn cannot(place: &str, error: &dyn std::fmt::Display) -> String {
    format!(
        "NOTIFY_SOCKET={place}: whoever is there is not told how the service is: {error}; the service runs without it, \
         and where systemd waits for it, see NotifyAccess= and RestrictAddressFamilies= of the unit"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outside(place: &str) -> Result<Vsock, String> {
        match parse(OsStr::new(place)) {
            Ok(Place::Outside(vsock)) => Ok(vsock),
            Ok(Place::Local(address)) => Err(format!("{address:?}")),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn addresses_outside_of_the_virtual_machine() {
        assert_eq!(outside("vsock:2:1234"), Ok(Vsock { kinds: ANY_KIND, cid: 2, port: 1234 }));
        for (name, kind) in [("dgram", Type::DGRAM), ("stream", Type::STREAM), ("seqpacket", Type::SEQPACKET)] {
            let vsock = outside(&format!("vsock-{name}:4294967294:4294967295")).unwrap();
            assert_eq!((vsock.kinds, vsock.cid, vsock.port), (&[kind][..], u32::MAX - 1, u32::MAX));
        }
        // sd_notify(3): the context id must not be left out.
        for wrong in
            ["vsock:", "vsock::1", "vsock:1", "vsock:2:", "vsock:2:x", "vsock-stream:-1:1", "vsock:2:4294967296"]
        {
            assert!(outside(wrong).unwrap_err().contains("vsock:CID:PORT"), "{wrong}");
        }
    }

    #[test]
    fn addresses_of_this_machine_and_none_at_all() {
        assert!(matches!(parse(OsStr::new("/run/n")), Ok(Place::Local(at)) if at.as_pathname().is_some()));
        assert!(matches!(parse(OsStr::new("@n:x")), Ok(Place::Local(at)) if at.as_abstract_name() == Some(b"n:x")));
        for wrong in ["", "run/n", "unix:/run/n", "vsock-raw:1:1", "127.0.0.1:80"] {
            assert!(matches!(parse(OsStr::new(wrong)), Err(PlaceError::Unknown)), "{wrong}");
        }
        assert!(matches!(parse(OsStr::new(&format!("/{}", "x".repeat(200)))), Err(PlaceError::Path(_))));
    }

    /// With a socketpair(2) in the place of a connection.
    #[test]
    fn a_message_on_a_connection_ends_with_it() {
        for kind in [Type::STREAM, Type::SEQPACKET] {
            let (ours, theirs) = Socket::pair(Domain::UNIX, kind, None).unwrap();
            let heard = std::thread::spawn(move || {
                let mut text = String::new();
                io::Read::read_to_string(&mut &theirs, &mut text).unwrap();
                text
            });
            deliver(&ours, kind, "READY=1\nSTATUS=well").unwrap();
            assert_eq!(heard.join().unwrap(), "READY=1\nSTATUS=well");
        }
    }

    #[test]
    fn all_is_sent_before_the_barrier_falls() {
        // Nobody is there, which is known at once, or after two seconds.
        let above = Above::new(OsStr::new("vsock:0:1")).unwrap();
        above.say("READY=1", true).unwrap();
        let barrier = above.barrier().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(barrier.passed()).unwrap();
    }
}
