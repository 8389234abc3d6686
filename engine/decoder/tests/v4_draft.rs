//! The draft block: its guesses equal the naive F64 implementation, and a guess does not depend on its company.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use esker_decoder::{DecoderError, Draft, KvFormat, Logits, LogitsOut, Model, ModelBuilder, Sequence};
use esker_prefix::TokenId;
use serde_json::{Value, json};
use support::reference::Reference;
use support::{Checkpoint, Random, row_bits, v4, v32, with};

fn config(window: usize) -> Value {
    with(v4(), json!({"num_nextn_predict_layers": 1, "sliding_window": window}))
}

fn builder(checkpoint: &Checkpoint) -> ModelBuilder {
    let mut builder = ModelBuilder::new(&checkpoint.config_text(), KvFormat::F32, 16).unwrap();
    builder.shard("model.safetensors", checkpoint.shard()).unwrap();
    builder.draft();
    builder
}

/// Guesses after every token, each call as long as `lengths` say (the last repeats).
fn guesses(model: &Model, tokens: &[TokenId], next: &[TokenId], lengths: &[usize]) -> Vec<Vec<f32>> {
    let (mut sequence, mut draft) = (Sequence::new(model), Draft::new(model).unwrap());
    sequence.keep_residual();
    let mut rows = Vec::new();
    let mut lengths = lengths.iter().copied();
    let mut length = 0;
    while rows.len() < tokens.len() {
        length = lengths.next().unwrap_or(length).min(tokens.len() - rows.len());
        let span = rows.len()..rows.len() + length;
        sequence.prefill(model, &tokens[span.clone()], Logits::None).unwrap();
        let residual = sequence.take_residual().unwrap();
        assert_eq!((residual.first(), residual.tokens(model)), (span.start, length));
        let logits: LogitsOut = draft.guess(model, &residual, &next[span], Logits::All).unwrap();
        rows.extend(logits.rows().map(<[f32]>::to_vec));
    }
    rows
}

#[test]
fn guesses_equal_the_reference() {
    let mut compared = 0;
    for seed in 0..20 {
        let checkpoint = Checkpoint::random(config(5), seed);
        let tokens = Random(seed).tokens(41, 61);
        let (tokens, next) = (&tokens[..40], &tokens[1..]);
        let (expected, margin) = Reference::new(&checkpoint).draft(tokens, next);
        if margin < 2e-5 {
            continue;
        }
        compared += 1;
        let model = builder(&checkpoint).finish().unwrap();
        assert!(model.has_draft());
        for (got, expected) in guesses(&model, tokens, next, &[7, 1, 40]).iter().zip(&expected) {
            for (got, expected) in got.iter().zip(expected) {
                assert!((f64::from(*got) - expected).abs() < 1e-4, "seed {seed}: {got} is not {expected}");
            }
        }
    }
    assert!(compared > 3, "only {compared} models were clear of ties");
}

