//! DeepSeek V3.2 and GLM-5: a latent with its rope key per token and layer, an indexer key where the layer has an
//! indexer, and a plain residual.

use std::borrow::Cow;
use std::ops::Range;

use crate::arrival::Supply;
use crate::block::Place;
use crate::checkpoint::Checkpoint;
use crate::config::MlaConfig;
use crate::kernel::pages;
use crate::kernel::vector::add_scaled;
use crate::mla::Mla;
use crate::moe::{Mlp, Moe};
use crate::norm::RmsNorm;
use crate::panels::KeyPanels;
use crate::rope::{Angles, Rope};
use crate::{DecoderError, Model, ModelConfig, Result, StateField};

const KEY_GROUP: &str = "indexer_key";

/// The layers of a model.
pub(crate) struct Layers {
    rope: Rope,
    layers: Vec<Layer>,
    hidden: usize,
    row_width: usize,
}

/// One layer: `x += attention(norm(x)); x += mlp(norm(x))`.
struct Layer {
    input_norm: RmsNorm,
    attention: Mla,
    post_norm: RmsNorm,
    mlp: FeedForward,
    indexed: bool,
}

enum FeedForward {
    Dense(Mlp),
    Sparse(Moe),
}

impl Layers {
    pub(crate) fn take(checkpoint: &mut Checkpoint, config: &ModelConfig, mla: &MlaConfig) -> Result<Self> {
        let rope = Rope::new(&mla.rope, mla.qk_rope_head_dim, config.max_position_embeddings)
            .map_err(DecoderError::Config)?;
        let mut layers = Vec::new();
        for index in 0..config.num_hidden_layers {
            layers.push(Layer::take(checkpoint, index, config, mla, &rope)?);
        }
        Ok(Self { rope, layers, hidden: config.hidden_size, row_width: mla.row_width() })
    }

    pub(crate) fn parameters(&self) -> usize {
        self.layers.iter().map(Layer::parameters).sum()
    }

    /// Takes one chunk, which starts at position `first`, through all layers. `x` and the result are
    /// `[tokens, hidden]`; selections go to `recorded` by layer.
    pub(crate) fn forward(
        &self,
        model: &Model,
        mut x: Vec<f32>,
        first: usize,
        cache: &mut Cache,
        supply: &mut Supply,
        mut recorded: Option<&mut Vec<Vec<Vec<u32>>>>,
    ) -> Result<Vec<f32>> {
        let tokens = x.len() / self.hidden;
        let angles: Angles = self.rope.angles(first, tokens);
        let mut selection = vec![Vec::new(); tokens];
        for (index, layer) in self.layers.iter().enumerate() {
            let cache = &mut cache.layers[index];
            if let Some(keys) = supply.keys(index)? {
                cache.keys = keys;
            }
            let normed = layer.input_norm.apply(&x);
            let queries =
                layer.attention.select(&normed, &angles, first, &model.formats, cache, &mut selection);
            if let Some(rows) = supply.rows(index)? {
                cache.admit_rows(rows);
            }
            let attended = match &mut supply.parked {
                Some(parked) if cache.parked > 0 => {
                    let held = (cache.parked, &cache.rows[..]);
                    let (rows, selection) = parked.gather(model, index, held, self.row_width, &selection)?;
                    layer.attention.attend(&queries, &rows, &selection)
                }
                _ => layer.attention.attend(&queries, &cache.rows, &selection),
            };
            add_scaled(&mut x, &attended, 1.0);
            let transformed = layer.mlp.forward(&layer.post_norm.apply(&x));
            add_scaled(&mut x, &transformed, 1.0);
            if let Some(recorded) = recorded.as_mut().filter(|_| layer.indexed) {
                recorded[index].extend_from_slice(&selection);
            }
        }
        Ok(x)
    }
}

impl Layer {
    fn take(
        checkpoint: &mut Checkpoint,
        index: usize,
        config: &ModelConfig,
        mla: &MlaConfig,
        rope: &Rope,
    ) -> Result<Self> {
        let name = format!("model.layers.{index}");
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        let mlp = match mla.moe.as_ref().filter(|_| mla.is_sparse[index]) {
            Some(moe) => FeedForward::Sparse(Moe::take(checkpoint, &format!("{name}.mlp"), hidden, moe)?),
            None => {
                let width = mla.intermediate_size;
                FeedForward::Dense(Mlp::take(checkpoint, &format!("{name}.mlp"), hidden, width)?)
            }
        };
        let indexed = config.has_indexer[index];
        Ok(Self {
            input_norm: RmsNorm::take(checkpoint, &format!("{name}.input_layernorm"), hidden, eps)?,
            attention: Mla::take(checkpoint, &format!("{name}.self_attn"), config, mla, rope, indexed)?,
            post_norm: RmsNorm::take(checkpoint, &format!("{name}.post_attention_layernorm"), hidden, eps)?,
            mlp,
            indexed,
        })
    }

