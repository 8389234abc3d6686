//! Rows left where they are stored: the same logits, bit for bit, whatever the pool holds; and only what is picked is read.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use esker_decoder::{
    DecoderError, Incoming, KvFormat, LayerRows, Logits, Model, Parked, PlaneSource, Sequence,
};
use esker_prefix::{BlockObject, ObjectKind, StateObject, TokenId};
use serde_json::{Value, json};
use support::{Checkpoint, Random, deployed, identity, logit_bits, v4, v32, with};

const BLOCK: usize = 16;
const TOKENS: usize = 330;

struct Blocks {
    planes: Vec<Vec<Bytes>>,
    /// Fetches after which nothing can be had any more.
    until: usize,
    fetched: Arc<AtomicUsize>,
}

impl PlaneSource for Blocks {
    fn fetch(&mut self, plane: usize, blocks: &[usize]) -> Option<Vec<Bytes>> {
        assert!(blocks.is_sorted_by(|a, b| a < b), "each block once, ascending");
        let fetches = self.fetched.fetch_add(1, Ordering::Relaxed);
        (fetches < self.until)
            .then(|| blocks.iter().map(|&block| self.planes[block][plane].clone()).collect())
    }
}

struct Stored {
    blocks: Vec<BlockObject>,
    state: StateObject,
}

impl Stored {
    fn of(model: &Model, tokens: &[TokenId], boundary: usize) -> Self {
        let mut sequence = Sequence::new(model);
        sequence.prefill(model, &tokens[..boundary * BLOCK], Logits::None).unwrap();
        let blocks =
            (0..boundary).map(|index| sequence.block(model, index, identity(0, index)).unwrap()).collect();
        Self { blocks, state: sequence.state(model, boundary - 1, identity(0, boundary - 1)).unwrap() }
    }

    /// A sequence that leaves what it can. `change` changes the parked bytes.
    fn park(
        &self,
        model: &Model,
        pool_bytes: usize,
        until: usize,
        change: u8,
    ) -> (Sequence, Arc<AtomicUsize>) {
        let mut incoming = Incoming::without_parked(model, self.blocks.len(), TOKENS);
        let mut rows: Vec<LayerRows> = Vec::new();
        for plane in 0..model.layout().planes(ObjectKind::Block).len() {
            for (index, block) in self.blocks.iter().enumerate() {
                rows.extend(incoming.put(model, index, plane, &block.planes()[plane]).unwrap());
            }
        }
        let changed = |plane: &Bytes| {
            Bytes::from(
                plane
                    .iter()
                    .enumerate()
                    .map(|(at, byte)| byte ^ if at % 4 == 2 { change } else { 0 })
                    .collect::<Vec<u8>>(),
            )
        };
        let planes = self.blocks.iter().map(|block| block.planes().iter().map(changed).collect()).collect();
        let fetched = Arc::new(AtomicUsize::new(0));
        let source = Blocks { planes, until, fetched: Arc::clone(&fetched) };
        let parked = Parked::new(model, self.blocks.len() * BLOCK, pool_bytes, Box::new(source));
        let mut sequence = Sequence::new(model);
        let arrivals = move |layer, part| {
            let at = rows.iter().position(|rows| (rows.layer(), rows.part()) == (layer, part))?;
            Some(rows.swap_remove(at))
        };
        let last = self.blocks[self.blocks.len() - 1].id().hash;
        sequence.expect_parked(model, parked, last, Box::new(arrivals)).unwrap();
        (sequence, fetched)
    }
}

fn models() -> Vec<(Value, KvFormat)> {
    let shared = json!({"model_type": "glm_moe_dsa", "num_hidden_layers": 4, "index_topk_freq": 3});
    let odd = json!({"num_hidden_layers": 4, "layer_types": [
        "compressed_sparse_attention", "sliding_attention", "heavily_compressed_attention",
        "compressed_sparse_attention"], "compress_ratios": null, "compress_rates": {
        "compressed_sparse_attention": 3, "heavily_compressed_attention": 7}});
    vec![
        (v32(), KvFormat::F32),
        (with(v32(), shared), KvFormat::Bf16),
        (deployed(v32()), KvFormat::Deployed),
        (v4(), KvFormat::F32),
        (with(v4(), odd), KvFormat::Bf16),
        (deployed(v4()), KvFormat::Deployed),
    ]
}

#[test]
fn parked_equals_resident_whatever_the_pool_holds() {
    for (config, format) in models() {
        let model = Checkpoint::random(config.clone(), 3).load(format, 16);
        let tokens = Random(4).tokens(TOKENS, 61);
        let whole = logit_bits(&model, &mut Sequence::new(&model), &tokens, &[TOKENS]);
        let largest = model.layout().planes(ObjectKind::Block).iter().map(|plane| plane.len_bytes).max();
        let largest = usize::try_from(largest.unwrap()).unwrap();
        for boundary in [1, 5, 16] {
            let (stored, start) = (Stored::of(&model, &tokens, boundary), boundary * BLOCK);
            for pool_bytes in [0, 12 * largest, usize::MAX] {
                for replay in [false, true] {
                    let (mut sequence, _) = stored.park(&model, pool_bytes, usize::MAX, 0);
                    match replay {
                        true => sequence.replay(&model, &tokens[..start]).unwrap(),
                        false => sequence.restore_state(&model, &stored.state).unwrap(),
                    }
                    let rest = logit_bits(&model, &mut sequence, &tokens[start..], &[1, 1, 40, 1]);
                    assert!(rest == whole[start..], "{config}, {format:?}, at {start}, pool {pool_bytes}");
                    let figures = sequence.residency().unwrap();
                    assert!(figures.rows_picked > 0 && figures.pool_hits <= figures.rows_picked);
                    assert_eq!(figures.pool_hits == 0, pool_bytes == 0, "{figures:?}");
                    if pool_bytes == usize::MAX {
                        let planes = boundary * model.layout().planes(ObjectKind::Block).len();
                        assert!(figures.planes_fetched <= planes as u64, "each plane once at most");
                    }
                    // What is new is given, what is parked is not.
                    let index = TOKENS / BLOCK - 1;
                    sequence.block(&model, index, identity(0, index)).unwrap();
                    let refused = sequence.block(&model, 0, identity(0, 0)).unwrap_err();
                    assert!(matches!(refused, DecoderError::RowsMissing { .. }), "{refused}");
                }
            }
        }
    }
}

