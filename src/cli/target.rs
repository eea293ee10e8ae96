//! Which service is meant.

use std::future::Future;
use std::path::PathBuf;

use super::exit::{Exit, Failure};
use crate::control::client::Client;
use crate::control::place::Places;

/// Which service; without either, the only one that is running.
#[derive(Debug, Clone, clap::Args)]
pub struct Target {
    /// Service to talk to [default: the only one that is running]
    #[arg(short, long, value_name = "NAME", conflicts_with = "control")]
    pub name: Option<String>,
    /// Control socket to talk to, where it is not in the usual place
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

impl Target {
    /// Its supervisor.
    pub fn client(&self) -> Result<Client, Failure> {
        let path = match &self.control {
            Some(path) => path.clone(),
            None => Places::of_this_process().find(self.name.as_deref())?,
        };
        Ok(Client::new(path))
    }
}

/// Does a subcommand's work to its end.
pub fn block_on(work: impl Future<Output = Result<Exit, Failure>>) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Failure::System { step: "start", source })?;
    runtime.block_on(work)
}
