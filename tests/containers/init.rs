//! PID 1: orphans, signals, no terminal.

use nix::sys::signal::Signal;

use crate::common::wait_for;
use crate::stage::Container;

#[test]
fn orphans_are_reaped_and_those_of_no_generation_are_left_alone() {
    let Some(pod) = Container::new().puppet(&[], "--version 1\n--spawn-grandchild") else { return };
    let is_zombie = |stat: &procfs::process::Stat| stat.state == 'Z';
    // A shell of `docker exec` that leaves fifty behind, and one that stays.
    let script = "for i in $(seq 50); do (sleep 0.1 & exec 2>&-) & done; setsid sleep 1000 & exit 0";
    assert!(pod.command("sh", &["-c", script]).stdout(std::process::Stdio::null()).status().unwrap().success());
    let sleeping = || pod.children().into_iter().filter(|stat| stat.comm == "sleep" && stat.state != 'Z');
    // The other one is an orphan of the generation.
    wait_for("all but two are gone", || sleeping().count() == 2 && !pod.children().iter().any(is_zombie));
    let before: Vec<_> = sleeping().map(|stat| stat.pid).collect();
    pod.write("script", "--version 2\n--spawn-grandchild");
    pod.must(&["upgrade", "--wait"]);
    pod.must(&["restart", "--wait"]);
    let after: Vec<_> = sleeping().map(|stat| stat.pid).collect();
    let stayed = after.iter().filter(|pid| before.contains(pid)).count();
    assert_eq!((stayed, after.len()), (1, 2), "{before:?} {after:?}\n{}", pod.log());
    wait_for("no zombie is left", || !pod.children().iter().any(is_zombie));
}

#[test]
fn every_signal_does_what_it_says() {
    for (signal, from_inside) in [("TERM", true), ("INT", true), ("QUIT", false), ("TERM", false)] {
        let Some(mut pod) = Container::new().puppet(&[], "--version 1") else { return };
        if from_inside {
            let _killed_with_all_else = pod.command("sh", &["-c", &format!("kill -s {signal} 1")]).status();
        } else {
            pod.signal(format!("SIG{signal}").parse().unwrap());
        }
        assert_eq!(pod.wait().code(), Some(0), "{signal}: {}", pod.log());
    }
    let Some(pod) = Container::new().puppet(&[], "--version 1") else { return };
    pod.signal(Signal::SIGUSR1);
    wait_for("it prints its state", || pod.log().contains("generation 1 serves"));
    pod.signal(Signal::SIGHUP);
    wait_for("it is upgraded", || pod.must(&["status", "--ready"]).contains("generation 2 serves"));
    // A tty of its own is not there, so that HUP always means an upgrade.
    assert_eq!(pod.init().stat().unwrap().tty_nr, 0);
    assert!(!pod.command("test", &["-e", "/dev/tty"]).status().unwrap().success());
}

#[test]
fn a_signal_that_would_end_any_other_process_does_not_end_it() {
    let Some(pod) = Container::new().puppet(&[], "--version 1") else { return };
    let harmless = ["PIPE", "PWR", "VTALRM", "PROF", "XCPU", "IO", "ABRT", "TRAP", "34", "64"];
    for signal in harmless {
        assert!(pod.command("sh", &["-c", &format!("kill -{signal} 1")]).status().unwrap().success(), "{signal}");
        let outside =
            std::process::Command::new("kill").args([&format!("-{signal}"), &pod.init().pid.to_string()]).status();
        assert!(outside.unwrap().success(), "{signal}");
    }
    assert!(pod.must(&["status", "--ready"]).contains("generation 1 serves"));
    pod.must(&["upgrade"]);
}
