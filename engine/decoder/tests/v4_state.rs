//! V4 state as values: blocks and the state of a boundary continue bit for bit; only the right state is accepted.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use esker_decoder::{BlockIdentity, DecoderError, ErrorKind, KvFormat, Logits, Model, Sequence, StateField};
use esker_prefix::{BlockObject, NamespaceId, ObjectKind, StateObject, TokenId};
use serde_json::json;
use support::{Checkpoint, Random, deployed, identity, logit_bits, v4, v32, with};

const TOKENS: usize = 139;

fn model(format: KvFormat, window: usize) -> Model {
    let base = match format {
        KvFormat::Deployed | KvFormat::DeployedFp8Keys => deployed(v4()),
        KvFormat::F32 | KvFormat::Bf16 => v4(),
    };
    Checkpoint::random(with(base, json!({"sliding_window": window})), 3).load(format, 16)
}

/// A whole sequence, its blocks, and its state at every boundary.
fn taken(model: &Model, tokens: &[TokenId]) -> (Sequence, Vec<BlockObject>, Vec<StateObject>) {
    let mut sequence = Sequence::new(model);
    let mut states = Vec::new();
    for (index, chunk) in tokens.chunks_exact(16).enumerate() {
        sequence.prefill(model, chunk, Logits::None).unwrap();
        states.push(sequence.state(model, index, identity(0, index)).unwrap());
    }
    sequence.prefill(model, &tokens[sequence.tokens()..], Logits::None).unwrap();
    let take = |index| sequence.block(model, index, identity(0, index)).unwrap();
    let blocks = (0..tokens.len() / 16).map(take).collect();
    (sequence, blocks, states)
}

fn restored(model: &Model, blocks: &[BlockObject], state: &StateObject) -> Sequence {
    let mut sequence = Sequence::new(model);
    blocks.iter().for_each(|block| sequence.restore(model, block).unwrap());
    sequence.restore_state(model, state).unwrap();
    sequence
}

#[test]
fn restored_equals_uninterrupted_at_every_boundary_in_every_format() {
    for (format, window) in [
        (KvFormat::F32, 6),
        (KvFormat::Bf16, 6),
        (KvFormat::Bf16, 40),
        (KvFormat::Deployed, 6),
        (KvFormat::DeployedFp8Keys, 40),
    ] {
        let model = model(format, window);
        let tokens = Random(4).tokens(TOKENS, 61);
        let whole = logit_bits(&model, &mut Sequence::new(&model), &tokens, &[TOKENS]);
        let (_, blocks, states) = taken(&model, &tokens);
        for boundary in 1..=blocks.len() {
            let start = boundary * 16;
            for lengths in [&[TOKENS][..], &[1, 1, 3, 30], &[1]] {
                let mut sequence = restored(&model, &blocks[..boundary], &states[boundary - 1]);
                let rest = logit_bits(&model, &mut sequence, &tokens[start..], lengths);
                assert!(rest == whole[start..], "{format:?}, window {window}, at {start}");
            }
            // What a restored sequence gives is the same bytes again, and those of later boundaries too.
            let mut sequence = restored(&model, &blocks[..boundary], &states[boundary - 1]);
            for index in boundary - 1..blocks.len() {
                assert_eq!(sequence.block(&model, index, identity(0, index)).unwrap(), blocks[index]);
                assert_eq!(sequence.state(&model, index, identity(0, index)).unwrap(), states[index]);
                let end = TOKENS.min((index + 2) * 16);
                sequence.prefill(&model, &tokens[(index + 1) * 16..end], Logits::None).unwrap();
            }
        }
    }
}

