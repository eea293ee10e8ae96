//! What harm a service, or anybody who knows its notify socket, can try.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::common::{request, wait_for, PATIENCE};
use crate::stage::{clean, Stage};
use crate::watched::{fds_of, rss_of, Rest};

/// For an answer, on a busy machine.
const SOON: Duration = Duration::from_secs(8);

/// The address that the serving generation has in its environment.
fn notify_socket(stage: &Stage) -> SocketAddr {
    let env = request(stage.address(), "/env");
    let name =
        env.lines().find_map(|line| line.strip_prefix("NOTIFY_SOCKET=@")).expect("an abstract socket").to_owned();
    SocketAddr::from_abstract_name(name.as_bytes()).unwrap()
}

/// Its version can be replaced by a decent one, after which zddsup has open what it had.
fn recovers(stage: &Stage, rest: &Rest) {
    // What was left for a next version is taken by none of these, and dropped.
    for version in ["6", "7", "8", "9"] {
        stage.next(&format!("--version {version}"));
        stage.upgrade();
        stage.wait_settled();
    }
    assert!(request(stage.address(), "/").contains("version=9 "));
    rest.is_back();
    assert!(!stage.log().contains("panicked"));
}

#[test]
fn a_stranger_says_nothing_to_it() {
    let stage = Stage::start(&["--ready", "notify", "--start-timeout", "60s"], "--version 1");
    let before = stage.serving();
    let stranger = UnixDatagram::unbound().unwrap();
    let address = notify_socket(&stage);
    let own = std::process::id();
    for text in ["STATUS=taken over", "WATCHDOG=trigger", "STOPPING=1", "FDSTORE=1"] {
        stranger.send_to_addr(text.as_bytes(), &address).unwrap();
    }
    stranger.send_to_addr(format!("MAINPID={own}").as_bytes(), &address).unwrap();
    stage.wait_for_log("not of this generation");
    // The last one, too, was taken by then.
    stage.wait_for_log(&format!("pid={own}"));
    stage.upgrade();
    let status = stage.status();
    let first = status.generations.iter().find(|one| one.number == before.number).unwrap();
    assert_eq!(first.status.as_deref(), Some("version 1"));
    assert_eq!((status.restarts, status.stored_fds), (0, 0));
}

/// Anybody on the machine can send to an abstract socket. It costs the supervisor little to find out who.
#[test]
fn strangers_that_flood_it_delay_nobody() {
    let stage = Stage::start(&[], "--version 1");
    let rest = Rest::of(&stage);
    let loads = [stage.load(), stage.keep_alive_load()];
    let (over, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let address = notify_socket(&stage);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let stranger = UnixDatagram::unbound().unwrap();
            while !over.load(Ordering::Relaxed) && stranger.send_to_addr(b"READY=1", &address).is_ok() {
                sent.fetch_add(1, Ordering::Relaxed);
            }
        });
        wait_for("the flood runs", || sent.load(Ordering::Relaxed) > 100);
        let begin = Instant::now();
        for _ in 0..10 {
            stage.answers_within(SOON);
        }
        println!("10 status in {:?}, {} datagrams meanwhile", begin.elapsed(), sent.load(Ordering::Relaxed));
        // The generation's end is taken after its last words: the flood is none of them.
        stage.next("--version 2");
        stage.upgrade();
        for load in &loads {
            assert!(load.saw("2", PATIENCE), "{}", load.so_far());
        }
        stage.wait_settled();
        over.store(true, Ordering::Relaxed);
    });
    clean(loads);
    recovers(&stage, &rest);
}

