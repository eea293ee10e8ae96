//! Making children, one test at a time.

use std::fs::File;
use std::future::Future;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use zddsup::core::End;
use zddsup::process::program::Program;
use zddsup::process::reaper::Reaper;
use zddsup::process::spawn::{spawn, Launch, SpawnError, Spawned};

static TURN: Mutex<()> = Mutex::new(());

/// Runs a test when it is its turn.
pub fn alone<T>(test: impl Future<Output = T>) -> T {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), test).await.expect("hangs") })
}

pub fn program(name: impl AsRef<Path>) -> Arc<Program> {
    Arc::new(Program::resolve(name.as_ref().as_os_str(), None, Path::new("/")).unwrap())
}

/// What runs `program` with these arguments, with an environment of PATH only.
pub fn launch(program: &Arc<Program>, args: &[&str]) -> Launch {
    let name = program.found().as_os_str().to_owned();
    Launch {
        program: program.clone(),
        recorded: false,
        args: std::iter::once(name).chain(args.iter().map(Into::into)).collect(),
        env: vec![("PATH".into(), "/usr/local/bin:/usr/bin:/bin".into())],
        cgroup: None,
        directory: "/".into(),
        fds: Vec::new(),
        stdout: None,
        stderr: None,
        identity: None,
        umask: None,
        limits: Vec::new(),
        nice: None,
        oom_score_adj: None,
        listen_pid: false,
        trap: false,
    }
}

pub fn shell(script: &str) -> Launch {
    launch(&program("/bin/sh"), &["-c", script])
}

/// Waits for its end, as the supervisor does on SIGCHLD.
pub async fn end(spawned: Spawned, reaper: &Reaper) -> End {
    spawned.pidfd.exited().await.unwrap();
    reaper.reap();
    spawned.end.await.unwrap()
}

/// Runs it to its end, and gives what it wrote to its stdout.
pub async fn stdout_of(mut launch: Launch) -> (End, String) {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    launch.stdout = Some(write);
    let reaper = Reaper::new();
    let spawned = spawn(launch, &reaper).await.unwrap();
    let end = end(spawned, &reaper).await;
    (end, read_all(read))
}

pub fn read_all(fd: OwnedFd) -> String {
    let mut text = String::new();
    File::from(fd).read_to_string(&mut text).unwrap();
    text
}

/// Why it cannot be started. Nothing may be left of it.
pub async fn failure(launch: Launch) -> String {
    let error: SpawnError = spawn(launch, &Reaper::new()).await.unwrap_err();
    assert_eq!(nix::sys::wait::waitpid(None, None), Err(nix::errno::Errno::ECHILD), "it was not reaped");
    error.to_string()
}
