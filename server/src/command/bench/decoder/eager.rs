//! Against `transformers`: the same weights, tokens and threads, F32, eager.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use esker_decoder::{KvFormat, Logits, Sequence};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Bed, median, missing};
use crate::bundled;

const PROMPT_TOKENS: usize = 4096;
const DECODE_STEPS: usize = 32;
const ROUNDS: usize = 5;

/// What the script answers.
#[derive(Deserialize)]
struct Eager {
    prefill_s: f64,
    decode_step_s: f64,
    logits: Vec<f32>,
    versions: Value,
}

pub(super) fn run(
    bed: &Bed,
    script: &Path,
    dir: &Path,
    figures: &mut Map<String, Value>,
) -> anyhow::Result<()> {
    let tokens = bed.tokens(PROMPT_TOKENS + DECODE_STEPS);
    let model = &bundled::load(KvFormat::F32, super::BLOCK_TOKENS)?.model;
    let (mut prefill_s, mut steps, mut logits) = (f64::INFINITY, Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let mut sequence = Sequence::new(model);
        sequence.prefill(model, &tokens[..PROMPT_TOKENS], Logits::Last)?;
        prefill_s = prefill_s.min(started.elapsed().as_secs_f64());
        for &token in &tokens[PROMPT_TOKENS..] {
            let started = Instant::now();
            let out = sequence.prefill(model, &[token], Logits::Last)?;
            steps.push(started.elapsed().as_secs_f64());
            logits = out.last().unwrap_or_default().to_vec();
        }
    }
    let step_s = median(&mut steps);
    figures.insert("prefill_4k_tokens_s".into(), json!(PROMPT_TOKENS as f64 / prefill_s));
    figures.insert("decode_4k_tokens_s".into(), json!(1.0 / step_s));

    match ask(script, dir, &tokens) {
        Ok(eager) => {
            figures.insert("prefill_vs_hf".into(), json!(eager.prefill_s / prefill_s));
            figures.insert("decode_vs_hf".into(), json!(eager.decode_step_s / step_s));
            figures.insert("hf_prefill_4k_tokens_s".into(), json!(PROMPT_TOKENS as f64 / eager.prefill_s));
            figures.insert("hf_decode_4k_tokens_s".into(), json!(1.0 / eager.decode_step_s));
            figures.insert("hf_versions".into(), eager.versions);
            let differences = logits.iter().zip(&eager.logits).map(|(ours, theirs)| (ours - theirs).abs());
            figures.insert("hf_max_abs_dlogit".into(), json!(differences.fold(0.0, f32::max)));
        }
        Err(error) => missing(figures, &["prefill_vs_hf", "decode_vs_hf"], &format!("{error:#}")),
    }
    Ok(())
}

fn ask(script: &Path, dir: &Path, tokens: &[esker_prefix::TokenId]) -> anyhow::Result<Eager> {
    ensure!(script.exists(), "there is no script {}; name it with --transformers", script.display());
    bundled::write_to(dir, PROMPT_TOKENS + DECODE_STEPS)?;
    let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
    let list = dir.join("ids.json");
    std::fs::write(&list, serde_json::to_vec(&ids)?)
        .with_context(|| format!("cannot write {}", list.display()))?;
    let (list, decode) = (list.display().to_string(), DECODE_STEPS.to_string());
    super::ask(script, &["--model", &dir.display().to_string(), "--tokens", &list, "--decode", &decode])
}
