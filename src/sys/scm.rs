//! File descriptors and credentials over Unix sockets: SCM_RIGHTS, SCM_CREDENTIALS (unix(7)).
