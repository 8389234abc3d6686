//! Layouts of published models, built from the fields of their `config.json`.
//!
//! Row formats and counts: DeepSeek V3.2 (arXiv 2512.02556), GLM-5 (same family), DeepSeek V4 (arXiv 2606.19348,
//! sections 3.5 and 4.2) and the deployed byte formats of FlashMLA and SGLang.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Dtype, Family, Field, Group, KvLayout, with_default_planes};
use crate::{PrefixError, Result};

/// How the rows of a published model are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowFormat {
    /// As deployed: FP8 latents with scales, BF16 rope keys; indexer keys FP8 (V3.2) or FP4 (V4).
    Deployed,
    /// As deployed, V4 indexer keys FP8 instead of FP4.
    DeployedFp8Keys,
    /// Everything BF16.
    Bf16,
    /// Everything single precision.
    F32,
}

impl RowFormat {
    fn name(self) -> &'static str {
        match self {
            Self::Deployed => "deployed",
            Self::DeployedFp8Keys => "deployed-fp8-keys",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }
}

/// The fields of a `config.json` that decide what is cached.
#[derive(Deserialize)]
struct Config {
    model_type: String,
    num_hidden_layers: u16,
    index_head_dim: Option<u32>,
    // V3.2, GLM-5
    kv_lora_rank: Option<u32>,
    qk_rope_head_dim: Option<u32>,
    indexer_types: Option<Vec<String>>,
    index_topk_freq: Option<u16>,
    index_skip_topk_offset: Option<u16>,
    // V4: released files say compress_ratios, transformers says layer_types and compress_rates; with both, types tell
    // the kind of a layer and compress_ratios its ratio
    head_dim: Option<u32>,
    partial_rotary_factor: Option<f64>,
    sliding_window: Option<u32>,
    compress_ratios: Option<Vec<u32>>,
    layer_types: Option<Vec<String>>,
    compress_rates: Option<BTreeMap<String, u32>>,
}

impl KvLayout {
    /// The layout of the model that a published `config.json` describes.
    pub fn from_config(config_json: &str, format: RowFormat, block_tokens: u32) -> Result<Self> {
        let config: Config =
            serde_json::from_str(config_json).map_err(|error| PrefixError::BadConfig(error.to_string()))?;
        let groups = match config.model_type.as_str() {
            "deepseek_v32" | "glm_moe_dsa" => mla_dsa(&config, format, block_tokens)?,
            "deepseek_v4" => v4(&config, format, block_tokens)?,
            other => {
                return Err(PrefixError::BadConfig(format!(
                    "model_type {other:?} is not known; known are deepseek_v32, glm_moe_dsa, deepseek_v4"
                )));
            }
        };
        let groups = groups.into_iter().filter(|group| !group.layers.is_empty());
        let groups = with_default_planes(groups.collect());
        Self::new(format!("{}/{}", config.model_type, format.name()), block_tokens, groups)
    }
}

/// MLA with DSA: per token a latent and rope key in every layer, an indexer key in every layer with an indexer.
fn mla_dsa(config: &Config, format: RowFormat, block_tokens: u32) -> Result<Vec<Group>> {
    let latent = require(config.kv_lora_rank, "kv_lora_rank")?;
    let rope = require(config.qk_rope_head_dim, "qk_rope_head_dim")?;
    let key = require(config.index_head_dim, "index_head_dim")?;
    let all: Vec<u16> = (0..config.num_hidden_layers).collect();
    let indexed = match &config.indexer_types {
        // The older form of the same schedule (arXiv 2603.12201).
        None => {
            let frequency = config.index_topk_freq.unwrap_or(1).max(1);
            let offset = config.index_skip_topk_offset.unwrap_or(2);
            all.iter().copied().filter(|layer| (layer + 1).saturating_sub(offset) % frequency == 0).collect()
        }
        Some(types) if types.len() == all.len() => {
            all.iter().copied().filter(|&layer| types[usize::from(layer)] == "full").collect()
        }
        Some(types) => {
            return Err(PrefixError::BadConfig(format!(
                "indexer_types has {} entries for {} layers",
                types.len(),
                all.len()
            )));
        }
    };
    let latent_row = match format {
        RowFormat::Deployed | RowFormat::DeployedFp8Keys => vec![
            field("latent", Dtype::F8E4m3, latent),
            field("scales", Dtype::F32, blocks_of(latent, 128, "kv_lora_rank")?),
            field("rope_key", Dtype::Bf16, rope),
        ],
        RowFormat::Bf16 => vec![field("latent", Dtype::Bf16, latent), field("rope_key", Dtype::Bf16, rope)],
        RowFormat::F32 => vec![field("latent", Dtype::F32, latent), field("rope_key", Dtype::F32, rope)],
    };
    let key_row = match format {
        RowFormat::Deployed | RowFormat::DeployedFp8Keys => fp8_key(key)?,
        RowFormat::Bf16 => vec![field("key", Dtype::Bf16, key)],
        RowFormat::F32 => vec![field("key", Dtype::F32, key)],
    };
    Ok(vec![
        history("indexer_key", indexed, block_tokens, key_row, 0),
        history("latent", all, block_tokens, latent_row, 1),
    ])
}

