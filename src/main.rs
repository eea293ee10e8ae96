//! The `zddsup` command: parse, dispatch, exit code; nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    zddsup::cli::main()
}
