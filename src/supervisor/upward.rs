//! What is said to a supervisor above this one, by `sd_notify(3)`. Nothing where there is none.
//!
//! ```text
//! first generation ready      READY=1, MAINPID=
//! an upgrade begins           RELOADING=1, MONOTONIC_USEC=
//! it is over, well or not     READY=1, and STATUS= says which
//! stopping                    STOPPING=1
//! while any of these lasts    EXTEND_TIMEOUT_USEC=, again and again
//! the loop turns              WATCHDOG=1 at half of WATCHDOG_USEC
//! ```

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use nix::time::{clock_gettime, ClockId};

use crate::core::UpgradeId;

/// How long the one above is asked to wait on, each time …
const EXTEND_BY: Duration = Duration::from_secs(30);
/// … and how often: a message or two may be late.
const EXTEND_EVERY: Duration = Duration::from_secs(10);

/// Characters of a reason in STATUS=.
const LONGEST_REASON: usize = 500;

/// One above that does not read holds the loop up no longer than this.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// The one above, if `NOTIFY_SOCKET` named one.
#[derive(Debug, Default)]
pub struct Upward {
    place: Option<OsString>,
    ready: bool,
    stopping: bool,
    reloading: Option<UpgradeId>,
    /// How the last upgrade failed.
    failed: Option<String>,
    told: String,
    feed_every: Option<Duration>,
    feed_due: Option<Instant>,
    extend_due: Option<Instant>,
}

impl Upward {
    /// As the environment names it.
    #[must_use]
    pub fn from_environment(now: Instant) -> Upward {
        let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
        // Inherited from a service of which zddsup is not the main process, it is for another one (sd_watchdog_enabled(3)).
        let is_ours = std::env::var_os("WATCHDOG_PID").is_none_or(|pid| pid == *std::process::id().to_string());
        let watchdog = number("WATCHDOG_USEC").filter(|&usec| is_ours && usec > 0).map(Duration::from_micros);
        Upward::new(std::env::var_os("NOTIFY_SOCKET"), watchdog, now)
    }

    /// At a path, or at an abstract name after `@`; `watchdog`: how often it wants a sign of life.
    #[must_use]
    pub fn new(place: Option<OsString>, watchdog: Option<Duration>, now: Instant) -> Upward {
        let there = place.is_some();
        let feed_every = watchdog.filter(|_| there).map(|every| every / 2);
        let at_once = Some(now).filter(|_| there);
        Upward { place, feed_every, feed_due: feed_every.and(at_once), extend_due: at_once, ..Upward::default() }
    }

    /// A generation serves: the first one, said once.
    pub fn ready(&mut self, now: Instant) {
        if !self.ready {
            self.ready = true;
            self.settled(now);
        }
    }

    /// Somebody asked for a transaction, and it begins.
    pub fn reloading(&mut self, upgrade: UpgradeId, now: Instant) {
        self.failed = None;
        // Before READY=1 it is a part of the start.
        if self.ready && !self.stopping {
            self.reloading = Some(upgrade);
            let extend = self.extend(now);
            self.say(&format!("RELOADING=1\nMONOTONIC_USEC={}\n{extend}", monotonic_usec()));
        }
    }

    /// A transaction is over; `failed` says how, and that what served before serves on.
    pub fn reloaded(&mut self, upgrade: UpgradeId, failed: Option<String>, now: Instant) {
        if let Some(failed) = failed {
            // Lines separate fields, and a message has a limit.
            let line: String = failed.chars().take(LONGEST_REASON).map(|c| if c == '\n' { ' ' } else { c }).collect();
            self.failed = Some(format!("upgrade {upgrade} failed: {line}"));
        }
        if self.reloading == Some(upgrade) {
            self.reloading = None;
            self.settled(now);
        }
    }

    /// The end has begun.
    pub fn stopping(&mut self, now: Instant) {
        if !self.stopping {
            self.stopping = true;
            self.reloading = None;
            let extend = self.extend(now);
            self.say(&format!("STOPPING=1\n{extend}"));
        }
    }

    /// One line for people.
    pub fn status(&mut self, line: &str) {
        let line = match &self.failed {
            Some(failed) => format!("STATUS={line}; {failed}"),
            None => format!("STATUS={line}"),
        };
        if self.told != line {
            self.say(&line);
            self.told = line;
        }
    }

    /// When [`Upward::tick`] has something to say.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.feed_due.into_iter().chain(self.extend_due.filter(|_| self.is_busy())).min()
    }

    /// Signs of life, where one is due.
    pub fn tick(&mut self, now: Instant) {
        if self.feed_due.is_some_and(|due| due <= now) {
            self.feed_due = self.feed_every.map(|every| now + every);
            self.say("WATCHDOG=1");
        }
        if self.is_busy() && self.extend_due.is_some_and(|due| due <= now) {
            let extend = self.extend(now);
            self.say(&extend);
        }
    }

    /// Whether it is at something that the one above waits for, with a limit of its own.
    fn is_busy(&self) -> bool {
        !self.ready || self.stopping || self.reloading.is_some()
    }

    fn settled(&mut self, now: Instant) {
        if self.stopping {
            return;
        }
        let pid = std::process::id();
        // As PID 1 of a namespace of its own, zddsup has another pid for the one above.
        let main = if pid == 1 { String::new() } else { format!("\nMAINPID={pid}") };
        self.say(&format!("READY=1{main}"));
        self.extend_due = self.extend_due.map(|_| now);
    }

    fn extend(&mut self, now: Instant) -> String {
        self.extend_due = self.extend_due.map(|_| now + EXTEND_EVERY);
        format!("EXTEND_TIMEOUT_USEC={}", EXTEND_BY.as_micros())
    }

    fn say(&self, state: &str) {
        if let Err(error) = self.send(state) {
            tracing::debug!("cannot notify: {error}");
        }
    }

    fn send(&self, state: &str) -> io::Result<()> {
        let Some(place) = &self.place else { return Ok(()) };
        connect(place)?.send(state.as_bytes()).map(drop)
    }
}