/// V4: compressed rows per 4 or `m'` tokens, windows in every layer, the overlap of the compressors of sparse layers.
fn v4(config: &Config, format: RowFormat, block_tokens: u32) -> Result<Vec<Group>> {
    let width = require(config.head_dim, "head_dim")?;
    let key = require(config.index_head_dim, "index_head_dim")?;
    let window = require(config.sliding_window, "sliding_window")?;
    let rope = rope_dim(config, width)?;
    let schedule = schedule(config)?;
    let row = match format {
        RowFormat::Deployed | RowFormat::DeployedFp8Keys => vec![
            field("latent", Dtype::F8E4m3, width - rope),
            field("rope", Dtype::Bf16, rope),
            field("scales", Dtype::F8E8m0, blocks_of(width - rope, 64, "head_dim without rope")?),
            field("pad", Dtype::U8, 1),
        ],
        RowFormat::Bf16 => vec![field("latent", Dtype::Bf16, width)],
        RowFormat::F32 => vec![field("latent", Dtype::F32, width)],
    };
    let key_row = match format {
        RowFormat::Deployed => vec![
            field("key", Dtype::F4E2m1, key),
            field("scales", Dtype::F8E8m0, blocks_of(key, 32, "index_head_dim")?),
        ],
        RowFormat::DeployedFp8Keys => fp8_key(key)?,
        RowFormat::Bf16 => vec![field("key", Dtype::Bf16, key)],
        RowFormat::F32 => vec![field("key", Dtype::F32, key)],
    };

    let layers_with = |kind: Option<Compression>| -> Vec<u16> {
        (0..config.num_hidden_layers).filter(|&layer| schedule[usize::from(layer)] == kind).collect()
    };
    let ratios = |sparse: bool| -> Vec<u32> {
        let of_kind = schedule.iter().flatten().filter(|compression| compression.sparse == sparse);
        let mut ratios: Vec<u32> = of_kind.map(|compression| compression.ratio).collect();
        ratios.sort_unstable();
        ratios.dedup();
        ratios
    };
    let sparse_ratio = match ratios(true)[..] {
        [] => SPARSE_RATIO,
        [ratio] => ratio,
        [first, second, ..] => {
            return Err(PrefixError::BadConfig(format!(
                "sparse layers compress by one ratio, not by {first} and {second}"
            )));
        }
    };
    let csa = layers_with(Some(Compression { ratio: sparse_ratio, sparse: true }));
    let csa_rows = block_tokens.div_ceil(sparse_ratio);
    let mut groups = vec![
        history("csa_indexer_key", csa.clone(), csa_rows, key_row, 2),
        history("csa", csa.clone(), csa_rows, row.clone(), 3),
    ];
    for ratio in ratios(false) {
        let layers = layers_with(Some(Compression { ratio, sparse: false }));
        groups.push(history(&format!("hca_{ratio}"), layers, block_tokens.div_ceil(ratio), row.clone(), 3));
    }
    let all: Vec<u16> = (0..config.num_hidden_layers).collect();
    groups.push(Group { family: Family::State, ..history("window", all, window, row, 0) });
    // The compressor of a sparse layer and its indexer each need the tokens of the run before, values and gates, in f32.
    let overlap = vec![
        field("kv", Dtype::F32, width),
        field("gate", Dtype::F32, width),
        field("indexer_kv", Dtype::F32, key),
        field("indexer_gate", Dtype::F32, key),
    ];
    groups.push(Group {
        family: Family::State,
        ..history("csa_overlap", csa.clone(), sparse_ratio, overlap, 1)
    });
    // What a run of tokens has so far belongs to the state. Where blocks cut runs, rows of a block are those that it completes,
    // as many as there may be, the last unused in some blocks.
    let mut pending = |name: String, layers: Vec<u16>, ratio: u32, fields: Vec<Field>| {
        let group = history(&name, layers, ratio - 1, fields, 2);
        groups.push(Group { family: Family::State, run_tokens: ratio, ..group });
    };
    let both =
        |kv: &str, gate: &str, count: u32| [field(kv, Dtype::F32, count), field(gate, Dtype::F32, count)];
    let inputs = [both("kv", "gate", 2 * width), both("indexer_kv", "indexer_gate", 2 * key)].concat();
    pending("csa_pending".into(), csa, sparse_ratio, inputs);
    for ratio in ratios(false) {
        let layers = layers_with(Some(Compression { ratio, sparse: false }));
        pending(format!("hca_{ratio}_pending"), layers, ratio, both("kv", "gate", width).to_vec());
    }
    Ok(groups)
}

