//! Attention over the window and compressed rows: one row per position serves all heads, as key and as value.
//!
//! A query sees the last `sliding_window` positions uncompressed, and every compressed row whose run has ended by
//! its own position: all of them, or in a sparse layer those that the indexer selects. Sums over rows run window first,
//! then compressed, each ascending: the same whether the query came in a chunk or alone.

use std::borrow::Cow;

use rayon::prelude::*;

use crate::arrival::Supply;
use crate::checkpoint::Checkpoint;
use crate::kernel::packed::{Packed, Rows};
use crate::kernel::shared::attend_shared;
use crate::kernel::sparse::Scratch;
use crate::linear::Linear;
use crate::norm::{RmsNorm, rms_norm};
use crate::rope::{Angles, Rope};
use crate::row_codec::RowFormats;
use crate::v4::Passage;
use crate::v4::cache::{KeyCache, LayerCache, RowCache};
use crate::v4::compressor::Compressor;
use crate::v4::config::{Compression, V4Config};
use crate::v4::indexer::Indexer;
use crate::{Model, ModelConfig, Result};

/// Queries that one task takes through the attention.
const TILE_QUERIES: usize = 16;
/// Multiply-adds of one token below which the groups of the first output projection are not worth dividing.
const PARALLEL_WORK: usize = 1 << 18;

/// Attention of one layer.
pub(super) struct Attention {
    wq_a: Linear,
    q_norm: RmsNorm,
    wq_b: Linear,
    wkv: Linear,
    kv_norm: RmsNorm,
    sinks: Vec<f32>,
    /// First output projection of each group, from its heads side by side to `o_lora_rank`.
    wo_a: Vec<Packed>,
    wo_b: Linear,
    pub(super) compressor: Option<Compressor>,
    pub(super) indexer: Option<Indexer>,
    heads: usize,
    width: usize,
    rope: usize,
    window: usize,
    ratio: usize,
    groups: usize,
    o_lora: usize,
    eps: f32,
}

/// For each query of a chunk the rows that the indexer selected, ascending.
type Selection = Vec<Vec<u32>>;

/// Where a chunk stands.
pub(super) struct Chunk<'a> {
    /// Position of its first token.
    pub(super) first: usize,
    pub(super) rope: &'a Rope,
    /// The chunk's own positions.
    pub(super) angles: Cow<'a, Angles>,
    pub(super) formats: &'a RowFormats,
}

impl<'a> Chunk<'a> {
    pub(super) fn new(passage: &Passage<'a>, rope: &'a Rope, angles: &'a Angles) -> Self {
        Self { first: passage.first, rope, angles: Cow::Borrowed(angles), formats: &passage.model.formats }
    }

    /// Leaves out the first `count` of its `tokens`.
    pub(super) fn skip(&mut self, count: usize, tokens: usize) {
        self.first += count;
        self.angles = Cow::Owned(self.rope.angles(self.first, tokens - count));
    }
}

impl Attention {
    pub(super) fn take(
        checkpoint: &mut Checkpoint,
        name: &str,
        compression: Option<Compression>,
        config: &ModelConfig,
        v4: &V4Config,
    ) -> Result<Self> {
        let (hidden, heads, eps) = (config.hidden_size, config.num_attention_heads, config.rms_norm_eps);
        let (width, latent, rope) = (v4.head_dim, config.q_lora_rank, v4.qk_rope_head_dim);
        let (groups, o_lora) = (v4.o_groups, v4.o_lora_rank);
        let of_group = heads / groups * width;
        let rows = checkpoint.take(&format!("{name}.wo_a.weight"), &[groups * o_lora, of_group])?;
        let wo_a = rows
            .chunks_exact(o_lora * of_group)
            .map(|rows| Packed::from_outputs(rows, o_lora, of_group))
            .collect();
        let compressor = match compression {
            None => None,
            Some(compression) => {
                let (name, dimensions) = (format!("{name}.compressor"), [hidden, width, rope]);
                Some(Compressor::take(checkpoint, &name, dimensions, compression, eps)?)
            }
        };
        let indexer = match compression.filter(|compression| compression.sparse) {
            None => None,
            Some(compression) => {
                Some(Indexer::take(checkpoint, &format!("{name}.indexer"), config, v4, compression)?)
            }
        };
        let mut linear = |part: &str, outputs, inputs| {
            Linear::take(checkpoint, &format!("{name}.{part}"), outputs, inputs, false)
        };
        Ok(Self {
            wq_a: linear("wq_a", latent, hidden)?,
            wq_b: linear("wq_b", heads * width, latent)?,
            wkv: linear("wkv", width, hidden)?,
            wo_b: linear("wo_b", hidden, groups * o_lora)?,
            q_norm: RmsNorm::take(checkpoint, &format!("{name}.q_norm"), latent, eps)?,
            kv_norm: RmsNorm::take(checkpoint, &format!("{name}.kv_norm"), width, eps)?,
            sinks: checkpoint.take(&format!("{name}.attn_sink"), &[heads])?,
            wo_a,
            compressor,
            indexer,
            heads,
            width,
            rope,
            window: v4.sliding_window,
            ratio: compression.map_or(0, |compression| compression.ratio),
            groups,
            o_lora,
            eps,
        })
    }

