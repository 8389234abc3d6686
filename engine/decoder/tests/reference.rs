//! The decoder computes the published mathematics: logits and selections equal a naive F64 implementation on random
//! models of all families.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use esker_decoder::{KvFormat, Logits, Sequence};
use serde_json::{Value, json};
use support::reference::Reference;
use support::{Checkpoint, Random, v4, v32, with};

const TOKENS: usize = 40;

/// Compares on the first seed whose choices are clear of rounding.
fn compare(config: Value) {
    let (checkpoint, tokens, expected) = (0..80)
        .map(|seed| {
            let checkpoint = Checkpoint::random(config.clone(), seed);
            let vocab = usize::try_from(config["vocab_size"].as_u64().unwrap()).unwrap();
            let tokens = Random(seed + 1000).tokens(TOKENS, vocab);
            let outcome = Reference::new(&checkpoint).run(&tokens);
            (checkpoint, tokens, outcome)
        })
        .find(|(_, _, outcome)| outcome.margin > 2e-5)
        .expect("a seed without near-ties");
    let model = checkpoint.load(KvFormat::F32, 16);
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

/// In the released naming, and in that of `transformers`, whose schedule is the same.
#[test]
fn v4_in_both_namings() {
    compare(v4());
    let named = json!({
        "compress_ratios": null, "num_hash_layers": null, "qk_rope_head_dim": 8, "rope_scaling": null,
        "compress_rope_theta": null, "swiglu_limit": 0,
        "layer_types": [
            "sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention",
            "heavily_compressed_attention", "compressed_sparse_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["hash_moe", "moe", "moe", "hash_moe", "moe"],
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 7000.0},
            "compress": {
                "rope_type": "yarn", "rope_theta": 90000.0, "factor": 8.0, "beta_fast": 32, "beta_slow": 1,
                "original_max_position_embeddings": 32, "attention_factor": 1.0,
            },
        },
    });
    compare(with(v4(), named.clone()));
    // Nested parameters that leave the scale to YaRN, as `transformers` reads them.
    let mut scaled = named;
    scaled["rope_parameters"]["compress"]["attention_factor"] = Value::Null;
    compare(with(v4(), scaled));
}

/// Other settings that a file may have, and a rotation that is not yet nested, whose own base counts for nothing.
#[test]
fn v4_with_other_settings() {
    compare(with(v4(), json!({"scoring_func": "sigmoid", "n_shared_experts": 2})));
    let flat = json!({
        "rope_scaling": null, "rope_theta": 9000.0, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 9000.0, "factor": 4, "original_max_position_embeddings": 16,
            "beta_fast": 8, "beta_slow": 1,
        },
    });
    compare(with(v4(), flat));
}

/// More heads than lanes, rows beyond the widest step, more keys than one step, several groups, one stream, a window
/// longer than the sequence.
#[test]
fn v4_wider_than_every_tile() {
    let wide = json!({
        "num_attention_heads": 18, "head_dim": 90, "o_groups": 3, "index_n_heads": 9, "index_head_dim": 37,
        "q_lora_rank": 270, "num_hidden_layers": 3, "compress_ratios": [4, 8, 4],
        "hc_mult": 1, "sliding_window": 64, "index_topk": 4,
    });
    compare(with(v4(), wide));
}
