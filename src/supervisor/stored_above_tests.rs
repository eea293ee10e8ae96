use super::*;
use crate::core::GenerationId;
use crate::supervisor::recorded::{RecordedGeneration, Role};
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;

/// One above, that holds what it is given.
struct Above {
    dir: tempfile::TempDir,
    socket: UnixDatagram,
    held: Vec<(String, OwnedFd)>,
}

impl Above {
    fn new() -> Above {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        Above { dir, socket, held: Vec::new() }
    }

    /// Begins to store, with what came back.
    fn store(&self, most: usize) -> (StoredAbove, Returned) {
        let back = self.held.iter().map(|(name, fd)| (name.clone(), fd.try_clone().unwrap())).collect();
        StoredAbove::new(Some(self.dir.path().join("notify").into()), most, back)
    }

    /// Acts on what was sent, and gives it.
    fn act(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        let mut buffer = [0; 4096];
        while let Some(mut message) = scm::receive(self.socket.as_fd(), &mut buffer).unwrap() {
            let text = String::from_utf8(buffer[..message.len].to_vec()).unwrap();
            let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or_default().to_owned();
            match text.lines().next().unwrap() {
                "FDSTORE=1" => self.held.push((name, message.fds.remove(0))),
                "FDSTOREREMOVE=1" => self.held.retain(|(held, _)| *held != name),
                _ => {}
            }
            said.push(text);
        }
        said
    }

    fn names(&self) -> Vec<&str> {
        self.held.iter().map(|(name, _)| name.as_str()).collect()
    }
}

fn listener() -> (OwnedFd, u64) {
    let fd = OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
    let inode = fstat(&fd).unwrap().st_ino;
    (fd, inode)
}

fn wanted(inode: u64, fd: &OwnedFd) -> Wanted<'_> {
    Wanted { name: socket_name(inode), fd: fd.as_fd(), polled: false }
}

fn recorded(number: u32) -> Recorded {
    let generation = RecordedGeneration {
        cgroup: None,
        number: GenerationId(number),
        pid: 1,
        start_ticks: 1,
        main_pid: 1,
        main_start_ticks: 1,
        marker: "m".to_owned(),
        role: Role::Serving,
    };
    Recorded::new(vec![generation], Vec::new())
}

#[test]
fn what_is_new_is_stored_once_and_what_is_gone_is_removed_and_all_comes_back() {
    let mut above = Above::new();
    let (mut store, _) = above.store(10);
    let ((one, at_one), (two, at_two)) = (listener(), listener());
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    let calls = Own::Calls.name("m");
    let own = Wanted { name: calls.clone(), fd: pipe.as_fd(), polled: true };
    store.keep(&[wanted(at_one, &one), own], &recorded(1)).unwrap();
    let polled = format!("FDSTORE=1\nFDNAME={calls}");
    let socket = |inode: u64| format!("FDSTORE=1\nFDNAME=zddsup/socket/{inode}\nFDPOLL=0");
    assert_eq!(above.act(), ["FDSTORE=1\nFDNAME=zddsup/state\nFDPOLL=0".to_owned(), socket(at_one), polled]);
    // The same memory has what is recorded from then on.
    store.keep(&[wanted(at_two, &two)], &recorded(2)).unwrap();
    let gone = [removal(&calls), removal(&socket_name(at_one))];
    assert_eq!(above.act(), [[socket(at_two)].as_slice(), &gone].concat());
    store.keep(&[wanted(at_two, &two)], &recorded(3)).unwrap();
    assert_eq!(above.act(), [""; 0]);
    drop((store, two));
    let (mut next, mut back) = above.store(10);
    assert_eq!(back.recorded.take(), Some(recorded(3)));
    let again = back.socket(at_two).unwrap();
    assert!(back.socket(at_one).is_none() && back.take(Own::Calls, "m").is_none());
    // It is there already.
    next.keep(&[wanted(at_two, &again)], &recorded(4)).unwrap();
    assert_eq!(above.act(), [""; 0]);
    let (mut next, back) = above.store(10);
    assert_eq!(back.recorded, Some(recorded(4)));
    next.keep(&[], &recorded(5)).unwrap();
    above.act();
    assert_eq!(above.names(), ["zddsup/state"]);
}

