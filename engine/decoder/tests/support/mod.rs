//! Random models in the published format, the same on every machine, so that tests need no file.

// Each test file uses a part of it; a test fails by panicking; tables of experts are drawn as the F32 that all is.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::cast_possible_truncation)]

pub mod reference;

use std::collections::BTreeMap;

use bytes::Bytes;
use esker_decoder::{
    BlockIdentity, Compression, Family, KvFormat, Logits, LogitsOut, MlaConfig, Model, ModelBuilder,
    ModelConfig, Sequence, V4Config,
};
use esker_prefix::{BlockHash, NamespaceId, ScopeTag, TokenId};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    /// Roughly normal: a sum of four uniforms, scaled to variance 1.
    fn normal(&mut self) -> f32 {
        let uniform = |bits: u64| (bits & 0xFFFF) as f32 / 65_536.0 - 0.5;
        let bits = self.next();
        (0..4).map(|i| uniform(bits >> (16 * i))).sum::<f32>() * 3.0_f32.sqrt()
    }

    pub fn tokens(&mut self, count: usize, vocab: usize) -> Vec<TokenId> {
        (0..count).map(|_| TokenId(u32::try_from(self.below(vocab)).unwrap())).collect()
    }
}

/// A tiny V3.2: three layers, one dense, two sparse.
pub fn v32() -> Value {
    json!({
        "model_type": "deepseek_v32", "vocab_size": 61, "hidden_size": 40, "intermediate_size": 48,
        "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "q_lora_rank": 20,
        "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "index_n_heads": 4,
        "index_head_dim": 16, "index_topk": 7, "first_k_dense_replace": 1, "n_routed_experts": 6,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": true, "routed_scaling_factor": 1.5, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048, "rope_theta": 10000, "rope_scaling": null,
    })
}

/// A tiny V4: a layer with only the window, two at ratio 4, two at ratio 16, the first two routed by a table.
pub fn v4() -> Value {
    json!({
        "model_type": "deepseek_v4", "vocab_size": 61, "hidden_size": 40, "num_hidden_layers": 5,
        "num_attention_heads": 4, "head_dim": 24, "qk_rope_head_dim": 8, "q_lora_rank": 20, "sliding_window": 6,
        "compress_ratios": [0, 16, 4, 16, 4, 0], "o_groups": 2, "o_lora_rank": 10, "hc_mult": 3,
        "hc_sinkhorn_iters": 7, "hc_eps": 1e-6, "index_n_heads": 3, "index_head_dim": 16, "index_topk": 5,
        "num_hash_layers": 2, "moe_intermediate_size": 24, "n_routed_experts": 6, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus", "swiglu_limit": 1.0, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048, "rope_theta": 10000, "compress_rope_theta": 40000,
        "rope_scaling": {
            "type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
        },
    })
}

/// Widths that the deployed row formats can cut into their blocks.
pub fn deployed(base: Value) -> Value {
    let widths = match base["model_type"] == "deepseek_v4" {
        true => json!({"head_dim": 136, "index_head_dim": 128}),
        false => json!({"kv_lora_rank": 256, "index_head_dim": 128}),
    };
    with(base, widths)
}

/// `base` with some fields replaced.
pub fn with(mut base: Value, changes: Value) -> Value {
    for (name, value) in changes.as_object().unwrap() {
        base[name] = value.clone();
    }
    base
}

