//! `--listen`. What is accepted must be printed so that it is accepted again.
#![no_main]
use zddsup::listener::ListenerSpec;
libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(spec) = text.parse::<ListenerSpec>() {
        assert_eq!(spec.to_string().parse::<ListenerSpec>().as_ref(), Ok(&spec));
    }
});
