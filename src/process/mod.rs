//! Processes: programs, spawning, reaping, groups, output.
