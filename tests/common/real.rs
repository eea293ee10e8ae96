//! Programs that a machine may lack.

use std::process::{Command, Stdio};

/// Set to 1 where everything must be there: a test that would be skipped fails then.
const REQUIRE: &str = "ZDDSUP_REQUIRE_REAL";

/// Whether a program is there, by a command that succeeds if it is. Where it is not, this says so and the test ends:
///
/// ```ignore
/// if !installed("nginx", &["nginx", "-v"]) {
///     return;
/// }
/// ```
#[must_use]
pub fn installed(name: &str, probe: &[&str]) -> bool {
    let [program, args @ ..] = probe else { panic!("no command to find {name} by") };
    let mut command = Command::new(program);
    command.args(args).env("PATH", path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if command.status().is_ok_and(|status| status.success()) {
        return true;
    }
    skipped(&format!("{name} is not installed"));
    false
}

/// Says why a test is skipped, and fails it where nothing may be.
pub fn skipped(why: &str) {
    assert!(std::env::var_os(REQUIRE).is_none_or(|value| value != "1"), "{why}, and {REQUIRE} is 1");
    println!("skipped: {why}");
}

/// `PATH`, with the directories that Debian has servers in and a user's may lack.
#[must_use]
pub fn path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}
