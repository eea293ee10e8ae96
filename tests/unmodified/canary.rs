//! A share of new connections for the new version, before it gets all of them.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Output};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};
use zddsup::control::types::{GenerationPhase, ServicePhase, UpgradePhase, UpgradeResult};

use crate::common::load::{Failure, Load};
use crate::common::real::installed;
use crate::common::{processes_with, puppet, request, Setup, Supervisor, PATIENCE};
use crate::stage::Site;
use crate::steering::start;

const VERSION_1: &str = "--version 1";
const VERSION_2: &str = "--version 2";

/// A site with version 1, and version 2 in its canary.
fn in_canary(flags: &[&str], options: &[&str]) -> (Site, Supervisor) {
    let site = Site::new();
    let supervisor = start(&site, flags, VERSION_1);
    begin(&site, &supervisor, options);
    (site, supervisor)
}

fn begin(site: &Site, supervisor: &Supervisor, options: &[&str]) {
    site.write("script", VERSION_2);
    let words: Vec<_> = ["upgrade", "--wait=canary"].iter().chain(options).copied().collect();
    let output = supervisor.cli(&words);
    assert!(output.status.success(), "{output:?}\n{}", supervisor.log());
    assert!(text(&output.stdout).contains("gets"), "{output:?}");
    assert_eq!(supervisor.status().phase, ServicePhase::Canary);
}

/// Somebody who waits for the result of an upgrade.
fn waiting(supervisor: &Supervisor, options: &[&str]) -> Child {
    let words: Vec<_> = ["upgrade"].iter().chain(options).copied().collect();
    supervisor.cli_command(&words).stderr(std::process::Stdio::piped()).spawn().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn ends_with(waiting: Child, code: i32, words: &str) -> Output {
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    assert!(text(&output.stderr).contains(words), "no {words:?} in {}", text(&output.stderr));
    output
}

/// A connection from this address of the loopback network.
fn connect_from(source: &str, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::new(source.parse().unwrap(), 0).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.into()
}

fn ask(stream: &mut TcpStream) -> String {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = [0; 4096];
    let read = stream.read(&mut answer).unwrap();
    text(&answer[..read])
}

/// Of so many connections, those that version 2 answers.
fn new_ones(address: SocketAddr, connections: usize) -> usize {
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let new = move |_: &usize| request(address, "/").contains("version=2 ");
            std::thread::spawn(move || (0..connections / 4).filter(new).count())
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).sum()
}

/// Five standard deviations of the binomial distribution either way: one run in a million is outside.
#[track_caller]
fn assert_share(percent: u32, address: SocketAddr) {
    let (connections, share) = (4000, f64::from(percent) / 100.0);
    let (mean, most) = (4000.0 * share, 5.0 * (4000.0 * share * (1.0 - share)).sqrt());
    let new = new_ones(address, connections);
    println!("{percent}%: {new} of {connections}, expected {mean} +- {most:.0}");
    let off = (f64::from(u32::try_from(new).unwrap()) - mean).abs();
    assert!(off <= most, "{new} of {connections}, expected {mean} +- {most:.0}");
}

#[test]
fn the_share_is_as_asked() {
    let (site, supervisor) = in_canary(&[], &["--canary", "5%"]);
    let status = supervisor.status();
    assert_eq!((status.serving.unwrap().0, status.generations[0].phase), (1, GenerationPhase::Canary));
    let canary = status.upgrades[0].canary.clone().unwrap();
    assert_eq!((canary.share.to_string().as_str(), canary.by_hand), ("5%", true));
    assert_share(5, site.address);
    assert!(supervisor.cli(&["abort", "--wait"]).status.success(), "{}", supervisor.log());
    assert_eq!(new_ones(site.address, 200), 0);
    begin(&site, &supervisor, &["--canary", "20%"]);
    assert_share(20, site.address);
    assert!(supervisor.cli(&["promote", "--wait"]).status.success(), "{}", supervisor.log());
    assert_eq!(new_ones(site.address, 200), 200);
    supervisor.wait_settled();
}