#[test]
fn a_guess_does_not_depend_on_its_company_and_a_cut_is_exact_within_a_window() {
    let model = builder(&Checkpoint::random(config(9), 1)).finish().unwrap();
    let tokens = Random(2).tokens(301, 61);
    let (tokens, next) = (&tokens[..300], &tokens[1..]);
    let bits = |rows: &[Vec<f32>]| rows.iter().map(|row| row_bits(row)).collect::<Vec<_>>();
    let whole = bits(&guesses(&model, tokens, next, &[300]));
    assert!(bits(&guesses(&model, tokens, next, &[1])) == whole);
    assert!(bits(&guesses(&model, tokens, next, &[13, 2, 270])) == whole);

    let (mut sequence, mut draft) = (Sequence::new(&model), Draft::new(&model).unwrap());
    sequence.keep_residual();
    let mut from = |start: usize, end: usize| {
        sequence.truncate(start);
        sequence.prefill(&model, &tokens[start..end], Logits::None).unwrap();
        let residual = sequence.take_residual().unwrap();
        let logits = draft.guess(&model, &residual, &next[start..end], Logits::All).unwrap();
        logits.rows().map(row_bits).collect::<Vec<_>>()
    };
    from(0, 290);
    for start in [290, 291, 288] {
        assert!(from(start, 295) == whole[start..295], "cut to {start}");
    }
    // Begun anew, it sees what any draft sees once a window has passed.
    draft = Draft::new(&model).unwrap();
    let mut sequence = Sequence::new(&model);
    sequence.prefill(&model, &tokens[..200], Logits::None).unwrap();
    sequence.keep_residual();
    sequence.prefill(&model, &tokens[200..], Logits::None).unwrap();
    let late = draft.guess(&model, &sequence.take_residual().unwrap(), &next[200..], Logits::All).unwrap();
    let late: Vec<Vec<u32>> = late.rows().map(row_bits).collect();
    assert!(late[8..] == whole[208..] && late[0] != whole[200]);
}

#[test]
fn only_the_rows_that_are_asked_for_get_logits() {
    let model = builder(&Checkpoint::random(config(9), 1)).finish().unwrap();
    let tokens = Random(2).tokens(301, 61);
    let mut sequence = Sequence::new(&model);
    sequence.keep_residual();
    sequence.prefill(&model, &tokens[..300], Logits::None).unwrap();
    let residual = sequence.take_residual().unwrap();
    let guess = |want| Draft::new(&model).unwrap().guess(&model, &residual, &tokens[1..], want).unwrap();
    let (all, last) = (guess(Logits::All), guess(Logits::Last));
    assert_eq!((all.rows().len(), last.rows().len(), guess(Logits::None).rows().len()), (300, 1, 0));
    assert_eq!(last.last().map(row_bits), all.last().map(row_bits));
}

#[test]
fn a_draft_that_is_not_there_or_does_not_fit_is_refused() {
    let checkpoint = Checkpoint::random(config(5), 1);
    let plain = checkpoint.load(KvFormat::F32, 16);
    assert!(!plain.has_draft() && matches!(Draft::new(&plain), Err(DecoderError::NoDraft)));
    assert_eq!(plain.fingerprint(), builder(&checkpoint).finish().unwrap().fingerprint());
    for name in checkpoint.tensors.keys().filter(|name| name.starts_with("mtp.")) {
        let mut without = checkpoint.clone();
        without.tensors.remove(name);
        match builder(&without).finish().map(drop) {
            Err(DecoderError::MissingTensor { tensor, .. }) => assert_eq!(&tensor, name),
            other => panic!("without {name}: {other:?}"),
        }
    }
    assert!(matches!(builder(&Checkpoint::random(v32(), 1)).finish(), Err(DecoderError::NoDraft)));

    let model = builder(&checkpoint).finish().unwrap();
    let mut sequence = Sequence::new(&model);
    assert!(sequence.take_residual().is_none());
    sequence.keep_residual();
    sequence.prefill(&model, &[TokenId(1), TokenId(2)], Logits::None).unwrap();
    let residual = sequence.take_residual().unwrap();
    let mut draft = Draft::new(&model).unwrap();
    let refused = draft.guess(&model, &residual, &[TokenId(3)], Logits::Last).unwrap_err();
    assert!(matches!(refused, DecoderError::DraftTokens { expected: 2, got: 1 }), "{refused}");
    let refused = draft.guess(&model, &residual, &[TokenId(3), TokenId(61)], Logits::Last).unwrap_err();
    assert!(matches!(refused, DecoderError::UnknownToken { .. }), "{refused}");
    let other = builder(&Checkpoint::random(config(5), 2)).finish().unwrap();
    assert!(matches!(
        draft.guess(&other, &residual, &[TokenId(3); 2], Logits::Last),
        Err(DecoderError::OtherModel)
    ));
}