/// Objects have the sizes that the formats give; a format changes numbers a little, and only the narrower ones.
#[test]
fn formats_cost_what_they_say() {
    let row = |width: usize, narrow: usize, format: KvFormat| match format {
        KvFormat::F32 => 4 * width,
        KvFormat::Bf16 => 2 * width,
        KvFormat::Deployed | KvFormat::DeployedFp8Keys => narrow,
    };
    let tokens = Random(5).tokens(64, 61);
    let checkpoint = Checkpoint::random(deployed(v4()), 3);
    let logits = |model: &Model| {
        let out = Sequence::new(model).prefill(model, &tokens, Logits::All).unwrap();
        out.rows().flatten().copied().collect::<Vec<_>>()
    };
    let exact = logits(&checkpoint.load(KvFormat::F32, 16));
    for (format, key, worst) in [
        (KvFormat::F32, 4 * 128, 0.0),
        (KvFormat::Bf16, 2 * 128, 0.2),
        (KvFormat::DeployedFp8Keys, 132, 2.0),
        (KvFormat::Deployed, 68, 2.0),
    ] {
        let model = checkpoint.load(format, 16);
        // 128 e4m3, 8 bf16, 2 scales, one unused; two sparse layers with four rows a block, two heavy ones with one.
        let row = row(136, 128 + 16 + 2 + 1, format);
        let bytes = |kind| usize::try_from(model.layout().object_bytes_at(kind, 16)).unwrap();
        assert_eq!(bytes(ObjectKind::Block), 2 * 4 * (row + key) + 2 * row);
        assert_eq!(bytes(ObjectKind::State), 5 * 6 * row + 2 * 4 * 2 * (136 + 128) * 4);
        let apart = exact.iter().zip(logits(&model)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart <= worst && (apart > 0.0) == (worst > 0.0), "{format:?}: {apart}");
    }
}

/// The promise that needs no plan: whenever a prefill ends, the state at the last boundary can still be taken.
#[test]
fn the_last_boundary_is_within_reach_after_any_prefill() {
    let model = model(KvFormat::F32, 6);
    let tokens = Random(5).tokens(700, 61);
    let (_, _, states) = taken(&model, &tokens);
    let mut random = Random(6);
    for _ in 0..20 {
        let length = 16 + random.below(684);
        let mut sequence = Sequence::new(&model);
        sequence.prefill(&model, &tokens[..length], Logits::None).unwrap();
        let index = length / 16 - 1;
        assert_eq!(sequence.state(&model, index, identity(0, index)).unwrap(), states[index]);
    }
}

/// What a long sequence keeps beside its rows is bounded.
#[test]
fn tails_do_not_grow() {
    let model = model(KvFormat::F32, 6);
    let mut sequence = Sequence::new(&model);
    let tokens = Random(7).tokens(2048, 61);
    let mut beside = Vec::new();
    for chunk in tokens.chunks(512) {
        sequence.prefill(&model, chunk, Logits::None).unwrap();
        let of_block = usize::try_from(model.layout().object_bytes(ObjectKind::Block)).unwrap();
        let rows = of_block * sequence.tokens() / 16;
        beside.push(sequence.len_bytes() - rows);
    }
    assert!(beside.iter().all(|bytes| *bytes == beside[0]), "{beside:?}");
}

#[test]
fn a_cut_is_exact_within_reach_and_leaves_whole_blocks_beyond() {
    let model = model(KvFormat::F32, 6);
    let tokens = Random(8).tokens(TOKENS, 61);
    let whole = logit_bits(&model, &mut Sequence::new(&model), &tokens, &[TOKENS]);
    let (mut sequence, blocks, states) = taken(&model, &tokens);
    for length in [TOKENS + 1, 137, 130, 128] {
        assert_eq!(sequence.truncate(length), length.min(TOKENS));
        let rest = logit_bits(&model, &mut sequence, &tokens[length.min(TOKENS)..], &[5, 1, 40]);
        assert!(rest == whole[length.min(TOKENS)..], "cut to {length}");
    }
    assert_eq!(sequence.truncate(101), 96);
    assert!(sequence.needs_state());
    let refused = sequence.prefill(&model, &tokens[96..], Logits::Last).unwrap_err();
    assert!(matches!(refused, DecoderError::StateMissing { tokens: 96 }), "{refused}");
    assert!(sequence.state_rows(&model, 0, StateField::Window).is_empty());
    assert_eq!(sequence.block(&model, 5, identity(0, 5)).unwrap(), blocks[5]);
    sequence.restore_state(&model, &states[5]).unwrap();
    assert!(!sequence.needs_state());
    assert!(logit_bits(&model, &mut sequence, &tokens[96..], &[9]) == whole[96..]);
    assert_eq!(sequence.truncate(3), 0);
    assert!(logit_bits(&model, &mut sequence, &tokens, &[50]) == whole);
}

