use std::time::Instant;

use nix::sys::stat::fstat;
use tokio::sync::mpsc;

use super::*;
use crate::proto::handoff::MAX_STATE;

/// What a generation does with its end.
struct Peer(OwnedFd);

impl Peer {
    fn says(&self, message: &FromGeneration, fds: &[&OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        scm::send(self.0.as_fd(), &message.encode().unwrap(), &fds).unwrap();
    }

    fn hello(&self) {
        self.says(&FromGeneration::Hello { protocol: 1 }, &[]);
    }

    /// The next message; others have their turn until it is there.
    async fn hears(&self) -> (ToGeneration, Vec<OwnedFd>) {
        let mut buffer = vec![0; MAX_PACKET];
        loop {
            match scm::receive(self.0.as_fd(), &mut buffer).unwrap() {
                Some(received) => {
                    let message = ToGeneration::decode(&buffer[..received.len], received.fds.len()).unwrap();
                    return (message, received.fds);
                }
                None => tokio::task::yield_now().await,
            }
        }
    }
}

/// How many a generation may keep here.
const MOST_FDS: usize = 20;

fn channel(listeners: &[(String, Arc<OwnedFd>)], batch: usize) -> (Channel, Peer, mpsc::UnboundedReceiver<Incoming>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let report = move |incoming| {
        let _nobody_asks = sender.send(incoming);
    };
    let (channel, theirs) = Channel::with_batches("web", 3, listeners, batch, MOST_FDS, report).unwrap();
    (channel, Peer(theirs), receiver)
}

fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap()
}

fn inode(fd: &OwnedFd) -> u64 {
    fstat(fd).unwrap().st_ino
}

fn status(text: &str) -> FromGeneration {
    FromGeneration::Status { text: text.to_owned() }
}

fn kept(id: u64, state: Vec<u8>) -> Outgoing {
    Outgoing { message: ToGeneration::Kept { id, name: "x".to_owned(), state }, fds: Vec::new() }
}

/// The first report that is no message, after how many.
async fn end(reports: &mut mpsc::UnboundedReceiver<Incoming>) -> (usize, Incoming) {
    let mut messages = 0;
    loop {
        match reports.recv().await.unwrap() {
            Incoming::Message { .. } => messages += 1,
            other => return (messages, other),
        }
    }
}