#[test]
fn a_network_is_served_by_the_new_version_alone() {
    let (site, supervisor) = in_canary(&[], &["--canary-from", "127.0.0.2/32", "--canary-from", "10.0.0.0/8"]);
    let from = |source| ask(&mut connect_from(source, site.address));
    for _ in 0..50 {
        assert!(from("127.0.0.2").contains("version=2 "));
        assert!(from("127.0.0.1").contains("version=1 "));
        assert!(from("127.0.0.3").contains("version=1 "));
    }
    let output = supervisor.cli(&["abort"]);
    assert!(output.status.success() && text(&output.stdout).contains("abort"), "{output:?}");
    for _ in 0..50 {
        assert!(from("127.0.0.2").contains("version=1 "));
    }
    supervisor.wait_settled();
}

#[test]
fn ipv6_networks_too() {
    let dir = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let supervisor = Setup::within(dir, ["--", &puppet(), "--bind", "[::1]:0"]).start();
    let address = supervisor.address();
    let canary = |from| {
        let output = supervisor.cli(&["upgrade", "--wait=canary", "--canary-from", from]);
        assert!(output.status.success(), "{output:?}\n{}", supervisor.log());
    };
    canary("2001:db8::/32");
    assert!((0..50).all(|_| request(address, "/").contains("generation=1")));
    assert!(supervisor.cli(&["abort"]).status.success(), "{}", supervisor.log());
    canary("::/8");
    assert!((0..50).all(|_| request(address, "/").contains("generation=3")));
    assert!(supervisor.cli(&["promote", "--wait"]).status.success(), "{}", supervisor.log());
}

/// What the new one has it finishes; the old one has all that is new, and nothing fails.
#[test]
fn an_abort_under_load_loses_nothing() {
    let site = Site::new();
    let supervisor = start(&site, &[], VERSION_1);
    let first = supervisor.serving();
    let loads = [Load::start(site.load()), Load::start(site.load().keep_alive())];
    site.write("script", VERSION_2);
    let upgrade = waiting(&supervisor, &["--canary", "30%", "--canary-from", "127.0.0.2"]);
    assert!(loads[0].saw("2", PATIENCE), "{}", supervisor.log());
    let mut held = connect_from("127.0.0.2", site.address);
    assert!(ask(&mut held).contains("version=2 "));
    assert!(supervisor.cli(&["abort"]).status.success(), "{}", supervisor.log());
    ends_with(upgrade, 8, "somebody asked for it; the old version (generation 1) never stopped serving");
    // What was on its way when it was asked may still be the new one's.
    assert!(loads[0].more(20, PATIENCE));
    assert_eq!(new_ones(site.address, 100), 0);
    supervisor.wait_until("its connection is seen", |status| {
        let left =
            |g: &zddsup::control::types::Generation| g.phase == GenerationPhase::Draining && g.connections > Some(0);
        status.generations.iter().any(left)
    });
    assert!(ask(&mut held).contains("version=2 "));
    drop(held);
    for load in &loads {
        assert!(load.more(20, PATIENCE));
    }
    for load in loads {
        load.stop().assert_clean();
    }
    let status = supervisor.wait_settled();
    assert_eq!(supervisor.serving().pid, first.pid);
    assert_eq!(status.upgrades[0].result, Some(UpgradeResult::Aborted));
    assert_eq!(status.ended.get(&UpgradeResult::Aborted), Some(&1));
}

/// A server that cuts what it has when it is told to stop: a canary that is given up is left alone until it has nothing.
#[test]
fn python_is_tried_and_given_up_and_tried_again() {
    if !installed("python3", &["/usr/bin/python3", "--version"]) {
        return;
    }
    let site = Site::new();
    site.write("index.html", "hello\n");
    let command = ["--", "/usr/bin/python3", "-m", "http.server", "--bind", "127.0.0.1", "PORT"];
    let supervisor = site.start(&command);
    let loads = [Load::start(site.load()), Load::start(site.load())];
    for ending in ["abort", "promote", "abort", "promote"] {
        let output = supervisor.cli(&["upgrade", "--wait=canary", "--canary", "50%"]);
        assert!(output.status.success(), "{output:?}\n{}", supervisor.log());
        for load in &loads {
            assert!(load.more(20, PATIENCE));
        }
        let output = supervisor.cli(&[ending, "--wait"]);
        assert!(output.status.success(), "{output:?}\n{}", supervisor.log());
    }
    for load in loads {
        load.stop().assert_clean();
    }
    assert_eq!(supervisor.wait_settled().serving.unwrap().0, 5);
}

