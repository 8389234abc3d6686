//! Multi-head latent attention over the selected rows, in absorbed form.
//!
//! A cached row is `[latent | rope key]`, shared by all heads. Per head, `W_UK` maps the query into latent space, so
//! scores are products with the selected rows as they lie in the cache, and `W_UV` maps the weighted sum of latents
//! to values. Sums over rows run per query in ascending order: the same whether the query came in a chunk or alone.

use rayon::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::config::MlaConfig;
use crate::indexer::Indexer;
use crate::kernel::packed::{Packed, Rows};
use crate::kernel::sparse::{Scratch, attend};
use crate::linear::Linear;
use crate::norm::{LATENT_EPS, RmsNorm};
use crate::rope::{Angles, Rope};
use crate::row_codec::RowFormats;
use crate::v32::LayerCache;
use crate::{ModelConfig, Result};

/// Queries that one task takes through the attention: enough to reuse the packed `W_UK` and `W_UV`.
const TILE_QUERIES: usize = 32;

/// Attention of one layer.
pub(crate) struct Mla {
    q_a_proj: Linear,
    q_a_layernorm: RmsNorm,
    q_b_proj: Linear,
    kv_a_proj: Linear,
    kv_a_layernorm: RmsNorm,
    /// `W_UK` of each head, from its nope part into latent space.
    up_key: Vec<Packed>,
    /// `W_UV` of each head, out of latent space.
    up_value: Vec<Packed>,
    o_proj: Linear,
    indexer: Option<Indexer>,
    heads: usize,
    nope: usize,
    rope: usize,
    latent: usize,
    value: usize,
    scale: f32,
}

impl Mla {
    pub(crate) fn take(
        checkpoint: &mut Checkpoint,
        name: &str,
        config: &ModelConfig,
        mla: &MlaConfig,
        rope: &Rope,
        indexed: bool,
    ) -> Result<Self> {
        let (hidden, heads, bias) = (config.hidden_size, config.num_attention_heads, mla.attention_bias);
        let (nope, latent, value) = (mla.qk_nope_head_dim, mla.kv_lora_rank, mla.v_head_dim);
        let (query, q_lora) = (mla.qk_head_dim(), config.q_lora_rank);
        let up = checkpoint.take(&format!("{name}.kv_b_proj.weight"), &[heads * (nope + value), latent])?;
        let (mut up_key, mut up_value) = (Vec::new(), Vec::new());
        for head in up.chunks_exact((nope + value) * latent) {
            let (key_rows, value_rows) = head.split_at(nope * latent);
            up_key.push(Packed::from_inputs(key_rows, nope, latent));
            up_value.push(Packed::from_outputs(value_rows, value, latent));
        }
        let mut linear = |part: &str, outputs, inputs, bias| {
            Linear::take(checkpoint, &format!("{name}.{part}"), outputs, inputs, bias)
        };
        Ok(Self {
            q_a_proj: linear("q_a_proj", q_lora, hidden, bias)?,
            q_b_proj: linear("q_b_proj", heads * query, q_lora, false)?,
            kv_a_proj: linear("kv_a_proj_with_mqa", mla.row_width(), hidden, bias)?,
            o_proj: linear("o_proj", hidden, heads * value, bias)?,
            q_a_layernorm: RmsNorm::take(checkpoint, &format!("{name}.q_a_layernorm"), q_lora, LATENT_EPS)?,
            kv_a_layernorm: RmsNorm::take(checkpoint, &format!("{name}.kv_a_layernorm"), latent, LATENT_EPS)?,
            up_key,
            up_value,
            indexer: match indexed {
                true => Some(Indexer::take(
                    checkpoint,
                    &format!("{name}.indexer"),
                    config,
                    mla.indexer_rope_interleave,
                )?),
                false => None,
            },
            heads,
            nope,
            rope: mla.qk_rope_head_dim,
            latent,
            value,
            scale: rope.softmax_factor / (query as f32).sqrt(),
        })
    }

    pub(crate) fn parameters(&self) -> usize {
        let linear = [&self.q_a_proj, &self.q_b_proj, &self.kv_a_proj, &self.o_proj];
        linear.map(Linear::parameters).iter().sum::<usize>()
            + self.up_key.iter().chain(&self.up_value).map(Packed::parameters).sum::<usize>()
            + self.q_a_layernorm.parameters()
            + self.kv_a_layernorm.parameters()
            + self.indexer.as_ref().map_or(0, Indexer::parameters)
    }

