//! A model so small that a token takes microseconds: for promises about time and about accounts, where what it says is of no
//! interest.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Map, json};

use crate::Random;

/// Longest prompt and output of it together.
const CONTEXT: usize = 8_192;
const VOCABULARY: usize = 4_096;
const LAYERS: usize = 2;
const HIDDEN: usize = 32;
const HEADS: usize = 2;
const HEAD: usize = 8;
const ROPE: usize = 8;
const QUERY_RANK: usize = 16;
const LATENT: usize = 32;
const INDEXERS: usize = 2;
const KEY: usize = 16;
const INNER: usize = 48;

/// Writes a V3.2 model of random weights, always the same, into a folder of its own below `folder`, with a tokenizer of made-up
/// words. No token ends its output.
pub fn tiny_model(folder: &Path) -> Result<PathBuf> {
    let model = folder.join("tiny");
    std::fs::create_dir_all(&model)?;
    let config = json!({
        "model_type": "deepseek_v32", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "q_lora_rank": QUERY_RANK, "kv_lora_rank": LATENT,
        "qk_nope_head_dim": HEAD, "qk_rope_head_dim": ROPE, "v_head_dim": HEAD, "index_n_heads": INDEXERS,
        "index_head_dim": KEY, "index_topk": 64, "first_k_dense_replace": LAYERS, "rms_norm_eps": 1e-6,
        "max_position_embeddings": CONTEXT, "rope_theta": 10_000, "tie_word_embeddings": true,
        // Every layer is dense; the decoder asks how experts would be chosen all the same.
        "moe_intermediate_size": INNER, "n_routed_experts": 2, "n_shared_experts": 0, "num_experts_per_tok": 1,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 1.0,
    });
    std::fs::write(model.join("config.json"), config.to_string())?;
    std::fs::write(model.join("model.safetensors"), safetensors())?;
    let words: Map<_, _> = (0..VOCABULARY).map(|word| (format!("w{word}"), word.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    });
    std::fs::write(model.join("tokenizer.json"), tokenizer.to_string())?;
    Ok(model)
}

/// Length of a JSON header, the header, values as f32 LE: the published format of checkpoints.
fn safetensors() -> Vec<u8> {
    let mut random = Random(1);
    let (mut header, mut values) = (Map::new(), Vec::new());
    for (name, shape) in tensors() {
        let start = values.len();
        let fan_in = *shape.last().unwrap_or(&1) as f32;
        for _ in 0..shape.iter().product() {
            let uniform = (random.number() >> 40) as f32 / (1 << 23) as f32 - 1.0;
            let value: f32 = match name.contains("norm.weight") {
                true => 1.0,
                false => uniform * (3.0 / fan_in).sqrt(),
            };
            values.extend_from_slice(&value.to_le_bytes());
        }
        let about = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, values.len()]});
        header.insert(name, about);
    }
    let mut header = serde_json::Value::Object(header).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &values].concat()
}

fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let of_layer = [
            ("input_layernorm.weight", vec![HIDDEN]),
            ("post_attention_layernorm.weight", vec![HIDDEN]),
            ("self_attn.q_a_proj.weight", vec![QUERY_RANK, HIDDEN]),
            ("self_attn.q_a_layernorm.weight", vec![QUERY_RANK]),
            ("self_attn.q_b_proj.weight", vec![HEADS * (HEAD + ROPE), QUERY_RANK]),
            ("self_attn.kv_a_proj_with_mqa.weight", vec![LATENT + ROPE, HIDDEN]),
            ("self_attn.kv_a_layernorm.weight", vec![LATENT]),
            ("self_attn.kv_b_proj.weight", vec![HEADS * 2 * HEAD, LATENT]),
            ("self_attn.o_proj.weight", vec![HIDDEN, HEADS * HEAD]),
            ("self_attn.indexer.wq_b.weight", vec![INDEXERS * KEY, QUERY_RANK]),
            ("self_attn.indexer.wk.weight", vec![KEY, HIDDEN]),
            ("self_attn.indexer.k_norm.weight", vec![KEY]),
            ("self_attn.indexer.k_norm.bias", vec![KEY]),
            ("self_attn.indexer.weights_proj.weight", vec![INDEXERS, HIDDEN]),
            ("mlp.gate_proj.weight", vec![INNER, HIDDEN]),
            ("mlp.up_proj.weight", vec![INNER, HIDDEN]),
            ("mlp.down_proj.weight", vec![HIDDEN, INNER]),
        ];
        all.extend(of_layer.map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape)));
    }
    all
}
