//! The driver: turns actions into system calls, and what happens into events.
