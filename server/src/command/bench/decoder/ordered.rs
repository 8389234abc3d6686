//! Time to first token behind a long stored prefix: layer after layer while the rest still comes, and once all of it is there.

use std::path::Path;

use anyhow::Context;
use serde_json::{Map, Value, json};

use crate::command::bench::restore::measure;

const CACHED_TOKENS: usize = 128 << 10;
/// Of a new turn.
const TURN_TOKENS: usize = 64;
const ROUNDS: usize = 5;

/// The bundled weights are given positions that far: numbers of a length that they were not made for cost the same time.
pub(super) fn run(dir: &Path, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    let row = measure(super::load()?, dir, &[CACHED_TOKENS], TURN_TOKENS, ROUNDS)?;
    let row = row.first().context("nothing was measured")?;
    figures.insert("ordered_cached_tokens".into(), json!(row.cached_tokens));
    figures.insert("ordered_ttft_128k_ms".into(), json!(row.ordered_ms));
    figures.insert("whole_ttft_128k_ms".into(), json!(row.whole_ms));
    figures.insert("computed_ttft_128k_ms".into(), json!(row.computed_ms));
    figures.insert("ordered_bytes_read_128k".into(), json!(row.bytes_read));
    figures.insert("ordered_restore_gain".into(), json!(row.ordered_restore_gain));
    Ok(())
}