/// The ratio that means sparse attention where a file gives only ratios.
const SPARSE_RATIO: u32 = 4;

/// How a layer compresses: tokens per row, and whether an indexer selects rows, which then overlap.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Compression {
    ratio: u32,
    sparse: bool,
}

/// Compression per layer (`None`: window only), from either naming of the schedule. Entries beyond the layers belong to
/// the draft module and are left out.
fn schedule(config: &Config) -> Result<Vec<Option<Compression>>> {
    let layers = usize::from(config.num_hidden_layers);
    let (ratios, types) = (config.compress_ratios.as_deref(), config.layer_types.as_deref());
    let given = ratios.map(<[_]>::len).into_iter().chain(types.map(<[_]>::len)).min();
    let given = given.ok_or_else(|| missing("compress_ratios or layer_types"))?;
    if given < layers {
        return Err(PrefixError::BadConfig(format!("schedule has {given} entries for {layers} layers")));
    }
    let rate = |kind: &str| {
        config.compress_rates.as_ref().and_then(|rates| rates.get(kind).copied()).ok_or_else(|| {
            PrefixError::BadConfig(format!("layer type {kind:?} has no entry in compress_rates"))
        })
    };
    (0..layers)
        .map(|layer| {
            let sparse = match types.map(|types| types[layer].as_str()) {
                Some("sliding_attention") => return Ok(None),
                Some(kind) => Some(kind == "compressed_sparse_attention"),
                None => None,
            };
            let ratio = match (ratios, types) {
                (Some(ratios), _) => ratios[layer],
                (None, types) => rate(types.map_or("", |types| &types[layer]))?,
            };
            match ratio {
                0 if sparse.is_none() => Ok(None),
                2.. if sparse.is_some() || ratio >= SPARSE_RATIO => {
                    Ok(Some(Compression { ratio, sparse: sparse.unwrap_or(ratio == SPARSE_RATIO) }))
                }
                _ => Err(PrefixError::BadConfig(format!("compression ratio {ratio} is not known"))),
            }
        })
        .collect()
}

fn rope_dim(config: &Config, width: u32) -> Result<u32> {
    let rope = match (config.qk_rope_head_dim, config.partial_rotary_factor) {
        (Some(rope), _) => rope,
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a fraction of a u32")]
        (None, Some(factor)) if (0.0..=1.0).contains(&factor) => (f64::from(width) * factor).round() as u32,
        _ => return Err(missing("qk_rope_head_dim or partial_rotary_factor")),
    };
    if rope >= width {
        return Err(PrefixError::BadConfig(format!("rope width {rope} leaves nothing of head_dim {width}")));
    }
    Ok(rope)
}

fn history(name: &str, layers: Vec<u16>, rows: u32, fields: Vec<Field>, restore_order: u16) -> Group {
    Group {
        name: name.to_owned(),
        family: Family::History,
        layers,
        rows,
        fields,
        restore_order,
        plane_layers: 1,
        optional: false,
        grain_blocks: 1,
        run_tokens: 0,
    }
}

fn fp8_key(width: u32) -> Result<Vec<Field>> {
    let scales = blocks_of(width, 128, "index_head_dim")?;
    Ok(vec![field("key", Dtype::F8E4m3, width), field("scales", Dtype::F32, scales)])
}

fn field(name: &str, dtype: Dtype, count: u32) -> Field {
    Field { name: name.to_owned(), dtype, count }
}

fn blocks_of(width: u32, block: u32, what: &str) -> Result<u32> {
    if width == 0 || !width.is_multiple_of(block) {
        return Err(PrefixError::BadConfig(format!("{what} {width} is not a multiple of {block}")));
    }
    Ok(width / block)
}

fn require(value: Option<u32>, name: &str) -> Result<u32> {
    value.filter(|&value| value > 0).ok_or_else(|| missing(name))
}

fn missing(name: &str) -> PrefixError {
    PrefixError::BadConfig(format!("{name} is missing or zero"))
}
