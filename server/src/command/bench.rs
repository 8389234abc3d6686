//! `esker bench`: measurements, as commands.

mod store;

/// Measure this machine
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, clap::Subcommand)]
enum Bench {
    /// The store against the drive itself: puts, fetches, lookups, opening; ratios of one run
    Store(store::Args),
}

/// Runs the bench that was asked for.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.bench {
        Bench::Store(args) => store::run(&args),
    }
}
