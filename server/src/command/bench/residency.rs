//! What it takes to decode with most rows left on SSD: per step the rows picked, those found in memory, bytes read and time,
//! for shares of the rows in memory; and for new turns of several lengths, where it stops paying.

use anyhow::Context;
use serde::Serialize;

use super::restore::{Bench, On};
use crate::generate::RestoreMode;
use crate::model_folder::LoadedModel;

/// What to measure
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    on: On,
    /// Stored tokens
    #[arg(long, value_delimiter = ',', default_value = "32768,131072", value_name = "N")]
    tokens: Vec<usize>,
    /// Shares of the rows in memory, in percent
    #[arg(long, value_delimiter = ',', default_value = "10,15,25,50,100", value_name = "PERCENT")]
    shares: Vec<u64>,
    /// Tokens decoded
    #[arg(long, default_value_t = 64, value_name = "N")]
    steps: usize,
    /// Lengths of a new turn, at a share of 25 %
    #[arg(long, value_delimiter = ',', default_value = "16,64,256,1024", value_name = "N")]
    turns: Vec<usize>,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
}

/// Figures of one context.
#[derive(Debug, Serialize)]
pub(crate) struct Figures {
    cached_tokens: usize,
    /// Bytes of the rows that can be left on SSD.
    parkable_bytes: u64,
    /// A step with all rows in memory, milliseconds.
    resident_step_ms: f64,
    resident_first_token_ms: f64,
    shares: Vec<Share>,
    turns: Vec<Turn>,
    /// The shortest of these turns whose first token comes later than with all rows restored; `None` if none does.
    stops_paying_at_tokens: Option<usize>,
}

/// Figures of one share, per step.
#[derive(Debug, Serialize)]
struct Share {
    resident_percent: u64,
    first_token_ms: f64,
    step_ms: f64,
    waited_ms: f64,
    rows_picked: f64,
    pool_hits: f64,
    planes_read: f64,
    bytes_read: f64,
}

/// A new turn.
#[derive(Debug, Serialize)]
struct Turn {
    new_tokens: usize,
    parked_first_token_ms: f64,
    restored_first_token_ms: f64,
    bytes_read: u64,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let longest = args.turns.iter().max().unwrap_or(&0) + args.steps + 1;
    let context = args.tokens.iter().max().unwrap_or(&0) + longest;
    let loaded = args.on.load(context)?;
    let contexts = measure(loaded, args)?;
    if args.json {
        say!("{}", serde_json::to_string(&contexts).context("figures")?);
        return Ok(());
    }
    for context in contexts {
        say!(
            "{} tokens, {:.1} MiB of rows; all in memory: first token {:.1} ms, step {:.2} ms",
            context.cached_tokens,
            context.parkable_bytes as f64 / f64::from(1 << 20),
            context.resident_first_token_ms,
            context.resident_step_ms
        );
        say!("  share  first token ms  step ms  waited ms  rows picked  in pool  planes read  KiB read");
        for share in &context.shares {
            say!(
                "  {:>4}% {:>15.1} {:>8.2} {:>10.2} {:>12.0} {:>8.0} {:>12.1} {:>9.1}",
                share.resident_percent,
                share.first_token_ms,
                share.step_ms,
                share.waited_ms,
                share.rows_picked,
                share.pool_hits,
                share.planes_read,
                share.bytes_read / 1024.0
            );
        }
        say!("  new turn  parked ms  restored ms  MiB read");
        for turn in &context.turns {
            say!(
                "  {:>8} {:>10.1} {:>12.1} {:>9.1}",
                turn.new_tokens,
                turn.parked_first_token_ms,
                turn.restored_first_token_ms,
                turn.bytes_read as f64 / f64::from(1 << 20)
            );
        }
    }
    Ok(())
}

fn measure(loaded: LoadedModel, args: &Args) -> anyhow::Result<Vec<Figures>> {
    let block_tokens = loaded.model.layout().block_tokens() as usize;
    let per_block = loaded.model.parkable_block_bytes();
    let bench = Bench::new(loaded, &args.on.dir)?;
    let mut contexts = Vec::new();
    for &cached in &args.tokens {
        bench.fill(cached, 1, RestoreMode::Ordered)?;
        let parkable_bytes = (cached / block_tokens) as u64 * per_block;
        // A share of everything goes through the pool as well, so that it is compared with memory alone.
        let budget = |percent: u64| (parkable_bytes * percent / 100).min(parkable_bytes.saturating_sub(1));
        let mut turn = 1_000_000;
        let mut decode = |new_tokens: usize, steps: usize, resident_bytes: Option<u64>| {
            turn += 1;
            bench.generate(cached, new_tokens, turn, steps, RestoreMode::Ordered, resident_bytes)
        };
        let resident = decode(1, args.steps, None)?;
        let mut shares = Vec::new();
        for &percent in &args.shares {
            let got = decode(1, args.steps, Some(budget(percent)))?;
            let steps = got.steps.max(1) as f64;
            let parked = got.parked.unwrap_or_default();
            let of_steps = |total: u64, before: u64| (total - before) as f64 / steps;
            let (before, total) = (parked.prefill, parked.total);
            shares.push(Share {
                resident_percent: percent,
                first_token_ms: got.first_ms,
                step_ms: got.step_ms,
                waited_ms: (parked.waited[1] - parked.waited[0]).as_secs_f64() * 1e3 / steps,
                rows_picked: of_steps(total.rows_picked, before.rows_picked),
                pool_hits: of_steps(total.pool_hits, before.pool_hits),
                planes_read: of_steps(total.planes_fetched, before.planes_fetched),
                bytes_read: of_steps(total.bytes_fetched, before.bytes_fetched),
            });
        }
        let mut turns = Vec::new();
        for &new_tokens in &args.turns {
            let parked = decode(new_tokens, 1, Some(budget(25)))?;
            let restored = decode(new_tokens, 1, None)?;
            turns.push(Turn {
                new_tokens,
                parked_first_token_ms: parked.first_ms,
                restored_first_token_ms: restored.first_ms,
                bytes_read: parked.parked.unwrap_or_default().total.bytes_fetched,
            });
        }
        let late = turns.iter().find(|turn| turn.parked_first_token_ms > turn.restored_first_token_ms);
        contexts.push(Figures {
            cached_tokens: cached,
            parkable_bytes,
            resident_step_ms: resident.step_ms,
            resident_first_token_ms: resident.first_ms,
            stops_paying_at_tokens: late.map(|turn| turn.new_tokens),
            shares,
            turns,
        });
    }
    Ok(contexts)
}
