//! `{fd:NAME}` in arguments and environment.
#![no_main]
use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = zddsup::proto::placeholder::expand(OsStr::from_bytes(bytes), &[("web", 3), ("admin", 4)], 7);
});