#[test]
fn messages_that_are_none() {
    let stage = Stage::start(&[], "--version 1");
    let rest = Rest::of(&stage);
    let notify = |query: &str| drop(request(stage.address(), &format!("/notify?{query}")));
    for query in [
        "bytes=4097",
        "bytes=100000",
        "text=READY",
        "text=%00%01%02",
        "text=%FF%FE=1",
        "text==",
        "text=%0A%0A%0A",
        "text=MAINPID=0",
        "text=MAINPID=1",
        "text=MAINPID=-1",
        "text=MAINPID=99999999999999999999",
        "text=EXTEND_TIMEOUT_USEC=18446744073709551615",
        "text=WATCHDOG_USEC=18446744073709551615",
        "text=WATCHDOG_USEC=0",
        "text=ERRNO=99999999999",
        "text=FDSTOREREMOVE=1%0AFDNAME=nothing",
        "text=BARRIER=1",
        "text=x=y&fds=253",
        "text=FDSTORE=1%0AFDNAME=..%2F..&fds=253",
        "text=FDSTORE=1%0AFDSTOREREMOVE=1",
    ] {
        notify(query);
        stage.answers_within(SOON);
    }
    // Something that it keeps, removed again: what comes after has been taken before.
    notify("text=FDSTORE=1%0AFDNAME=mine&fds=253");
    notify("text=FDSTOREREMOVE=1%0AFDNAME=mine");
    notify("text=FDSTOREREMOVE=1%0AFDNAME=..%2F..");
    notify("text=STATUS=the%20end");
    stage.wait_until("all were taken", |status| {
        status.generations.iter().any(|generation| generation.status.as_deref() == Some("the end"))
    });
    assert_eq!(stage.status().stored_fds, 0);
    recovers(&stage, &rest);
}

#[test]
fn a_service_that_floods_its_notify_socket() {
    let stage = Stage::start(&[], "--version 1");
    let rest = Rest::of(&stage);
    let address = stage.address();
    let floods = [
        "text=STATUS=flood&times=100000",
        "text=x&times=50000",
        "bytes=4000&times=20000",
        "text=FDSTORE=1&fds=253&times=5000",
    ];
    let flood = |query: &'static str| {
        std::thread::spawn(move || crate::common::try_request(address, &format!("/notify?{query}")))
    };
    let floods: Vec<_> = floods.into_iter().map(flood).collect();
    let (mut most_memory, mut most_fds) = (0, 0);
    while floods.iter().any(|flood| !flood.is_finished()) {
        stage.answers_within(SOON);
        most_memory = most_memory.max(rss_of(stage.pid()));
        most_fds = most_fds.max(fds_of(stage.pid()).values().sum());
        rest.assert_memory(most_memory);
    }
    println!("most while it lasts: {most_memory} KiB, {most_fds} fds");
    assert!(most_fds < 4000, "{most_fds} fds");
    // Not again: what it stored is passed on, as it wanted.
    let stored = request(address, "/notify?text=FDSTOREREMOVE=1%0AFDNAME=stored");
    assert!(stored.contains("version="));
    stage.wait_until("it removed what it stored", |status| status.stored_fds == 0);
    recovers(&stage, &rest);
}

/// What a version does to its handoff socket once it serves.
#[test]
fn a_service_that_breaks_the_handoff_protocol() {
    // One that has said hello is told to drain by a message, which none of these reads.
    let stage = Stage::start(&["--drain-timeout", "300ms", "--stop-timeout", "1s"], "--version 1");
    let rest = Rest::of(&stage);
    for (what, is_cut_off) in [
        ("garbage", true),
        ("oversized", true),
        ("fds", true),
        ("before-hello", true),
        ("hellos", true),
        ("keep-state", true),
        ("keep-fds", true),
        ("empty", false),
        ("flood", false),
        ("deaf", false),
    ] {
        stage.next(&format!("--version {what} --handoff-hostile {what}"));
        stage.upgrade();
        stage.wait_settled();
        assert!(request(stage.address(), "/").contains(&format!("version={what} ")));
        if is_cut_off {
            let cut_off = |line: &str| {
                line.contains("handoff socket closed")
                    && line.contains(&format!("generation={}", stage.serving().number))
            };
            wait_for("its channel is closed", || stage.log().lines().any(cut_off));
        }
        // It is there for the next version, however much it is told.
        stage.answers_within(SOON);
        let (memory, fds) = (rss_of(stage.pid()), fds_of(stage.pid()).values().sum::<usize>());
        println!("{what}: {memory} KiB, {fds} fds");
    }
    recovers(&stage, &rest);
}
