//! `config.json`, in the published names: every dimension, checked once, so that the rest of the crate may rely on it.
//!
//! `deepseek_v32` and `glm_moe_dsa` share the mathematics and are read here; they differ in defaults only: the norm's
//! epsilon, the rotation of the indexer, and whether layers may share a selection. `deepseek_v4` is read in
//! `v4/config.rs`.

use esker_prefix::{KvLayout, RowFormat, TokenId};
use serde::Deserialize;
use serde_json::Value;

use crate::rope::{Rope, RopeConfig};
use crate::v4::config::{Compression, V4Config, parse as parse_v4};
use crate::{DecoderError, Result};

/// Bound on one dimension; every product of four fits a `u128` and every product of three a `u64`.
pub(crate) const MAX_DIMENSION: usize = 1 << 20;
/// Bound on the parameters of a model, 2^40: four times the largest published, and 4 TiB once they are F32.
const MAX_PARAMETERS: u128 = 1 << 40;

/// Number format in which rows are cached and stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// Single precision: rows as they are computed.
    F32,
    /// bfloat16: rows are rounded before their first use, so that a hit and a miss see the same numbers. Stored
    /// rows take half the bytes; in memory a sequence keeps the rounded values as F32.
    Bf16,
    /// As deployed: FP8 rows with a scale per block and BF16 rotated channels; indexer keys FP8 (V3.2, GLM-5) or FP4
    /// (V4), after a rotation by a Hadamard matrix, and the indexer's queries rounded like its keys.
    Deployed,
    /// The same with the indexer keys of V4 in FP8.
    DeployedFp8Keys,
}

impl KvFormat {
    pub(crate) fn row_format(self) -> RowFormat {
        match self {
            Self::F32 => RowFormat::F32,
            Self::Bf16 => RowFormat::Bf16,
            Self::Deployed => RowFormat::Deployed,
            Self::DeployedFp8Keys => RowFormat::DeployedFp8Keys,
        }
    }
}

/// A model's configuration, checked.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// `deepseek_v32`, `glm_moe_dsa` or `deepseek_v4`.
    pub model_type: String,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers; the layers of a multi-token-prediction head are not counted and not loaded.
    pub num_hidden_layers: usize,
    /// Heads of the attention.
    pub num_attention_heads: usize,
    /// Width of the query latent.
    pub q_lora_rank: usize,
    /// Heads of the indexer.
    pub index_n_heads: usize,
    /// Width of an indexer head and of the cached indexer key.
    pub index_head_dim: usize,
    /// Rows that a query attends to at most.
    pub index_topk: usize,
    /// Per layer: whether it has an indexer of its own.
    pub has_indexer: Vec<bool>,
    /// Epsilon of the layer norms.
    pub rms_norm_eps: f32,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<TokenId>,
    /// Rows and columns of a block of FP8 weights that share a scale.
    pub weight_block: [usize; 2],
    /// What only this family of models has.
    pub family: Family,
}

/// The families of models, by their attention.
#[derive(Clone, Debug)]
pub enum Family {
    /// V3.2 and GLM-5: a latent per token, of which an indexer selects some.
    Mla(Box<MlaConfig>),
    /// V4: a window and compressed rows.
    V4(Box<V4Config>),
}

/// What a V3.2 or GLM-5 configuration has beyond [`ModelConfig`].
#[derive(Clone, Debug)]
pub struct MlaConfig {
    /// Width of the cached latent.
    pub kv_lora_rank: usize,
    /// Width of a head's part without position.
    pub qk_nope_head_dim: usize,
    /// Width of the rotated part, one key for all heads.
    pub qk_rope_head_dim: usize,
    /// Width of a head's values.
    pub v_head_dim: usize,
    /// Whether the projections into and out of the attention carry biases.
    pub attention_bias: bool,
    /// Whether the indexer rotates pairs (2i, 2i+1) rather than (i, i + half). A layer without an indexer of its own
    /// uses the selection of the nearest one below.
    pub indexer_rope_interleave: bool,
    /// Per layer: whether its feed-forward part is a mixture of experts.
    pub is_sparse: Vec<bool>,
    /// Width of a dense feed-forward layer.
    pub intermediate_size: usize,
    /// The mixture of experts; `None` where all layers are dense.
    pub moe: Option<MoeConfig>,
    pub(crate) rope: RopeConfig,
}

