//! The `esker` command.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use esker_server::command;

/// Esker keeps the KV cache of prompts on SSD and gives it back for a few percent of the cost of computing it again.
#[derive(Parser)]
#[command(name = "esker", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the prefix cache and the bundled decoder over gRPC
    Serve(Box<command::serve::Args>),
    /// Continue a text on a running node
    Generate(command::generate::Args),
    /// Show how much of a text a running node has stored
    Lookup(command::lookup::Args),
    /// Compute and store prompts before traffic asks for them: submit a job, watch it, list and cancel jobs
    Warmup(command::warmup::Args),
    /// Show it all: a long document cold, SIGKILL, restart, the same document warm, and that nothing changed
    Demo(command::demo::Args),
    /// Check a data folder offline: every byte of every record, and the index against them; mend it with --repair
    Fsck(command::fsck::Args),
    /// The essentials of a running node, live in a terminal
    Top(command::top::Args),
    /// Tell what a data folder holds, without disturbing it
    Stat(command::stat::Args),
    /// Tell what was used, what it costs and what caching saved; export or verify the billing ledger
    Usage(command::usage::Args),
    /// The tenants of a running node and what they hold; erase one, or take back what an account has put
    Tenants(command::tenants::Args),
    /// Check the audit log of a data folder, and show its newest lines
    Audit(command::audit::Args),
    /// Measure: the store on this machine, policies on a trace
    Bench(command::bench::Args),
    /// Check the decoder against a folder of golden vectors
    Golden(command::golden::Args),
}

fn main() -> ExitCode {
    // Messages for people go to standard error; standard output carries results only.
    let filter = tracing_subscriber::EnvFilter::try_from_env("ESKER_LOG").unwrap_or_else(|_| "info".into());
    let colours = std::io::stderr().is_terminal();
    // A message that cannot be written, on a disk that is full, is lost; telling that in the same place would end the process.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).log_internal_errors(false);
    log.with_writer(std::io::stderr).init();
    let result = match Cli::parse().command {
        Command::Fsck(args) => match command::fsck::run(&args) {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Command::Usage(args) => match command::usage::run(args) {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Command::Top(args) => command::top::run(&args),
        Command::Stat(args) => command::stat::run(&args),
        Command::Serve(args) => command::serve::run(*args),
        Command::Generate(args) => command::generate::run(args),
        Command::Lookup(args) => command::lookup::run(args),
        Command::Warmup(args) => command::warmup::run(args),
        Command::Demo(args) => command::demo::run(args),
        Command::Tenants(args) => command::tenants::run(args),
        Command::Audit(args) => command::audit::run(&args),
        Command::Bench(args) => command::bench::run(args),
        Command::Golden(args) => command::golden::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            command::tell(format_args!("esker: {}", causes(&error)));
            ExitCode::FAILURE
        }
    }
}

/// What failed and why, outermost first. A cause that the text before it already quotes says nothing new.
fn causes(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}
