//! A prefix that comes layer by layer while the first layers compute: bit for bit what it is when it comes at once, and
//! nothing is left of it when a layer does not come.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use esker_decoder::{DecoderError, Incoming, KvFormat, LayerRows, Logits, Model, Part, Sequence};
use esker_prefix::{BlockHash, BlockObject, ObjectKind, StateObject, TokenId};
use serde_json::{Value, json};
use support::{Checkpoint, Random, deployed, identity, logit_bits, v4, v32, with};

const BLOCK: u32 = 16;

fn stored(model: &Model, tokens: &[TokenId], boundary: usize) -> (Vec<BlockObject>, StateObject) {
    let mut sequence = Sequence::new(model);
    sequence.prefill(model, &tokens[..boundary * BLOCK as usize], Logits::None).unwrap();
    let blocks =
        (0..boundary).map(|index| sequence.block(model, index, identity(0, index)).unwrap()).collect();
    (blocks, sequence.state(model, boundary - 1, identity(0, boundary - 1)).unwrap())
}

fn last(blocks: &[BlockObject]) -> BlockHash {
    blocks[blocks.len() - 1].id().hash
}

/// Parts of layers in the order in which planes of these ranks complete them; up to `planes` planes come.
fn layers(model: &Model, blocks: &[BlockObject], planes: usize) -> Vec<LayerRows> {
    let ranks = model.layout().plane_ranks(ObjectKind::Block);
    let mut order: Vec<usize> = (0..ranks.len()).collect();
    order.sort_by_key(|&plane| ranks[plane]);
    let mut incoming = Incoming::new(model, blocks.len(), 300);
    let mut complete = Vec::new();
    for &plane in order.iter().take(planes) {
        for (index, block) in blocks.iter().enumerate() {
            complete.extend(incoming.put(model, index, plane, &block.planes()[plane]).unwrap());
        }
    }
    complete
}

/// Expects `rows`, and notes when each is asked for.
fn expect(
    model: &Model,
    sequence: &mut Sequence,
    blocks: &[BlockObject],
    rows: Vec<LayerRows>,
) -> Arc<Mutex<Vec<(usize, Part)>>> {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let mut rows: BTreeMap<(usize, Part), LayerRows> =
        rows.into_iter().map(|rows| ((rows.layer(), rows.part()), rows)).collect();
    let noted = Arc::clone(&asked);
    let arrivals = move |layer, part| {
        noted.lock().unwrap().push((layer, part));
        rows.remove(&(layer, part))
    };
    sequence.expect(model, blocks.len() * BLOCK as usize, last(blocks), Box::new(arrivals)).unwrap();
    asked
}

fn models() -> Vec<(Value, KvFormat)> {
    let shared = json!({"model_type": "glm_moe_dsa", "num_hidden_layers": 4, "index_topk_freq": 3});
    let windows_last = json!({"num_hidden_layers": 4, "compress_ratios": [4, 0, 16, 0]});
    vec![
        (v32(), KvFormat::F32),
        (with(v32(), shared), KvFormat::Bf16),
        (deployed(v32()), KvFormat::Deployed),
        (v4(), KvFormat::F32),
        (with(v4(), windows_last), KvFormat::Bf16),
        (deployed(v4()), KvFormat::Deployed),
    ]
}

#[test]
fn what_comes_layer_by_layer_is_what_comes_at_once() {
    for (config, format) in models() {
        let model = Checkpoint::random(config.clone(), 3).load(format, BLOCK);
        let tokens = Random(4).tokens(150, 61);
        let whole = logit_bits(&model, &mut Sequence::new(&model), &tokens, &[150]);
        let has_states = !model.layout().planes(ObjectKind::State).is_empty();
        for boundary in [1, 3, 7] {
            let (blocks, state) = stored(&model, &tokens, boundary);
            let start = boundary * BLOCK as usize;
            // With the state, and from blocks alone by a replay.
            for replay in [false, true] {
                let mut sequence = Sequence::new(&model);
                let asked = expect(&model, &mut sequence, &blocks, layers(&model, &blocks, usize::MAX));
                match replay {
                    true => sequence.replay(&model, &tokens[..start]).unwrap(),
                    false => sequence.restore_state(&model, &state).unwrap(),
                }
                assert_eq!(
                    replay && has_states,
                    !asked.lock().unwrap().is_empty(),
                    "asked too early or late"
                );
                let rest = logit_bits(&model, &mut sequence, &tokens[start..], &[30, 1, 2]);
                assert!(rest == whole[start..], "{config}, {format:?}, at {start}, replay {replay}");
                assert!(!sequence.is_arriving() && asked.lock().unwrap().is_sorted());
                for (index, block) in blocks.iter().enumerate() {
                    assert_eq!(&sequence.block(&model, index, identity(0, index)).unwrap(), block);
                }
            }
        }
    }
}

