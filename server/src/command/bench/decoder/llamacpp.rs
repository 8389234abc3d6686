//! Against llama.cpp, which restores a whole sequence from a file: bytes a second from a drive whose page cache is empty, and the time
//! to the first token after that. Theirs is a model of 135 M parameters with full attention, ours the bundled one; so times are also
//! told by what they bring back, a cached megabyte and a thousand cached tokens.

use std::path::Path;

use anyhow::ensure;
use serde::Deserialize;
use serde_json::{Map, json};

use crate::command::bench::restore::restore_whole;

/// Ours, as many as `ordered` has.
const CACHED_TOKENS: usize = 128 << 10;
/// Theirs: to compute more would take minutes.
const LLAMA_TOKENS: usize = 4096;
const ROUNDS: usize = 9;
const ROWS: [&str; 3] =
    ["restore_bytes_vs_llamacpp", "first_token_per_mb_vs_llamacpp", "first_token_per_token_vs_llamacpp"];

/// What the script answers.
#[derive(Deserialize)]
struct Slot {
    tokens: usize,
    bytes: u64,
    computed_s: f64,
    restore_s: f64,
    first_token_s: f64,
    version: String,
}

pub(super) fn run(
    script: &Path,
    dir: &Path,
    figures: &mut Map<String, serde_json::Value>,
) -> anyhow::Result<()> {
    let ours = restore_whole(super::load()?, dir, CACHED_TOKENS, ROUNDS)?;
    let ours_bytes_s = ours.raw_bytes as f64 / ours.restore_s;
    figures.insert("restore_128k_bytes".into(), json!(ours.raw_bytes));
    figures.insert("restore_128k_ms".into(), json!(ours.restore_s * 1e3));
    figures.insert("restore_128k_gb_s".into(), json!(ours_bytes_s / 1e9));
    figures.insert("first_token_128k_ms".into(), json!(ours.first_token_s * 1e3));
    let theirs = match ask(script, dir) {
        Ok(theirs) => theirs,
        Err(error) => {
            super::missing(figures, &ROWS, &format!("{error:#}"));
            return Ok(());
        }
    };
    let theirs_bytes_s = theirs.bytes as f64 / theirs.restore_s;
    figures.insert("llamacpp_version".into(), json!(theirs.version));
    figures.insert("llamacpp_tokens".into(), json!(theirs.tokens));
    figures.insert("llamacpp_restore_bytes".into(), json!(theirs.bytes));
    figures.insert("llamacpp_restore_ms".into(), json!(theirs.restore_s * 1e3));
    figures.insert("llamacpp_restore_gb_s".into(), json!(theirs_bytes_s / 1e9));
    figures.insert("llamacpp_first_token_ms".into(), json!(theirs.first_token_s * 1e3));
    figures.insert("llamacpp_computed_ms".into(), json!(theirs.computed_s * 1e3));
    figures.insert("restore_bytes_vs_llamacpp".into(), json!(ours_bytes_s / theirs_bytes_s));
    let by_bytes = |first_token_s: f64, bytes: u64| first_token_s / bytes as f64;
    figures.insert(
        "first_token_per_mb_vs_llamacpp".into(),
        json!(by_bytes(theirs.first_token_s, theirs.bytes) / by_bytes(ours.first_token_s, ours.raw_bytes)),
    );
    figures.insert(
        "first_token_per_token_vs_llamacpp".into(),
        json!(theirs.first_token_s / theirs.tokens as f64 / (ours.first_token_s / CACHED_TOKENS as f64)),
    );
    Ok(())
}

fn ask(script: &Path, dir: &Path) -> anyhow::Result<Slot> {
    ensure!(script.exists(), "there is no script {}; name it with --llamacpp", script.display());
    super::ask(script, &["--dir", &dir.display().to_string(), "--tokens", &LLAMA_TOKENS.to_string()])
}
