//! Catching bind(2) and listen(2) of a process, and of all that it starts: seccomp(2), `seccomp_unotify(2)`.
//!
//! ```text
//!  a thread of the service          kernel                      zddsup
//!  bind(5, …) ────────────────────> the filter says: ask ─────> Notifier::next()
//!     │ waits                                                      looks at it, copies the socket …
//!     │            <───── go_on: the call itself goes on <───────┤
//!     │            <───── answer: it is over, with this result <─┤
//!     └            <───── put_in_place: fd 5 is this file <──────┘ (and then answer)
//! ```
//! This is no security boundary: the service can change its memory and its fds while it is looked at. Whatever it does
//! so, it could have done without us.
//!
//! When the last copy of the [`Notifier`]'s fd is closed, the caught calls give ENOSYS from then on.

mod filter;
mod notifier;

pub use self::filter::{Filter, Installed};
pub use self::notifier::{Call, Notification, Notifier};

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod tests;
