//! Command line: one file a subcommand.
