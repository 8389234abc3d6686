//! `config.json` of DeepSeek V4, under both namings: that of the released files (`compress_ratios`,
//! `num_hash_layers`, `rope_scaling`) and that of `transformers` (`layer_types` with `compress_rates`,
//! `mlp_layer_types`, `rope_parameters`). The schedule is data: what each layer does is listed per layer.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::config::{Family, MAX_DIMENSION, ModelConfig, OneOrMany, Quantization, in_range};
use crate::rope::{Rope, RopeConfig};

/// The ratio that means sparse attention where a file gives only ratios.
const SPARSE_RATIO: usize = 4;
/// Ratios that a file which gives only layer types leaves out.
const DEFAULT_RATES: [usize; 2] = [SPARSE_RATIO, 128];
/// Layers that a table routes, if a file does not say.
const DEFAULT_HASH_LAYERS: usize = 3;

/// What a V4 configuration has beyond [`ModelConfig`].
#[derive(Clone, Debug)]
pub struct V4Config {
    /// Width of a query head and of the one key-and-value row that all heads share.
    pub head_dim: usize,
    /// Width of the rotated part, the last channels of a row.
    pub qk_rope_head_dim: usize,
    /// Positions that a query sees uncompressed, its own included.
    pub sliding_window: usize,
    /// Per layer: how it compresses; `None` where the window is all there is.
    pub compression: Vec<Option<Compression>>,
    /// Groups of heads that share a first output projection.
    pub o_groups: usize,
    /// Width of a group's output.
    pub o_lora_rank: usize,
    /// Streams of the residual.
    pub hc_mult: usize,
    /// Rounds that make the mixing matrix doubly stochastic.
    pub hc_sinkhorn_iters: usize,
    /// Epsilon of the mixing weights.
    pub hc_eps: f32,
    /// Per layer: whether a table gives a token's experts instead of their scores.
    pub is_hash: Vec<bool>,
    /// Experts to choose from.
    pub n_routed_experts: usize,
    /// Experts chosen per token.
    pub num_experts_per_tok: usize,
    /// Width of one expert. Beside those chosen every token sees a shared one of this width, whatever `n_shared_experts`
    /// says: the released models have 1, and the published implementations know no other.
    pub moe_intermediate_size: usize,
    /// Factor on the routed experts' output, whose weights are normalised first.
    pub routed_scaling_factor: f32,
    /// What makes scores of the router's logits.
    pub scoring: Scoring,
    /// Bound on an expert's gate (above) and up projection (both sides), if any.
    pub swiglu_limit: Option<f32>,
    /// Rotation in layers that have only the window.
    pub(crate) main_rope: RopeConfig,
    /// Rotation of everything in the other layers.
    pub(crate) compress_rope: RopeConfig,
}

/// What makes scores of a router's logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// `sqrt(ln(1 + e^x))`, of the released models.
    SqrtSoftplus,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
}

/// How a layer compresses what it has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compression {
    /// Tokens per row.
    pub ratio: usize,
    /// Whether rows span the run before theirs too, and an indexer selects among them (published as CSA); otherwise
    /// every query attends to all rows (HCA).
    pub sparse: bool,
}

impl V4Config {
    /// For each layer the first position that it must be fed, and behind them `tokens`, to rebuild the state after
    /// `tokens` tokens, of which the compressed rows are held. A layer's own state takes its last window and what its
    /// compressor keeps; what it feeds the next layer takes one window less one token before that.
    pub(crate) fn replay_plan(&self, tokens: usize) -> Vec<usize> {
        let mut plan = vec![tokens; self.compression.len() + 1];
        for (layer, compression) in self.compression.iter().enumerate().rev() {
            let kept = compression.map_or(0, |compression| compression.kept(tokens));
            let own = tokens.saturating_sub(self.sliding_window.max(kept));
            plan[layer] = own.min(plan[layer + 1].saturating_sub(self.sliding_window - 1));
        }
        plan
    }

