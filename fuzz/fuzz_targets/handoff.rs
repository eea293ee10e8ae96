//! Packets on a generation's handoff socket, both ways. What can be read must be written the same.
#![no_main]
use zddsup::proto::handoff::{FromGeneration, ToGeneration};
libfuzzer_sys::fuzz_target!(|input: (&[u8], u8)| {
    let (packet, fds) = (input.0, usize::from(input.1));
    if let Ok(message) = FromGeneration::decode(packet, fds) {
        if let Ok(again) = message.encode() {
            assert_eq!(FromGeneration::decode(&again, fds).unwrap(), message);
        }
    }
    let _ = ToGeneration::decode(packet, fds);
});
