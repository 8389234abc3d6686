//! Restored equals uninterrupted, bit for bit, at every block boundary; and only the right block is accepted.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use std::ops::ControlFlow;

use esker_decoder::{DecoderError, ErrorKind, KvFormat, Logits, Model, Sequence};
use esker_prefix::{BlockObject, TokenId};
use serde_json::json;
use support::{Checkpoint, Random, deployed, identity, logit_bits, v32, with};

const TOKENS: usize = 75;

fn filled(model: &Model, seed: u64) -> (Sequence, Vec<TokenId>) {
    let tokens = Random(seed).tokens(TOKENS, model.config().vocab_size);
    let mut sequence = Sequence::new(model);
    sequence.prefill(model, &tokens, Logits::None).unwrap();
    (sequence, tokens)
}

fn blocks(model: &Model, sequence: &Sequence, chain: u8) -> Vec<BlockObject> {
    let count = sequence.tokens() / model.layout().block_tokens() as usize;
    (0..count).map(|index| sequence.block(model, index, identity(chain, index)).unwrap()).collect()
}

#[test]
fn at_every_boundary_in_both_formats_with_and_without_shared_selections() {
    let shared = json!({"model_type": "glm_moe_dsa", "num_hidden_layers": 4, "index_topk_freq": 3});
    for config in [v32(), with(v32(), shared), deployed(v32())] {
        let narrow = config["kv_lora_rank"] == 256;
        for format in [KvFormat::F32, if narrow { KvFormat::Deployed } else { KvFormat::Bf16 }] {
            for block_tokens in [1, 16, 64] {
                let model = Checkpoint::random(config.clone(), 3).load(format, block_tokens);
                let (sequence, tokens) = filled(&model, 4);
                let whole = logit_bits(&model, &mut Sequence::new(&model), &tokens, &[TOKENS]);
                let blocks = blocks(&model, &sequence, 0);
                for boundary in (1..=blocks.len()).filter(|count| count % 7 == 1 || block_tokens > 1) {
                    let mut restored = Sequence::new(&model);
                    blocks[..boundary].iter().for_each(|block| restored.restore(&model, block).unwrap());
                    let start = boundary * block_tokens as usize;
                    assert_eq!(restored.tokens(), start);
                    let rest = logit_bits(&model, &mut restored, &tokens[start..], &[1, 2, 30]);
                    assert!(rest == whole[start..], "{format:?}, blocks of {block_tokens}, at {start}");
                    assert!(self::blocks(&model, &restored, 0) == blocks, "blocks are the same bytes again");
                }
            }
        }
    }
}

#[test]
fn truncation_is_exact() {
    let model = Checkpoint::random(v32(), 3).load(KvFormat::F32, 16);
    let (mut sequence, tokens) = filled(&model, 4);
    let whole = logit_bits(&model, &mut Sequence::new(&model), &tokens, &[TOKENS]);
    for length in [70, 33, 32, 1, 0] {
        sequence.truncate(length);
        assert_eq!(sequence.tokens(), length);
        assert!(logit_bits(&model, &mut sequence, &tokens[length..], &[5, 1, 40]) == whole[length..]);
    }
}

#[test]
fn only_the_next_block_of_the_same_prefix_is_accepted() {
    let model = Checkpoint::random(v32(), 3).load(KvFormat::F32, 16);
    let (sequence, tokens) = filled(&model, 4);
    let (mine, other) = (blocks(&model, &sequence, 0), blocks(&model, &sequence, 1));
    let mut restored = Sequence::new(&model);

    let refused = restored.restore(&model, &mine[1]).unwrap_err();
    assert!(matches!(refused, DecoderError::BlockPosition { expected: 16, got: 32 }), "{refused}");
    restored.restore(&model, &mine[0]).unwrap();
    let refused = restored.restore(&model, &mine[0]).unwrap_err();
    assert!(matches!(refused, DecoderError::BlockPosition { expected: 32, got: 16 }), "{refused}");
    let refused = restored.restore(&model, &other[1]).unwrap_err();
    assert!(matches!(refused, DecoderError::BlockParent { .. }), "{refused}");
    assert_eq!(refused.kind(), ErrorKind::Block);
    assert_eq!(restored.tokens(), 16, "a refused block leaves the sequence as it was");

    // Off a boundary no block can follow; back on it one can.
    restored.prefill(&model, &tokens[16..17], Logits::None).unwrap();
    assert!(restored.restore(&model, &mine[1]).is_err());
    restored.truncate(16);
    restored.restore(&model, &mine[1]).unwrap();

    let refused = restored.block(&model, 2, identity(0, 2)).unwrap_err();
    assert!(matches!(refused, DecoderError::BlockIncomplete { block: 2, end: 48, tokens: 32 }), "{refused}");
    assert!(restored.block(&model, usize::MAX, identity(0, 2)).is_err());
}

#[test]
fn blocks_and_sequences_of_other_models_are_refused() {
    let checkpoint = Checkpoint::random(v32(), 3);
    let model = checkpoint.load(KvFormat::F32, 16);
    let (mut sequence, tokens) = filled(&model, 4);
    let short = with(v32(), json!({"max_position_embeddings": 16}));
    let others = [
        checkpoint.load(KvFormat::Bf16, 16),
        Checkpoint::random(with(v32(), json!({"num_hidden_layers": 4})), 3).load(KvFormat::F32, 16),
        Checkpoint::random(short, 3).load(KvFormat::F32, 16),
        Checkpoint::random(v32(), 4).load(KvFormat::F32, 16),
    ];
    let blocks = blocks(&model, &sequence, 0);
    for other in &others[..2] {
        assert!(matches!(Sequence::new(other).restore(other, &blocks[0]), Err(DecoderError::Prefix(_))));
    }
    let mut full = Sequence::new(&others[2]);
    full.restore(&others[2], &blocks[0]).unwrap();
    assert!(matches!(full.restore(&others[2], &blocks[1]), Err(DecoderError::TooLong { .. })));
    for other in &others {
        assert_ne!(model.fingerprint(), other.fingerprint());
        let refused = sequence.prefill(other, &tokens, Logits::None).unwrap_err();
        assert!(matches!(refused, DecoderError::OtherModel), "{refused}");
    }
    assert_eq!(model.fingerprint(), checkpoint.load(KvFormat::F32, 16).fingerprint());
}

#[test]
fn a_cancelled_prefill_keeps_whole_chunks_and_can_go_on() {
    let model = Checkpoint::random(v32(), 3).load(KvFormat::F32, 16);
    let tokens = Random(5).tokens(700, 61);
    let whole = Sequence::new(&model).prefill(&model, &tokens, Logits::Last).unwrap();
    let mut sequence = Sequence::new(&model);
    let mut seen = Vec::new();
    let stopped = sequence.prefill_observed(&model, &tokens, Logits::Last, &mut |progress| {
        seen.push(progress.done);
        if seen.len() == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let kept = sequence.tokens();
    assert!(matches!(stopped, Err(DecoderError::Cancelled { tokens }) if tokens == kept && kept == seen[1]));
    assert!(kept > 0 && kept < 700);
    assert_eq!(sequence.prefill(&model, &tokens[kept..], Logits::Last).unwrap(), whole);
}