#[test]
fn a_promotion_under_load_loses_nothing_bakes_and_is_rolled_back_at_once() {
    let site = Site::new();
    let supervisor = start(&site, &["--bake", "60s"], VERSION_1);
    let loads = [Load::start(site.load()), Load::start(site.load().keep_alive())];
    site.write("script", VERSION_2);
    let upgrade = waiting(&supervisor, &["--canary", "20%"]);
    for load in &loads[..1] {
        assert!(load.saw("2", PATIENCE), "{}", supervisor.log());
    }
    let promote = supervisor.cli_command(&["promote"]).spawn().unwrap();
    supervisor.wait_until("it bakes", |status| status.phase == ServicePhase::Baking);
    assert_eq!(new_ones(site.address, 100), 100);
    assert!(supervisor.cli(&["rollback"]).status.success(), "{}", supervisor.log());
    assert_eq!(new_ones(site.address, 100), 0);
    ends_with(upgrade, 7, "did not stay");
    assert_eq!(promote.wait_with_output().unwrap().status.code(), Some(7));
    for load in loads {
        load.stop().assert_clean();
    }
    supervisor.wait_settled();
}

#[test]
fn steps_follow_each_other_each_with_its_check() {
    let site = Site::new();
    let supervisor = start(&site, &[], VERSION_1);
    let load = Load::start(site.load());
    site.write("script", VERSION_2);
    let steps = ["--canary-steps", "5%,10%,50%,100%", "--canary-interval", "300ms"];
    let check = "exec:echo \"$ZDDSUP_GENERATION\" >> checks";
    let words: Vec<_> = ["upgrade", "--wait", "--canary-check", check].iter().chain(&steps).copied().collect();
    // Where a check runs is where zddsup does.
    let output = supervisor.cli(&words);
    assert!(output.status.success(), "{output:?}\n{}", supervisor.log());
    load.stop().assert_clean();
    assert_eq!(new_ones(site.address, 100), 100);
    let log = supervisor.log();
    let shares: Vec<_> = ["gets 5% of", "gets 10% of", "gets 50% of"].map(|share| log.find(share).unwrap()).into();
    assert!(shares.is_sorted(), "{log}");
    let report = supervisor.status().upgrades[0].clone();
    let canary = report.canary.unwrap();
    assert_eq!((canary.step, canary.steps, canary.share.to_string().as_str()), (3, 3, "50%"));
    let phase = report.phases.iter().find(|time| time.phase == UpgradePhase::Canary).unwrap();
    // Three times 300 ms, measured by another clock.
    assert!(phase.ms >= 800, "{:?}", report.phases);
    let checks = std::fs::read_to_string(site.path("checks")).unwrap();
    assert!(checks.lines().count() >= 3 && checks.lines().all(|line| line == "2"), "{checks:?}");
}

/// A step is not over before its check is, however long that takes.
#[test]
fn a_step_waits_for_its_check() {
    let site = Site::new();
    let supervisor = start(&site, &["--probe-timeout", "50s"], VERSION_1);
    site.write("script", VERSION_2);
    let steps = ["--canary-steps", "5%,100%", "--canary-interval", "1ms"];
    let check = ["--canary-check", "exec:until [ -e go ]; do sleep 0.05; done"];
    let upgrade = waiting(&supervisor, &[&steps[..], &check].concat());
    supervisor.wait_until("it is in its canary", |status| status.phase == ServicePhase::Canary);
    // Far more than its step lasts.
    assert!(new_ones(site.address, 400) < 200);
    assert_eq!(supervisor.status().phase, ServicePhase::Canary);
    site.write("go", "");
    ends_with(upgrade, 0, "");
    assert_eq!(new_ones(site.address, 100), 100);
}

/// The incumbent is the same process as before, serves, and all of the new version is gone.
#[track_caller]
fn untouched(site: &Site, supervisor: &Supervisor, first: Option<i32>) {
    let status = supervisor.wait_settled();
    assert_eq!((status.phase, supervisor.serving().pid), (ServicePhase::Serving, first));
    assert_eq!(new_ones(site.address, 100), 0);
}

