//! How much longer a decode step takes at 64k tokens of context than at 4k.

use std::time::Instant;

use esker_decoder::{Logits, Model, Sequence};
use serde_json::{Map, Value, json};

use super::{Bed, median};

const SHORT_TOKENS: usize = 4 << 10;
const LONG_TOKENS: usize = 64 << 10;
const STEPS: usize = 48;

pub(super) fn run(bed: &Bed, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    let model = &bed.loaded.model;
    let tokens = bed.tokens(LONG_TOKENS + STEPS);
    let prefilled = |tokens: &[esker_prefix::TokenId]| -> anyhow::Result<Sequence> {
        let mut sequence = Sequence::new(model);
        sequence.prefill(model, tokens, Logits::None)?;
        Ok(sequence)
    };
    let mut short = prefilled(&tokens[..SHORT_TOKENS])?;
    let started = Instant::now();
    let mut long = prefilled(&tokens[..LONG_TOKENS])?;
    figures
        .insert("prefill_64k_tokens_s".into(), json!(LONG_TOKENS as f64 / started.elapsed().as_secs_f64()));
    let (mut short_s, mut long_s) = (Vec::new(), Vec::new());
    for step in 0..STEPS {
        short_s.push(timed(&mut short, model, tokens[SHORT_TOKENS + step])?);
        long_s.push(timed(&mut long, model, tokens[LONG_TOKENS + step])?);
    }
    let (short_s, long_s) = (median(&mut short_s), median(&mut long_s));
    figures.insert("decode_step_4k_us".into(), json!(short_s * 1e6));
    figures.insert("decode_step_64k_us".into(), json!(long_s * 1e6));
    figures.insert("decode_flatness".into(), json!(long_s / short_s));
    Ok(())
}

fn timed(sequence: &mut Sequence, model: &Model, token: esker_prefix::TokenId) -> anyhow::Result<f64> {
    let started = Instant::now();
    sequence.prefill(model, &[token], Logits::Last)?;
    Ok(started.elapsed().as_secs_f64())
}
