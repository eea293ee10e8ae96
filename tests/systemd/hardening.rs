//! A printed unit with every directive that it offers: those that are comments as well.

use crate::common::ZDDSUP;
use crate::protocol::Boot;
use crate::stage::Systemd;
use crate::{printed, HERE};

/// `#Directive=` becomes `Directive=`; what is prose stays a comment.
fn tightened(unit: &str) -> String {
    let directive = |line: &str| {
        let word = line.strip_prefix('#')?.split_once('=')?.0;
        word.chars().all(|c| c.is_ascii_alphabetic()).then(|| line[1..].to_owned())
    };
    unit.lines().map(|line| directive(line).unwrap_or_else(|| line.to_owned()) + "\n").collect()
}

fn runs(boot: Boot, flags: &[&str], puppet_flags: &[&str]) {
    let puppet = ["--", "/run/target/examples/puppet", "--script", "/run/stage/script"];
    let unit = printed(&[&["--name", "web"], flags, &puppet, puppet_flags].concat());
    let unit = tightened(&unit).replace(ZDDSUP, "/run/target/zddsup");
    for directive in ["ProtectSystem=strict", "MemoryDenyWriteExecute=yes", "PrivateTmp=yes"] {
        assert!(unit.contains(&format!("\n{directive}\n")), "{unit}");
    }
    let Some(systemd) = boot(&[("web.service", unit), ("web.service.d/test.conf", HERE.to_owned())]) else { return };
    systemd.serves_three_versions("web", 80);
}

fn all_of_it(boot: Boot) {
    // As another user, at a port that only root may bind: with capabilities, or with zddsup's.
    runs(boot, &["--user", "nobody", "--listen", "127.0.0.1:80"], &[]);
    runs(boot, &["--user", "nobody", "--listen", "127.0.0.1:80", "--handoff", "adopt"], &["--bind", "127.0.0.1:80"]);
}

#[test]
fn all_of_the_hardening_is_allowed() {
    all_of_it(Systemd::boot);
}

#[test]
fn all_of_the_hardening_is_allowed_under_a_newer_systemd() {
    all_of_it(Systemd::boot_newer);
}
