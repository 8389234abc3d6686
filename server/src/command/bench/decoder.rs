//! `esker bench decoder`: the decoder against others and against the machine, in one run.
//!
//! Machines are shared, so the figures that count are ratios; each is taken beside what it is compared with, alternating
//! where that is possible, and the best of some rounds counts: company only ever adds time.

mod eager;
mod flatness;
mod llamacpp;
mod ordered;
mod products;
mod warm;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use esker_decoder::KvFormat;
use esker_prefix::TokenId;
use serde_json::{Map, Value, json};

use crate::bundled;
use crate::model_folder::LoadedModel;

/// Longest context that is measured; the bundled weights are given positions that far.
const CONTEXT: usize = 160 << 10;
const BLOCK_TOKENS: u32 = 128;

/// What to measure
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A folder on the drive to be measured; data is written to a folder of its own in it, and removed
    #[arg(long, default_value = ".", value_name = "DIR")]
    dir: PathBuf,
    /// The script that runs `transformers` on the same weights; it makes its own environment
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/decoder/transformers"), value_name = "FILE")]
    transformers: PathBuf,
    /// The script that runs llama.cpp on a model of its own; it makes its own environment
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/decoder/llamacpp"), value_name = "FILE")]
    llamacpp: PathBuf,
    /// Only these parts: transformers, flatness, gemm, warm, ordered, llamacpp
    #[arg(long, value_delimiter = ',', value_name = "PART")]
    only: Vec<String>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    const PARTS: [&str; 6] = ["transformers", "flatness", "gemm", "warm", "ordered", "llamacpp"];
    if let Some(unknown) = args.only.iter().find(|only| !PARTS.contains(&only.as_str())) {
        anyhow::bail!("--only knows {}, not {unknown:?}", PARTS.join(", "));
    }
    let wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|only| only == name);
    let dir = tempfile::Builder::new()
        .prefix("esker-bench-")
        .tempdir_in(&args.dir)
        .with_context(|| format!("cannot make a folder in {}", args.dir.display()))?;
    let bed = Bed::new()?;
    let mut figures = Map::new();
    figures.insert("model".into(), json!(bundled::NAME));
    figures.insert("threads".into(), json!(rayon::current_num_threads()));
    let mut part = |name: &str,
                    title: &str,
                    rows: &[&str],
                    run: &dyn Fn(&mut Map<String, Value>) -> anyhow::Result<()>| {
        if wanted(name) {
            note!("{title}");
            // What one part cannot measure costs no other's rows.
            if let Err(error) = run(&mut figures) {
                missing(&mut figures, rows, &format!("{error:#}"));
            }
        }
    };
    part("transformers", "against transformers, 4k tokens", &["prefill_vs_hf", "decode_vs_hf"], &|figures| {
        eager::run(&bed, &args.transformers, dir.path(), figures)
    });
    part("flatness", "decode step, 4k and 64k tokens", &["decode_flatness"], &|figures| {
        flatness::run(&bed, figures)
    });
    part("gemm", "dense products of V4-Flash", &["gemm_efficiency"], &products::run);
    part("warm", "time to first token, 16k cached tokens", &["warm_ttft_speedup_16k"], &|figures| {
        warm::run(&bed, dir.path(), figures)
    });
    part("ordered", "restore in order, 128k cached tokens", &["ordered_restore_gain"], &|figures| {
        ordered::run(dir.path(), figures)
    });
    let rows = ["restore_128k_gb_s", "restore_bytes_vs_llamacpp"];
    part("llamacpp", "restore beside llama.cpp", &rows, &|figures| {
        llamacpp::run(&args.llamacpp, dir.path(), figures)
    });
    super::tell(figures, args.json)
}

/// The bundled weights with room for long contexts, and text.
struct Bed {
    loaded: LoadedModel,
    document: Vec<TokenId>,
}

impl Bed {
    fn new() -> anyhow::Result<Self> {
        let loaded = load()?;
        let document = loaded.tokenizer.encode(bundled::DEMO_DOCUMENT).context("the demo's document")?;
        Ok(Self { loaded, document })
    }

    /// The demo's document, over and over.
    fn tokens(&self, count: usize) -> Vec<TokenId> {
        self.document.iter().copied().cycle().take(count).collect()
    }
}

/// The bundled model, with positions far enough. Its weights do not know how many there are.
fn load() -> anyhow::Result<LoadedModel> {
    bundled::load_for(KvFormat::Bf16, BLOCK_TOKENS, CONTEXT)
}

/// What the other side's script prints when it is run on as many threads as this side has. What it tells people goes to standard error.
fn ask<T: serde::de::DeserializeOwned>(script: &Path, args: &[&str]) -> anyhow::Result<T> {
    let output = Command::new(script)
        .args(args)
        .args(["--threads", &rayon::current_num_threads().to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", script.display()))?;
    ensure!(output.status.success(), "{} ended with {}", script.display(), output.status);
    serde_json::from_slice(&output.stdout).with_context(|| format!("what {} printed", script.display()))
}

/// Says in the figures, and on standard error, that rows are missing, and why.
fn missing(figures: &mut Map<String, Value>, rows: &[&str], why: &str) {
    note!("   missing: {}: {why}", rows.join(", "));
    let list = figures.entry("missing").or_insert_with(|| json!({}));
    if let Some(list) = list.as_object_mut() {
        list.extend(rows.iter().map(|row| ((*row).to_owned(), json!(why))));
    }
}

/// The middle one of some times, in seconds.
fn median(times: &mut [f64]) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}
