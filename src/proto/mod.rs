//! Bytes and environment of the protocols: pure, fuzzed.
