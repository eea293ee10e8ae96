//! Datagrams on a generation's notify socket.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = zddsup::proto::notify::parse(bytes);
});
