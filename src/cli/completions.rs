//! `zddsup completions`: a completion script for a shell.

use clap::CommandFactory;
use clap_complete::Shell;

use super::exit::{Exit, Failure};
use super::{text, Cli};

/// For which shell.
#[derive(Debug, Clone, clap::Args)]
pub struct Flags {
    /// Shell that the script is for
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints it.
pub fn run(flags: &Flags) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(flags.shell, &mut Cli::command(), "zddsup", &mut script);
    text::print(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done)
}