/// Whatever layer is the last to come, nothing is left that was computed before it was missed; and the sequence can be
/// used again.
#[test]
fn a_layer_that_does_not_come_leaves_nothing() {
    for (config, format) in models() {
        let model = Checkpoint::random(config, 3).load(format, BLOCK);
        let tokens = Random(5).tokens(100, 61);
        let whole = logit_bits(&model, &mut Sequence::new(&model), &tokens, &[100]);
        let (blocks, state) = stored(&model, &tokens, 3);
        for planes in 0..model.layout().planes(ObjectKind::Block).len() {
            for replay in [false, true] {
                let mut sequence = Sequence::new(&model);
                expect(&model, &mut sequence, &blocks, layers(&model, &blocks, planes));
                let missed = if replay && sequence.needs_state() {
                    sequence.replay(&model, &tokens[..48]).unwrap_err()
                } else {
                    sequence.restore_state(&model, &state).unwrap();
                    sequence.prefill(&model, &tokens[48..], Logits::All).unwrap_err()
                };
                assert!(matches!(missed, DecoderError::RowsMissing { tokens: 48, .. }), "{missed}");
                assert_eq!((sequence.tokens(), sequence.is_arriving()), (0, false));
                assert!(logit_bits(&model, &mut sequence, &tokens, &[100]) == whole);
            }
        }
    }
}

#[test]
fn what_is_not_there_yet_is_not_given_and_what_does_not_fit_is_refused() {
    let model = Checkpoint::random(v4(), 3).load(KvFormat::F32, BLOCK);
    let tokens = Random(6).tokens(64, 61);
    let (blocks, _) = stored(&model, &tokens, 3);

    let mut incoming = Incoming::new(&model, 3, 0);
    let plane = |block: usize, plane: usize| &blocks[block].planes()[plane][..];
    let refused = incoming.put(&model, 1, 0, plane(1, 0)).err().unwrap();
    assert!(matches!(refused, DecoderError::BlockPosition { expected: 16, got: 32 }), "{refused}");
    assert!(matches!(incoming.put(&model, 0, 99, &[]), Err(DecoderError::Prefix(_))));
    assert!(matches!(incoming.put(&model, 0, 0, &plane(0, 0)[1..]), Err(DecoderError::Prefix(_))));
    (0..3).for_each(|block| drop(incoming.put(&model, block, 0, plane(block, 0)).unwrap()));
    assert!(incoming.put(&model, 3, 0, plane(0, 0)).is_err(), "more blocks than announced");

    let mut sequence = Sequence::new(&model);
    for wrong in [0, 15, 47] {
        let refused = sequence.expect(&model, wrong, last(&blocks), Box::new(|_, _| None)).unwrap_err();
        assert!(matches!(refused, DecoderError::BlockPosition { .. }), "{refused}");
    }
    let refused = sequence.expect(&model, 4096, last(&blocks), Box::new(|_, _| None)).unwrap_err();
    assert!(matches!(refused, DecoderError::TooLong { .. }), "{refused}");
    expect(&model, &mut sequence, &blocks, layers(&model, &blocks, usize::MAX));
    assert!(matches!(sequence.block(&model, 0, identity(0, 0)), Err(DecoderError::RowsMissing { .. })));
    assert!(matches!(sequence.restore(&model, &blocks[0]), Err(DecoderError::RowsMissing { .. })));
    assert!(sequence.expect(&model, 48, last(&blocks), Box::new(|_, _| None)).is_err(), "not empty any more");
    assert_eq!(sequence.truncate(20), 0);
    assert!(!sequence.is_arriving());
    sequence.prefill(&model, &tokens, Logits::None).unwrap();
}