#[test]
fn a_check_that_fails_ends_it_with_its_words() {
    let site = Site::new();
    let supervisor = start(&site, &[], VERSION_1);
    let (load, first) = (Load::start(site.load()), supervisor.serving().pid);
    site.write("script", VERSION_2);
    // All of it is read, more than a pipe holds, and its last lines are told.
    let check = "exec:seq 99999; echo out; echo 'errors: 7%' >&2; exit 3";
    let upgrade = waiting(&supervisor, &["--canary", "20%", "--canary-check", check]);
    ends_with(
        upgrade,
        8,
        "its check exec:seq 99999; echo out; echo 'errors: 7%' >&2; exit 3: the command exited with status 3",
    );
    let report = supervisor.status().upgrades[0].clone();
    assert_eq!((report.result, report.old_kept_serving), (Some(UpgradeResult::Aborted), true));
    assert!(report.reason.as_ref().unwrap().ends_with("it said: 99999 | out | errors: 7%"), "{report:?}");
    untouched(&site, &supervisor, first);
    load.stop().assert_clean();
}

#[test]
fn a_check_by_http_tells_its_status() {
    let site = Site::new();
    let supervisor = start(&site, &[], VERSION_1);
    let first = supervisor.serving().pid;
    let monitor = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/errors", monitor.local_addr().unwrap());
    let answers = std::thread::spawn(move || {
        for status in ["200 OK", "418 I'm a teapot"] {
            let (mut stream, _) = monitor.accept().unwrap();
            let mut request = [0; 4096];
            let mut read = 0;
            while !request[..read].ends_with(b"\r\n\r\n") {
                read += stream.read(&mut request[read..]).unwrap();
            }
            stream.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").as_bytes()).unwrap();
        }
    });
    site.write("script", VERSION_2);
    let steps = ["--canary-steps", "20%,40%", "--canary-interval", "400ms"];
    let upgrade = waiting(&supervisor, &[&steps[..], &["--canary-check", &url]].concat());
    ends_with(upgrade, 8, "answered with status 418");
    answers.join().unwrap();
    untouched(&site, &supervisor, first);
}

#[test]
fn its_end_ends_it() {
    let (site, supervisor) = in_canary(&[], &["--canary-from", "127.0.0.2"]);
    let first = supervisor.serving().pid;
    let candidate = supervisor.status().generations[0].pid.unwrap();
    kill(Pid::from_raw(candidate), Signal::SIGKILL).unwrap();
    let report = supervisor.wait_for_report("it is over", |report| report.result == Some(UpgradeResult::Aborted));
    assert!(report.reason.unwrap().contains("was killed by SIGKILL in its canary"));
    assert!(ask(&mut connect_from("127.0.0.2", site.address)).contains("version=1 "));
    untouched(&site, &supervisor, first);
}

#[test]
fn its_probe_goes_on_and_ends_it() {
    let site = Site::new();
    site.write("healthy", "");
    let supervisor = start(&site, &["--ready", "exec:test -e healthy || { echo sick; false; }"], VERSION_1);
    let first = supervisor.serving().pid;
    begin(&site, &supervisor, &["--canary-steps", "10%,20%", "--canary-interval", "1s"]);
    std::fs::remove_file(site.path("healthy")).unwrap();
    let report = supervisor.wait_for_report("it is over", |report| report.result == Some(UpgradeResult::Aborted));
    let reason = report.reason.unwrap();
    assert!(reason.contains("its probe exec:") && reason.ends_with("it said: sick"), "{reason}");
    untouched(&site, &supervisor, first);
}

/// The old one is lost: the new one is there, and takes all.
#[test]
fn the_end_of_the_old_one_is_the_switch() {
    let site = Site::new();
    let supervisor = start(&site, &[], VERSION_1);
    let (load, first) = (Load::start(site.load()), supervisor.serving().pid.unwrap());
    site.write("script", VERSION_2);
    let upgrade = waiting(&supervisor, &["--canary", "20%"]);
    assert!(load.saw("2", PATIENCE), "{}", supervisor.log());
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    ends_with(upgrade, 0, "");
    assert_eq!(new_ones(site.address, 200), 200);
    let summary = load.stop();
    assert_eq!(summary.failures.get(&Failure::Refused), None, "{summary}");
    let status = supervisor.wait_settled();
    assert_eq!((status.serving.unwrap().0, status.restarts), (2, 0));
    assert!(status.upgrades[0].reason.as_ref().unwrap().contains("generation 1 was killed by SIGKILL"), "{status:?}");
    // The version before can be gone back to.
    assert!(supervisor.cli(&["rollback"]).status.success(), "{}", supervisor.log());
}

