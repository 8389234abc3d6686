//! `esker bench`: measurements, as commands.

mod decoder;
mod replay;
mod residency;
pub(crate) mod restore;
mod serve;
mod store;

use serde_json::{Map, Value};

/// Measure this machine
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, clap::Subcommand)]
enum Bench {
    /// The decoder against `transformers`, against itself at longer contexts, against the machine; ratios of one run
    Decoder(decoder::Args),
    /// Replay a trace of requests: token hit ratio and bytes written, beside other policies and the best possible
    Replay(replay::Args),
    /// Decoding with most rows left on SSD: figures per step for shares of them in memory, and where it stops paying
    Residency(residency::Args),
    /// Time to first token of a stored prefix: layer after layer, as a whole, and computed
    Restore(restore::Args),
    /// The service against the store below it: fetches over gRPC, TLS and shared memory, lookups, settles, overload
    Serve(serve::Args),
    /// The store against the drive itself: puts, fetches, lookups, opening; ratios of one run
    Store(store::Args),
}

/// Prints figures: one JSON object, or a table.
fn tell(figures: Map<String, Value>, json: bool) -> anyhow::Result<()> {
    if json {
        say!("{}", Value::Object(figures));
        return Ok(());
    }
    for (key, value) in figures {
        match value.as_f64() {
            Some(number) => say!("{key:<36} {number:>14.3}"),
            None => say!("{key:<36} {value}"),
        }
    }
    Ok(())
}

/// Runs the bench that was asked for.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.bench {
        Bench::Decoder(args) => decoder::run(&args),
        Bench::Replay(args) => replay::run(args),
        Bench::Residency(args) => residency::run(&args),
        Bench::Restore(args) => restore::run(&args),
        Bench::Serve(args) => serve::run(&args),
        Bench::Store(args) => store::run(&args),
    }
}
