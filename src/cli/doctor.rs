//! `zddsup doctor`: what this machine lets zddsup do, and what to use where it does not.

use std::fmt::Write as _;
use std::io::Error as IoError;

use clap::Args;

use super::exit::{Exit, Failure};
use super::text;
use crate::doctor::{be_tried, examine, Finding, Verdict};

/// Flags of `zddsup doctor`.
#[derive(Debug, Args)]
pub struct Flags {
    /// Be the process that is tried on.
    #[arg(long, hide = true)]
    trial: bool,
}

/// Tries, and prints what it found.
pub fn run(flags: &Flags) -> Result<Exit, Failure> {
    let failed = |step| move |source: IoError| Failure::System { step, source };
    if flags.trial {
        be_tried().map_err(failed("listen on loopback"))?;
        return Ok(Exit::Done);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed("start tokio"))?;
    let own = std::env::current_exe().map_err(failed("find zddsup's own file"))?;
    let findings = runtime.block_on(examine(&own, &["doctor", "--trial"]));
    text::print(&in_words(&findings))?;
    match findings.iter().filter(|finding| finding.verdict == Verdict::Missing).count() {
        0 => Ok(Exit::Done),
        missing => {
            let line =
                format!("{} missing for programs that bind for themselves", text::count(missing as u64, "thing"));
            Err(Failure::Said { exit: Exit::Failed, line })
        }
    }
}

fn in_words(findings: &[Finding]) -> String {
    let mut shown = String::new();
    for Finding { what, verdict, words } in findings {
        let mark = match verdict {
            Verdict::Works => "ok",
            Verdict::Note => "note",
            Verdict::Missing => "MISSING",
        };
        // Writing to a String cannot fail.
        let _written = writeln!(shown, "  {mark:<8} {what:<22} {words}");
    }
    shown
}
