//! The program that is to take this one's place: found as it was when zddsup was started, tried, and executed.

use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::sys::signal::Signal;
use nix::sys::stat::fstat;
use nix::unistd::{execve, Pid};

use super::{STATE_VAR, TRIAL_PASSED, TRIAL_VAR};
use crate::config::start_directory;
use crate::core::End;
use crate::process::program::{Program, ProgramError};
use crate::process::reaper::Reaper;
use crate::supervisor::ending::describe;
use crate::sys::fds;
use crate::sys::pidfd::PidFd;

/// How long the other program may take to say that it can read the state.
const LONGEST_TRIAL: Duration = Duration::from_secs(5);
/// Of what it says if it cannot.
const MOST_WORDS: u64 = 4096;

/// Why another program cannot take this one's place. It goes on.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// Nothing is where this one was found.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// What is there cannot be executed.
    #[error("{program} cannot be executed: {source}")]
    Exec {
        /// Which.
        program: String,
        /// Why not.
        source: io::Error,
    },
    /// It is executed, and says no.
    #[error("{program} cannot go on with this service: {why}")]
    Refused {
        /// Which.
        program: String,
        /// What it said.
        why: String,
    },
    /// The state cannot be written down.
    #[error(transparent)]
    State(#[from] crate::state::StateError),
    /// Something of the system failed.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// It never comes to rest.
    #[error("a generation is being spawned or counted all the time: try again")]
    Busy,
}

/// How the program's file is found: by the name that it was called by, links followed anew. Where that is another one's
/// (a name that somebody made up), by the path that it has now. To be asked at the start.
pub fn own_name() -> OsString {
    let called = std::env::args_os().next().unwrap_or_default();
    let path = std::env::current_exe().map(PathBuf::into_os_string).unwrap_or_default();
    let number = |program: Result<Program, ProgramError>| {
        let found = fstat(program.ok()?.held()).ok()?;
        Some((found.st_dev, found.st_ino))
    };
    if number(find(&called)).is_some_and(|called| Some(called) == number(find(&path))) {
        called
    } else {
        path
    }
}

/// The file as it is now.
pub fn find(own_name: &OsStr) -> Result<Program, ProgramError> {
    Program::resolve(own_name, std::env::var_os("PATH").as_deref(), &start_directory())
}

/// A document in memory that goes by its fd.
pub fn document(bytes: &[u8]) -> Result<File, ReplaceError> {
    let failed = |source| ReplaceError::System { what: "keep the state in memory (memfd_create)", source };
    let fd = memfd_create(c"zddsup-state", MFdFlags::MFD_CLOEXEC).map_err(|errno| failed(errno.into()))?;
    let mut file = File::from(fd);
    file.write_all(bytes).and_then(|()| file.rewind()).map_err(failed)?;
    Ok(file)
}

/// Executes it as a child that only looks whether it could go on with this state. Within a runtime only.
pub async fn tried(program: &Program, state: &[u8], reaper: Reaper) -> Result<(), ReplaceError> {
    let name = program.found().display().to_string();
    let refused = |why: String| ReplaceError::Refused { program: name.clone(), why };
    let mut child = child(program, state)?;
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or(0));
    // The one who reaps tells of its end, as of all others'; it is asked as soon as there is one.
    let end = reaper.watch(pid);
    let held = PidFd::open(pid).map_err(|source| ReplaceError::System { what: "watch the other program", source })?;
    let ended = async {
        let _cannot_be_watched = held.exited().await;
        reaper.reap();
        end.await
    };
    let end = tokio::time::timeout(LONGEST_TRIAL, ended).await;
    let Ok(Ok(end)) = end else {
        let _gone_already = held.signal(Signal::SIGKILL);
        return Err(refused(format!("it did not answer within {LONGEST_TRIAL:?}; is it zddsup?")));
    };
    let said = words(child.stdout.take().map(OwnedFd::from));
    if end == End::Exited(0) && said == TRIAL_PASSED {
        return Ok(());
    }
    let complaint = words(child.stderr.take().map(OwnedFd::from));
    Err(refused(match complaint.lines().next() {
        Some(line) if end != End::Exited(0) => line.strip_prefix("zddsup: ").unwrap_or(line).to_owned(),
        Some(_) | None => format!("it {}, and did not say that it can; is it zddsup?", describe(end)),
    }))
}

fn child(program: &Program, state: &[u8]) -> Result<Child, ReplaceError> {
    let mut args = std::env::args_os();
    Command::new(program.found())
        .arg0(args.next().unwrap_or_default())
        .args(args)
        .env(TRIAL_VAR, "1")
        .stdin(document(state)?)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| ReplaceError::Exec { program: program.found().display().to_string(), source })
}

/// What is in a pipe now.
fn words(pipe: Option<OwnedFd>) -> String {
    let mut said = Vec::new();
    if let Some(pipe) = pipe {
        let _cannot_fail_on_an_open_fd = fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
        let _until_it_is_empty = File::from(pipe).take(MOST_WORDS).read_to_end(&mut said);
    }
    String::from_utf8_lossy(&said).trim().to_owned()
}

/// Executes it in the place of this one, with these fds open. Comes back if that fails.
pub fn execute(program: &Program, state: &[u8], kept: &[i32]) -> Result<Infallible, ReplaceError> {
    let document = document(state)?;
    let name = program.found().display().to_string();
    let failed = |source| ReplaceError::Exec { program: name.clone(), source };
    let text = |text: OsString| CString::new(text.into_vec()).map_err(|error| failed(error.into()));
    let path = text(program.found().as_os_str().to_owned())?;
    let args = std::env::args_os().map(text).collect::<Result<Vec<_>, _>>()?;
    let state_var = (OsString::from(STATE_VAR), OsString::from(document.as_raw_fd().to_string()));
    let env = std::env::vars_os().chain([state_var]).map(|(name, value)| {
        let mut pair = name;
        pair.push("=");
        pair.push(value);
        text(pair)
    });
    let env = env.collect::<Result<Vec<_>, _>>()?;
    let mut kept = kept.to_vec();
    kept.push(document.as_raw_fd());
    let executed = fds::keep_over_exec(&kept, true).and_then(|()| Ok(execve(&path, &args, &env)?));
    let _all_are_open = fds::keep_over_exec(&kept, false);
    executed.map_err(failed)
}
