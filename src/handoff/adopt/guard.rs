//! A socket's file that others may remove, put back at once: a version that ends removes that of the version after it, and
//! one that starts that of the version before. On a thread of its own, as nobody connects meanwhile.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::file::SocketFile;

/// Guards a file until it is dropped.
#[derive(Debug)]
pub struct Guard {
    file: Arc<SocketFile>,
    /// Its end tells the thread to end.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    /// From now on. If it is not there it is put back first.
    pub fn new(file: &Arc<SocketFile>) -> io::Result<Guard> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        inotify.add_watch(&file.directory_path(), AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM)?;
        let (stop, stopped) = UnixStream::pair()?;
        let guarded = Arc::clone(file);
        let thread = thread::Builder::new().name("guard".to_owned()).spawn(move || {
            let watched = guarded.view().act(|| watch(&guarded, &inotify, &stopped));
            if let Err(error) = watched.and_then(|watched| watched) {
                tracing::warn!("{guarded} is not put back if somebody removes it: {error}");
            }
        })?;
        Ok(Guard { file: Arc::clone(file), stop: Some(stop), thread: Some(thread) })
    }

    /// Whether it is for this file.
    #[must_use]
    pub fn is_for(&self, file: &Arc<SocketFile>) -> bool {
        Arc::ptr_eq(&self.file, file)
    }
}

fn watch(file: &SocketFile, inotify: &Inotify, stopped: &UnixStream) -> io::Result<()> {
    loop {
        if file.link_from_here()? {
            tracing::info!("{file} was removed by somebody: put back");
        }
        let mut polled = [inotify.as_fd(), stopped.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut polled, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        if polled[1].any().unwrap_or(true) {
            return Ok(());
        }
        // Which one was removed does not matter.
        let _events = inotify.read_events()?;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _it_does_not_panic = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::view::View;
    use nix::unistd::gettid;
    use socket2::{Domain, Socket, Type};
    use std::fs;
    use std::time::{Duration, Instant};

    #[test]
    fn what_is_removed_is_back_at_once_until_the_guard_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let view = || View::of(gettid().as_raw()).unwrap();
        let mut file = SocketFile::locate(view(), &path, ".hidden").unwrap();
        file.bind(&Socket::new(Domain::UNIX, Type::STREAM, None).unwrap().into(), &view(), &path).unwrap();
        let file = Arc::new(file);
        let guard = Guard::new(&file).unwrap();
        let mut longest = Duration::ZERO;
        for round in 0..100 {
            if round % 2 == 0 {
                fs::remove_file(&path).unwrap();
            } else {
                fs::rename(&path, dir.path().join("away")).unwrap();
            }
            let begin = Instant::now();
            while !path.exists() {
                assert!(begin.elapsed() < Duration::from_secs(20));
            }
            longest = longest.max(begin.elapsed());
        }
        println!("it was missing for {longest:?} at most");
        assert!(guard.is_for(&file));
        drop(guard);
        fs::remove_file(&path).unwrap();
        assert!(!path.exists());
    }
}
