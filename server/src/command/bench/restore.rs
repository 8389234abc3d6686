//! Time to first token of a stored prefix: with rows that come in the order of the layers, with all of them awaited, and
//! with everything computed. In one run, on one model, through the same code that serves.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use esker_decoder::{KvFormat, Sampler};
use esker_prefix::{RootSecret, ScopeKey, ScopeKind, TokenId};
use esker_store::TtlClass;
use serde::Serialize;

use crate::bundled;
use crate::generate::{Account, Event, Guessing, Job, ParkedAccount, RestoreMode, generate};
use crate::model_folder::{LoadedModel, load_model};
use crate::node::{Node, NodeSettings};
use crate::writers::Place;

/// Longest wait for what a generation leaves to be stored.
const STORED_WITHIN: Duration = Duration::from_secs(120);

/// What to measure
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    on: On,
    /// Stored tokens
    #[arg(long, value_delimiter = ',', default_value = "8192,16384,32768,131072", value_name = "N")]
    tokens: Vec<usize>,
    /// Tokens of the new turn
    #[arg(long, default_value_t = 64, value_name = "N")]
    new_tokens: usize,
    /// Restores of each kind; the median counts
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: usize,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// On which drive, and with which model.
#[derive(Debug, clap::Args)]
pub(super) struct On {
    /// A folder on the drive to be measured; a data folder of its own is made in it, and removed
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub(super) dir: PathBuf,
    /// Measure with the model of this folder, not the bundled one
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
}

impl On {
    /// The model, with room for a context.
    pub(super) fn load(&self, context: usize) -> anyhow::Result<LoadedModel> {
        match &self.model {
            Some(dir) => load_model(dir, KvFormat::Bf16, 128),
            None => bundled::load_for(KvFormat::Bf16, 128, context),
        }
    }
}

/// Times of one length.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Restored {
    /// Tokens that are stored.
    pub(crate) cached_tokens: usize,
    /// Tokens behind them that are not.
    pub(crate) new_tokens: usize,
    /// Bytes of the records that are read.
    pub(crate) bytes_read: u64,
    /// Time to first token, in milliseconds: layer after layer, while the rest still comes.
    pub(crate) ordered_ms: f64,
    /// The same once everything is there.
    pub(crate) whole_ms: f64,
    /// The same with nothing stored.
    pub(crate) computed_ms: f64,
    /// `whole_ms / ordered_ms`.
    pub(crate) ordered_restore_gain: f64,
    /// `computed_ms / ordered_ms`.
    pub(crate) warm_ttft_speedup: f64,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let context = args.tokens.iter().max().unwrap_or(&0) + args.new_tokens + 1;
    let loaded = args.on.load(context)?;
    let rows = measure(loaded, &args.on.dir, &args.tokens, args.new_tokens, args.rounds)?;
    if args.json {
        say!("{}", serde_json::to_string(&rows).context("figures")?);
        return Ok(());
    }
    say!("cached tokens   ordered ms     whole ms  computed ms   gain   speedup   MiB read");
    for row in rows {
        say!(
            "{:>13} {:>12.1} {:>12.1} {:>12.0} {:>6.2} {:>9.1} {:>10.1}",
            row.cached_tokens,
            row.ordered_ms,
            row.whole_ms,
            row.computed_ms,
            row.ordered_restore_gain,
            row.warm_ttft_speedup,
            row.bytes_read as f64 / f64::from(1 << 20),
        );
    }
    Ok(())
}

/// Stores a prompt of each length by computing it, then resumes it `rounds` times in either way with a new turn that is
/// never stored. Reads pass the page cache by wherever the drive allows it. Leaves nothing in `dir`.
pub(crate) fn measure(
    loaded: LoadedModel,
    dir: &Path,
    lengths: &[usize],
    new_tokens: usize,
    rounds: usize,
) -> anyhow::Result<Vec<Restored>> {
    if rounds == 0 || new_tokens == 0 {
        bail!("rounds and new tokens must be at least 1");
    }
    let bench = Bench::new(loaded, dir)?;
    let mut rows = Vec::new();
    for &cached in lengths {
        let computed = bench.fill(cached, new_tokens, RestoreMode::Nothing)?;
        let (mut ordered, mut whole, mut bytes_read) = (Vec::new(), Vec::new(), 0);
        for turn in 1..=rounds as u64 {
            for (mode, times) in [(RestoreMode::Whole, &mut whole), (RestoreMode::Ordered, &mut ordered)] {
                let got = bench.generate(cached, new_tokens, turn, 1, mode, None)?;
                bytes_read = got.bytes_read;
                times.push(got.first_ms);
            }
        }
        let (ordered_ms, whole_ms) = (median(&mut ordered), median(&mut whole));
        rows.push(Restored {
            cached_tokens: cached,
            new_tokens,
            bytes_read,
            ordered_ms,
            whole_ms,
            computed_ms: computed.first_ms,
            ordered_restore_gain: whole_ms / ordered_ms,
            warm_ttft_speedup: computed.first_ms / ordered_ms,
        });
    }
    Ok(rows)
}

/// A stored prefix that is put back as a whole, before one more token is computed.
pub(crate) struct Whole {
    /// Of its planes, as they were put.
    pub(crate) raw_bytes: u64,
    /// Until all of it is there.
    pub(crate) restore_s: f64,
    /// Until the token after it.
    pub(crate) first_token_s: f64,
}

