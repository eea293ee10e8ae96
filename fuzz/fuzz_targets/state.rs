//! The file that a killed supervisor left.
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = zddsup::supervisor::recorded::Recorded::parse(bytes);
});