/// The mixture of experts of a sparse layer.
#[derive(Clone, Debug)]
pub struct MoeConfig {
    /// Experts to choose from.
    pub n_routed_experts: usize,
    /// Experts that see every token; one MLP of their joint width.
    pub n_shared_experts: usize,
    /// Experts chosen per token.
    pub num_experts_per_tok: usize,
    /// Width of one expert.
    pub moe_intermediate_size: usize,
    /// Groups that the experts are divided into.
    pub n_group: usize,
    /// Groups that a token may choose experts from.
    pub topk_group: usize,
    /// Whether the chosen weights are normalised to sum to one.
    pub norm_topk_prob: bool,
    /// Factor on the routed experts' output.
    pub routed_scaling_factor: f32,
}

impl ModelConfig {
    /// Reads and checks `config.json`.
    pub fn from_json(text: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Kind {
            model_type: String,
        }
        let refuse = |error: serde_json::Error| DecoderError::Config(error.to_string());
        let kind: Kind = serde_json::from_str(text).map_err(refuse)?;
        let config = match kind.model_type.as_str() {
            "deepseek_v32" | "glm_moe_dsa" => serde_json::from_str::<Raw>(text).map_err(refuse)?.check(),
            "deepseek_v4" => parse_v4(text),
            other => Err(format!("model_type {other:?} is not deepseek_v32, glm_moe_dsa or deepseek_v4")),
        };
        let config = config.map_err(DecoderError::Config)?;
        if config.parameters() > MAX_PARAMETERS {
            let reason = format!("the model would exceed {MAX_PARAMETERS} parameters");
            return Err(DecoderError::Config(reason));
        }
        Ok(config)
    }

    /// The layout of this model's blocks. What a published file may give in several ways is written out in the one
    /// that the layout's own reader takes first.
    pub(crate) fn layout(&self, text: &str, format: KvFormat, block_tokens: u32) -> Result<KvLayout> {
        let mut json: Value =
            serde_json::from_str(text).map_err(|error| DecoderError::Config(error.to_string()))?;
        match &self.family {
            Family::Mla(_) => {
                let names = self.has_indexer.iter().map(|&full| if full { "full" } else { "shared" });
                json["indexer_types"] = names.collect();
            }
            Family::V4(v4) => {
                let layers = || v4.compression.iter().copied();
                json["compress_ratios"] =
                    layers().map(|layer| layer.map_or(0, |layer| layer.ratio)).collect();
                let kind = |layer: Option<Compression>| match layer {
                    None => "sliding_attention",
                    Some(Compression { sparse: true, .. }) => "compressed_sparse_attention",
                    Some(Compression { sparse: false, .. }) => "heavily_compressed_attention",
                };
                json["layer_types"] = layers().map(kind).collect();
                json["qk_rope_head_dim"] = v4.qk_rope_head_dim.into();
            }
        }
        Ok(KvLayout::from_config(&json.to_string(), format.row_format(), block_tokens)?)
    }

    /// Parameters of the model, roughly: every matrix, but not all that is small.
    fn parameters(&self) -> u128 {
        let layers = match &self.family {
            Family::Mla(mla) => mla.parameters(self),
            Family::V4(v4) => v4.parameters(self),
        };
        2 * self.vocab_size as u128 * self.hidden_size as u128 + layers
    }
}

impl MlaConfig {
    /// Width of a query head, `[nope | rope]`.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Width of a cached row, `[latent | rope key]`.
    pub fn row_width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    /// Parameters of the layers.
    fn parameters(&self, config: &ModelConfig) -> u128 {
        let wide = |value: usize| value as u128;
        let (hidden, heads) = (wide(config.hidden_size), wide(config.num_attention_heads));
        let latent = wide(config.q_lora_rank);
        let query = latent * (hidden + heads * wide(self.qk_head_dim()));
        let key = hidden * wide(self.row_width())
            + wide(self.kv_lora_rank) * heads * wide(self.qk_nope_head_dim + self.v_head_dim);
        let output = heads * wide(self.v_head_dim) * hidden;
        let indexer = wide(config.index_n_heads) * (latent * wide(config.index_head_dim) + hidden)
            + hidden * wide(config.index_head_dim);
        let mut total = 0;
        for (&indexed, &sparse) in config.has_indexer.iter().zip(&self.is_sparse) {
            total += query + key + output;
            total += if indexed { indexer } else { 0 };
            total += match self.moe.as_ref().filter(|_| sparse) {
                None => 3 * hidden * wide(self.intermediate_size),
                Some(moe) => {
                    let experts = wide(moe.n_routed_experts) + wide(moe.n_shared_experts);
                    3 * hidden * experts * wide(moe.moe_intermediate_size)
                        + hidden * wide(moe.n_routed_experts)
                }
            };
        }
        total
    }
}

