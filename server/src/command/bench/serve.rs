//! `esker bench serve`: the service against what it stands on, in one run on the same node.
//!
//! Server and clients share this machine and this process, each with a runtime of its own, so every figure is a ratio to something
//! measured beside it, in turn with it, or says how many clients there were. A client looks at a word of every page that it
//! receives, whichever way the page came.

mod bed;
mod fetching;
mod looking;
mod overload;
mod settling;

use std::path::PathBuf;

use serde_json::Map;

use bed::Bed;

/// What to measure
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A folder on the drive to be used; some 2 GB are written to a folder of its own in it, and removed
    #[arg(long, default_value = ".", value_name = "DIR")]
    dir: PathBuf,
    /// Only these parts: fetch, lookup, settle, overload, encryption
    #[arg(long, value_delimiter = ',', value_name = "PART")]
    only: Vec<String>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let wanted = |part: &str| args.only.is_empty() || args.only.iter().any(|only| only == part);
    let mut figures = Map::new();
    note!("prefixes of 100,096 tokens");
    let bed = Bed::new(&args.dir)?;
    if wanted("fetch") {
        note!("fetch: in process, gRPC, shared memory, mTLS");
        fetching::run(&bed, &mut figures)?;
    }
    if wanted("lookup") {
        note!("lookup, 64 clients");
        looking::run(&bed, &mut figures)?;
    }
    if wanted("settle") {
        note!("settle, 64 clients");
        settling::run(&bed, &mut figures)?;
    }
    if wanted("overload") {
        note!("overload");
        overload::run(&bed, &mut figures)?;
    }
    if wanted("encryption") {
        note!("encryption");
        let encrypted = Bed::encrypted(&args.dir)?;
        fetching::encrypted(&bed, &encrypted, &mut figures)?;
        encrypted.close()?;
    }
    bed.close()?;
    super::tell(figures, args.json)
}
