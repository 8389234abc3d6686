//! `esker golden`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use esker_decoder::golden::{self, GoldenSettings};

use crate::model_folder::{read, read_shards, read_text};

/// Arguments of `esker golden`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder with config.json, model.safetensors and golden.safetensors
    dir: PathBuf,
    /// Tokens per block in the restore check; a power of two
    #[arg(long, default_value_t = 64)]
    block_tokens: u32,
}

/// Prints one JSON line; fails when the decoder is out of tolerance.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let name =
        args.dir.canonicalize().ok().and_then(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()));
    let name = name.with_context(|| format!("{} is not a folder", args.dir.display()))?;
    let config = read_text(&args.dir.join("config.json"))?;
    let golden = read(&args.dir.join("golden.safetensors"))?;
    let shards = read_shards(&args.dir)?;
    let settings = GoldenSettings { block_tokens: args.block_tokens, ..GoldenSettings::default() };
    let report = golden::check(&name, &config, shards, &golden, settings)
        .with_context(|| format!("cannot check {}", args.dir.display()))?;
    say!("{}", serde_json::to_string(&report)?);
    if !report.passed() {
        bail!("{name} is out of tolerance");
    }
    Ok(())
}
