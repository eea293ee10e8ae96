//! Upgrades where a handshake takes a while, as it does everywhere but on loopback: the SYN is the old generation's, and its
//! end the new one's, with and without SYN cookies.

use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::sched::{unshare, CloneFlags};

use crate::common::load::{Config, Load};
use crate::common::{puppet, PATIENCE};
use crate::stage::Site;

/// In a network of its own, in which each packet takes some milliseconds, or as long as it does.
fn far_away(settings: &[&str], work: impl FnOnce() + Send + 'static) {
    let settings: Vec<_> = settings.iter().map(ToString::to_string).collect();
    let thread = thread::spawn(move || {
        let ran = |program: &str, arguments: &[&str]| {
            Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
        };
        if unshare(CloneFlags::CLONE_NEWNET).is_err() || !ran("ip", &["link", "set", "lo", "up"]) {
            return eprintln!("not checked: no network of its own (root, and iproute2)");
        }
        if !ran("tc", &["qdisc", "add", "dev", "lo", "root", "netem", "delay", "5ms", "2ms"]) {
            eprintln!("no delay: there is no tc(8), or no netem in this kernel");
        }
        for setting in &settings {
            assert!(ran("sysctl", &["-w", setting]), "{setting}");
        }
        work();
    });
    thread.join().unwrap();
}

fn upgrades_lose_nothing() {
    let site = Site::new();
    site.write("script", "--version 1");
    let (puppet, address) = (puppet(), site.address.to_string());
    let supervisor = site.start(&["--", &puppet, "--bind", &address, "--script", "script"]);
    let load = Load::start(Config { workers: 24, pause: Duration::ZERO, ..site.load() });
    assert!(load.more(100, PATIENCE));
    for version in 2..=5 {
        site.write("script", &format!("--version {version}"));
        let output = supervisor.cli(&["upgrade", "--wait"]);
        assert!(output.status.success(), "{output:?}\n{}", supervisor.log());
        assert!(load.saw(&version.to_string(), PATIENCE), "{}", load.so_far());
    }
    let summary = load.stop();
    println!("{summary}");
    summary.assert_clean();
    for report in supervisor.status().upgrades {
        assert_eq!((report.proof.cut, report.proof.queued_when_gone), (0, 0), "{report:?}");
    }
}

#[test]
fn handshakes_under_way_end_well_without_cookies() {
    far_away(&["net.ipv4.tcp_syncookies=0"], upgrades_lose_nothing);
}

/// A cookie for each: the kernel remembers nothing of a handshake until it is over.
#[test]
fn handshakes_under_way_end_well_with_cookies() {
    far_away(&["net.ipv4.tcp_syncookies=2"], upgrades_lose_nothing);
}

#[test]
fn handshakes_under_way_end_well_where_requests_migrate() {
    far_away(&["net.ipv4.tcp_migrate_req=1"], upgrades_lose_nothing);
}
