//! `--limit`. What is accepted must be printed so that it is accepted again.
#![no_main]
use zddsup::process::limits::Limit;
libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(limit) = text.parse::<Limit>() {
        assert_eq!(limit.to_string().parse::<Limit>().as_ref(), Ok(&limit));
    }
});
