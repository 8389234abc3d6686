//! The subcommands of `esker`, one per file.

pub mod bench;
pub mod demo;
pub mod fsck;
pub mod generate;
pub mod golden;
pub mod lookup;
pub mod serve;
pub mod stat;
pub mod top;
pub mod usage;
pub mod warmup;

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, bail};

/// Where to find a running node.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeArgs {
    /// Address of a running node
    #[arg(long, default_value = "127.0.0.1:7410", value_name = "HOST:PORT", env = "ESKER_NODE")]
    node: String,
}

/// A text given on the command line, in a file, or both (the file comes first).
#[derive(Clone, Debug, clap::Args)]
pub struct TextArgs {
    /// The text; "-" reads standard input
    text: Option<String>,
    /// Put this file before the text
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
}

impl TextArgs {
    fn read(&self) -> anyhow::Result<String> {
        let mut whole = String::new();
        if let Some(path) = &self.file {
            whole =
                std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        }
        match self.text.as_deref() {
            Some("-") => {
                std::io::stdin().read_to_string(&mut whole).context("cannot read standard input")?;
            }
            Some(text) => whole.push_str(text),
            None => {}
        }
        if whole.is_empty() {
            bail!("nothing to work on: give a text, or a file with --file");
        }
        Ok(whole)
    }
}

/// A runtime for the commands that talk to a node.
fn client_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")
}
