//! States off the block grid: a sequence that is restored from whole blocks and a state inside the next goes on bit for bit,
//! wherever that is, at once, layer by layer, and with rows left where they are.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use bytes::Bytes;
use esker_decoder::{
    BlockIdentity, DecoderError, Incoming, KvFormat, LayerRows, Logits, Model, Parked, PlaneSource, Sequence,
};
use esker_prefix::{BlockHash, BlockObject, ObjectKind, StateObject, TokenId};
use serde_json::{Value, json};
use support::{Checkpoint, Random, deployed, identity, logit_bits, v4, v32, with};

const BLOCK: usize = 16;
const TOKENS: usize = 110;

/// A state inside the block `end / BLOCK`.
fn inside(end: usize) -> BlockIdentity {
    let mut inside = identity(0, end / BLOCK);
    inside.hash = BlockHash([u8::try_from(end).unwrap(); 32]);
    inside
}

fn state(model: &Model, sequence: &Sequence, end: usize) -> StateObject {
    let identity = if end.is_multiple_of(BLOCK) { identity(0, end / BLOCK - 1) } else { inside(end) };
    sequence.state_at(model, end, identity).unwrap()
}

/// Whole blocks of a prefix of `end` tokens, and the state at its end.
fn stored(model: &Model, tokens: &[TokenId], end: usize) -> (Vec<BlockObject>, StateObject) {
    let mut sequence = Sequence::new(model);
    sequence.prefill(model, &tokens[..end], Logits::None).unwrap();
    let take = |index| sequence.block(model, index, identity(0, index)).unwrap();
    ((0..end / BLOCK).map(take).collect(), state(model, &sequence, end))
}

fn restored(model: &Model, blocks: &[BlockObject], state: &StateObject) -> Sequence {
    let mut sequence = Sequence::new(model);
    blocks.iter().for_each(|block| sequence.restore(model, block).unwrap());
    sequence.restore_state(model, state).unwrap();
    sequence
}

fn models() -> Vec<(Value, KvFormat)> {
    let shared = json!({"model_type": "glm_moe_dsa", "num_hidden_layers": 4, "index_topk_freq": 3});
    // Blocks cut the runs of these.
    let odd = json!({"num_hidden_layers": 4, "layer_types": [
        "compressed_sparse_attention", "sliding_attention", "heavily_compressed_attention",
        "compressed_sparse_attention"], "compress_ratios": null, "compress_rates": {
        "compressed_sparse_attention": 3, "heavily_compressed_attention": 7}});
    let long_runs = json!({"num_hidden_layers": 4, "compress_ratios": [4, 24, 64, 0]});
    vec![
        (v32(), KvFormat::F32),
        (with(v32(), shared), KvFormat::Bf16),
        (deployed(v32()), KvFormat::Deployed),
        (v4(), KvFormat::F32),
        (with(v4(), odd), KvFormat::Bf16),
        (with(v4(), long_runs), KvFormat::F32),
        (deployed(v4()), KvFormat::Deployed),
    ]
}

#[test]
fn a_sequence_goes_on_from_any_length() {
    for (config, format) in models() {
        let model = Checkpoint::random(config.clone(), 3).load(format, u32::try_from(BLOCK).unwrap());
        let tokens = Random(4).tokens(TOKENS, 61);
        let whole = logit_bits(&model, &mut Sequence::new(&model), &tokens, &[TOKENS]);
        for end in (1..70).chain([95, 100, 109]) {
            let (blocks, at_end) = stored(&model, &tokens, end);
            let mut sequence = restored(&model, &blocks, &at_end);
            assert_eq!((sequence.tokens(), sequence.needs_state()), (end, false));
            assert_eq!(state(&model, &sequence, end), at_end, "what comes back is what went, at {end}");
            let rest = logit_bits(&model, &mut sequence, &tokens[end..], &[1, 3, TOKENS]);
            assert!(rest == whole[end..], "{config} {format:?} at {end}");
            // Its later blocks and states are those of a sequence that was never put away.
            let (all, last) = stored(&model, &tokens, TOKENS);
            assert_eq!(state(&model, &sequence, TOKENS), last);
            for (index, block) in all.iter().enumerate() {
                assert_eq!(sequence.block(&model, index, identity(0, index)).unwrap(), *block);
            }
        }
    }
}