async fn malformed(reports: &mut mpsc::UnboundedReceiver<Incoming>) -> String {
    match end(reports).await.1 {
        Incoming::Malformed(error) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn hello_and_the_listeners_in_batches_come_first() {
    let listeners: Vec<_> = (0..5).map(|index| (format!("l{index}"), Arc::new(pipe().0))).collect();
    let (channel, peer, _reports) = channel(&listeners, 2);
    let drain = ToGeneration::Drain { timeout_ms: Some(5), last: false, more: false };
    channel.send(Outgoing { message: drain.clone(), fds: Vec::new() });
    let hello = ToGeneration::Hello { protocol: 1, service: "web".to_owned(), generation: 3 };
    assert_eq!(peer.hears().await.0, hello);
    let mut got = Vec::new();
    loop {
        let (ToGeneration::Listeners { names, last }, fds) = peer.hears().await else { panic!("no listeners") };
        assert!(fds.len() <= 2);
        got.extend(names.into_iter().zip(fds));
        if last {
            break;
        }
    }
    let found: Vec<_> = got.iter().map(|(name, fd)| (name.clone(), inode(fd))).collect();
    let sent: Vec<_> = listeners.iter().map(|(name, fd)| (name.clone(), inode(fd))).collect();
    assert_eq!(found, sent);
    assert_eq!(peer.hears().await.0, drain);
}

#[tokio::test]
async fn a_generation_without_listeners_knows_that_there_are_none() {
    let (_channel, peer, _reports) = channel(&[], 2);
    peer.hears().await;
    assert_eq!(peer.hears().await.0, ToGeneration::Listeners { names: Vec::new(), last: true });
}

#[tokio::test]
async fn what_it_says_is_reported_in_order_with_its_fds() {
    let (channel, peer, mut reports) = channel(&[], 2);
    assert!(!channel.has_spoken());
    let (read, _write) = pipe();
    peer.hello();
    channel.catch_up();
    assert!(channel.has_spoken());
    peer.says(&FromGeneration::Ready, &[]);
    peer.says(&FromGeneration::Keep { name: "pipe".to_owned(), state: b"s".to_vec() }, &[&read]);
    drop(peer);
    let mut said = Vec::new();
    loop {
        match reports.recv().await.unwrap() {
            Incoming::Message { message, fds } => said.push((message, fds.iter().map(inode).collect::<Vec<_>>())),
            Incoming::Closed => break,
            Incoming::Malformed(error) => panic!("{error}"),
        }
    }
    let keep = FromGeneration::Keep { name: "pipe".to_owned(), state: b"s".to_vec() };
    let expected =
        [(FromGeneration::Hello { protocol: 1 }, vec![]), (FromGeneration::Ready, vec![]), (keep, vec![inode(&read)])];
    assert_eq!(said, expected);
    assert!(!channel.has_spoken());
}

#[tokio::test]
async fn last_words_are_there_at_once_even_from_one_that_did_not_read() {
    let (channel, peer, mut reports) = channel(&[], 2);
    peer.hello();
    for _ in 0..100 {
        peer.says(&status("x"), &[]);
    }
    drop(peer);
    channel.catch_up();
    let mut said = 0;
    while let Ok(Incoming::Message { .. }) = reports.try_recv() {
        said += 1;
    }
    assert_eq!(said, 101);
}

#[tokio::test]
async fn who_does_not_read_holds_up_nobody_and_gets_all_in_order() {
    let (channel, peer, _reports) = channel(&[], 2);
    let before = Instant::now();
    for id in 0..200 {
        channel.send(kept(id, vec![7; MAX_STATE]));
    }
    assert!(before.elapsed() < Duration::from_secs(5));
    peer.hears().await;
    peer.hears().await;
    for expected in 0..200 {
        let (ToGeneration::Kept { id, state, .. }, _) = peer.hears().await else { panic!("not kept") };
        assert_eq!((id, state.len()), (expected, MAX_STATE));
    }
}

#[tokio::test]
async fn a_deaf_one_is_given_up() {
    let (channel, _peer, mut reports) = channel(&[], 2);
    for id in 0..=2 * MAX_QUEUED as u64 {
        channel.send(kept(id, Vec::new()));
    }
    assert!(malformed(&mut reports).await.contains("does not read"));
}

#[tokio::test]
async fn nonsense_ends_the_channel_and_leaks_nothing() {
    let too_long = vec![b' '; MAX_PACKET + 1];
    let endless = "[".repeat(MAX_PACKET);
    let hello = FromGeneration::Hello { protocol: 1 }.encode().unwrap();
    let ready = FromGeneration::Ready.encode().unwrap();
    let cases: [(&[&[u8]], usize, &str); 7] = [
        (&[b"{"], 3, "no message of version 1"),
        (&[b"\xff\0"], 253, "no message of version 1"),
        (&[endless.as_bytes()], 0, "no message of version 1"),
        (&[&too_long], 1, "more than 131072 bytes"),
        (&[&ready], 0, "before hello"),
        (&[&hello, &hello], 0, "hello again"),
        (&[&hello, &ready], 1, "1 fds with a message that has 0"),
    ];
    for (packets, fds, expected) in cases {
        let (_channel, peer, mut reports) = channel(&[], 2);
        let (read, write) = pipe();
        let (last, before) = packets.split_last().unwrap();
        for packet in before {
            scm::send(peer.0.as_fd(), packet, &[]).unwrap();
        }
        scm::send(peer.0.as_fd(), last, &vec![write.as_fd(); fds]).unwrap();
        assert!(malformed(&mut reports).await.contains(expected), "{expected}");
        drop(write);
        // End of file: no copy of the other end is open.
        assert_eq!(nix::unistd::read(&read, &mut [0; 1]), Ok(0), "{expected}");
    }
}

#[tokio::test]
async fn a_flood_is_taken_bit_by_bit() {
    let (_channel, peer, mut reports) = channel(&[], 2);
    peer.hello();
    let mut most = 0;
    for _ in 0..200 {
        while scm::send(peer.0.as_fd(), &status("x").encode().unwrap(), &[]).is_ok() {}
        tokio::task::yield_now().await;
        let mut waiting = 0;
        while reports.try_recv().is_ok() {
            waiting += 1;
        }
        most = most.max(waiting);
    }
    assert!((1..=2 * AT_ONCE).contains(&most), "{most}");
}

#[tokio::test]
async fn more_than_a_generation_may_keep_is_refused() {
    let (_channel, peer, mut reports) = channel(&[], 2);
    peer.hello();
    let keep = FromGeneration::Keep { name: "x".to_owned(), state: vec![0; MAX_STATE] }.encode().unwrap();
    let error = loop {
        let _full = scm::send(peer.0.as_fd(), &keep, &[]);
        tokio::task::yield_now().await;
        match reports.try_recv() {
            Ok(Incoming::Malformed(error)) => break error.to_string(),
            Ok(_) | Err(mpsc::error::TryRecvError::Empty) => {}
            Err(error) => panic!("{error}"),
        }
    };
    assert!(error.contains("keeps more than"));
    // Of fds, too.
    let (_channel, peer, mut reports) = channel(&[], 2);
    peer.hello();
    let keep = FromGeneration::Keep { name: "x".to_owned(), state: Vec::new() }.encode().unwrap();
    scm::send(peer.0.as_fd(), &keep, &[peer.0.as_fd(); MOST_FDS]).unwrap();
    scm::send(peer.0.as_fd(), &keep, &[peer.0.as_fd()]).unwrap();
    assert!(malformed(&mut reports).await.contains("keeps more than"));
}

#[tokio::test]
async fn dropped_it_is_closed() {
    let (channel, peer, _reports) = channel(&[], 2);
    drop(channel);
    peer.hears().await;
    peer.hears().await;
    let received = loop {
        match scm::receive(peer.0.as_fd(), &mut [0; 8]).unwrap() {
            Some(received) => break received,
            None => tokio::task::yield_now().await,
        }
    };
    assert_eq!(received.len, 0);
}