/// A checkpoint: its tensors by name, F32.
#[derive(Clone)]
pub struct Checkpoint {
    pub config: Value,
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Checkpoint {
    /// Draws every weight of the model that `config` describes; for V4 with a draft block, if it names one.
    pub fn random(config: Value, seed: u64) -> Self {
        let c = ModelConfig::from_json(&config.to_string()).unwrap();
        let drafts = config["num_nextn_predict_layers"].as_u64().unwrap_or(0) > 0;
        let mut it = Self { config, tensors: BTreeMap::new() };
        let mut random = Random(seed);
        let experts = match &c.family {
            Family::V4(v4) => v4.n_routed_experts,
            Family::Mla(_) => 0,
        };
        let mut add = |name: String, shape: &[usize]| {
            let count = shape.iter().product();
            let fan_in = *shape.last().unwrap() as f32;
            let draw = |random: &mut Random| match name.as_str() {
                name if name.contains("norm.weight") || name.contains("layernorm") => {
                    1.0 + 0.1 * random.normal()
                }
                name if name.ends_with("_scale") => 1.0 + 0.1 * random.normal(),
                name if name.ends_with("tid2eid") => random.below(experts) as f32,
                name if name.contains("bias") || name.ends_with("_base") => 0.3 * random.normal(),
                name if name.ends_with(".ape") || name.ends_with("attn_sink") => random.normal(),
                _ => random.normal() / fan_in.sqrt(),
            };
            let values = (0..count).map(|_| draw(&mut random)).collect();
            it.tensors.insert(name, (shape.to_vec(), values));
        };
        match &c.family {
            Family::Mla(mla) => add_mla(&c, mla, &mut add),
            Family::V4(v4) => {
                add_v4(&c, v4, &mut add);
                if drafts {
                    add_draft(&c, v4, &mut add);
                }
            }
        }
        it
    }

    pub fn config_text(&self) -> String {
        self.config.to_string()
    }

    /// The bytes of one safetensors file.
    pub fn shard(&self) -> Bytes {
        let parts: Vec<(&str, &[usize], Dtype, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|(name, (shape, values))| {
                let (dtype, bytes) = match name.strip_suffix(".ffn.gate.tid2eid") {
                    None => (Dtype::F32, values.iter().flat_map(|value| value.to_le_bytes()).collect()),
                    // Both formats occur in published tables: even layers have one, odd layers the other.
                    Some(layer) if layer.ends_with(['0', '2', '4']) => {
                        (Dtype::I64, values.iter().flat_map(|&value| (value as i64).to_le_bytes()).collect())
                    }
                    Some(_) => {
                        (Dtype::I32, values.iter().flat_map(|&value| (value as i32).to_le_bytes()).collect())
                    }
                };
                (name.as_str(), shape.as_slice(), dtype, bytes)
            })
            .collect();
        serialise(&parts)
    }

    pub fn try_load(&self, format: KvFormat, block_tokens: u32) -> esker_decoder::Result<Model> {
        let mut builder = ModelBuilder::new(&self.config_text(), format, block_tokens)?;
        builder.shard("model.safetensors", self.shard())?;
        builder.finish()
    }

    pub fn load(&self, format: KvFormat, block_tokens: u32) -> Model {
        self.try_load(format, block_tokens).unwrap()
    }
}

/// Adds a tensor of a name and shape.
type Add<'a> = &'a mut dyn FnMut(String, &[usize]);

fn add_mla(c: &ModelConfig, mla: &MlaConfig, add: Add<'_>) {
    let (d, heads) = (c.hidden_size, c.num_attention_heads);
    add("model.embed_tokens.weight".into(), &[c.vocab_size, d]);
    add("model.norm.weight".into(), &[d]);
    if !c.tie_word_embeddings {
        add("lm_head.weight".into(), &[c.vocab_size, d]);
    }
    for layer in 0..c.num_hidden_layers {
        let l = format!("model.layers.{layer}");
        let a = format!("{l}.self_attn");
        add(format!("{l}.input_layernorm.weight"), &[d]);
        add(format!("{l}.post_attention_layernorm.weight"), &[d]);
        add(format!("{a}.q_a_proj.weight"), &[c.q_lora_rank, d]);
        add(format!("{a}.q_a_layernorm.weight"), &[c.q_lora_rank]);
        add(format!("{a}.q_b_proj.weight"), &[heads * mla.qk_head_dim(), c.q_lora_rank]);
        add(format!("{a}.kv_a_proj_with_mqa.weight"), &[mla.row_width(), d]);
        add(format!("{a}.kv_a_layernorm.weight"), &[mla.kv_lora_rank]);
        add(
            format!("{a}.kv_b_proj.weight"),
            &[heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank],
        );
        add(format!("{a}.o_proj.weight"), &[d, heads * mla.v_head_dim]);
        if mla.attention_bias {
            add(format!("{a}.q_a_proj.bias"), &[c.q_lora_rank]);
            add(format!("{a}.kv_a_proj_with_mqa.bias"), &[mla.row_width()]);
            add(format!("{a}.o_proj.bias"), &[d]);
        }
        if c.has_indexer[layer] {
            add(format!("{a}.indexer.wq_b.weight"), &[c.index_n_heads * c.index_head_dim, c.q_lora_rank]);
            add(format!("{a}.indexer.wk.weight"), &[c.index_head_dim, d]);
            add(format!("{a}.indexer.k_norm.weight"), &[c.index_head_dim]);
            add(format!("{a}.indexer.k_norm.bias"), &[c.index_head_dim]);
            add(format!("{a}.indexer.weights_proj.weight"), &[c.index_n_heads, d]);
        }
        let mut mlp = |name: String, width: usize| {
            add(format!("{name}.gate_proj.weight"), &[width, d]);
            add(format!("{name}.up_proj.weight"), &[width, d]);
            add(format!("{name}.down_proj.weight"), &[d, width]);
        };
        match mla.moe.as_ref().filter(|_| mla.is_sparse[layer]) {
            None => mlp(format!("{l}.mlp"), mla.intermediate_size),
            Some(moe) => {
                for expert in 0..moe.n_routed_experts {
                    mlp(format!("{l}.mlp.experts.{expert}"), moe.moe_intermediate_size);
                }
                if moe.n_shared_experts > 0 {
                    mlp(format!("{l}.mlp.shared_experts"), moe.moe_intermediate_size * moe.n_shared_experts);
                }
                add(format!("{l}.mlp.gate.weight"), &[moe.n_routed_experts, d]);
                add(format!("{l}.mlp.gate.e_score_correction_bias"), &[moe.n_routed_experts]);
            }
        }
    }
}

fn add_v4(c: &ModelConfig, v4: &V4Config, add: Add<'_>) {
    let (d, n) = (c.hidden_size, v4.hc_mult);
    add("embed.weight".into(), &[c.vocab_size, d]);
    add("norm.weight".into(), &[d]);
    add("head.weight".into(), &[c.vocab_size, d]);
    add("hc_head_fn".into(), &[n, n * d]);
    add("hc_head_base".into(), &[n]);
    add("hc_head_scale".into(), &[1]);
    for (layer, &compression) in v4.compression.iter().enumerate() {
        add_v4_layer(c, v4, &format!("layers.{layer}"), (compression, v4.is_hash[layer]), add);
    }
}

fn add_draft(c: &ModelConfig, v4: &V4Config, add: Add<'_>) {
    let (d, n) = (c.hidden_size, v4.hc_mult);
    for name in ["enorm", "hnorm", "norm"] {
        add(format!("mtp.0.{name}.weight"), &[d]);
    }
    for name in ["e_proj", "h_proj"] {
        add(format!("mtp.0.{name}.weight"), &[d, d]);
    }
    add("mtp.0.hc_head_fn".into(), &[n, n * d]);
    add("mtp.0.hc_head_base".into(), &[n]);
    add("mtp.0.hc_head_scale".into(), &[1]);
    add_v4_layer(c, v4, "mtp.0", (None, false), add);
}

fn add_v4_layer(
    c: &ModelConfig,
    v4: &V4Config,
    l: &str,
    (compression, hash): (Option<Compression>, bool),
    add: Add<'_>,
) {
    let (d, heads, n) = (c.hidden_size, c.num_attention_heads, v4.hc_mult);
    let a = format!("{l}.attn");
    for site in ["attn", "ffn"] {
        add(format!("{l}.{site}_norm.weight"), &[d]);
        add(format!("{l}.hc_{site}_fn"), &[(2 + n) * n, n * d]);
        add(format!("{l}.hc_{site}_base"), &[(2 + n) * n]);
        add(format!("{l}.hc_{site}_scale"), &[3]);
    }
    add(format!("{a}.wq_a.weight"), &[c.q_lora_rank, d]);
    add(format!("{a}.q_norm.weight"), &[c.q_lora_rank]);
    add(format!("{a}.wq_b.weight"), &[heads * v4.head_dim, c.q_lora_rank]);
    add(format!("{a}.wkv.weight"), &[v4.head_dim, d]);
    add(format!("{a}.kv_norm.weight"), &[v4.head_dim]);
    add(format!("{a}.attn_sink"), &[heads]);
    let of_group = heads / v4.o_groups * v4.head_dim;
    add(format!("{a}.wo_a.weight"), &[v4.o_groups * v4.o_lora_rank, of_group]);
    add(format!("{a}.wo_b.weight"), &[d, v4.o_groups * v4.o_lora_rank]);
    let mut compressor = |name: String, width: usize| {
        let Some(Compression { ratio, sparse }) = compression else { return };
        let channels = if sparse { 2 * width } else { width };
        add(format!("{name}.ape"), &[ratio, channels]);
        add(format!("{name}.wkv.weight"), &[channels, d]);
        add(format!("{name}.wgate.weight"), &[channels, d]);
        add(format!("{name}.norm.weight"), &[width]);
    };
    compressor(format!("{a}.compressor"), v4.head_dim);
    if compression.is_some_and(|compression| compression.sparse) {
        compressor(format!("{a}.indexer.compressor"), c.index_head_dim);
        add(format!("{a}.indexer.wq_b.weight"), &[c.index_n_heads * c.index_head_dim, c.q_lora_rank]);
        add(format!("{a}.indexer.weights_proj.weight"), &[c.index_n_heads, d]);
    }
    add(format!("{l}.ffn.gate.weight"), &[v4.n_routed_experts, d]);
    match hash {
        true => add(format!("{l}.ffn.gate.tid2eid"), &[c.vocab_size, v4.num_experts_per_tok]),
        false => add(format!("{l}.ffn.gate.bias"), &[v4.n_routed_experts]),
    }
    let mut mlp = |name: String, width: usize| {
        add(format!("{name}.w1.weight"), &[width, d]);
        add(format!("{name}.w2.weight"), &[d, width]);
        add(format!("{name}.w3.weight"), &[width, d]);
    };
    for expert in 0..v4.n_routed_experts {
        mlp(format!("{l}.ffn.experts.{expert}"), v4.moe_intermediate_size);
    }
    mlp(format!("{l}.ffn.shared_experts"), v4.moe_intermediate_size);
}

/// A safetensors file of tensors given as name, shape, format and bytes.
pub fn serialise(parts: &[(&str, &[usize], Dtype, Vec<u8>)]) -> Bytes {
    let views = parts
        .iter()
        .map(|(name, shape, dtype, bytes)| (*name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap()));
    Bytes::from(safetensors::serialize(views, None).unwrap())
}

/// An identity for block `index` of some chain; `chain` tells chains apart.
pub fn identity(chain: u8, index: usize) -> BlockIdentity {
    let hash = |index: usize| BlockHash(*blake3::hash(&[chain, u8::try_from(index).unwrap()]).as_bytes());
    let (namespace, scope) = (NamespaceId([1; 32]), ScopeTag([2; 16]));
    BlockIdentity { namespace, scope, parent: hash(index), hash: hash(index + 1) }
}

/// Logits of every token, as bits, computed in calls of the given lengths (the last repeats).
pub fn logit_bits(
    model: &Model,
    sequence: &mut Sequence,
    tokens: &[TokenId],
    lengths: &[usize],
) -> Vec<Vec<u32>> {
    let mut bits = Vec::new();
    let mut rest = tokens;
    let mut lengths = lengths.iter();
    let mut length = tokens.len();
    while !rest.is_empty() {
        length = lengths.next().copied().unwrap_or(length).clamp(1, rest.len().max(1));
        let (now, later) = rest.split_at(length.min(rest.len()));
        let logits = sequence.prefill(model, now, Logits::All).unwrap();
        bits.extend(logits.rows().map(row_bits));
        rest = later;
    }
    bits
}

pub fn row_bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|value| value.to_bits()).collect()
}

pub fn rows(logits: &LogitsOut) -> Vec<Vec<f32>> {
    logits.rows().map(<[f32]>::to_vec).collect()
}