#[test]
fn no_more_is_stored_than_there_is_room_for() {
    let mut above = Above::new();
    let (mut store, _) = above.store(3);
    let sockets = [listener(), listener(), listener()];
    let all: Vec<_> = sockets.iter().map(|(fd, inode)| wanted(*inode, fd)).collect();
    store.keep(&all, &recorded(1)).unwrap();
    assert_eq!(above.act().len(), 3);
    // Room again: the third takes it.
    store.keep(&all[1..], &recorded(2)).unwrap();
    above.act();
    let names = ["zddsup/state".to_owned(), socket_name(sockets[1].1), socket_name(sockets[2].1)];
    assert_eq!(above.names(), names);
}

#[test]
fn garbage_that_came_back_is_left_alone_and_removed() {
    let mut above = Above::new();
    let (socket, inode) = listener();
    let file = |text: &str| {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, text.as_bytes(), 0).unwrap();
        OwnedFd::from(file)
    };
    above.held = vec![
        ("zddsup/state".to_owned(), file("{\"format\":1}")),
        ("zddsup/socket/1".to_owned(), file("no socket")),
        // Another one than its name says.
        (format!("zddsup/socket/{}", inode + 1), socket),
        ("zddsup/".to_owned(), file("")),
        ("zddsup/what/ever/else".to_owned(), file("")),
    ];
    let (mut store, mut back) = above.store(10);
    assert!(back.recorded.is_none() && back.socket(1).is_none() && back.socket(inode + 1).is_none());
    assert!(back.take(Own::Stderr, "m").is_none());
    store.keep(&[], &recorded(1)).unwrap();
    above.act();
    assert_eq!(above.names(), ["zddsup/state"]);
    assert_eq!(above.store(10).1.recorded, Some(recorded(1)));
}

#[test]
fn a_state_of_another_format_is_none_and_is_replaced() {
    let mut above = Above::new();
    let mut slots = Slots::new().unwrap();
    slots.write(b"{\"format\":99,\"generations\":[],\"listeners\":[]}").unwrap();
    above.held = vec![("zddsup/state".to_owned(), slots.memory().try_clone().unwrap().into())];
    let (mut store, back) = above.store(10);
    assert!(back.recorded.is_none());
    store.keep(&[], &recorded(1)).unwrap();
    above.act();
    assert_eq!(above.store(10).1.recorded, Some(recorded(1)));
}

#[test]
fn sockets_that_are_in_the_way_are_waited_for() {
    let mut above = Above::new();
    let (mut store, _) = above.store(10);
    let (socket, inode) = listener();
    store.keep(&[wanted(inode, &socket)], &recorded(1)).unwrap();
    above.act();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| store.let_go(&[inode]));
        let said: Vec<_> = std::iter::repeat_with(|| above.act()).flatten().take(2).collect();
        assert_eq!(said, [removal(&socket_name(inode)), "BARRIER=1".to_owned()]);
        waits.join().unwrap();
    });
    assert_eq!(store.names.len(), 1);
}

#[test]
fn nothing_is_stored_where_nobody_stores() {
    let above = Above::new();
    let (mut off, _) = above.store(0);
    let (socket, inode) = listener();
    assert!(!off.is_on());
    off.keep(&[wanted(inode, &socket)], &recorded(1)).unwrap();
    off.let_go(&[inode]);
    assert!(scm::receive(above.socket.as_fd(), &mut [0; 10]).unwrap().is_none());
    // One above that is gone is an error, and what could not be sent is sent later.
    let (mut on, _) = above.store(10);
    std::fs::remove_file(above.dir.path().join("notify")).unwrap();
    assert!(on.keep(&[wanted(inode, &socket)], &recorded(1)).is_err());
    assert!(on.names.is_empty());
}