/// A way to the one above.
pub(super) fn connect(place: &OsStr) -> io::Result<UnixDatagram> {
    let address = match place.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(place)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

/// `CLOCK_MONOTONIC`, by which systemd tells this reload from one that began before it asked.
fn monotonic_usec() -> u128 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| Duration::from(time).as_micros())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One above, and what it has heard since it was asked last.
    struct Above {
        _dir: tempfile::TempDir,
        socket: UnixDatagram,
        begin: Instant,
    }

    impl Above {
        fn new(watchdog: Option<Duration>) -> (Above, Upward) {
            let dir = tempfile::tempdir().unwrap();
            let place = dir.path().join("notify");
            let socket = UnixDatagram::bind(&place).unwrap();
            socket.set_nonblocking(true).unwrap();
            let begin = Instant::now();
            (Above { _dir: dir, socket, begin }, Upward::new(Some(place.into()), watchdog, begin))
        }

        fn at(&self, seconds: u64) -> Instant {
            self.begin + Duration::from_secs(seconds)
        }

        fn heard(&self) -> Vec<String> {
            let mut buffer = [0; 4096];
            let next = || self.socket.recv(&mut buffer).ok().map(|len| String::from_utf8_lossy(&buffer[..len]).into());
            std::iter::from_fn(next).collect()
        }
    }

    #[test]
    fn ready_comes_once_and_names_the_process() {
        let (above, mut upward) = Above::new(None);
        upward.ready(above.at(1));
        upward.ready(above.at(2));
        assert_eq!(above.heard(), [format!("READY=1\nMAINPID={}", std::process::id())]);
        assert_eq!(upward.due(), None);
    }

    #[test]
    fn an_upgrade_that_fails_is_ready_again_and_says_so() {
        let (above, mut upward) = Above::new(None);
        upward.ready(above.at(0));
        let before = monotonic_usec();
        upward.reloading(UpgradeId(2), above.at(1));
        // Another one's end is not this one's.
        upward.reloaded(UpgradeId(1), None, above.at(1));
        upward.reloaded(UpgradeId(2), Some("it\nexited".to_owned()), above.at(2));
        upward.status("generation 1 serves");
        upward.status("generation 1 serves");
        let heard = above.heard();
        let [ready, reloading, again, status] = &heard[..] else { panic!("{heard:?}") };
        let usec = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().lines().next().unwrap();
        assert!(usec.parse::<u128>().unwrap() >= before, "{reloading}");
        assert_eq!(ready, again);
        assert_eq!(status, "STATUS=generation 1 serves; upgrade 2 failed: it exited");
    }

    #[test]
    fn what_lasts_is_extended_until_it_is_over() {
        let (above, mut upward) = Above::new(None);
        let extended = "EXTEND_TIMEOUT_USEC=30000000";
        assert_eq!(upward.due(), Some(above.at(0)));
        upward.tick(above.at(0));
        assert_eq!(upward.due(), Some(above.at(10)));
        upward.tick(above.at(9));
        upward.tick(above.at(10));
        assert_eq!(above.heard(), [extended, extended]);
        upward.ready(above.at(11));
        assert_eq!(upward.due(), None);
        upward.stopping(above.at(12));
        upward.stopping(above.at(12));
        upward.reloading(UpgradeId(1), above.at(13));
        upward.tick(above.at(22));
        assert_eq!(above.heard()[1..], [format!("STOPPING=1\n{extended}"), extended.to_owned()]);
    }

    #[test]
    fn signs_of_life_come_twice_as_often_as_they_must() {
        let (above, mut upward) = Above::new(Some(Duration::from_secs(8)));
        upward.ready(above.at(0));
        upward.tick(above.at(0));
        assert_eq!(upward.due(), Some(above.at(4)));
        upward.tick(above.at(3));
        upward.tick(above.at(5));
        assert_eq!(above.heard()[1..], ["WATCHDOG=1", "WATCHDOG=1"]);
        assert_eq!(upward.due(), Some(above.at(9)));
    }

    #[test]
    fn nobody_above_wants_nothing() {
        let mut upward = Upward::new(None, Some(Duration::from_secs(1)), Instant::now());
        assert_eq!(upward.due(), None);
        upward.stopping(Instant::now());
        assert_eq!(upward.due(), None);
    }

    #[test]
    fn an_abstract_name_is_reached() {
        let name = format!("zddsup-upward-{}", std::process::id());
        let above = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        Upward::new(Some(format!("@{name}").into()), None, Instant::now()).status("here");
        let mut buffer = [0; 100];
        let len = above.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"STATUS=here");
    }
}
