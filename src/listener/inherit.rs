//! Sockets that systemd passed to zddsup (`LISTEN_FDS`, `sd_listen_fds(3)`): used in the place of ones that it would bind.

use std::io;
use std::os::fd::OwnedFd;

use socket2::SockRef;

use super::address::Address;
use super::error::{BindError, Why};
use super::spec::{self, ListenFlag, ListenerSpec};
use super::{absolute, bind, error, meets, Listener};
use crate::proto::listen_fds::{self, ListenFdsError};
use crate::sys::socket::take_passed_fds;

/// How the names begin of what a zddsup before this one has stored in systemd (`FDSTORE=1` in `sd_notify(3)`), and gets back
/// among the sockets of units. Those are called as the unit is, or by `FileDescriptorName=`: hardly so.
pub const STORED: &str = "zddsup/";

/// What was passed and is not used yet.
#[derive(Debug, Default)]
pub struct Inherited {
    passed: Vec<Passed>,
    stored: Vec<(String, OwnedFd)>,
}

#[derive(Debug)]
struct Passed {
    name: String,
    fd: OwnedFd,
    bound: Address,
}

/// Why what was passed cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// The variables make no sense.
    #[error(transparent)]
    Variables(#[from] ListenFdsError),
    /// There are none.
    #[error("LISTEN_FDS says that {count} sockets were passed from fd 3 on, but: {source}; unset LISTEN_FDS")]
    Fds {
        /// How many.
        count: usize,
        /// Why they cannot be taken.
        source: io::Error,
    },
    /// One is for each connection, and the service has to be for all of them.
    #[error(
        "systemd passed {name:?}, which is a connection and no listening socket: set Accept=no in the .socket unit, and name \
         the service without '@' in its Service="
    )]
    Connection {
        /// What it is called.
        name: String,
    },
}

impl Inherited {
    /// Takes what was passed to this process, and the variables out of its environment: they are not for its children.
    /// To be called before the first thread is made and before anything is opened.
    pub fn take() -> Result<Inherited, InheritError> {
        let names = listen_fds::decode(|key| std::env::var(key).ok(), std::process::id());
        for key in listen_fds::VARS {
            std::env::remove_var(key);
        }
        let names = names?;
        if names.is_empty() {
            return Ok(Inherited::default());
        }
        let fds = take_passed_fds(names.len()).map_err(|source| InheritError::Fds { count: names.len(), source })?;
        let passed: Vec<_> = names.into_iter().zip(fds).collect();
        let is_connection =
            |(name, fd): &&(String, OwnedFd)| !name.starts_with(STORED) && SockRef::from(fd).peer_addr().is_ok();
        if let Some((name, _)) = passed.iter().find(is_connection) {
            return Err(InheritError::Connection { name: name.clone() });
        }
        Ok(Inherited::from_fds(passed))
    }

    /// The same from fds that are held. What is no socket that can be listened on is let go.
    pub fn from_fds(passed: impl IntoIterator<Item = (String, OwnedFd)>) -> Inherited {
        let (stored, passed): (Vec<_>, Vec<_>) = passed.into_iter().partition(|(name, _)| name.starts_with(STORED));
        let usable = passed.into_iter().filter_map(|(name, fd)| {
            let socket = SockRef::from(&fd);
            let bound = match bind::address_of(&socket) {
                Ok(_) if socket.peer_addr().is_ok() => Err(io::Error::other("it is a connection")),
                other => other,
            };
            match bound {
                Ok(bound) => Some(Passed { name, fd, bound }),
                Err(error) => {
                    tracing::warn!(name, "systemd passed something that cannot be listened on, ignored: {error}");
                    None
                }
            }
        });
        Inherited { passed: usable.collect(), stored }
    }

    /// Takes out what was stored. It is for no listener as such.
    pub fn take_stored(&mut self) -> Vec<(String, OwnedFd)> {
        std::mem::take(&mut self.stored)
    }

    /// Whether nothing was passed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.passed.is_empty()
    }

    /// Takes the socket for a listener: the one of its name, else the one at its address. None if there is none.
    pub fn take_for(&mut self, spec: &ListenerSpec) -> Result<Option<Listener>, BindError> {
        let mut spec = absolute(spec)?;
        let named = |passed: &Passed| passed.name == spec.name;
        // Any port is no address by which something could be found.
        let exact = !spec.address.has_any_port();
        let there = |passed: &Passed| exact && meets(&spec.address, &passed.bound);
        let places = [
            self.passed.iter().position(|passed| named(passed) && there(passed)),
            self.passed.iter().position(named),
            self.passed.iter().position(there),
        ];
        let Some(place) = places.into_iter().flatten().next() else { return Ok(None) };
        let passed = self.passed.remove(place);
        if !same_kind(&spec.address, &passed.bound) {
            return Err(error(&spec, Why::Other { passed: passed.bound.to_string() }));
        }
        // Found by its name: where it is bound, is systemd's to say.
        spec.address = passed.bound;
        Listener::passed(passed.fd, spec).map(Some)
    }

    /// What no listener took.
    #[must_use]
    pub fn unused(&self) -> Vec<String> {
        self.passed.iter().map(|passed| format!("{} ({})", passed.name, passed.bound)).collect()
    }

    /// All as listeners, each by a name of its own.
    pub fn into_listeners(self) -> Result<Vec<Listener>, BindError> {
        let flags = self.passed.iter().map(|passed| ListenFlag {
            name: (passed.name != listen_fds::UNNAMED).then(|| as_name(&passed.name)),
            address: passed.bound.clone(),
            options: super::options::Options::default(),
        });
        let mut specs = ListenFlag::name_all(flags.collect());
        // Sockets of one unit have its name.
        for place in 1..specs.len() {
            let (before, this) = specs.split_at_mut(place);
            let is_taken = |name: &str| before.iter().any(|spec| spec.name == name);
            let name = this[0].name.clone();
            let mut number = 2;
            while is_taken(&this[0].name) {
                this[0].name = format!("{name}-{number}");
                number += 1;
            }
        }
        specs.into_iter().zip(self.passed).map(|(spec, passed)| Listener::passed(passed.fd, spec)).collect()
    }
}