    fn parameters(&self) -> usize {
        let mlp = match &self.mlp {
            FeedForward::Dense(mlp) => mlp.parameters(),
            FeedForward::Sparse(moe) => moe.parameters(),
        };
        mlp + self.attention.parameters() + self.input_norm.parameters() + self.post_norm.parameters()
    }
}

impl FeedForward {
    fn forward(&self, x: &[f32]) -> Vec<f32> {
        match self {
            Self::Dense(mlp) => mlp.forward(x),
            Self::Sparse(moe) => moe.forward(x),
        }
    }
}

/// The cache of one sequence. Everything in it is rows, one per token: any prefix of them can be continued.
pub(crate) struct Cache {
    layers: Vec<LayerCache>,
    latent: usize,
    row_width: usize,
    key_width: usize,
}

/// Rows of one layer.
pub(crate) struct LayerCache {
    /// `[tokens, kv_lora_rank + qk_rope_head_dim]`, of the tokens behind those that are parked.
    pub(crate) rows: Vec<f32>,
    /// Tokens whose rows are not here.
    pub(crate) parked: usize,
    /// Empty where the layer shares a selection.
    pub(crate) keys: KeyPanels,
    indexed: bool,
}

impl LayerCache {
    /// Takes in the rows that come with a prefix, before those that are here.
    fn admit_rows(&mut self, arrived: Vec<f32>) {
        let own = std::mem::replace(&mut self.rows, arrived);
        self.rows.extend_from_slice(&own);
        self.parked = 0;
    }
}

impl Cache {
    pub(crate) fn new(config: &ModelConfig, mla: &MlaConfig) -> Self {
        let key_width = config.index_head_dim;
        let layer = |&indexed: &bool| LayerCache {
            rows: Vec::new(),
            parked: 0,
            keys: KeyPanels::new(key_width),
            indexed,
        };
        Self {
            layers: config.has_indexer.iter().map(layer).collect(),
            latent: mla.kv_lora_rank,
            row_width: mla.row_width(),
            key_width,
        }
    }

    /// Numbers held.
    pub(crate) fn len(&self) -> usize {
        self.layers.iter().map(|layer| layer.rows.len() + layer.keys.len()).sum()
    }

    pub(crate) fn reserve(&mut self, tokens: usize) {
        for layer in &mut self.layers {
            pages::reserve(&mut layer.rows, tokens * self.row_width);
            if layer.indexed {
                layer.keys.reserve(tokens);
            }
        }
    }

    /// The rows of a layer's first tokens are elsewhere, to come or to stay.
    pub(crate) fn park(&mut self, layer: usize, tokens: usize) {
        self.layers[layer].parked = tokens;
    }

    /// Drops every token from `tokens` on.
    pub(crate) fn truncate(&mut self, tokens: usize) {
        for layer in &mut self.layers {
            layer.parked = layer.parked.min(tokens);
            layer.rows.truncate((tokens - layer.parked) * self.row_width);
            layer.keys.truncate(tokens);
        }
    }

    /// A layer's rows of one group of the layout.
    pub(crate) fn rows(&self, group: &str, layer: usize, tokens: Range<usize>) -> Cow<'_, [f32]> {
        let layer = &self.layers[layer];
        match group {
            KEY_GROUP => layer.keys.rows(tokens).into(),
            _ => {
                let held = |token: usize| (token - layer.parked) * self.row_width;
                layer.rows[held(tokens.start)..held(tokens.end)].into()
            }
        }
    }

    /// Where rows of one group of the layout are appended.
    pub(crate) fn place(&mut self, group: &str, layer: usize) -> Place<'_> {
        let layer = &mut self.layers[layer];
        match group {
            KEY_GROUP => Place::Keys(&mut layer.keys),
            _ => Place::Rows(&mut layer.rows),
        }
    }

    /// A field of a layer's state for every token, row after row.
    pub(crate) fn field(&self, layer: usize, field: StateField) -> Vec<f32> {
        let cache = &self.layers[layer];
        let rows = cache.rows.chunks_exact(self.row_width);
        match field {
            StateField::Latent => rows.flat_map(|row| &row[..self.latent]).copied().collect(),
            StateField::RopeKey => rows.flat_map(|row| &row[self.latent..]).copied().collect(),
            StateField::IndexKey => cache.keys.rows(0..cache.keys.len() / self.key_width),
            _ => Vec::new(),
        }
    }
}