    pub(super) fn parameters(&self) -> usize {
        let linear = [&self.wq_a, &self.wq_b, &self.wkv, &self.wo_b];
        linear.map(Linear::parameters).iter().sum::<usize>()
            + self.q_norm.parameters()
            + self.kv_norm.parameters()
            + self.sinks.len()
            + self.wo_a.iter().map(Packed::parameters).sum::<usize>()
            + self.compressor.as_ref().map_or(0, Compressor::parameters)
            + self.indexer.as_ref().map_or(0, Indexer::parameters)
    }

    /// Attention of a chunk whose keys the cache holds: selects, waits for rows that are to come, attends. `x` and the result are `[tokens, hidden]`;
    /// with them comes what the indexer selected, if there is one.
    pub(super) fn forward(
        &self,
        x: &[f32],
        chunk: &Chunk<'_>,
        cache: &mut LayerCache,
        mut supply: Option<(&Model, usize, &mut Supply)>,
    ) -> Result<(Vec<f32>, Option<Selection>)> {
        let latents = self.q_norm.apply(&self.wq_a.apply(x));
        let mut queries = self.wq_b.apply(&latents);
        queries.par_chunks_mut(self.heads * self.width).enumerate().with_min_len(TILE_QUERIES).for_each(
            |(token, query)| {
                for head in query.chunks_exact_mut(self.width) {
                    rms_norm(head, self.eps);
                    chunk.angles.rotate(token, true, &mut head[self.width - self.rope..]);
                }
            },
        );
        let selection = self
            .indexer
            .as_ref()
            .zip(cache.keys.as_ref())
            .map(|(indexer, cache)| indexer.select(x, &latents, chunk, &cache.keys));
        if let Some((_, layer, supply)) = &mut supply
            && let Some(rows) = supply.rows(*layer)?
        {
            cache.admit_rows(rows);
        }
        let parked = supply.and_then(|(model, layer, supply)| Some((model, layer, supply.parked.as_mut()?)));
        let cache = &*cache;
        let attended = match (parked, &cache.rows, &selection) {
            (Some((model, layer, parked)), Some(own), Some(picked)) if own.parked > 0 => {
                let held = (own.parked, &own.rows[..]);
                let (rows, picked) = parked.gather(model, layer, held, self.width, picked)?;
                self.attend(&queries, chunk, cache, &rows, Some(&picked))
            }
            _ => {
                let rows = cache.rows.as_ref().map_or(&[][..], |cache| &cache.rows);
                self.attend(&queries, chunk, cache, rows, selection.as_deref())
            }
        };
        Ok((self.wo_b.apply(&attended), selection))
    }

    /// Appends what the cache does not hold yet of the chunk's window rows, the inputs of the compressors, and the
    /// compressed rows and keys of the runs that it completes. A compressed row that is held is never formed again.
    pub(super) fn append(&self, x: &[f32], chunk: &Chunk<'_>, cache: &mut LayerCache) {
        let raw = self.wkv.apply(x);
        let mut rows = vec![0.0; raw.len()];
        for (token, (raw, row)) in
            raw.chunks_exact(self.width).zip(rows.chunks_exact_mut(self.width)).enumerate()
        {
            self.kv_norm.row(raw, row);
            chunk.angles.rotate(token, true, &mut row[self.width - self.rope..]);
        }
        chunk.formats.round_rows(&mut rows);
        cache.window.extend(&rows);

        let end = cache.window.end();
        if let Some((compressor, cache)) = self.compressor.as_ref().zip(cache.rows.as_mut()) {
            let RowCache { inputs, rows, parked } = cache;
            compressor.extend(inputs, x, chunk.first);
            let new = *parked + rows.len() / self.width..end / self.ratio;
            let mut new = compressor.rows(new, inputs, chunk.rope);
            chunk.formats.round_rows(&mut new);
            rows.extend_from_slice(&new);
        }
        if let Some((indexer, cache)) = self.indexer.as_ref().zip(cache.keys.as_mut()) {
            let KeyCache { inputs, keys } = cache;
            indexer.compressor.extend(inputs, x, chunk.first);
            let new = keys.count()..end / self.ratio;
            let mut new = indexer.compressor.rows(new, inputs, chunk.rope);
            chunk.formats.round_keys(&mut new, indexer.width());
            keys.extend(&new);
        }
    }

