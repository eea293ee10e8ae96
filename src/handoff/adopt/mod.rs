//! Listeners of programs that know nothing of zddsup: their bind(2) and listen(2) are caught ([`crate::sys::seccomp`]).

pub mod file;
pub mod guard;
pub mod remote;
