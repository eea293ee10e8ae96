//! All of a service's listeners, from wherever each can be had: systemd, a supervisor before us, or bound anew.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use super::inherit::{InheritError, Inherited};
use super::spec::ListenerSpec;
use super::{bind, meets, BindError, Listener};
use socket2::SockRef;

/// Why a service's listeners cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// What systemd passed makes no sense.
    #[error(transparent)]
    Inherit(#[from] InheritError),
    /// One of them cannot be had.
    #[error(transparent)]
    Bind(#[from] BindError),
}

/// Takes what systemd passed to this process, then [`open_from`].
pub fn open(specs: &[ListenerSpec], left: BTreeMap<String, OwnedFd>) -> Result<Vec<Listener>, ListenError> {
    Ok(open_from(Inherited::take()?, specs, left)?)
}

/// All listeners, in the order of `specs`, or none: those that were bound are let go when one cannot be had. Without any
/// `specs`, all that systemd passed. `left` are sockets of a supervisor before us, by the names that they had there.
pub fn open_from(
    mut inherited: Inherited,
    specs: &[ListenerSpec],
    mut left: BTreeMap<String, OwnedFd>,
) -> Result<Vec<Listener>, BindError> {
    if specs.is_empty() {
        return inherited.into_listeners();
    }
    let one = |spec: &ListenerSpec| match inherited.take_for(spec)? {
        Some(listener) => {
            // The same socket, if there is one: systemd still holds it.
            left.remove(&spec.name);
            Ok(listener)
        }
        None => match take_left(&mut left, spec) {
            Some(fd) => Listener::adopt(fd, spec),
            None => Listener::bind(spec),
        },
    };
    let listeners = specs.iter().map(one).collect::<Result<Vec<_>, _>>()?;
    for unused in inherited.unused() {
        tracing::warn!("systemd passed {unused}, which no --listen asks for: closed");
    }
    for name in left.keys() {
        tracing::info!(listener = name, "was a listener of the supervisor before and is asked for no more: closed");
    }
    Ok(listeners)
}

/// Takes out those of a supervisor before us that are asked for no more.
pub fn take_unasked(left: &mut BTreeMap<String, OwnedFd>, specs: &[ListenerSpec]) -> BTreeMap<String, OwnedFd> {
    let mut unasked = std::mem::take(left);
    for spec in specs {
        if let Some(asked) = name_left(&unasked, spec) {
            left.extend(unasked.remove_entry(&asked));
        }
    }
    unasked
}

fn take_left(left: &mut BTreeMap<String, OwnedFd>, spec: &ListenerSpec) -> Option<OwnedFd> {
    let name = name_left(left, spec)?;
    left.remove(&name)
}

/// The one of that name, unless it is bound elsewhere than is asked for now; else the one at that very address. A Unix socket
/// whose file is gone is of no use.
fn name_left(left: &BTreeMap<String, OwnedFd>, spec: &ListenerSpec) -> Option<String> {
    let spec = super::absolute(spec).ok()?;
    let is_there = |fd: &OwnedFd| {
        let bound = bind::address_of(&SockRef::from(fd)).ok();
        bound.is_some_and(|bound| meets(&spec.address, &bound) && bound.path().is_none_or(std::path::Path::exists))
    };
    let by_address = || {
        let exact = !spec.address.has_any_port();
        left.iter().find(|(_, fd)| exact && is_there(fd)).map(|(name, _)| name.clone())
    };
    match left.get(&spec.name) {
        Some(fd) if is_there(fd) => Some(spec.name.clone()),
        Some(_) | None => by_address(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs(texts: &[&str]) -> Vec<ListenerSpec> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn names(listeners: &[Listener]) -> Vec<&str> {
        listeners.iter().map(Listener::name).collect()
    }

    #[test]
    fn sockets_that_were_left_are_used_where_they_are_asked_for() {
        let before = ["web=127.0.0.1:0", "old=127.0.0.1:0", "admin=127.0.0.1:0"]
            .map(|text| Listener::bind(&text.parse().unwrap()).unwrap());
        let left =
            before.iter().map(|listener| (listener.name().to_owned(), listener.fd().try_clone().unwrap())).collect();
        let renamed = format!("new={}", before[1].address());
        let wanted = specs(&["web=127.0.0.1:0", &renamed, "admin=udp://127.0.0.1:0", "more=127.0.0.1:0"]);
        let now = open_from(Inherited::default(), &wanted, left).unwrap();
        assert_eq!(names(&now), ["web", "new", "admin", "more"]);
        assert_eq!([now[0].inode(), now[1].inode()], [before[0].inode(), before[1].inode()]);
        assert!(now[2].address().starts_with("udp://"));
        assert!(before.iter().all(|before| before.inode() != now[3].inode()));
        let left = |listener: &Listener| (listener.name().to_owned(), listener.fd().try_clone().unwrap());
        let mut left = before.iter().map(left).collect();
        let unasked = take_unasked(&mut left, &specs(&["web=127.0.0.1:0", &renamed]));
        assert_eq!(unasked.into_keys().collect::<Vec<_>>(), ["admin"]);
        assert_eq!(left.into_keys().collect::<Vec<_>>(), ["old", "web"]);
    }

    #[test]
    fn a_unix_socket_whose_file_is_gone_is_bound_anew() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = specs(&[&format!("web={}", dir.path().join("s").display())]);
        let before = Listener::bind(&wanted[0]).unwrap();
        let left = || BTreeMap::from([("web".to_owned(), before.fd().try_clone().unwrap())]);
        before.leave_file();
        assert_eq!(open_from(Inherited::default(), &wanted, left()).unwrap()[0].inode(), before.inode());
        assert!(!dir.path().join("s").exists());
        assert_ne!(open_from(Inherited::default(), &wanted, left()).unwrap()[0].inode(), before.inode());
    }

    #[test]
    fn what_systemd_passes_comes_first() {
        let passed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let left = BTreeMap::from([("web".to_owned(), OwnedFd::from(passed.try_clone().unwrap()))]);
        let wanted = specs(&[&format!("web={}", passed.local_addr().unwrap())]);
        let inherited = Inherited::from_fds([("web".to_owned(), passed.into())]);
        let listeners = open_from(inherited, &wanted, left).unwrap();
        assert_eq!(names(&listeners), ["web"]);
        assert!(open_from(Inherited::default(), &[], BTreeMap::new()).unwrap().is_empty());
    }

    #[test]
    fn when_one_cannot_be_had_none_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let wanted = [format!("a=unix://{}", path.display()), format!("b={}", taken.local_addr().unwrap())];
        let wanted = specs(&wanted.each_ref().map(String::as_str));
        open_from(Inherited::default(), &wanted, BTreeMap::new()).unwrap_err();
        assert!(!path.exists());
        assert_eq!(open_from(Inherited::default(), &wanted[..1], BTreeMap::new()).unwrap().len(), 1);
    }
}