    /// Begins the attention of a chunk that starts at position `first`: appends the chunk's rows to the cache, and selects,
    /// unless this layer shares the selection already in `selection`. `x` is `[tokens, hidden]`; gives the queries.
    pub(crate) fn select(
        &self,
        x: &[f32],
        angles: &Angles,
        first: usize,
        formats: &RowFormats,
        cache: &mut LayerCache,
        selection: &mut [Vec<u32>],
    ) -> Vec<f32> {
        let latents = self.q_a_layernorm.apply(&self.q_a_proj.apply(x));
        let mut queries = self.q_b_proj.apply(&latents);
        for (index, head) in queries.chunks_exact_mut(self.nope + self.rope).enumerate() {
            angles.rotate(index / self.heads, true, &mut head[self.nope..]);
        }

        let width = self.latent + self.rope;
        let mut rows = self.kv_a_proj.apply(x);
        let mut latent = vec![0.0; self.latent];
        for (token, row) in rows.chunks_exact_mut(width).enumerate() {
            self.kv_a_layernorm.row(&row[..self.latent], &mut latent);
            row[..self.latent].copy_from_slice(&latent);
            angles.rotate(token, true, &mut row[self.latent..]);
        }
        formats.round_rows(&mut rows);
        cache.rows.extend_from_slice(&rows);

        if let Some(indexer) = &self.indexer {
            let mut keys = indexer.keys(x, angles);
            formats.round_keys(&mut keys, indexer.width());
            cache.keys.extend(&keys);
            let mut queries = indexer.queries(&latents, angles);
            formats.round_queries(&mut queries, indexer.width());
            indexer.select(x, &queries, first, &cache.keys, selection);
        }
        queries
    }

    /// Ends it: attends to the selected `rows`. Gives `[tokens, hidden]`.
    pub(crate) fn attend(&self, queries: &[f32], rows: &[f32], selection: &[Vec<u32>]) -> Vec<f32> {
        self.o_proj.apply(&self.values(queries, rows, selection))
    }

    /// Values of each query, heads concatenated, `[tokens, heads * v]`.
    fn values(&self, queries: &[f32], rows: &[f32], selection: &[Vec<u32>]) -> Vec<f32> {
        let (query, value) = (self.heads * (self.nope + self.rope), self.heads * self.value);
        let mut out = vec![0.0; selection.len() * value];
        out.par_chunks_mut(TILE_QUERIES * value)
            .zip(queries.par_chunks(TILE_QUERIES * query))
            .zip(selection.par_chunks(TILE_QUERIES))
            .for_each_init(Tile::default, |scratch, ((out, queries), selection)| {
                self.attend_tile(queries, rows, selection, out, scratch);
            });
        out
    }

    fn attend_tile(
        &self,
        queries: &[f32],
        rows: &[f32],
        selection: &[Vec<u32>],
        out: &mut [f32],
        scratch: &mut Tile,
    ) {
        let Self { heads, nope, rope, latent, value, .. } = *self;
        let (tokens, query, width) = (selection.len(), nope + rope, latent + rope);
        let Tile { absorbed, summed, scratch } = scratch;

        // Queries into latent space: [tokens, heads, latent | rope].
        absorbed.resize(tokens * heads * width, 0.0);
        for (head, up_key) in self.up_key.iter().enumerate() {
            let from = Rows::new(&queries[head * query..], tokens, heads * query);
            up_key.multiply(from, &mut absorbed[head * width..], heads * width);
        }
        for (to, from) in absorbed.chunks_exact_mut(width).zip(queries.chunks_exact(query)) {
            to[latent..].copy_from_slice(&from[nope..]);
        }

        summed.resize(tokens * heads * latent, 0.0);
        let tokens_of = absorbed.chunks_exact(heads * width).zip(summed.chunks_exact_mut(heads * latent));
        for ((query, summed), selected) in tokens_of.zip(selection) {
            attend(query, rows, selected, latent, self.scale, scratch, summed);
        }

        // Weighted latents to values: [tokens, heads, v].
        for (head, up_value) in self.up_value.iter().enumerate() {
            let from = Rows::new(&summed[head * latent..], tokens, heads * latent);
            up_value.multiply(from, &mut out[head * value..], heads * value);
        }
    }
}

/// Buffers that one thread reuses from tile to tile.
#[derive(Default)]
struct Tile {
    absorbed: Vec<f32>,
    summed: Vec<f32>,
    scratch: Scratch,
}