#[test]
fn parked_rows_are_read_and_a_cut_is_exact() {
    for (config, format) in [(v32(), KvFormat::F32), (v4(), KvFormat::F32)] {
        let model = Checkpoint::random(config, 3).load(format, 16);
        let tokens = Random(5).tokens(TOKENS, 61);
        let whole = logit_bits(&model, &mut Sequence::new(&model), &tokens, &[TOKENS]);
        let stored = Stored::of(&model, &tokens, 16);
        let run = |change: u8| {
            let (mut sequence, _) = stored.park(&model, 4096, usize::MAX, change);
            sequence.restore_state(&model, &stored.state).unwrap();
            let rest = logit_bits(&model, &mut sequence, &tokens[256..300], &[44]);
            (sequence, rest)
        };
        assert!(run(0x40).1 != whole[256..300], "other bytes give the same: nothing was read");
        let (mut sequence, rest) = run(0);
        assert!(rest == whole[256..300]);
        for length in [290, 288] {
            assert_eq!(sequence.truncate(length), length);
            assert!(logit_bits(&model, &mut sequence, &tokens[length..300], &[3, 50]) == whole[length..300]);
        }
        // Into the parked rows; a model with states has to replay.
        assert_eq!(sequence.truncate(96), 96);
        sequence.replay(&model, &tokens[..96]).unwrap();
        assert!(logit_bits(&model, &mut sequence, &tokens[96..], &[50]) == whole[96..]);
    }
}

#[test]
fn a_block_of_which_a_cut_left_the_first_rows_parked_is_refused() {
    for (config, format) in models() {
        let model = Checkpoint::random(config, 3).load(format, 16);
        let tokens = Random(5).tokens(TOKENS, 61);
        let mut resident = Sequence::new(&model);
        resident.prefill(&model, &tokens[..136], Logits::None).unwrap();
        let stored = Stored::of(&model, &tokens, 8);
        let (mut sequence, _) = stored.park(&model, 4096, usize::MAX, 0);
        sequence.restore_state(&model, &stored.state).unwrap();
        sequence.prefill(&model, &tokens[128..140], Logits::None).unwrap();
        // In the middle of the seventh block, or, with states, at its beginning.
        let left = sequence.truncate(100);
        sequence.replay(&model, &tokens[..left]).unwrap();
        sequence.prefill(&model, &tokens[left..136], Logits::None).unwrap();
        let missing = |result: Result<(), DecoderError>| matches!(result, Err(DecoderError::RowsMissing { tokens, .. }) if tokens == left);
        let block = |of: &Sequence, index| of.block(&model, index, identity(0, index));
        for index in 0..8 {
            match index * BLOCK < left {
                true => assert!(missing(block(&sequence, index).map(drop)), "block {index}"),
                false => assert_eq!(block(&sequence, index).unwrap(), block(&resident, index).unwrap()),
            }
        }
        let state = |of: &Sequence, tokens| of.state_at(&model, tokens, identity(0, 20));
        if left == 100 {
            assert!(missing(state(&sequence, 105).map(drop)), "its rows begin with parked ones");
        }
        assert_eq!(state(&sequence, 136).unwrap(), state(&resident, 136).unwrap());
    }
}

#[test]
fn rows_that_cannot_be_had_leave_nothing() {
    for (config, format) in models() {
        let model = Checkpoint::random(config, 3).load(format, 16);
        let tokens = Random(6).tokens(TOKENS, 61);
        let whole = logit_bits(&model, &mut Sequence::new(&model), &tokens, &[TOKENS]);
        let stored = Stored::of(&model, &tokens, 9);
        for until in [0, 1, 2, 5] {
            let (mut sequence, fetched) = stored.park(&model, 0, until, 0);
            sequence.restore_state(&model, &stored.state).unwrap();
            sequence.keep_residual();
            let refused = sequence.prefill(&model, &tokens[144..], Logits::None).unwrap_err();
            assert!(matches!(refused, DecoderError::RowsMissing { .. }), "{refused}");
            assert_eq!((fetched.load(Ordering::Relaxed), sequence.tokens()), (until + 1, 0));
            let figures = sequence.residency().unwrap();
            assert!(figures.rows_picked > 0, "what was lost was picked all the same");
            assert!(logit_bits(&model, &mut sequence, &tokens, &[TOKENS]) == whole);
            assert_eq!(sequence.residency().unwrap(), figures);
            // What is computed again is not kept for a draft as well.
            assert!(sequence.take_residual().is_none());
        }
    }
}
