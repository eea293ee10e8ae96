//! fork(2) and execve(2) of a generation.