#[test]
fn a_rollback_is_an_abort_and_what_waits_goes_with_it() {
    let (site, supervisor) = in_canary(&[], &["--canary", "50%"]);
    let first = supervisor.serving().pid;
    supervisor.signal(Signal::SIGHUP);
    supervisor.wait_until("one waits", |status| status.pending.is_some());
    assert!(supervisor.cli(&["rollback"]).status.success(), "{}", supervisor.log());
    untouched(&site, &supervisor, first);
}

#[test]
fn one_that_is_not_ready_can_be_given_up_too() {
    let site = Site::new();
    let supervisor = start(&site, &["--ready", "notify"], VERSION_1);
    let first = supervisor.serving().pid;
    site.write("script", "--version 2\n--ready none");
    let upgrade = waiting(&supervisor, &["--canary", "50%"]);
    supervisor.wait_until("it starts", |status| status.generations.iter().any(|g| g.number.0 == 2 && g.pid.is_some()));
    let promote = supervisor.cli(&["promote"]);
    assert_eq!(promote.status.code(), Some(6), "{promote:?}");
    assert!(supervisor.cli(&["abort"]).status.success(), "{}", supervisor.log());
    ends_with(upgrade, 8, "given up before the switch");
    untouched(&site, &supervisor, first);
}

#[test]
fn what_is_asked_meanwhile_is_one_more() {
    let (site, supervisor) = in_canary(&[], &["--canary", "10%"]);
    site.write("script", "--version 3");
    for _ in 0..20 {
        supervisor.signal(Signal::SIGHUP);
    }
    let status = supervisor.wait_until("one waits", |status| status.pending.is_some());
    assert!(status.pending.unwrap().contains("canary of generation 2"));
    assert!(supervisor.cli(&["promote"]).status.success(), "{}", supervisor.log());
    supervisor.wait_until("the third serves", |status| status.serving.is_some_and(|serving| serving.0 == 3));
    let status = supervisor.wait_settled();
    assert_eq!((status.serving.unwrap().0, status.upgrades.len()), (3, 3), "{status:#?}");
    assert!(request(site.address, "/").contains("version=3 "));
}

#[test]
fn a_stop_in_a_canary_finishes_both() {
    let (site, mut supervisor) = in_canary(&[], &["--canary-from", "127.0.0.2"]);
    let slow = |mut stream: TcpStream| {
        stream.write_all(b"GET /slow?ms=500 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        std::thread::spawn(move || {
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        })
    };
    let [old, new] = ["127.0.0.1", "127.0.0.2"].map(|source| connect_from(source, site.address));
    // Both have accepted it before they are told.
    let [mut old, mut new] = [old, new];
    assert!(ask(&mut old).contains("version=1 ") && ask(&mut new).contains("version=2 "));
    let [old, new] = [slow(old), slow(new)];
    supervisor.signal(Signal::SIGTERM);
    assert!(supervisor.wait().success(), "{}", supervisor.log());
    assert!(old.join().unwrap().contains("version=1 ") && new.join().unwrap().contains("version=2 "));
}

