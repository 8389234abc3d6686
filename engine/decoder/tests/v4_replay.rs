//! V4 resumed from blocks alone: replayed equals uninterrupted, bit for bit, and the blocks stay what they were.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use std::ops::ControlFlow;

use bytes::Bytes;
use esker_decoder::{DecoderError, KvFormat, Logits, Model, Sequence};
use esker_prefix::{BlockObject, TokenId};
use serde_json::{Value, json};
use support::{Checkpoint, Random, deployed, identity, logit_bits, v4, v32, with};

/// A model of blocks of 16 tokens.
fn model(changes: Value, format: KvFormat) -> Model {
    Checkpoint::random(with(v4(), changes), 3).load(format, 16)
}

fn blocks(model: &Model, tokens: &[TokenId]) -> Vec<BlockObject> {
    let mut sequence = Sequence::new(model);
    sequence.prefill(model, tokens, Logits::None).unwrap();
    (0..tokens.len() / 16).map(|index| sequence.block(model, index, identity(0, index)).unwrap()).collect()
}

fn restored(model: &Model, blocks: &[BlockObject]) -> Sequence {
    let mut sequence = Sequence::new(model);
    blocks.iter().for_each(|block| sequence.restore(model, block).unwrap());
    sequence
}

#[test]
fn replayed_equals_uninterrupted_at_every_boundary() {
    let sparse = json!({"num_hidden_layers": 3, "compress_ratios": [4, 4, 16], "sliding_window": 2});
    let narrow = json!({"num_hidden_layers": 2, "compress_ratios": [16, 4], "sliding_window": 1});
    for (changes, format, count) in [
        (json!({"sliding_window": 6}), KvFormat::F32, 139),
        (json!({"sliding_window": 9}), KvFormat::Bf16, 75),
        (with(deployed(v4()), json!({"sliding_window": 7})), KvFormat::Deployed, 75),
        (sparse, KvFormat::F32, 75),
        (narrow, KvFormat::F32, 75),
        // Longer than a chunk, and than the sequence.
        (json!({"sliding_window": 90}), KvFormat::F32, 700),
        (json!({"sliding_window": 400}), KvFormat::Bf16, 300),
    ] {
        let model = model(changes.clone(), format);
        let tokens = Random(4).tokens(count, 61);
        let whole = logit_bits(&model, &mut Sequence::new(&model), &tokens, &[count]);
        let blocks = blocks(&model, &tokens);
        for boundary in (1..=blocks.len()).filter(|boundary| count < 200 || boundary % 11 == 5) {
            let start = boundary * 16;
            let mut sequence = restored(&model, &blocks[..boundary]);
            let needed = sequence.replay_tokens(&model);
            // As many tokens as are needed, or more, give the same.
            let given = if boundary % 2 == 0 { needed } else { start };
            sequence.replay(&model, &tokens[start - given..start]).unwrap();
            assert!(!sequence.needs_state() && sequence.replay_tokens(&model) == 0);

            let mut usual = Sequence::new(&model);
            usual.prefill(&model, &tokens[..start], Logits::None).unwrap();
            let state = |sequence: &Sequence| sequence.state(&model, boundary - 1, identity(0, boundary - 1));
            assert_eq!(state(&sequence).unwrap(), state(&usual).unwrap(), "{changes}, at {start}");
            let rest = logit_bits(&model, &mut sequence, &tokens[start..], &[1, 2, 30]);
            assert!(rest == whole[start..], "{changes}, at {start}");
            for (index, block) in blocks.iter().enumerate() {
                assert_eq!(&sequence.block(&model, index, identity(0, index)).unwrap(), block);
            }
        }
    }
}

/// A wrong byte in a stored row is still there after, and is seen: rows are read, and never formed again.
#[test]
fn rows_are_read_and_not_written() {
    let model = model(json!({"sliding_window": 6}), KvFormat::F32);
    let tokens = Random(5).tokens(80, 61);
    let mut blocks = blocks(&model, &tokens[..64]);
    let mut usual = restored(&model, &blocks);
    usual.replay(&model, &tokens[..64]).unwrap();
    let last = blocks[3].clone();
    let planes = last.planes().iter().map(|plane| {
        let mut bytes = plane.to_vec();
        bytes.chunks_exact_mut(4).for_each(|value| value[2] ^= 0x40);
        Bytes::from(bytes)
    });
    let (namespace, scope) = (last.namespace(), last.scope());
    blocks[3] = BlockObject::new(
        model.layout(),
        namespace,
        scope,
        last.parent(),
        last.id().hash,
        last.tokens(),
        planes.collect(),
    )
    .unwrap();
    let mut changed = restored(&model, &blocks);
    changed.replay(&model, &tokens[..64]).unwrap();
    assert_eq!(changed.block(&model, 3, identity(0, 3)).unwrap(), blocks[3]);
    let bits = |sequence: &mut Sequence| logit_bits(&model, sequence, &tokens[64..], &[16]);
    assert!(bits(&mut changed) != bits(&mut usual));
}

#[test]
fn what_a_replay_costs_is_known_before() {
    let of = |layers: usize, window: usize| {
        let schedule: Vec<usize> = (0..layers).map(|layer| [4, 16][layer % 2]).collect();
        let changes = json!({
            "num_hidden_layers": layers, "compress_ratios": schedule, "sliding_window": window,
        });
        model(changes, KvFormat::F32)
    };
    for (layers, window) in [(1, 6), (3, 6), (5, 40), (4, 5)] {
        let needed = layers * (window - 1) + 1;
        assert_eq!(of(layers, window).replay_tokens(1024), needed);
        assert_eq!(of(layers, window).replay_tokens(16), 16.min(needed));
    }
    // The overlap of the compressor reaches further than such a window.
    assert_eq!(of(1, 1).replay_tokens(1024), 4);
    assert_eq!(of(3, 2).replay_tokens(1024), 4 + 2);
    let dense = Checkpoint::random(v32(), 3).load(KvFormat::F32, 16);
    assert_eq!(dense.replay_tokens(1024), 0);
}

#[test]
fn too_few_tokens_are_refused_and_a_break_leaves_the_state_missing() {
    let model = model(json!({"sliding_window": 90}), KvFormat::F32);
    let tokens = Random(6).tokens(640, 61);
    let blocks = blocks(&model, &tokens);
    let mut sequence = restored(&model, &blocks);
    let needed = sequence.replay_tokens(&model);
    for given in [&tokens[..needed - 1], &[&tokens[..], &tokens[..1]].concat()] {
        let refused = sequence.replay(&model, given).unwrap_err();
        assert!(matches!(refused, DecoderError::ReplayTokens { tokens: 640, .. }), "{refused}");
    }
    let stopped = sequence.replay_observed(&model, &tokens, &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(DecoderError::Cancelled { tokens: 640 })));
    assert!(sequence.needs_state());
    sequence.replay(&model, &tokens).unwrap();
    // A sequence that needs no state is left alone.
    sequence.replay(&model, &[]).unwrap();
    let next = sequence.prefill(&model, &tokens[..1], Logits::Last).unwrap();
    let mut usual = Sequence::new(&model);
    usual.prefill(&model, &tokens, Logits::None).unwrap();
    assert_eq!(next, usual.prefill(&model, &tokens[..1], Logits::Last).unwrap());
}
