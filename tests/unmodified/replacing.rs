//! Another zddsup in the place of the one that steers, while programs bind for themselves.

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use zddsup::control::types::{GenerationPhase, ServicePhase};

use crate::common::load::{Config, Load, Target};
use crate::common::real::installed;
use crate::common::{puppet, request, PATIENCE};
use crate::leaving;
use crate::places::NOBODY;
use crate::stage::Site;
use crate::steering::start;

fn loads(config: &Config) -> [Load; 2] {
    // One that is kept for ever would hold its generation.
    let kept = Config { per_connection: 20, ..config.clone().keep_alive() };
    let loads = [Load::start(config.clone()), Load::start(kept)];
    assert!(loads.iter().all(|load| load.more(20, PATIENCE)));
    loads
}

#[test]
fn between_upgrades_and_while_one_listens_that_is_not_ready() {
    let site = Site::new();
    let supervisor = start(&site, &["--ready", "notify"], "--version 1");
    let loads = loads(&site.load());
    supervisor.self_upgrade();
    site.write("script", "--version 2");
    supervisor.upgrade();
    assert!(loads[0].saw("2", PATIENCE));
    site.write("script", "--version 3\n--ready none\n");
    supervisor.signal(Signal::SIGHUP);
    supervisor.wait_until("the candidate listens", |_| supervisor.log().matches("listens on tcp:").count() == 3);
    supervisor.self_upgrade();
    assert!(loads[0].more(50, PATIENCE));
    assert!(supervisor.cli(&["abort"]).status.success(), "{}", supervisor.log());
    supervisor.wait_settled();
    // Its own calls are caught still: what it binds now too.
    site.write("script", "--version 4");
    supervisor.self_upgrade();
    supervisor.upgrade();
    for load in loads {
        assert!(load.saw("4", PATIENCE), "{}\n{}", load.so_far(), supervisor.log());
        let summary = load.stop();
        summary.assert_clean();
        assert!(!summary.order().contains(&"3"), "{summary}");
    }
}

#[test]
fn where_zddsup_listens_besides() {
    let site = Site::new();
    let supervisor = start(&site, &["--listen", "ADDRESS", "--handoff", "adopt"], "--version 1");
    let loads = loads(&site.load());
    for version in 2..5 {
        supervisor.self_upgrade();
        site.write("script", &format!("--version {version}"));
        supervisor.upgrade();
        supervisor.wait_settled();
    }
    for load in loads {
        assert!(load.saw("4", PATIENCE), "{}\n{}", load.so_far(), supervisor.log());
        load.stop().assert_clean();
    }
}

#[test]
fn a_canary_keeps_its_share_and_its_check() {
    let site = Site::new();
    let supervisor = start(&site, &[], "--version 1");
    let load = Load::start(site.load());
    site.write("script", "--version 2");
    let healthy = site.path("healthy");
    std::fs::write(&healthy, "").unwrap();
    let check = format!("exec:test -e {}", healthy.display());
    let words = [
        "upgrade",
        "--wait=canary",
        "--canary-steps",
        "50%,100%",
        "--canary-interval",
        "300s",
        "--canary-check",
        &check,
    ];
    let output = supervisor.cli(&words);
    assert!(output.status.success(), "{output:?}");
    supervisor.self_upgrade();
    assert_eq!(supervisor.status().phase, ServicePhase::Canary);
    load.stop().assert_clean();
    let load = Load::start(site.load());
    assert!(load.saw("1", PATIENCE) && load.saw("2", PATIENCE), "both go on to get some: {}", load.so_far());
    load.stop().assert_clean();
    // Its check goes on too.
    std::fs::remove_file(&healthy).unwrap();
    supervisor.wait_until("it is given up", |status| status.phase == ServicePhase::Serving);
    assert_eq!(supervisor.serving().number.0, 1);
    supervisor.wait_settled();
}

#[test]
fn in_every_moment_in_which_a_candidate_binds() {
    let site = Site::new();
    let supervisor = start(&site, &[], "--version 1");
    let loads = loads(&site.load());
    for version in 2..10 {
        site.write("script", &format!("--version {version}"));
        supervisor.signal(Signal::SIGHUP);
        supervisor.signal(Signal::SIGUSR2);
        supervisor.wait_until("both are done", |status| {
            status.supervisor.replaced == version - 1
                && status.serving.is_some_and(|serving| serving.0 >= u32::try_from(version).unwrap())
        });
        supervisor.wait_settled();
    }
    for load in loads {
        assert!(load.saw("9", PATIENCE), "{}\n{}", load.so_far(), supervisor.log());
        load.stop().assert_clean();
    }
}

