//! The decoder computes the published mathematics: logits and selections equal a naive F64 implementation on random
//! models of both families.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use esker_decoder::{KvFormat, Logits, Sequence};
use serde_json::{Value, json};
use support::reference::Reference;
use support::{Checkpoint, Random, v32, with};

const TOKENS: usize = 40;

/// Compares on the first seed whose choices are clear of rounding.
fn compare(config: Value) {
    let (checkpoint, tokens, expected) = (0..50)
        .map(|seed| {
            let checkpoint = Checkpoint::random(config.clone(), seed);
            let vocab = usize::try_from(config["vocab_size"].as_u64().unwrap()).unwrap();
            let tokens = Random(seed + 1000).tokens(TOKENS, vocab);
            let outcome = Reference::new(&checkpoint).run(&tokens);
            (checkpoint, tokens, outcome)
        })
        .find(|(_, _, outcome)| outcome.margin > 2e-5)
        .expect("a seed without near-ties");
    let model = checkpoint.load(KvFormat::F32, 8);
    let mut sequence = Sequence::new(&model);
    sequence.record_selections();
    let logits = sequence.prefill(&model, &tokens, Logits::All).unwrap();
    for (layer, expected) in expected.selections.iter().enumerate() {
        assert_eq!(sequence.selections(layer), expected, "selections of layer {layer}");
    }
    let pairs = logits.rows().flatten().zip(expected.logits.iter().flatten());
    let worst = pairs.map(|(got, expected)| (f64::from(*got) - expected).abs()).fold(0.0, f64::max);
    let scale = expected.logits.iter().flatten().fold(0.0_f64, |a, b| a.max(b.abs()));
    assert!(worst < 1e-4 && scale > 0.5, "off by {worst} at scale {scale}");
}

#[test]
fn v32_plain() {
    compare(v32());
}

#[test]
fn v32_grouped_routing_without_normalisation() {
    let groups = json!({
        "n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "norm_topk_prob": false,
        "n_shared_experts": 2, "first_k_dense_replace": 0,
    });
    compare(with(v32(), groups));
}

#[test]
fn v32_yarn_in_the_older_spelling() {
    let yarn = json!({"rope_scaling": {
        "type": "yarn", "rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 16, "beta_fast": 32,
        "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 1.0,
    }});
    compare(with(v32(), yarn));
}

#[test]
fn v32_yarn_without_mscale_scales_the_rotation() {
    let yarn = json!({"rope_theta": null, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 8, "beta_slow": 0.5,
    }});
    compare(with(v32(), yarn));
}

#[test]
fn v32_dense_with_biases_and_tied_head() {
    let dense = json!({
        "mlp_layer_types": ["dense", "dense", "dense"], "attention_bias": true, "tie_word_embeddings": true,
        "n_routed_experts": null, "num_experts_per_tok": null, "moe_intermediate_size": null,
        "indexer_rope_interleave": true,
    });
    compare(with(v32(), dense));
}

/// More heads than lanes, latents beyond the widest step, a selection of more than one step of rows.
#[test]
fn v32_wider_than_every_tile() {
    let wide = json!({
        "num_attention_heads": 19, "kv_lora_rank": 90, "index_n_heads": 9, "index_head_dim": 37, "index_topk": 21,
        "q_lora_rank": 270, "num_hidden_layers": 2,
    });
    compare(with(v32(), wide));
}

fn glm() -> Value {
    let glm = json!({
        "model_type": "glm_moe_dsa", "num_hidden_layers": 6, "rms_norm_eps": 1e-5, "qk_nope_head_dim": 14,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "n_shared_experts": 0, "index_topk": 5,
    });
    with(v32(), glm)
}

#[test]
fn glm_with_its_own_rotation_of_the_indexer() {
    compare(glm());
}

#[test]
fn glm_may_be_told_to_rotate_halves() {
    compare(with(glm(), json!({"indexer_rope_interleave": false})));
}

#[test]
fn glm_shares_selections_by_list_by_frequency_and_by_pattern() {
    let by_list = json!({"indexer_types": ["full", "full", "shared", "shared", "shared", "full"]});
    compare(with(glm(), by_list));
    compare(with(glm(), json!({"index_topk_freq": 4, "index_skip_topk_offset": 2})));
    compare(with(glm(), json!({"index_topk_pattern": "FSFSSF"})));
}