/// Rows of layers in order.
fn layers(model: &Model, blocks: &[BlockObject], parked: bool) -> Vec<LayerRows> {
    let mut incoming = match parked {
        true => Incoming::without_parked(model, blocks.len(), TOKENS),
        false => Incoming::new(model, blocks.len(), TOKENS),
    };
    let mut rows = Vec::new();
    for plane in 0..model.layout().planes(ObjectKind::Block).len() {
        for (index, block) in blocks.iter().enumerate() {
            rows.extend(incoming.put(model, index, plane, &block.planes()[plane]).unwrap());
        }
    }
    rows
}

/// Planes of blocks in memory.
struct Blocks(Vec<BlockObject>);

impl PlaneSource for Blocks {
    fn fetch(&mut self, plane: usize, blocks: &[usize]) -> Option<Vec<Bytes>> {
        Some(blocks.iter().map(|&block| self.0[block].planes()[plane].clone()).collect())
    }
}

#[test]
fn rows_that_come_later_or_never_are_followed_by_those_of_the_state() {
    for (config, format) in models() {
        let model = Checkpoint::random(config.clone(), 3).load(format, u32::try_from(BLOCK).unwrap());
        let tokens = Random(4).tokens(TOKENS, 61);
        let whole = logit_bits(&model, &mut Sequence::new(&model), &tokens, &[TOKENS]);
        for end in [17, 30, 61, 97] {
            let (blocks, at_end) = stored(&model, &tokens, end);
            let last = blocks[blocks.len() - 1].id().hash;
            for parked in [false, true] {
                let mut sequence = Sequence::new(&model);
                let mut rows = layers(&model, &blocks, parked);
                let arrivals = move |layer, part| {
                    let at = rows.iter().position(|rows| (rows.layer(), rows.part()) == (layer, part))?;
                    Some(rows.swap_remove(at))
                };
                let held = blocks.len() * BLOCK;
                if parked {
                    let parked = Parked::new(&model, held, 1 << 20, Box::new(Blocks(blocks.clone())));
                    sequence.expect_parked(&model, parked, last, Box::new(arrivals)).unwrap();
                } else {
                    sequence.expect(&model, held, last, Box::new(arrivals)).unwrap();
                }
                sequence.restore_state(&model, &at_end).unwrap();
                assert_eq!((sequence.tokens(), sequence.needs_state()), (end, false));
                let rest = logit_bits(&model, &mut sequence, &tokens[end..], &[1, 2, 30]);
                assert!(rest == whole[end..], "{config} {format:?} at {end}, parked {parked}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let model = Checkpoint::random(v4(), 3).load(KvFormat::F32, u32::try_from(BLOCK).unwrap());
    let tokens = Random(5).tokens(TOKENS, 61);
    let (blocks, at_end) = stored(&model, &tokens, 40);
    // A block too few, a block of another prefix, nothing at all.
    let mut sequence = Sequence::new(&model);
    sequence.restore(&model, &blocks[0]).unwrap();
    let refused = sequence.restore_state(&model, &at_end).unwrap_err();
    assert!(matches!(refused, DecoderError::StatePosition { expected: 16, got: 40 }), "{refused}");
    sequence.restore(&model, &blocks[1]).unwrap();
    let mut other = inside(40);
    other.parent = BlockHash([9; 32]);
    let mut whole = Sequence::new(&model);
    whole.prefill(&model, &tokens[..40], Logits::None).unwrap();
    let of_another = whole.state_at(&model, 40, other).unwrap();
    let refused = sequence.restore_state(&model, &of_another).unwrap_err();
    assert!(matches!(refused, DecoderError::StatePrefix { .. }), "{refused}");
    assert_eq!((sequence.tokens(), sequence.needs_state()), (32, true));
    sequence.restore_state(&model, &at_end).unwrap();
    assert_eq!(sequence.tokens(), 40);
    // What is held goes back to the last boundary, and not beyond the end.
    assert!(whole.state_at(&model, 33, inside(33)).is_ok());
    for end in [0, 20, 41] {
        assert!(whole.state_at(&model, end, inside(end)).is_err(), "{end}");
    }
}
