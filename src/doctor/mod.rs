//! What this machine lets zddsup do, found out by doing it: on loopback, with a process of its own, and nothing is left.
//!
//! What a kernel, a container's profile and a sandbox allow together is written nowhere, so nothing is guessed from versions.

mod steering;
mod trial;

use std::path::Path;

use crate::process::cgroup::Delegated;

const CGROUPS: &str = "cgroup a generation";

/// What is known of one thing that zddsup does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it does.
    pub what: &'static str,
    /// Whether it can.
    pub verdict: Verdict,
    /// With what, or why not, and what to use instead.
    pub words: String,
}

/// Whether something can be had here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It works.
    Works,
    /// It works, and there is something to know.
    Note,
    /// It does not.
    Missing,
}

/// What has been found so far.
#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, what: &'static str, verdict: Verdict, words: impl Into<String>) {
        self.0.push(Finding { what, verdict, words: words.into() });
    }

    /// Gives what was tried, if it works.
    fn tried<T, E: std::fmt::Display>(
        &mut self,
        what: &'static str,
        words: &str,
        instead: &str,
        result: Result<T, E>,
    ) -> Option<T> {
        match result {
            Ok(result) => {
                self.add(what, Verdict::Works, words);
                Some(result)
            }
            Err(error) => {
                let instead = if instead.is_empty() { String::new() } else { format!("; {instead}") };
                self.add(what, Verdict::Missing, format!("{error}{instead}"));
                None
            }
        }
    }
}

/// Tries everything. The program is zddsup's own, and is run with these arguments: it has to call [`be_tried`].
pub async fn examine(program: &Path, args: &[&str]) -> Vec<Finding> {
    let mut findings = Findings::default();
    trial::adoption(&mut findings, program, args).await;
    steering::steering(&mut findings);
    cgroup(&mut findings);
    findings.0
}

/// A unit's is another one than that of whoever asks: to do without is nothing that is missing.
fn cgroup(findings: &mut Findings) {
    match Delegated::find("doctor", true) {
        Ok(delegated) => findings.add(CGROUPS, Verdict::Works, format!("in {}", delegated.directory().display())),
        Err(reason) => {
            findings.add(CGROUPS, Verdict::Note, format!("not where this runs, but process groups: {reason}"));
        }
    }
}

pub use self::trial::be_tried;
