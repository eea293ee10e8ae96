//! Who a generation runs as.

use std::ffi::{CString, OsString};
use std::io;
use std::path::PathBuf;

use nix::unistd::{getegid, geteuid, getgid, getgrouplist, getgroups, getuid, Gid, Group, Uid, User};

/// A user with groups, looked up before the fork.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: Uid,
    /// Primary group.
    pub gid: Gid,
    /// Supplementary groups, as initgroups(3) sets them.
    pub groups: Vec<Gid>,
    /// Login name, for USER and LOGNAME.
    pub name: String,
    /// Home directory, for HOME.
    pub home: PathBuf,
    /// Login shell, for SHELL.
    pub shell: PathBuf,
}

/// Why there is no such user or group.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The name is not known.
    #[error("there is no user {0:?}: create it, or give a number with --group")]
    NoUser(String),
    /// A number without an entry has no primary group.
    #[error("user {0} has no entry in passwd(5), and so no group: give --group too")]
    NoPrimaryGroup(Uid),
    /// The name is not known.
    #[error("there is no group {0:?}: create it, or give its number")]
    NoGroup(String),
    /// The lookup itself failed.
    #[error("cannot look up {what:?}: {source}; check nsswitch.conf(5)")]
    Lookup {
        /// What was looked up.
        what: String,
        /// Why not.
        source: io::Error,
    },
}

impl Identity {
    /// Looks up a user and a group, each by name or number. Who zddsup runs as stands for what is not given.
    pub fn resolve(user: Option<&str>, group: Option<&str>) -> Result<Identity, IdentityError> {
        let group = group.map(find_group).transpose()?;
        let Some(wanted) = user else {
            let entry = User::from_uid(geteuid()).ok().flatten();
            let gid = group.unwrap_or_else(getegid);
            let groups = getgroups().map_err(|errno| lookup("groups", errno))?;
            return Ok(Identity::of(geteuid(), gid, groups, entry));
        };
        let (uid, entry) = find_user(wanted)?;
        let gid = match (group, &entry) {
            (Some(gid), _) => gid,
            (None, Some(entry)) => entry.gid,
            (None, None) => return Err(IdentityError::NoPrimaryGroup(uid)),
        };
        let groups = match entry.as_ref().and_then(|entry| CString::new(entry.name.clone()).ok()) {
            Some(name) => getgrouplist(&name, gid).map_err(|errno| lookup(wanted, errno))?,
            None => vec![gid],
        };
        Ok(Identity::of(uid, gid, groups, entry))
    }

    fn of(uid: Uid, gid: Gid, groups: Vec<Gid>, entry: Option<User>) -> Identity {
        let (name, home, shell) = match entry {
            Some(entry) => (entry.name, entry.dir, entry.shell),
            None => (uid.to_string(), PathBuf::from("/"), PathBuf::from("/bin/sh")),
        };
        Identity { uid, gid, groups, name, home, shell }
    }

    /// What a login would set.
    #[must_use]
    pub fn environment(&self) -> [(&'static str, OsString); 4] {
        let name = || OsString::from(&self.name);
        [
            ("USER", name()),
            ("LOGNAME", name()),
            ("HOME", self.home.clone().into()),
            ("SHELL", self.shell.clone().into()),
        ]
    }

    /// Whether zddsup itself runs as this user and group, without the right to be another: nothing is to be changed.
    #[must_use]
    pub fn is_own(&self) -> bool {
        !geteuid().is_root()
            && (getuid(), geteuid()) == (self.uid, self.uid)
            && (getgid(), getegid()) == (self.gid, self.gid)
    }
}

fn find_user(wanted: &str) -> Result<(Uid, Option<User>), IdentityError> {
    if let Some(entry) = User::from_name(wanted).map_err(|errno| lookup(wanted, errno))? {
        return Ok((entry.uid, Some(entry)));
    }
    let uid = number(wanted).map(Uid::from_raw).ok_or_else(|| IdentityError::NoUser(wanted.to_owned()))?;
    Ok((uid, User::from_uid(uid).map_err(|errno| lookup(wanted, errno))?))
}

fn find_group(wanted: &str) -> Result<Gid, IdentityError> {
    if let Some(entry) = Group::from_name(wanted).map_err(|errno| lookup(wanted, errno))? {
        return Ok(entry.gid);
    }
    number(wanted).map(Gid::from_raw).ok_or_else(|| IdentityError::NoGroup(wanted.to_owned()))
}

/// An id. The last one means "leave it" to the kernel, and so is none.
fn number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten().filter(|&id| id != u32::MAX)
}

fn lookup(what: &str, errno: nix::errno::Errno) -> IdentityError {
    IdentityError::Lookup { what: what.to_owned(), source: errno.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_up_names_and_numbers() {
        let root = Identity::resolve(Some("root"), None).unwrap();
        assert_eq!((root.uid.as_raw(), root.gid.as_raw(), root.name.as_str()), (0, 0, "root"));
        assert!(root.groups.contains(&Gid::from_raw(0)));
        assert_eq!(Identity::resolve(Some("0"), None).unwrap(), root);
        let stranger = Identity::resolve(Some("54321"), Some("12345")).unwrap();
        assert_eq!((stranger.uid.as_raw(), stranger.gid.as_raw()), (54321, 12345));
        assert_eq!((stranger.groups, stranger.name.as_str()), (vec![Gid::from_raw(12345)], "54321"));
        let own = Identity::resolve(None, None).unwrap();
        assert_eq!((own.uid, own.gid), (geteuid(), getegid()));
    }

    #[test]
    fn says_what_is_not_there() {
        for (user, group, part) in [
            (Some("no-such-user"), None, "there is no user"),
            (Some("54321"), None, "--group"),
            (Some("4294967295"), None, "there is no user"),
            (Some("-1"), None, "there is no user"),
            (Some("a\0b"), None, "there is no user"),
            (None, Some("no-such-group"), "there is no group"),
        ] {
            let error = Identity::resolve(user, group).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
