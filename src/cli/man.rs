//! `zddsup man`: the manual pages.

use std::path::PathBuf;

use clap::CommandFactory;

use super::exit::{Exit, Failure};
use super::{text, Cli};

/// Which pages, and where to.
#[derive(Debug, Clone, clap::Args)]
pub struct Flags {
    /// Subcommand whose page to print [default: the page of zddsup itself]
    subcommand: Option<String>,
    /// Write all pages as files into this directory instead
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "subcommand")]
    to: Option<PathBuf>,
}

/// Prints a page, or writes all.
pub fn run(flags: &Flags) -> Result<Exit, Failure> {
    // Pages of `help` would say nothing new.
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    if let Some(directory) = &flags.to {
        let write = |source| Failure::System { step: "write the manual pages", source };
        std::fs::create_dir_all(directory).map_err(write)?;
        clap_mangen::generate_to(command, directory).map_err(write)?;
        return Ok(Exit::Done);
    }
    let meant = match &flags.subcommand {
        None => command,
        Some(name) => {
            let unknown = || {
                let known: Vec<_> = command.get_subcommands().map(|one| one.get_name().to_owned()).collect();
                let line = format!("there is no subcommand {name}; there are {}", known.join(", "));
                Failure::Said { exit: Exit::Usage, line }
            };
            let found = command.find_subcommand(name).ok_or_else(unknown)?;
            found.clone().display_name(format!("zddsup-{}", found.get_name()))
        }
    };
    let mut page = Vec::new();
    // Writing to a Vec cannot fail.
    let _written = clap_mangen::Man::new(meant).render(&mut page);
    text::print(&String::from_utf8_lossy(&page))?;
    Ok(Exit::Done)
}