    /// Each query's heads through the first output projection, `[tokens, groups * o_lora_rank]`.
    fn attend(
        &self,
        queries: &[f32],
        chunk: &Chunk<'_>,
        cache: &LayerCache,
        rows: &[f32],
        selection: Option<&[Vec<u32>]>,
    ) -> Vec<f32> {
        let query = self.heads * self.width;
        let mut attended = vec![0.0; queries.len()];
        attended
            .par_chunks_mut(TILE_QUERIES * query)
            .zip(queries.par_chunks(TILE_QUERIES * query))
            .enumerate()
            .for_each_init(Tile::default, |tile, (index, (attended, queries))| {
                let Tile { keys, scratch } = tile;
                let first = index * TILE_QUERIES;
                for (token, (query_row, attended)) in
                    (first..).zip(queries.chunks_exact(query).zip(attended.chunks_exact_mut(query)))
                {
                    let selected = selection.map(|all| &all[token][..]);
                    self.keys(chunk.first + token, cache, rows, selected, keys);
                    let scale = 1.0 / (self.width as f32).sqrt();
                    attend_shared(query_row, keys, &self.sinks, scale, scratch, attended);
                    for head in attended.chunks_exact_mut(self.width) {
                        chunk.angles.rotate_back(token, &mut head[self.width - self.rope..]);
                    }
                }
            });
        self.project(&attended)
    }

    /// The rows that a query at `position` attends to, its window and of the compressed `rows` those selected, or all that
    /// it sees, in the order of their sums. A window that is not held in full
    /// is that of a draft: a sequence has all that a query needs.
    fn keys<'a>(
        &self,
        position: usize,
        cache: &'a LayerCache,
        rows: &'a [f32],
        selected: Option<&[u32]>,
        keys: &mut Vec<&'a [f32]>,
    ) {
        let first = (position + 1).saturating_sub(self.window).max(cache.window.first());
        keys.clear();
        keys.extend(cache.window.rows(first..position + 1).chunks_exact(self.width));
        if cache.rows.is_none() {
            return;
        }
        match selected {
            Some(selected) => {
                keys.extend(selected.iter().map(|&row| &rows[row as usize * self.width..][..self.width]))
            }
            None => keys.extend(rows.chunks_exact(self.width).take((position + 1) / self.ratio)),
        }
    }

    /// Heads to group outputs: `[tokens, heads * width]` to `[tokens, groups * o_lora_rank]`.
    fn project(&self, attended: &[f32]) -> Vec<f32> {
        let (query, output) = (self.heads * self.width, self.groups * self.o_lora);
        let (of_group, tokens) = (query / self.groups, attended.len() / query);
        let mut out = vec![0.0; tokens * output];
        if tokens == 1 {
            let groups = out.par_chunks_mut(self.o_lora).zip(attended.par_chunks(of_group)).zip(&self.wo_a);
            let run = |((out, attended), weight): ((&mut [f32], &[f32]), &Packed)| {
                weight.multiply(Rows::new(attended, 1, of_group), out, self.o_lora);
            };
            match of_group * output < PARALLEL_WORK {
                true => groups.with_min_len(self.groups).for_each(run),
                false => groups.for_each(run),
            }
            return out;
        }
        let part = tokens.div_ceil(rayon::current_num_threads()).next_multiple_of(TILE_QUERIES);
        out.par_chunks_mut(part * output).zip(attended.par_chunks(part * query)).for_each(
            |(out, attended)| {
                for (group, weight) in self.wo_a.iter().enumerate() {
                    let from = Rows::new(&attended[group * of_group..], attended.len() / query, query);
                    weight.multiply(from, &mut out[group * self.o_lora..], output);
                }
            },
        );
        out
    }
}

/// Buffers that one thread reuses from tile to tile.
#[derive(Default)]
struct Tile<'a> {
    keys: Vec<&'a [f32]>,
    scratch: Scratch,
}
