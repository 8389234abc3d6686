//! The subcommands of `esker`, one per file.

/// Prints a line of a result as [`print`](command::print) does, where the library's own macro would panic.
macro_rules! say {
    ($($arg:tt)*) => { $crate::command::print(&(format!($($arg)*) + "\n"))? };
}

/// Tells people a line as [`tell`](command::tell) does, where the library's own macro would panic.
macro_rules! note {
    ($($arg:tt)*) => { $crate::command::tell(format_args!($($arg)*)) };
}

pub mod audit;
pub mod bench;
pub mod demo;
pub mod fsck;
pub mod generate;
pub mod golden;
pub mod lookup;
pub mod serve;
pub mod stat;
pub mod tenants;
pub mod top;
pub mod usage;
pub mod warmup;

use std::io::{ErrorKind, Read, Write};
use std::path::PathBuf;

use anyhow::{Context, bail};
use esker_client::{Client, ClientError, Credentials};

/// Where to find a running node, and who asks it.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeArgs {
    /// Address of a running node
    #[arg(long, default_value = "127.0.0.1:7410", value_name = "HOST:PORT", env = "ESKER_NODE")]
    node: String,
    #[command(flatten)]
    credentials: CredentialArgs,
}

/// Who asks a node, and how it is known.
#[derive(Clone, Debug, clap::Args)]
pub struct CredentialArgs {
    /// Authority of the node's certificate, PEM: the connection is by TLS
    #[arg(long, value_name = "FILE", env = "ESKER_CA")]
    ca: Option<PathBuf>,
    /// Certificate that says who asks, PEM
    #[arg(long, value_name = "FILE", env = "ESKER_CERT", requires = "key")]
    cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", env = "ESKER_KEY", requires = "cert")]
    key: Option<PathBuf>,
    /// File with a bearer token that says who asks; read for each connection
    #[arg(long, value_name = "FILE", env = "ESKER_TOKEN")]
    token: Option<PathBuf>,
}

impl CredentialArgs {
    fn read(&self) -> anyhow::Result<Credentials> {
        let read =
            |path: &PathBuf| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        Ok(Credentials {
            authority: self.ca.as_ref().map(read).transpose()?,
            identity: match self.cert.as_ref().zip(self.key.as_ref()) {
                Some((chain, key)) => Some((read(chain)?, read(key)?)),
                None => None,
            },
            token: match &self.token {
                Some(path) => Some(
                    String::from_utf8(read(path)?)
                        .with_context(|| format!("{} holds no token: it is not text", path.display()))?,
                ),
                None => None,
            },
        })
    }
}

impl NodeArgs {
    async fn connect(&self) -> anyhow::Result<Client> {
        let credentials = self.credentials.read()?;
        let hint = "name the authority of the node's certificate with --ca FILE";
        match Client::connect_as(&self.node, &credentials).await {
            Err(error @ ClientError::Credentials(_)) if credentials.authority.is_none() => {
                Err(error).context(hint)
            }
            connected => Ok(connected?),
        }
    }
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

/// Prints results. Who reads them may have seen enough and closed the pipe, like `head`.
fn print(text: &str) -> anyhow::Result<()> {
    is_taken(text).map(|_| ())
}

/// The same, and whether anybody still reads.
fn is_taken(text: &str) -> anyhow::Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot write to standard output"),
    }
}

/// Tells people something on standard error. Where that is closed or full there is nobody to tell.
pub fn tell(text: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// A runtime for the commands that talk to a node.
fn client_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")
}
