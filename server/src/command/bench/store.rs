//! `esker bench store`.

use std::path::PathBuf;

use anyhow::Context;
use esker_benches::store::{Options, RealBlocks};
use esker_decoder::{BlockIdentity, KvFormat, Logits, Sequence};
use esker_prefix::{BlockHash, NamespaceId, ScopeTag};

use crate::bundled;

/// Tokens in a block of the small bundled model that make it about as large as one of 128 tokens is in V4-Flash.
const REAL_BLOCK_TOKENS: u32 = 2048;

/// What to measure
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A folder on the drive to be measured; some 13 GB are written to a folder of its own in it, and removed
    #[arg(long, default_value = ".", value_name = "DIR")]
    dir: PathBuf,
    /// Small blocks of the store whose opening is timed
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    blocks: u64,
    /// Only these parts: chain, codec, put, fetch, latency, open, rivals, wear
    #[arg(long, value_delimiter = ',', value_name = "PART")]
    only: Vec<String>,
    /// Trace whose replay tells write_amplification, as for `esker bench replay` [default: made-up chats]
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    note!("real latents of the bundled model");
    let options = Options {
        dir: &args.dir,
        real: real_blocks()?,
        small_blocks: args.blocks,
        trace: args.trace.as_deref(),
        only: args.only.clone(),
    };
    let figures = esker_benches::store::run(&options, &|part| note!("{part}"))?;
    super::tell(figures, args.json)
}

/// Decodes the demo's document.
fn real_blocks() -> anyhow::Result<RealBlocks> {
    let loaded = bundled::load(KvFormat::Bf16, REAL_BLOCK_TOKENS)?;
    let tokens = loaded.tokenizer.encode(bundled::DEMO_DOCUMENT).context("the demo's document")?;
    let mut sequence = Sequence::new(&loaded.model);
    sequence.prefill(&loaded.model, &tokens, Logits::Last)?;
    let layout = loaded.model.layout().clone();
    let identity = BlockIdentity {
        namespace: NamespaceId([0; 32]),
        scope: ScopeTag([0; 16]),
        parent: BlockHash([0; 32]),
        hash: BlockHash([0; 32]),
    };
    let count = sequence.tokens() / layout.block_tokens() as usize;
    let blocks = (0..count)
        .map(|index| Ok(sequence.block(&loaded.model, index, identity)?.into_planes()))
        .collect::<anyhow::Result<_>>()?;
    Ok(RealBlocks { layout, blocks })
}
