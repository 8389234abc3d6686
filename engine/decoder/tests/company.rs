//! The contract: a token's numbers do not depend on its company. Whatever the lengths of the calls and the number of
//! threads, logits and state have the same bits.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use esker_decoder::{KvFormat, Model, Sequence, StateField};
use esker_prefix::TokenId;
use rayon::ThreadPoolBuilder;
use serde_json::json;
use support::{Checkpoint, Random, deployed, logit_bits, row_bits, v4, v32, with};

const FIELDS: [StateField; 13] = [
    StateField::Latent,
    StateField::RopeKey,
    StateField::IndexKey,
    StateField::Window,
    StateField::Compressed,
    StateField::OverlapKv,
    StateField::OverlapGate,
    StateField::IndexOverlapKv,
    StateField::IndexOverlapGate,
    StateField::TailKv,
    StateField::TailGate,
    StateField::IndexTailKv,
    StateField::IndexTailGate,
];

/// Everything that a run computes, as bits.
fn run(model: &Model, tokens: &[TokenId], lengths: &[usize], threads: usize) -> Vec<Vec<u32>> {
    let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let mut sequence = Sequence::new(model);
        let mut bits = logit_bits(model, &mut sequence, tokens, lengths);
        for layer in 0..model.config().num_hidden_layers {
            for field in FIELDS {
                bits.push(row_bits(&sequence.state_rows(model, layer, field)));
            }
        }
        bits
    })
}

fn compare(model: &Model, tokens: &[TokenId], seed: u64) {
    let whole = run(model, tokens, &[tokens.len()], 1);
    assert!(whole[0].iter().any(|&bits| f32::from_bits(bits).abs() > 0.1), "the model computes something");
    let mut random = Random(seed);
    for (round, threads) in [1, 2, 3, 2].into_iter().enumerate() {
        let longest = [1, 8, 70, tokens.len()][round];
        let lengths: Vec<usize> = (0..tokens.len()).map(|_| 1 + random.below(longest)).collect();
        assert!(run(model, tokens, &lengths, threads) == whole, "calls of {lengths:?} on {threads} threads");
    }
}

#[test]
fn small_models_of_both_families() {
    let shared = json!({
        "model_type": "glm_moe_dsa", "num_hidden_layers": 5, "index_topk_freq": 2, "n_group": 3, "topk_group": 2,
        "attention_bias": true,
    });
    for (config, format) in [(v32(), KvFormat::F32), (with(v32(), shared), KvFormat::Bf16)] {
        let model = Checkpoint::random(config, 5).load(format, 16);
        compare(&model, &Random(6).tokens(150, 61), 7);
    }
}

/// Widths beyond a panel, a tile and the blocking of the products, more heads than lanes, a selection beyond both
/// its own panels and one chunk.
#[test]
fn a_model_wider_than_every_tile() {
    let wide = json!({
        "hidden_size": 300, "intermediate_size": 270, "q_lora_rank": 260, "kv_lora_rank": 90, "num_attention_heads": 19,
        "index_n_heads": 9, "index_topk": 280, "num_hidden_layers": 2, "moe_intermediate_size": 33, "vocab_size": 131,
    });
    let model = Checkpoint::random(with(v32(), wide), 8).load(KvFormat::F32, 16);
    compare(&model, &Random(9).tokens(400, 131), 10);
}

/// Beyond one chunk, with windows shorter and longer than it and than a block, in both row formats.
#[test]
fn v4_in_both_formats() {
    for (window, format, block_tokens) in [(6, KvFormat::F32, 16), (300, KvFormat::Bf16, 64)] {
        let changes = json!({"sliding_window": window});
        let model = Checkpoint::random(with(v4(), changes), 13).load(format, block_tokens);
        compare(&model, &Random(14).tokens(350, 61), 15);
    }
    let wide = json!({
        "hidden_size": 300, "num_attention_heads": 18, "head_dim": 90, "o_groups": 3, "index_n_heads": 9,
        "index_head_dim": 37, "index_topk": 40, "q_lora_rank": 260, "num_hidden_layers": 3,
    });
    let model = Checkpoint::random(with(v4(), wide), 16).load(KvFormat::F32, 16);
    compare(&model, &Random(17).tokens(300, 61), 18);
}

#[test]
fn in_the_deployed_formats() {
    for (config, format) in [
        (v32(), KvFormat::Deployed),
        (v4(), KvFormat::Deployed),
        (with(v4(), json!({"sliding_window": 70})), KvFormat::DeployedFp8Keys),
    ] {
        let model = Checkpoint::random(deployed(config), 19).load(format, 16);
        compare(&model, &Random(20).tokens(150, 61), 21);
    }
}

#[test]
fn a_bf16_cache_holds_only_bf16_numbers() {
    let model = Checkpoint::random(v32(), 11).load(KvFormat::Bf16, 16);
    for rows in &run(&model, &Random(12).tokens(40, 61), &[40], 1)[40..] {
        assert!(rows.iter().all(|bits| bits & 0xFFFF == 0));
    }
}
