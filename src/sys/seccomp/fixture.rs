//! A thread of the tests whose calls are caught.

use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{Filter, Notification, Notifier};

/// Runs it in a thread of its own, under the filter.
pub(crate) fn trapped<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> (Notifier, JoinHandle<T>) {
    let (say, hear) = mpsc::channel();
    let thread = thread::spawn(move || {
        say.send(Filter::bind_and_listen().unwrap().install().unwrap().listener).unwrap();
        act()
    });
    (Notifier::new(hear.recv().unwrap()).unwrap(), thread)
}

/// The next call, which must come.
pub(crate) async fn next(notifier: &Notifier) -> Notification {
    tokio::time::timeout(Duration::from_secs(60), notifier.next()).await.expect("no call").unwrap()
}
