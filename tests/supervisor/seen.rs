//! What of a process can be seen from outside.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use socket2::{Domain, Socket, Type};

/// Its environment, as it was started with.
pub fn environ(pid: i32) -> BTreeMap<String, String> {
    let bytes = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    let pairs = bytes.split(|&byte| byte == 0).filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| String::from_utf8_lossy(pair).into_owned())
        .map(|pair| pair.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned())).unwrap())
        .collect()
}

/// Its fds, and what each is.
pub fn fds(pid: i32) -> BTreeMap<i32, String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap());
    entries
        .filter_map(|entry| {
            let what = std::fs::read_link(entry.path()).ok()?;
            Some((entry.file_name().to_str()?.parse().ok()?, what.display().to_string()))
        })
        .collect()
}

/// `name value` lines, as the puppet's `/inherited` has them.
pub fn facts(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.split_once(' ')).collect()
}

/// The fds in the puppet's `/inherited`, and what each is.
pub fn inherited_fds(text: &str) -> BTreeMap<i32, String> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("fd ")?.split_once(' '));
    lines.map(|(number, rest)| (number.parse().unwrap(), rest.split(" flags=").next().unwrap().to_owned())).collect()
}

/// A port of the loopback address that nobody else is given while the first of both is held: a server that binds it with
/// `SO_REUSEPORT` has it.
pub fn reserved_port() -> (OwnedFd, SocketAddr) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket.into(), address)
}

/// A listener whose port is taken.
pub fn taken() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Where a puppet listens by itself (`--also-bind`, `--bind`), as it says in the log; the last one that said so.
pub fn own_address(log: &str) -> SocketAddr {
    let line = log.lines().rev().find_map(|line| line.strip_prefix("puppet: listens on "));
    line.unwrap_or_else(|| panic!("it does not say where it listens: {log}")).trim().parse().unwrap()
}

/// Whether a program is installed.
pub fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// Whether this runs as root; says so where a test needs it and it is not.
pub fn is_root(what: &str) -> bool {
    let root = nix::unistd::Uid::effective().is_root();
    if !root {
        eprintln!("skipped: {what} can only be tested as root");
    }
    root
}