#[test]
fn only_the_state_of_the_same_prefix_is_accepted() {
    let model = model(KvFormat::F32, 6);
    let tokens = Random(9).tokens(TOKENS, 61);
    let (sequence, blocks, states) = taken(&model, &tokens);
    let mut fresh = Sequence::new(&model);
    fresh.restore(&model, &blocks[0]).unwrap();
    assert!(fresh.needs_state());
    let refused = fresh.restore_state(&model, &states[1]).unwrap_err();
    assert!(matches!(refused, DecoderError::StatePosition { expected: 16, got: 32 }), "{refused}");
    let other = restored(&model, &blocks[..1], &states[0]).state(&model, 0, identity(1, 0)).unwrap();
    let refused = fresh.restore_state(&model, &other).unwrap_err();
    assert!(matches!(refused, DecoderError::StatePrefix { .. }), "{refused}");
    assert_eq!(refused.kind(), ErrorKind::Block);
    assert!(fresh.needs_state(), "a refused state leaves the sequence as it was");
    let narrow = self::model(KvFormat::Bf16, 6);
    let (_, _, theirs) = taken(&narrow, &tokens);
    assert!(matches!(fresh.restore_state(&model, &theirs[0]), Err(DecoderError::Prefix(_))));
    fresh.restore_state(&model, &states[0]).unwrap();

    for index in [0, 6, 8, usize::MAX] {
        let refused = sequence.state(&model, index, identity(0, 0)).unwrap_err();
        assert!(matches!(refused, DecoderError::StateNotHeld { tokens: TOKENS, .. }), "{refused}");
    }
    let mut blocks_only = Sequence::new(&model);
    blocks_only.restore(&model, &blocks[0]).unwrap();
    assert!(blocks_only.state(&model, 0, identity(0, 0)).is_err());
}

#[test]
fn what_is_of_another_namespace_is_refused_by_name() {
    let model = model(KvFormat::F32, 6);
    let tokens = Random(9).tokens(TOKENS, 61);
    let (mut ours, blocks, states) = taken(&model, &tokens);
    ours.truncate(128);
    // The same prefix, under the name of another model.
    let foreign = |index| BlockIdentity { namespace: NamespaceId([9; 32]), ..identity(0, index) };
    let state = ours.state(&model, 7, foreign(7)).unwrap();
    let block = ours.block(&model, 1, foreign(1)).unwrap();
    let named = |refused: DecoderError| {
        assert!(matches!(refused, DecoderError::OtherNamespace { .. }), "{refused}");
        assert_eq!(refused.kind(), ErrorKind::Block);
        let text = refused.to_string();
        assert!(text.contains(&NamespaceId([9; 32]).to_string()), "{text}");
        assert!(text.contains(&NamespaceId([1; 32]).to_string()), "{text}");
    };
    let mut sequence = Sequence::new(&model);
    sequence.restore(&model, &blocks[0]).unwrap();
    named(sequence.restore(&model, &block).unwrap_err());
    blocks[1..8].iter().for_each(|block| sequence.restore(&model, block).unwrap());
    named(sequence.restore_state(&model, &state).unwrap_err());
    assert!(sequence.needs_state(), "a refused state leaves the sequence as it was");
    sequence.restore_state(&model, &states[7]).unwrap();
    // Nothing is left of it, nor of its namespace.
    assert_eq!(sequence.truncate(0), 0);
    sequence.restore(&model, &ours.block(&model, 0, foreign(0)).unwrap()).unwrap();
    sequence.restore(&model, &block).unwrap();
    named(sequence.restore(&model, &blocks[2]).unwrap_err());
}

#[test]
fn a_model_without_state_groups_has_an_empty_state_and_needs_none() {
    let model = Checkpoint::random(v32(), 3).load(KvFormat::F32, 16);
    let mut sequence = Sequence::new(&model);
    sequence.prefill(&model, &Random(4).tokens(40, 61), Logits::None).unwrap();
    let state = sequence.state(&model, 1, identity(0, 1)).unwrap();
    assert_eq!(state.len_bytes(), 0);
    assert!(sequence.restore_state(&model, &state).is_err(), "it is that of 32 tokens");
    assert_eq!(sequence.truncate(32), 32);
    sequence.restore_state(&model, &state).unwrap();
    assert!(!sequence.needs_state());
}