/// systemd allows more in a name than we do.
fn as_name(text: &str) -> String {
    let name: String =
        text.chars().map(|char| if spec::is_name(&char.to_string()) || char == '@' { char } else { '-' }).collect();
    name.strip_prefix('@').map_or_else(|| name.clone(), |rest| format!("-{rest}"))
}

fn same_kind(wanted: &Address, passed: &Address) -> bool {
    match (wanted, passed) {
        (Address::Inet { transport: wanted, .. }, Address::Inet { transport: passed, .. }) => wanted == passed,
        (Address::Unix { kind: wanted, .. }, Address::Unix { kind: passed, .. }) => wanted == passed,
        (Address::Inet { .. }, Address::Unix { .. }) | (Address::Unix { .. }, Address::Inet { .. }) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::UnixListener;

    fn tcp() -> (OwnedFd, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (listener.into(), address)
    }

    fn names(listeners: &[Listener]) -> Vec<&str> {
        listeners.iter().map(Listener::name).collect()
    }

    #[test]
    fn without_flags_all_are_used_and_each_has_a_name() {
        let fds = ["web.socket", "web.socket", "a b", "web.socket"].map(|name| (name.to_owned(), tcp().0));
        let bound = Inherited::from_fds(fds).into_listeners().unwrap();
        assert_eq!(names(&bound), ["web.socket", "web.socket-2", "a-b", "web.socket-3"]);
        let bound = Inherited::from_fds([(listen_fds::UNNAMED.to_owned(), tcp().0)]).into_listeners().unwrap();
        assert_eq!(names(&bound), ["listener"]);
    }

    #[test]
    fn flags_find_theirs_by_name_and_by_address_and_bind_the_rest() {
        let (one, at_one) = tcp();
        let (two, at_two) = tcp();
        let (three, _) = tcp();
        let inode = nix::sys::stat::fstat(&one).unwrap().st_ino;
        let fds = [("x".to_owned(), one), ("admin".to_owned(), two), ("spare".to_owned(), three)];
        let mut inherited = Inherited::from_fds(fds);
        let mut take = |flag: &str| inherited.take_for(&flag.parse().unwrap()).unwrap();
        let web = take(&format!("web={at_one}")).unwrap();
        assert_eq!((web.name(), web.inode()), ("web", inode));
        assert_eq!(take("admin=127.0.0.1:1").unwrap().address(), format!("tcp://{at_two}"));
        assert!(take("new=127.0.0.1:0").is_none());
        let unused = inherited.unused();
        assert!(unused.len() == 1 && unused[0].starts_with("spare (tcp://127.0.0.1:"), "{unused:?}");
    }

    #[test]
    fn another_kind_by_the_same_name_is_refused() {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let error = Inherited::from_fds([("web".to_owned(), udp.into())])
            .take_for(&"web=127.0.0.1:0".parse().unwrap())
            .unwrap_err();
        assert!(error.to_string().contains("udp://127.0.0.1"), "{error}");
    }

    #[test]
    fn what_cannot_be_listened_on_is_ignored() {
        let (listener, address) = tcp();
        let connection = TcpStream::connect(address).unwrap();
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        let fds = [("c".to_owned(), connection.into()), ("p".to_owned(), pipe), ("l".to_owned(), listener)];
        assert_eq!(names(&Inherited::from_fds(fds).into_listeners().unwrap()), ["l"]);
    }

    #[test]
    fn what_was_stored_is_no_listener_whatever_it_is() {
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        let (socket, address) = tcp();
        let fds =
            [("zddsup/state".to_owned(), pipe), ("zddsup/socket/7".to_owned(), socket), ("web".to_owned(), tcp().0)];
        let mut inherited = Inherited::from_fds(fds);
        let stored: Vec<_> = inherited.take_stored().into_iter().map(|(name, _)| name).collect();
        assert_eq!(stored, ["zddsup/state", "zddsup/socket/7"]);
        assert!(inherited.take_for(&format!("x={address}").parse().unwrap()).unwrap().is_none());
        assert_eq!(names(&inherited.into_listeners().unwrap()), ["web"]);
    }

    #[test]
    fn the_file_of_a_passed_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let spec = format!("web={}", path.display()).parse().unwrap();
        let taken = Inherited::from_fds([("x".to_owned(), listener.into())]).take_for(&spec).unwrap();
        drop(taken.unwrap());
        assert!(path.exists());
    }
}