/// `config.json` as it is written. Fields that other tools read are ignored.
#[derive(Deserialize)]
struct Raw {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    q_lora_rank: Option<usize>,
    kv_lora_rank: usize,
    qk_nope_head_dim: usize,
    qk_rope_head_dim: usize,
    v_head_dim: usize,
    index_n_heads: usize,
    index_head_dim: usize,
    index_topk: usize,
    indexer_rope_interleave: Option<bool>,
    indexer_types: Option<Vec<String>>,
    index_topk_pattern: Option<Value>,
    index_topk_freq: Option<usize>,
    index_skip_topk_offset: Option<usize>,
    mlp_layer_types: Option<Vec<String>>,
    first_k_dense_replace: Option<usize>,
    moe_layer_freq: Option<usize>,
    moe_intermediate_size: Option<usize>,
    n_routed_experts: Option<usize>,
    num_experts: Option<usize>,
    n_shared_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    n_group: Option<usize>,
    topk_group: Option<usize>,
    norm_topk_prob: Option<bool>,
    routed_scaling_factor: Option<f32>,
    scoring_func: Option<String>,
    topk_method: Option<String>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    rms_norm_eps: Option<f32>,
    max_position_embeddings: usize,
    rope_parameters: Option<RopeConfig>,
    rope_scaling: Option<RopeConfig>,
    rope_theta: Option<f64>,
    tie_word_embeddings: Option<bool>,
    eos_token_id: Option<OneOrMany>,
    quantization_config: Option<Quantization>,
}

#[derive(Deserialize)]
pub(crate) struct Quantization {
    quant_method: Option<String>,
    fmt: Option<String>,
    weight_block_size: Option<[usize; 2]>,
}

#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// The end-of-sequence tokens that a `config.json` or `generation_config.json` names, if it does.
pub(crate) fn eos_token_ids(text: &str) -> Result<Option<Vec<TokenId>>> {
    #[derive(Deserialize)]
    struct Eos {
        eos_token_id: Option<OneOrMany>,
    }
    let eos: Eos = serde_json::from_str(text).map_err(|error| DecoderError::Config(error.to_string()))?;
    Ok(eos.eos_token_id.map(OneOrMany::into_tokens))
}

impl OneOrMany {
    pub(crate) fn into_tokens(self) -> Vec<TokenId> {
        match self {
            Self::One(id) => vec![TokenId(id)],
            Self::Many(ids) => ids.into_iter().map(TokenId).collect(),
        }
    }
}

impl Raw {
    fn check(self) -> std::result::Result<ModelConfig, String> {
        let glm = self.model_type == "glm_moe_dsa";
        self.check_unsupported()?;
        let q_lora_rank =
            self.q_lora_rank.ok_or("q_lora_rank is missing; the indexer needs a query latent")?;
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("q_lora_rank", q_lora_rank),
            ("kv_lora_rank", self.kv_lora_rank),
            ("qk_nope_head_dim", self.qk_nope_head_dim),
            ("qk_rope_head_dim", self.qk_rope_head_dim),
            ("v_head_dim", self.v_head_dim),
            ("index_n_heads", self.index_n_heads),
            ("index_head_dim", self.index_head_dim),
        ] {
            in_range(name, value, MAX_DIMENSION)?;
        }
        in_range("num_hidden_layers", self.num_hidden_layers, 4096)?;
        in_range("max_position_embeddings", self.max_position_embeddings, 1 << 30)?;
        in_range("index_topk", self.index_topk, 1 << 30)?;
        if !self.qk_rope_head_dim.is_multiple_of(2) || self.qk_rope_head_dim > self.index_head_dim {
            return Err(format!(
                "qk_rope_head_dim {} must be even and at most index_head_dim {}",
                self.qk_rope_head_dim, self.index_head_dim
            ));
        }