/// Medians of `rounds`, after the prefix was stored by computing it. Leaves nothing in `dir`.
pub(crate) fn restore_whole(
    loaded: LoadedModel,
    dir: &Path,
    cached: usize,
    rounds: usize,
) -> anyhow::Result<Whole> {
    let bench = Bench::new(loaded, dir)?;
    bench.fill(cached, 1, RestoreMode::Nothing)?;
    let (mut restores, mut firsts, mut raw_bytes) = (Vec::new(), Vec::new(), 0);
    for turn in 1..=rounds as u64 {
        let got = bench.generate(cached, 1, turn, 1, RestoreMode::Whole, None)?;
        raw_bytes = got.raw_bytes;
        restores.push(got.restore.as_secs_f64());
        firsts.push(got.first_ms / 1e3);
    }
    Ok(Whole { raw_bytes, restore_s: median(&mut restores), first_token_s: median(&mut firsts) })
}

/// A node on a folder of its own, with prompts that are told apart by their length and turn.
pub(super) struct Bench {
    node: Node,
    vocab: u32,
    /// Goes after the node.
    _data: Scratch,
}

/// One generation.
pub(super) struct Got {
    /// Time to first token, in milliseconds.
    pub(super) first_ms: f64,
    /// Time per token behind it, in milliseconds; 0 if there is none.
    pub(super) step_ms: f64,
    /// Tokens behind the first.
    pub(super) steps: usize,
    pub(super) bytes_read: u64,
    /// Of what was put back, as it was put.
    pub(super) raw_bytes: u64,
    /// Time in which it was put back.
    pub(super) restore: Duration,
    pub(super) parked: Option<ParkedAccount>,
}

impl Bench {
    pub(super) fn new(loaded: LoadedModel, dir: &Path) -> anyhow::Result<Self> {
        let data = Scratch::new(dir)?;
        let vocab = u32::try_from(loaded.model.config().vocab_size).unwrap_or(u32::MAX);
        let settings = NodeSettings { data: data.0.clone(), ..NodeSettings::default() };
        Ok(Self { node: Node::open(&settings, Some(loaded))?, vocab, _data: data })
    }

    /// Stores the first `cached` tokens by generating behind them, and waits until they are.
    pub(super) fn fill(&self, cached: usize, new_tokens: usize, mode: RestoreMode) -> anyhow::Result<Got> {
        let got = self.run(self.prompt(cached, new_tokens, 0), 1, mode, None, true)?.0;
        let engine = self.node.engine.as_ref().context("the node has no model")?;
        let until = Instant::now() + STORED_WITHIN;
        while engine.write_behind.waiting_bytes() > 0 {
            if Instant::now() > until {
                bail!("what was computed was not stored within {STORED_WITHIN:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(got)
    }

    /// Generates behind the first `cached` tokens, of which all whole blocks must be found, and a new turn. Stores nothing.
    pub(super) fn generate(
        &self,
        cached: usize,
        new_tokens: usize,
        turn: u64,
        max_new_tokens: usize,
        mode: RestoreMode,
        resident_bytes: Option<u64>,
    ) -> anyhow::Result<Got> {
        let prompt = self.prompt(cached, new_tokens, turn);
        let (got, hit_tokens) = self.run(prompt, max_new_tokens, mode, resident_bytes, false)?;
        let engine = self.node.engine.as_ref().context("the node has no model")?;
        let block_tokens = engine.loaded.model.layout().block_tokens() as usize;
        let whole = cached / block_tokens * block_tokens;
        if hit_tokens < whole {
            bail!("{hit_tokens} of {whole} tokens were found: the store lost some, or could not keep up");
        }
        Ok(got)
    }

    fn prompt(&self, cached: usize, new_tokens: usize, turn: u64) -> Vec<TokenId> {
        let new = (0..new_tokens as u64).map(|at| ((turn + 1) << 32) + at);
        (0..cached as u64).chain(new).map(|seed| token(seed, self.vocab)).collect()
    }

    fn run(
        &self,
        prompt: Vec<TokenId>,
        max_new_tokens: usize,
        restore: RestoreMode,
        resident_bytes: Option<u64>,
        stores: bool,
    ) -> anyhow::Result<(Got, usize)> {
        let engine = self.node.engine.as_ref().context("the node has no model")?;
        let job = Job {
            prompt,
            max_new_tokens,
            sampler: Sampler::seeded(0.0, 1.0, 0)?,
            logits_digest: false,
            stop: Vec::new(),
            place: Place::unshared(scope()),
            class: TtlClass::default(),
            stores,
            restore,
            resident_bytes,
            guessing: Guessing::default(),
        };
        let started = Instant::now();
        let (mut times, mut account) = (Vec::new(), None);
        generate(&self.node, engine, job, &mut |event| {
            match event {
                Event::Token { .. } => times.push(started.elapsed().as_secs_f64() * 1e3),
                Event::Done(done) => account = Some(done),
                _ => {}
            }
            ControlFlow::Continue(())
        })?;
        let account = account.context("a generation did not end")?;
        // A model that ends at once has given its logits all the same.
        let first_ms = times.first().copied();
        let first_ms = first_ms.unwrap_or_else(|| (account.restore + account.prefill).as_secs_f64() * 1e3);
        let steps = times.len().saturating_sub(1);
        let step_ms = times.last().map_or(0.0, |last| (last - first_ms) / steps.max(1) as f64);
        let Account { bytes_read, raw_bytes, restore, parked, hit_tokens, .. } = account;
        Ok((Got { first_ms, step_ms, steps, bytes_read, raw_bytes, restore, parked }, hit_tokens))
    }
}

/// A token of the vocabulary, the same for the same seed.
fn token(seed: u64, vocab: u32) -> TokenId {
    let mixed = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    TokenId(u32::try_from((mixed >> 33) % u64::from(vocab)).unwrap_or(0))
}

fn scope() -> ScopeKey {
    ScopeKey::derive(&RootSecret::new([7; 32]), ScopeKind::Private, "bench", 0)
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// A folder that goes with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join(format!("esker-bench-restore-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing can be done about a folder that does not go.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
