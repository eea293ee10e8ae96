//! Why a listener cannot be had, and what to do.

use std::io;
use std::path::PathBuf;

/// A listener that cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} (listener {listener}): {why}")]
pub struct BindError {
    /// Its name.
    pub listener: String,
    /// Where it should be.
    pub address: String,
    /// What is in the way.
    pub why: Why,
}

impl BindError {
    /// The kernel's error, where it was one that has no words of its own here.
    #[must_use]
    pub fn errno(&self) -> Option<nix::errno::Errno> {
        match &self.why {
            Why::System { source, .. } | Why::Option { source, .. } => {
                source.raw_os_error().map(nix::errno::Errno::from_raw)
            }
            _ => None,
        }
    }
}

/// What is in the way of a listener.
#[derive(Debug, thiserror::Error)]
pub enum Why {
    /// EADDRINUSE.
    #[error("the address is in use{}; end what holds it, or listen elsewhere", by(holder.as_ref()))]
    InUse {
        /// Who has it, if that could be found out.
        holder: Option<String>,
    },
    /// EACCES below `ip_unprivileged_port_start`.
    #[error(
        "only root may bind a port below {first}: run zddsup as root (--user gives the service another user), give it \
         CAP_NET_BIND_SERVICE, or let a systemd socket unit pass the socket"
    )]
    Privileged {
        /// First port that everybody may bind.
        first: u16,
    },
    /// EADDRNOTAVAIL.
    #[error("this machine does not have the address (`ip address` lists those that it has); freebind takes one that is yet to come")]
    NotHere,
    /// ENODEV.
    #[error("this machine has no network interface {0:?}; `ip link` lists those that it has")]
    NoDevice(String),
    /// EAFNOSUPPORT.
    #[error("IPv6 is not available on this machine; give an IPv4 address")]
    NoIpv6,
    /// Somebody serves there.
    #[error("a living process{} has a socket there; end it, or listen elsewhere", by(holder.as_ref()))]
    Live {
        /// Who, if that could be found out.
        holder: Option<String>,
    },
    /// Something else stands there.
    #[error("{0:?} exists and is not a socket: it is left alone; remove it, or listen elsewhere")]
    NotASocket(PathBuf),
    /// ENOENT.
    #[error("the directory {0:?} does not exist; make it first")]
    NoDirectory(PathBuf),
    /// user= or group= names nobody.
    #[error("there is no {kind} {name:?}")]
    NoAccount {
        /// user or group.
        kind: &'static str,
        /// What was given.
        name: String,
    },
    /// The kernel refuses an option.
    #[error("option {option}: {source}{}", privilege(source))]
    Option {
        /// Which.
        option: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A socket that was passed to us is another one.
    #[error("the socket that was passed for it is {passed}; correct one of the two")]
    Other {
        /// Its address.
        passed: String,
    },
    /// Anything else.
    #[error("{step}: {source}")]
    System {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl Why {
    pub(super) fn at(step: &'static str) -> impl FnOnce(io::Error) -> Why {
        move |source| Why::System { step, source }
    }
}

fn by(holder: Option<&String>) -> String {
    holder.map_or_else(String::new, |holder| format!(" ({holder})"))
}

fn privilege(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; it needs CAP_NET_ADMIN",
        _ => "",
    }
}
