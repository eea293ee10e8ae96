//! LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES as somebody may have set them.
#![no_main]
use zddsup::proto::listen_fds;
libfuzzer_sys::fuzz_target!(|input: (Option<String>, Option<String>, Option<String>)| {
    let (count, pid, names) = input;
    let variable = |name: &str| match name {
        listen_fds::COUNT_VAR => count.clone(),
        listen_fds::PID_VAR => pid.clone(),
        listen_fds::NAMES_VAR => names.clone(),
        _ => None,
    };
    let _ = listen_fds::decode(variable, 1);
});