        let has_indexer = self.indexer_schedule(glm)?;
        let is_sparse = self.mlp_schedule()?;
        let moe = if is_sparse.contains(&true) { Some(self.moe(glm)?) } else { None };
        let rms_norm_eps = self.rms_norm_eps.unwrap_or(if glm { 1e-5 } else { 1e-6 });
        if !(rms_norm_eps.is_finite() && rms_norm_eps >= 0.0) {
            return Err(format!("rms_norm_eps {rms_norm_eps} must be finite and not negative"));
        }
        let weight_block = match &self.quantization_config {
            Some(quantization) => quantization.weight_block()?,
            None => Quantization::DEFAULT_BLOCK,
        };
        let mut rope = self.rope_parameters.or(self.rope_scaling).unwrap_or_default();
        rope.rope_theta = rope.rope_theta.or(self.rope_theta);

        Rope::new(&rope, self.qk_rope_head_dim, self.max_position_embeddings)?;

        let mla = MlaConfig {
            kv_lora_rank: self.kv_lora_rank,
            qk_nope_head_dim: self.qk_nope_head_dim,
            qk_rope_head_dim: self.qk_rope_head_dim,
            v_head_dim: self.v_head_dim,
            attention_bias: self.attention_bias.unwrap_or(false),
            indexer_rope_interleave: self.indexer_rope_interleave.unwrap_or(glm),
            is_sparse,
            intermediate_size: self.intermediate_size,
            moe,
            rope,
        };
        Ok(ModelConfig {
            model_type: self.model_type,
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            q_lora_rank,
            index_n_heads: self.index_n_heads,
            index_head_dim: self.index_head_dim,
            index_topk: self.index_topk,
            has_indexer,
            rms_norm_eps,
            max_position_embeddings: self.max_position_embeddings,
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
            eos_token_ids: self.eos_token_id.map(OneOrMany::into_tokens).unwrap_or_default(),
            weight_block,
            family: Family::Mla(Box::new(mla)),
        })
    }

    /// Settings of other families that would silently give other numbers.
    fn check_unsupported(&self) -> std::result::Result<(), String> {
        let only = |name: &str, value: &Option<String>, expected: &str| match value {
            Some(value) if value != expected => {
                Err(format!("{name} {value:?} is not supported, only {expected:?}"))
            }
            _ => Ok(()),
        };
        only("hidden_act", &self.hidden_act, "silu")?;
        only("scoring_func", &self.scoring_func, "sigmoid")?;
        only("topk_method", &self.topk_method, "noaux_tc")?;
        if self.mlp_bias == Some(true) {
            return Err("mlp_bias is not supported".into());
        }
        if self.mlp_layer_types.is_none() && self.moe_layer_freq.is_some_and(|freq| freq != 1) {
            return Err("moe_layer_freq other than 1 needs mlp_layer_types".into());
        }
        Ok(())
    }

    /// `indexer_types`, or the pattern or frequency that older files give. All layers have one by default.
    fn indexer_schedule(&self, glm: bool) -> std::result::Result<Vec<bool>, String> {
        let layers = self.num_hidden_layers;
        let schedule: Vec<bool> = if let Some(types) = &self.indexer_types {
            parse_schedule("indexer_types", types, "full", "shared")?
        } else if let Some(pattern) = self.index_topk_pattern.as_ref().filter(|_| glm) {
            let types: Vec<String> = match pattern {
                Value::String(letters) => letters.chars().map(String::from).collect(),
                other => serde_json::from_value(other.clone()).map_err(|error| error.to_string())?,
            };
            let long = types.iter().map(|kind| match kind.as_str() {
                "F" => "full".to_owned(),
                "S" => "shared".to_owned(),
                other => other.to_owned(),
            });
            parse_schedule("index_topk_pattern", &long.collect::<Vec<_>>(), "full", "shared")?
        } else {
            let frequency = self.index_topk_freq.unwrap_or(1).max(1);
            let offset = self.index_skip_topk_offset.unwrap_or(2);
            (0..layers).map(|layer| (layer + 1).saturating_sub(offset) % frequency == 0).collect()
        };
        if schedule.len() != layers {
            return Err(format!("the indexer schedule has {} entries for {layers} layers", schedule.len()));
        }
        if !schedule[0] {
            return Err("layer 0 shares a selection, but no layer lies below it".into());
        }
        Ok(schedule)
    }

    fn mlp_schedule(&self) -> std::result::Result<Vec<bool>, String> {
        let layers = self.num_hidden_layers;
        let Some(types) = &self.mlp_layer_types else {
            let dense = self.first_k_dense_replace.unwrap_or(3);
            return Ok((0..layers).map(|layer| layer >= dense).collect());
        };
        if types.len() != layers {
            return Err(format!("mlp_layer_types has {} entries for {layers} layers", types.len()));
        }
        parse_schedule("mlp_layer_types", types, "sparse", "dense")
    }

    /// Fields that may be absent default as in the published configuration classes.
    fn moe(&self, glm: bool) -> std::result::Result<MoeConfig, String> {
        let required = |name: &str, value: Option<usize>| {
            let value = value.ok_or_else(|| format!("{name} is missing"))?;
            in_range(name, value, MAX_DIMENSION).map(|()| value)
        };
        let moe = MoeConfig {
            n_routed_experts: required("n_routed_experts", self.num_experts.or(self.n_routed_experts))?,
            n_shared_experts: self.n_shared_experts.unwrap_or(1),
            num_experts_per_tok: required("num_experts_per_tok", self.num_experts_per_tok)?,
            moe_intermediate_size: required("moe_intermediate_size", self.moe_intermediate_size)?,
            n_group: required("n_group", self.n_group.or(Some(if glm { 1 } else { 8 })))?,
            topk_group: required("topk_group", self.topk_group.or(Some(if glm { 1 } else { 4 })))?,
            norm_topk_prob: self.norm_topk_prob.unwrap_or(true),
            routed_scaling_factor: self.routed_scaling_factor.unwrap_or(2.5),
        };
        let MoeConfig { n_routed_experts: experts, n_group, topk_group, .. } = moe;
        if moe.n_shared_experts > 4096 {
            return Err(format!("n_shared_experts {} is above 4096", moe.n_shared_experts));
        }
        if experts % n_group != 0 || experts / n_group < 2 && n_group > 1 {
            return Err(format!(
                "n_routed_experts {experts} does not divide into {n_group} groups of at least 2"
            ));
        }
        if topk_group > n_group || moe.num_experts_per_tok > experts / n_group * topk_group {
            return Err(format!(
                "{} experts per token cannot come from {topk_group} of {n_group} groups of {}",
                moe.num_experts_per_tok,
                experts / n_group
            ));
        }
        if !moe.routed_scaling_factor.is_finite() {
            return Err("routed_scaling_factor must be finite".into());
        }
        Ok(moe)
    }
}