    /// Parameters of the layers, of `hidden` width.
    pub(crate) fn parameters(&self, config: &ModelConfig) -> u128 {
        let wide = |value: usize| value as u128;
        let (hidden, heads, head) =
            (wide(config.hidden_size), wide(config.num_attention_heads), wide(self.head_dim));
        let (latent, streams) = (wide(config.q_lora_rank), wide(self.hc_mult));
        let output = wide(self.o_groups) * wide(self.o_lora_rank);
        let attention = latent * (hidden + heads * head)
            + hidden * head
            + heads * head * wide(self.o_lora_rank)
            + output * hidden;
        let mixing = 2 * (2 + streams) * streams * streams * hidden;
        let experts = wide(self.n_routed_experts) + 1;
        let feed_forward =
            3 * hidden * experts * wide(self.moe_intermediate_size) + hidden * wide(self.n_routed_experts);
        let of_layer = |compression: &Compression| match compression.sparse {
            true => {
                let (heads, key) = (wide(config.index_n_heads), wide(config.index_head_dim));
                4 * hidden * (head + key) + heads * (latent * key + hidden)
            }
            false => 2 * head * (hidden + wide(compression.ratio)),
        };
        let compression: u128 = self.compression.iter().flatten().map(of_layer).sum();
        wide(config.num_hidden_layers) * (attention + mixing + feed_forward) + compression
    }
}

/// `config.json` as it is written. Fields that other tools read are ignored.
#[derive(Deserialize)]
struct Raw {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: usize,
    q_lora_rank: usize,
    qk_rope_head_dim: Option<usize>,
    partial_rotary_factor: Option<f64>,
    sliding_window: usize,
    compress_ratios: Option<Vec<usize>>,
    layer_types: Option<Vec<String>>,
    compress_rates: Option<BTreeMap<String, usize>>,
    o_groups: usize,
    o_lora_rank: usize,
    hc_mult: usize,
    hc_sinkhorn_iters: usize,
    hc_eps: f32,
    index_n_heads: usize,
    index_head_dim: usize,
    index_topk: usize,
    num_hash_layers: Option<usize>,
    mlp_layer_types: Option<Vec<String>>,
    moe_intermediate_size: usize,
    n_routed_experts: usize,
    num_experts_per_tok: usize,
    routed_scaling_factor: Option<f32>,
    scoring_func: Option<String>,
    topk_method: Option<String>,
    swiglu_limit: Option<f32>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    rms_norm_eps: Option<f32>,
    max_position_embeddings: usize,
    rope_theta: Option<f64>,
    compress_rope_theta: Option<f64>,
    rope_scaling: Option<RopeConfig>,
    rope_parameters: Option<Ropes>,
    tie_word_embeddings: Option<bool>,
    eos_token_id: Option<OneOrMany>,
    quantization_config: Option<Quantization>,
}

/// `rope_parameters` in the newer naming, which before it was nested said what `rope_scaling` says.
#[derive(Deserialize)]
#[serde(untagged)]
enum Ropes {
    Nested { main: RopeConfig, compress: RopeConfig },
    Flat(RopeConfig),
}

/// Reads and checks `config.json`.
pub(crate) fn parse(text: &str) -> Result<ModelConfig, String> {
    let raw: Raw = serde_json::from_str(text).map_err(|error| error.to_string())?;
    raw.check()
}