#[test]
fn an_observed_drain_goes_on_until_the_last_connection_is_gone() {
    let site = Site::new();
    let supervisor = start(&site, &[], "--version 1");
    let old = std::net::TcpStream::connect(site.address).unwrap();
    supervisor.wait_until("it is seen", |status| status.generations.iter().any(|one| one.connections == Some(1)));
    site.write("script", "--version 2");
    supervisor.upgrade();
    supervisor.self_upgrade();
    supervisor.wait_until("it drains", |status| {
        status.generations.iter().any(|one| one.phase == GenerationPhase::Draining && one.connections == Some(1))
    });
    drop(old);
    supervisor.wait_settled();
}

#[test]
fn what_waits_in_a_queue_that_is_kept_is_served_by_the_next() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("not checked: only root can become another user");
    }
    let site = Site::new();
    let supervisor = leaving::start(&site, &NOBODY);
    assert!(crate::common::try_request(site.address, "/hang").is_ok());
    let clients = leaving::waiting(&site, 10);
    site.write("script", "--version 2");
    supervisor.signal(Signal::SIGHUP);
    supervisor.wait_until("its socket is kept", |status| status.upgrades.iter().any(|report| report.proof.kept == 10));
    supervisor.wait_settled();
    supervisor.signal(Signal::SIGUSR2);
    supervisor.wait_until("it is replaced", |status| status.supervisor.replaced == 1);
    site.write("script", "--version 3");
    supervisor.signal(Signal::SIGHUP);
    leaving::answered(clients, "version=3 ", &supervisor);
}

#[test]
fn after_a_crash_what_waited_meanwhile_is_served() {
    let site = Site::new();
    let supervisor = start(&site, &["--restart-limit", "off"], "--version 1");
    site.write("script", "--version 2\n--exit-before-ready 3");
    kill(Pid::from_raw(supervisor.serving().pid.unwrap()), Signal::SIGKILL).unwrap();
    supervisor.wait_until("it is tried again", |status| status.restarts > 1);
    let load = Load::start(site.load());
    supervisor.self_upgrade();
    site.write("script", "--version 3");
    assert!(load.saw("3", PATIENCE), "{}\n{}", load.so_far(), supervisor.log());
    load.stop().assert_clean();
}

#[test]
fn unix_sockets_and_their_files() {
    let site = Site::new();
    site.write("script", "--version 1");
    let puppet = puppet();
    let supervisor = site.start(&["--", &puppet, "--bind", "unix:web.sock", "--script", "script"]);
    let config = Config { workers: 2, limit: PATIENCE * 3, ..Config::new(Target::Unix(site.path("web.sock"))) };
    let loads = loads(&config);
    for version in 2..5 {
        supervisor.self_upgrade();
        site.write("script", &format!("--version {version}"));
        supervisor.upgrade();
        supervisor.self_upgrade();
        supervisor.wait_settled();
    }
    for load in loads {
        assert!(load.saw("4", PATIENCE));
        load.stop().assert_clean();
    }
    supervisor.signal(Signal::SIGTERM);
    let mut supervisor = supervisor;
    assert!(supervisor.wait().success());
    let left = std::fs::read_dir(site.dir.path()).unwrap().flatten().filter(|entry| {
        let name = entry.file_name().into_string().unwrap();
        name.starts_with(".zddsup") || name == "web.sock"
    });
    assert_eq!(left.count(), 0);
}

#[test]
fn a_port_that_the_kernel_chose_is_kept() {
    let site = Site::new();
    site.write("script", "--version 1");
    let puppet = puppet();
    let supervisor = site.start(&["--", &puppet, "--bind", "127.0.0.1:0", "--script", "script"]);
    let address = supervisor.address();
    supervisor.self_upgrade();
    site.write("script", "--version 2");
    supervisor.upgrade();
    supervisor.wait_settled();
    assert_eq!(supervisor.address(), address);
    assert!(request(address, "/").contains("version=2 "));
}

/// Its workers bind and accept in the middle of it all.
#[test]
fn nginx_reloads_and_is_upgraded_across_it() {
    if !installed("nginx", &["nginx", "-v"]) {
        return;
    }
    let site = Site::new();
    let conf = |version: u32| {
        format!(
            "daemon off; worker_processes 2; pid SITE/nginx.pid; error_log stderr;\nevents {{}}\nhttp {{ access_log off; server {{ \
             listen ADDRESS; location / {{ return 200 'version={version} x'; }} }} }}\n"
        )
        .replace("SITE", &site.dir.path().display().to_string())
    };
    site.write("nginx.conf", &conf(1));
    let path = site.path("nginx.conf").display().to_string();
    let supervisor = site.start(&["--", "nginx", "-c", &path]);
    let loads = loads(&site.load());
    for version in 2..5 {
        supervisor.self_upgrade();
        site.write("nginx.conf", &conf(version));
        supervisor.upgrade();
        for load in &loads {
            assert!(load.saw(&version.to_string(), PATIENCE), "{}\n{}", load.so_far(), supervisor.log());
        }
    }
    for load in loads {
        load.stop().assert_clean();
    }
}
