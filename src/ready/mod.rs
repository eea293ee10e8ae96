//! How a generation shows that it can serve: notify, probes.