impl Quantization {
    /// The published block of V3.2.
    pub(crate) const DEFAULT_BLOCK: [usize; 2] = [128, 128];

    pub(crate) fn weight_block(&self) -> std::result::Result<[usize; 2], String> {
        for (name, value, expected) in
            [("quant_method", &self.quant_method, "fp8"), ("fmt", &self.fmt, "e4m3")]
        {
            if value.as_ref().is_some_and(|value| value != expected) {
                return Err(format!(
                    "quantization_config.{name} {value:?} is not supported, only {expected:?}"
                ));
            }
        }
        let block = self.weight_block_size.unwrap_or(Self::DEFAULT_BLOCK);
        in_range("weight_block_size", block[0], MAX_DIMENSION)?;
        in_range("weight_block_size", block[1], MAX_DIMENSION)?;
        Ok(block)
    }
}

pub(crate) fn in_range(name: &str, value: usize, max: usize) -> std::result::Result<(), String> {
    if value == 0 || value > max {
        return Err(format!("{name} must be 1 to {max}, got {value}"));
    }
    Ok(())
}

pub(crate) fn parse_schedule(
    name: &str,
    types: &[String],
    yes: &str,
    no: &str,
) -> std::result::Result<Vec<bool>, String> {
    let parse = |kind: &String| match kind.as_str() {
        kind if kind == yes => Ok(true),
        kind if kind == no => Ok(false),
        other => Err(format!("{name} has {other:?}, expected {yes:?} or {no:?}")),
    };
    types.iter().map(parse).collect()
}
