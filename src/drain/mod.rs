//! How an old generation finishes what it has: signal, connections left.