impl Raw {
    fn check(self) -> Result<ModelConfig, String> {
        self.check_unsupported()?;
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_attention_heads", self.num_attention_heads),
            ("head_dim", self.head_dim),
            ("q_lora_rank", self.q_lora_rank),
            ("sliding_window", self.sliding_window),
            ("o_groups", self.o_groups),
            ("o_lora_rank", self.o_lora_rank),
            ("index_n_heads", self.index_n_heads),
            ("index_head_dim", self.index_head_dim),
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("n_routed_experts", self.n_routed_experts),
            ("num_experts_per_tok", self.num_experts_per_tok),
        ] {
            in_range(name, value, MAX_DIMENSION)?;
        }
        in_range("num_hidden_layers", self.num_hidden_layers, 4096)?;
        in_range("max_position_embeddings", self.max_position_embeddings, 1 << 30)?;
        in_range("index_topk", self.index_topk, 1 << 30)?;
        in_range("hc_mult", self.hc_mult, 64)?;
        in_range("hc_sinkhorn_iters", self.hc_sinkhorn_iters, 1000)?;
        if self.num_experts_per_tok > self.n_routed_experts {
            return Err(format!(
                "{} experts per token cannot come from {}",
                self.num_experts_per_tok, self.n_routed_experts
            ));
        }
        if !self.num_attention_heads.is_multiple_of(self.o_groups) {
            return Err(format!(
                "{} heads do not divide into o_groups {}",
                self.num_attention_heads, self.o_groups
            ));
        }
        let rms_norm_eps = self.rms_norm_eps.unwrap_or(1e-6);
        let routed_scaling_factor = self.routed_scaling_factor.unwrap_or(1.0);
        for (name, value) in [
            ("rms_norm_eps", rms_norm_eps),
            ("hc_eps", self.hc_eps),
            ("swiglu_limit", self.swiglu_limit.unwrap_or(0.0)),
            ("routed_scaling_factor", routed_scaling_factor),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(format!("{name} {value} must be finite and not negative"));
            }
        }

        let qk_rope_head_dim = self.rope_dim()?;
        let compression = self.compression()?;
        let is_hash = self.hash_schedule()?;
        let (main_rope, compress_rope) = self.ropes();
        for rope in [&main_rope, &compress_rope] {
            Rope::new(rope, qk_rope_head_dim, self.max_position_embeddings)?;
        }
        let v4 = V4Config {
            head_dim: self.head_dim,
            qk_rope_head_dim,
            sliding_window: self.sliding_window,
            o_groups: self.o_groups,
            o_lora_rank: self.o_lora_rank,
            hc_mult: self.hc_mult,
            hc_sinkhorn_iters: self.hc_sinkhorn_iters,
            hc_eps: self.hc_eps,
            is_hash,
            n_routed_experts: self.n_routed_experts,
            num_experts_per_tok: self.num_experts_per_tok,
            moe_intermediate_size: self.moe_intermediate_size,
            routed_scaling_factor,
            scoring: match self.scoring_func.as_deref() {
                None | Some("sqrtsoftplus") => Scoring::SqrtSoftplus,
                Some("sigmoid") => Scoring::Sigmoid,
                Some(other) => {
                    return Err(format!(
                        "scoring_func {other:?} is not supported, only \"sqrtsoftplus\" and \"sigmoid\""
                    ));
                }
            },
            // Zero stands for "no bound", as in the published files.
            swiglu_limit: self.swiglu_limit.filter(|&limit| limit > 0.0),
            main_rope,
            compress_rope,
            compression,
        };
        Ok(ModelConfig {
            model_type: self.model_type,
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            q_lora_rank: self.q_lora_rank,
            index_n_heads: self.index_n_heads,
            index_head_dim: self.index_head_dim,
            index_topk: self.index_topk,
            has_indexer: v4.compression.iter().map(|layer| layer.is_some_and(|layer| layer.sparse)).collect(),
            rms_norm_eps,
            max_position_embeddings: self.max_position_embeddings,
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
            eos_token_ids: self.eos_token_id.map(OneOrMany::into_tokens).unwrap_or_default(),
            weight_block: match &self.quantization_config {
                Some(quantization) => quantization.weight_block()?,
                None => Quantization::DEFAULT_BLOCK,
            },
            family: Family::V4(Box::new(v4)),
        })
    }

    /// Settings that would silently give other numbers.
    fn check_unsupported(&self) -> Result<(), String> {
        let only = |name: &str, value: &Option<String>, expected: &str| match value {
            Some(value) if value != expected => {
                Err(format!("{name} {value:?} is not supported, only {expected:?}"))
            }
            _ => Ok(()),
        };
        only("hidden_act", &self.hidden_act, "silu")?;
        only("topk_method", &self.topk_method, "noaux_tc")?;
        for (name, value) in [("attention_bias", self.attention_bias), ("mlp_bias", self.mlp_bias)] {
            if value == Some(true) {
                return Err(format!("{name} is not supported"));
            }
        }
        match self.num_key_value_heads {
            Some(heads) if heads != 1 => Err(format!("num_key_value_heads must be 1, got {heads}")),
            _ => Ok(()),
        }
    }

    fn rope_dim(&self) -> Result<usize, String> {
        let of_main = match &self.rope_parameters {
            Some(Ropes::Nested { main: rope, .. } | Ropes::Flat(rope)) => rope.partial_rotary_factor,
            None => None,
        };
        let rope = match (self.qk_rope_head_dim, self.partial_rotary_factor.or(of_main)) {
            (Some(rope), _) => rope,
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of head_dim")]
            (None, Some(factor)) if (0.0..=1.0).contains(&factor) => {
                (self.head_dim as f64 * factor).round() as usize
            }
            _ => return Err("qk_rope_head_dim or partial_rotary_factor is missing".into()),
        };
        if rope == 0 || rope % 2 != 0 || rope >= self.head_dim || rope > self.index_head_dim {
            return Err(format!(
                "qk_rope_head_dim {rope} must be even, below head_dim {} and at most index_head_dim {}",
                self.head_dim, self.index_head_dim
            ));
        }
        Ok(rope)
    }

    /// What each layer compresses. Types decide where both they and ratios are given; entries beyond the layers belong
    /// to the draft module.
    fn compression(&self) -> Result<Vec<Option<Compression>>, String> {
        let layers = self.num_hidden_layers;
        let (ratios, types) = (self.compress_ratios.as_deref(), self.layer_types.as_deref());
        let given = ratios.map(<[_]>::len).into_iter().chain(types.map(<[_]>::len)).min();
        match given {
            None => return Err("compress_ratios or layer_types is missing".into()),
            Some(given) if given < layers => {
                return Err(format!("the layer schedule has {given} entries for {layers} layers"));
            }
            Some(_) => {}
        }
        (0..layers)
            .map(|layer| match types.map(|types| types[layer].as_str()) {
                None => checked(ratios.map_or(0, |ratios| ratios[layer]), None),
                Some("sliding_attention") => Ok(None),
                Some(kind) => {
                    let sparse = match kind {
                        "compressed_sparse_attention" => true,
                        "heavily_compressed_attention" => false,
                        other => return Err(format!("layer type {other:?} is not known")),
                    };
                    let rate = self.compress_rates.as_ref().and_then(|rates| rates.get(kind).copied());
                    let ratio = ratios.map(|ratios| ratios[layer]).or(rate);
                    let ratio = ratio.unwrap_or(DEFAULT_RATES[usize::from(!sparse)]);
                    checked(ratio, Some(sparse)).and_then(|compression| {
                        compression.ok_or_else(|| format!("layer {layer}, {kind:?}, has ratio 0")).map(Some)
                    })
                }
            })
            .collect()
    }

    fn hash_schedule(&self) -> Result<Vec<bool>, String> {
        let layers = self.num_hidden_layers;
        let Some(types) = &self.mlp_layer_types else {
            let hashed = self.num_hash_layers.unwrap_or(DEFAULT_HASH_LAYERS);
            return Ok((0..layers).map(|layer| layer < hashed).collect());
        };
        if types.len() != layers {
            return Err(format!("mlp_layer_types has {} entries for {layers} layers", types.len()));
        }
        crate::config::parse_schedule("mlp_layer_types", types, "hash_moe", "moe")
    }

    /// Rotations of the window-only layers and of the others. The published form never scales cosines, whatever YaRN would;
    /// the nested form of `transformers` says so with an `attention_factor` of 1, and without one YaRN's own scale is meant.
    fn ropes(&self) -> (RopeConfig, RopeConfig) {
        let (mut main, mut compress) = match &self.rope_parameters {
            Some(Ropes::Nested { main, compress }) => (main.clone(), compress.clone()),
            flat => {
                let scaling = match flat {
                    Some(Ropes::Flat(flat)) => Some(flat),
                    _ => self.rope_scaling.as_ref(),
                };
                let mut compress = scaling.cloned().unwrap_or_default();
                // A base beside the scaling is not that of the layers which are scaled.
                compress.rope_theta = None;
                compress.attention_factor = compress.attention_factor.or(Some(1.0));
                (RopeConfig::default(), compress)
            }
        };
        main.rope_theta = main.rope_theta.or(self.rope_theta);
        compress.rope_theta = compress.rope_theta.or(self.compress_rope_theta).or(Some(160_000.0));
        (main, compress)
    }
}

/// A layer of this ratio, 0 for none; only ratios tell the kind where `sparse` is not given.
fn checked(ratio: usize, sparse: Option<bool>) -> Result<Option<Compression>, String> {
    match (ratio, sparse) {
        (0, _) => Ok(None),
        (1 | 65_537.., _) | (..SPARSE_RATIO, None) => {
            Err(format!("compression ratio {ratio} is not 0, nor 4 to 65536 (2 where layer_types are given)"))
        }
        (ratio, sparse) => Ok(Some(Compression { ratio, sparse: sparse.unwrap_or(ratio == SPARSE_RATIO) })),
    }
}
