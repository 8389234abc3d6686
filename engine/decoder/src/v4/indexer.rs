//! The lightning indexer: which compressed rows a query of a sparse layer attends to.
//!
//! `score(t, i) = sum_h w_h(t) relu(q_h(t) . k(i))` over the rows that are visible to the query; the `index_topk` best
//! are selected, ties to the lower row. As in V3.2 a score depends on its query and key alone.

use rayon::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::kernel::sparse::{PANEL, index_scores};
use crate::linear::Linear;
use crate::panels::KeyPanels;
use crate::topk::TopK;
use crate::v4::attention::Chunk;
use crate::v4::compressor::Compressor;
use crate::v4::config::{Compression, V4Config};
use crate::{ModelConfig, Result};

/// Queries that one task scores: each pass over the keys serves all of them.
const TILE_QUERIES: usize = 16;

/// Indexer of one layer.
pub(super) struct Indexer {
    wq_b: Linear,
    weights_proj: Linear,
    pub(super) compressor: Compressor,
    heads: usize,
    width: usize,
    rope: usize,
    ratio: usize,
    topk: usize,
}

impl Indexer {
    pub(super) fn take(
        checkpoint: &mut Checkpoint,
        name: &str,
        config: &ModelConfig,
        v4: &V4Config,
        compression: Compression,
    ) -> Result<Self> {
        let (heads, width, rope) = (config.index_n_heads, config.index_head_dim, v4.qk_rope_head_dim);
        let (hidden, latent) = (config.hidden_size, config.q_lora_rank);
        let dimensions = [hidden, width, rope];
        Ok(Self {
            wq_b: Linear::take(checkpoint, &format!("{name}.wq_b"), heads * width, latent, false)?,
            weights_proj: Linear::take(checkpoint, &format!("{name}.weights_proj"), heads, hidden, false)?,
            compressor: Compressor::take(
                checkpoint,
                &format!("{name}.compressor"),
                dimensions,
                compression,
                config.rms_norm_eps,
            )?,
            heads,
            width,
            rope,
            ratio: compression.ratio,
            topk: config.index_topk,
        })
    }

    pub(super) fn parameters(&self) -> usize {
        self.wq_b.parameters() + self.weights_proj.parameters() + self.compressor.parameters()
    }

    /// Width of a key.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Selects for each query of a chunk. `x` is `[tokens, hidden]`, `latents` the query latents
    /// `[tokens, q_lora_rank]`, `keys` those of all rows that the chunk completes.
    pub(super) fn select(
        &self,
        x: &[f32],
        latents: &[f32],
        chunk: &Chunk<'_>,
        keys: &KeyPanels,
    ) -> Vec<Vec<u32>> {
        let row = self.heads * self.width;
        let mut queries = self.wq_b.apply(latents);
        for (token, query) in queries.chunks_exact_mut(row).enumerate() {
            for head in query.chunks_exact_mut(self.width) {
                chunk.angles.rotate(token, true, &mut head[self.width - self.rope..]);
            }
        }
        chunk.formats.round_queries(&mut queries, self.width);
        let mut weights = self.weights_proj.apply(x);
        let scale = 1.0 / ((self.heads * self.width) as f32).sqrt();
        weights.iter_mut().for_each(|weight| *weight *= scale);

        let mut selection = vec![Vec::new(); weights.len() / self.heads];
        selection
            .par_chunks_mut(TILE_QUERIES)
            .zip(queries.par_chunks(TILE_QUERIES * row))
            .zip(weights.par_chunks(TILE_QUERIES * self.heads))
            .enumerate()
            .for_each_init(Scratch::default, |scratch, (index, ((selection, queries), weights))| {
                self.select_tile(
                    queries,
                    weights,
                    chunk.first + index * TILE_QUERIES,
                    keys,
                    selection,
                    scratch,
                );
            });
        selection
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
        let visible = (first + selection.len()) / self.ratio;
        let stride = visible.next_multiple_of(PANEL).max(PANEL);
        let Scratch { scores, topk } = scratch;
        scores.resize(selection.len() * stride, 0.0);
        // While all visible rows fit the selection there is nothing to score.
        if visible > self.topk {
            index_scores(queries, weights, self.heads, keys.panels(visible), scores);
        }
        for (position, (selection, scores)) in
            (first..).zip(selection.iter_mut().zip(scores.chunks_exact(stride)))
        {
            topk.select(&scores[..(position + 1) / self.ratio], self.topk, selection);
        }
    }
}

#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    topk: TopK,
}