#[test]
fn a_supervisor_killed_in_a_canary_is_succeeded_and_the_old_one_serves() {
    let (site, first) = in_canary(&[], &["--canary", "30%"]);
    let loads = [Load::start(site.load()), Load::start(site.load().keep_alive())];
    let tried = first.status().generations[0].pid.unwrap();
    assert!(loads[0].saw("2", PATIENCE) && loads[0].saw("1", PATIENCE));
    first.kill_alone();
    site.write("script", "--version 3\n--ready delay-ms=1000");
    let words = ["--", &puppet(), "--bind", "ADDRESS", "--script", "script"]
        .map(|word| word.replace("ADDRESS", &site.address.to_string()));
    let ready = ["--ready".to_owned(), "notify".to_owned()];
    let second = Setup::within(std::sync::Arc::clone(&site.dir), ready.into_iter().chain(words)).spawn();
    second.wait_until("the old one serves", |status| status.serving.is_some_and(|serving| serving.0 == 1));
    assert!(loads[0].saw("3", PATIENCE), "{}", second.log());
    for load in loads {
        load.stop().assert_clean();
    }
    let status = second.wait_settled();
    assert_eq!(status.serving.unwrap().0, 3);
    assert!(!processes_with("ZDDSUP_GENERATION=2\0").contains(&tried), "the canary is still there");
}

#[test]
fn where_only_one_of_both_listens_it_has_everything() {
    let site = Site::new();
    let other = Site::new();
    let also = format!("--also-bind {}", other.address);
    let supervisor = start(&site, &[], &format!("{VERSION_1}\n{also}"));
    // The new one does not listen there any more.
    begin(&site, &supervisor, &["--canary", "50%", "--canary-from", "127.0.0.0/8"]);
    assert_eq!((new_ones(other.address, 100), new_ones(site.address, 100)), (0, 100));
    assert!(supervisor.cli(&["promote", "--wait"]).status.success(), "{}", supervisor.log());
    // And now again, where the old one does not.
    site.write("script", &format!("{VERSION_1}\n{also}"));
    let output = supervisor.cli(&["upgrade", "--wait=canary", "--canary", "1%"]);
    assert!(output.status.success(), "{output:?}\n{}", supervisor.log());
    assert!(request(other.address, "/").contains("generation=3"));
    assert!(supervisor.cli(&["abort", "--wait"]).status.success(), "{}", supervisor.log());
    assert_eq!(new_ones(site.address, 100), 100);
    supervisor.wait_until("nobody is left there", |status| status.listeners.len() == 1);
    assert!(TcpStream::connect(other.address).is_err());
}

#[test]
fn run_may_say_how_every_upgrade_is_tried() {
    let site = Site::new();
    let steps = ["--canary-steps", "50%,100%", "--canary-interval", "200ms"];
    let supervisor = start(&site, &steps, VERSION_1);
    site.write("script", VERSION_2);
    supervisor.signal(Signal::SIGHUP);
    supervisor.wait_until("the second serves", |status| status.serving.is_some_and(|serving| serving.0 == 2));
    assert!(supervisor.wait_settled().upgrades[0].canary.is_some());
    let output = supervisor.cli(&["upgrade", "--no-canary"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(supervisor.wait_settled().upgrades[0].canary, None);
}

#[test]
fn where_sockets_are_shared_it_is_refused_before_anything_is_spawned() {
    let supervisor = Supervisor::start(["--listen", "127.0.0.1:0", "--", &puppet()]);
    for words in [["upgrade", "--canary", "5%"], ["upgrade", "--canary-from", "127.0.0.2"]] {
        let output = supervisor.cli(&words);
        assert_eq!(output.status.code(), Some(6), "{output:?}");
        let said = text(&output.stderr);
        assert!(said.contains("share one socket") && said.contains("--handoff adopt"), "{said}");
    }
    assert_eq!(supervisor.status().generations.len(), 1);
    for (words, code, said) in [
        (&["promote"][..], 6, "--canary 5%"),
        (&["abort"], 6, "zddsup rollback"),
        (&["upgrade", "--canary", "100%"], 2, "smaller share"),
        (&["upgrade", "--canary", "5%", "--canary-interval", "3s"], 2, "--canary-steps"),
    ] {
        let output = supervisor.cli(words);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(text(&output.stderr).contains(said), "{output:?}");
    }
    // UDP sockets of zddsup are shared always.
    for flags in [&[][..], &["--switch", "steered", "--listen", "udp=udp://127.0.0.1:0"]] {
        let words = [&["--listen", "tcp=127.0.0.1:0", "--canary", "5%"][..], flags, &["--", "true"]].concat();
        let mut refused = Setup::new(words).spawn();
        assert_eq!(refused.wait().code(), Some(2));
        assert!(refused.log().contains("--handoff adopt"), "{}", refused.log());
    }
}
