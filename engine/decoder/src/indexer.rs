//! The indexer of DeepSeek Sparse Attention (arXiv 2512.02556): which rows a query attends to.
//!
//! `score(t, s) = sum_h w_h(t) relu(q_h(t) . k(s)) / sqrt(width)` for `s <= t`; the `index_topk` best are selected.
//! A product is one chain over the width, and heads are added in ascending order, so a score depends on its query and
//! key alone.

use rayon::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::kernel::sparse::{PANEL, index_scores};
use crate::linear::Linear;
use crate::norm::LayerNorm;
use crate::panels::KeyPanels;
use crate::rope::Angles;
use crate::topk::TopK;
use crate::{ModelConfig, Result};

/// Queries that one task scores: each pass over the keys serves all of them.
const TILE_QUERIES: usize = 16;

/// Indexer of one layer.
pub(crate) struct Indexer {
    wq_b: Linear,
    wk: Linear,
    k_norm: LayerNorm,
    weights_proj: Linear,
    heads: usize,
    width: usize,
    topk: usize,
    interleave: bool,
}

impl Indexer {
    pub(crate) fn take(
        checkpoint: &mut Checkpoint,
        name: &str,
        config: &ModelConfig,
        interleave: bool,
    ) -> Result<Self> {
        let (heads, width) = (config.index_n_heads, config.index_head_dim);
        let (hidden, latent) = (config.hidden_size, config.q_lora_rank);
        Ok(Self {
            wq_b: Linear::take(checkpoint, &format!("{name}.wq_b"), heads * width, latent, false)?,
            wk: Linear::take(checkpoint, &format!("{name}.wk"), width, hidden, false)?,
            k_norm: LayerNorm::take(checkpoint, &format!("{name}.k_norm"), width)?,
            weights_proj: Linear::take(checkpoint, &format!("{name}.weights_proj"), heads, hidden, false)?,
            heads,
            width,
            topk: config.index_topk,
            interleave,
        })
    }

    pub(crate) fn parameters(&self) -> usize {
        let linear = [&self.wq_b, &self.wk, &self.weights_proj];
        linear.map(Linear::parameters).iter().sum::<usize>() + self.k_norm.parameters()
    }

    /// Keys of a chunk, normed and rotated, `[tokens, index_head_dim]`. `x` is `[tokens, hidden]`.
    pub(crate) fn keys(&self, x: &[f32], angles: &Angles) -> Vec<f32> {
        let mut keys = self.wk.apply(x);
        for (token, key) in keys.chunks_exact_mut(self.width).enumerate() {
            self.k_norm.row(key);
            angles.rotate(token, self.interleave, key);
        }
        keys
    }

    /// Width of a key.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Queries of a chunk, rotated, `[tokens, heads, index_head_dim]`. `latents` is `[tokens, q_lora_rank]`.
    pub(crate) fn queries(&self, latents: &[f32], angles: &Angles) -> Vec<f32> {
        let mut queries = self.wq_b.apply(latents);
        for (token, query) in queries.chunks_exact_mut(self.heads * self.width).enumerate() {
            query.chunks_exact_mut(self.width).for_each(|head| angles.rotate(token, self.interleave, head));
        }
        queries
    }

    /// Selects for each query of a chunk that starts at position `first`. `x` is `[tokens, hidden]`, `keys` those of all
    /// positions up to the chunk's end.
    pub(crate) fn select(
        &self,
        x: &[f32],
        queries: &[f32],
        first: usize,
        keys: &KeyPanels,
        selection: &mut [Vec<u32>],
    ) {
        let row = self.heads * self.width;
        let mut weights = self.weights_proj.apply(x);
        let scale = 1.0 / ((self.heads * self.width) as f32).sqrt();
        weights.iter_mut().for_each(|weight| *weight *= scale);

        selection
            .par_chunks_mut(TILE_QUERIES)
            .zip(queries.par_chunks(TILE_QUERIES * row))
            .zip(weights.par_chunks(TILE_QUERIES * self.heads))
            .enumerate()
            .for_each_init(Scratch::default, |scratch, (index, ((selection, queries), weights))| {
                self.select_tile(queries, weights, first + index * TILE_QUERIES, keys, selection, scratch);
            });
    }

    fn select_tile(
        &self,
        queries: &[f32],
        weights: &[f32],
        first: usize,
        keys: &KeyPanels,
        selection: &mut [Vec<u32>],
        scratch: &mut Scratch,
    ) {
        let visible = first + selection.len();
        let stride = visible.next_multiple_of(PANEL);
        let Scratch { scores, topk } = scratch;
        scores.resize(selection.len() * stride, 0.0);
        // While all visible rows fit the selection there is nothing to score.
        if visible > self.topk {
            index_scores(queries, weights, self.heads, keys.panels(visible), scores);
        }
        for (index, (selection, scores)) in selection.iter_mut().zip(scores.chunks_exact(stride)).enumerate()
        {
            topk.select(&scores[..=first + index], self.topk, selection);
        }
    }
}

#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    topk: TopK,
}
