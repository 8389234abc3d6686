//! One conversation's cache, and the one path by which tokens enter it.
//!
//! Prefill and decode are the same call: decode is a prefill of one token. A long prefill is cut into chunks to
//! bound memory; where it is cut changes no bit.

use std::ops::ControlFlow;

use esker_prefix::{BlockHash, TokenId};

use crate::kernel::vector::add_scaled;
use crate::panels::KeyPanels;
use crate::rope::Angles;
use crate::{DecoderError, KvFormat, Model, Result};

/// Tokens that go through the layers together: enough rows for the products to run at full rate, few enough that
/// the intermediates stay in cache.
const CHUNK_TOKENS: usize = 256;

/// The cache of one sequence: per layer and token a latent with its rope key, and an indexer key where the layer has
/// an indexer. Rows are F32 in memory, rounded already where the model's format is narrower; [`Sequence::len_bytes`]
/// says what it takes. It grows with its tokens, up to the model's `max_position_embeddings`.
pub struct Sequence {
    pub(crate) layers: Vec<LayerCache>,
    pub(crate) tokens: usize,
    pub(crate) model: [u8; 32],
    /// Hash of the block restored last, while nothing else has been appended.
    pub(crate) restored: Option<BlockHash>,
    recorded: Option<Vec<Vec<Vec<u32>>>>,
}

/// Rows of one layer.
pub(crate) struct LayerCache {
    /// `[tokens, kv_lora_rank + qk_rope_head_dim]`.
    pub(crate) rows: Vec<f32>,
    /// Empty where the layer shares a selection.
    pub(crate) keys: KeyPanels,
}

/// Which positions to give logits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// None of them.
    None,
    /// The last token's.
    Last,
    /// Every token's.
    All,
}

/// Logits, one row per position asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitsOut {
    vocab_size: usize,
    values: Vec<f32>,
}

impl LogitsOut {
    /// Rows of `vocab_size` numbers.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.values.chunks_exact(self.vocab_size)
    }

    /// The last row; `None` if none was asked for.
    pub fn last(&self) -> Option<&[f32]> {
        self.rows().last()
    }
}

/// How far a prefill has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Tokens of this prefill that are in the cache.
    pub done: usize,
    /// Tokens of this prefill.
    pub total: usize,
}

/// A field of the cached state, by its published name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateField {
    /// Normed latent, `[tokens, kv_lora_rank]`.
    Latent,
    /// Rotated rope key, `[tokens, qk_rope_head_dim]`.
    RopeKey,
    /// Indexer key after norm and rotation, `[tokens, index_head_dim]`.
    IndexKey,
}

impl Sequence {
    /// An empty sequence of this model.
    pub fn new(model: &Model) -> Self {
        let width = model.config.index_head_dim;
        let layer = |_: &_| LayerCache { rows: Vec::new(), keys: KeyPanels::new(width) };
        let layers = model.layers.iter().map(layer).collect();
        Self { layers, tokens: 0, model: model.fingerprint(), restored: None, recorded: None }
    }

    /// Tokens in the cache.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Memory that the rows take.
    pub fn len_bytes(&self) -> usize {
        self.layers.iter().map(|layer| (layer.rows.len() + layer.keys.len()) * size_of::<f32>()).sum()
    }

    /// Appends `tokens` and gives the logits asked for. On an error that is not [`DecoderError::Cancelled`] the
    /// sequence is unchanged. Computes on the current rayon pool; call it from a thread that may block.
    pub fn prefill(&mut self, model: &Model, tokens: &[TokenId], want: Logits) -> Result<LogitsOut> {
        self.prefill_observed(model, tokens, want, &mut |_| ControlFlow::Continue(()))
    }

    /// [`Sequence::prefill`] that reports after each chunk; a break cancels and keeps what is computed.
    pub fn prefill_observed(
        &mut self,
        model: &Model,
        tokens: &[TokenId],
        want: Logits,
        observer: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<LogitsOut> {
        self.check_model(model)?;
        if tokens.is_empty() {
            return Err(DecoderError::NoTokens);
        }
        let (end, limit) = (self.tokens + tokens.len(), model.config.max_position_embeddings);
        if end > limit {
            return Err(DecoderError::TooLong { tokens: end, limit });
        }
        let rows: Vec<usize> = tokens.iter().map(|&token| model.check_token(token)).collect::<Result<_>>()?;
        self.reserve(model, tokens.len());

        let mut values = Vec::new();
        let mut done = 0;
        for chunk in rows.chunks(CHUNK_TOKENS) {
            let x = rayon::scope(|_| self.forward(model, chunk));
            done += chunk.len();
            let wanted = match want {
                Logits::None => &[],
                Logits::Last if done < rows.len() => &[],
                Logits::Last => &x[x.len() - model.config.hidden_size..],
                Logits::All => &x[..],
            };
            if !wanted.is_empty() {
                values.extend(rayon::scope(|_| model.head.apply(&model.norm.apply(wanted))));
            }
            if observer(Progress { done, total: rows.len() }).is_break() && done < rows.len() {
                return Err(DecoderError::Cancelled { tokens: self.tokens });
            }
        }
        Ok(LogitsOut { vocab_size: model.config.vocab_size, values })
    }

    /// Drops every token from `tokens` on. Exact: rows never depend on later ones.
    pub fn truncate(&mut self, tokens: usize) {
        if tokens >= self.tokens {
            return;
        }
        for layer in &mut self.layers {
            layer.rows.truncate(layer.rows.len() / self.tokens * tokens);
            layer.keys.truncate(tokens);
        }
        for layer in self.recorded.iter_mut().flatten() {
            layer.truncate(tokens);
        }
        self.tokens = tokens;
        self.restored = None;
    }

    /// From now on keeps the selection of every query, see [`Sequence::selections`].
    pub fn record_selections(&mut self) {
        self.recorded.get_or_insert_with(|| vec![Vec::new(); self.layers.len()]);
    }

    /// The rows that `layer`'s indexer selected for each query since recording began, ascending. Empty for a layer
    /// without an indexer.
    pub fn selections(&self, layer: usize) -> &[Vec<u32>] {
        self.recorded.as_ref().and_then(|layers| layers.get(layer)).map_or(&[], Vec::as_slice)
    }

    /// A field of `layer`'s state for every cached token, row after row; empty where the layer has no such field.
    pub fn state_rows(&self, model: &Model, layer: usize, field: StateField) -> Vec<f32> {
        let latent = model.config.kv_lora_rank;
        let cache = &self.layers[layer];
        let rows = cache.rows.chunks_exact(model.config.row_width());
        match field {
            StateField::Latent => rows.flat_map(|row| &row[..latent]).copied().collect(),
            StateField::RopeKey => rows.flat_map(|row| &row[latent..]).copied().collect(),
            StateField::IndexKey => cache.keys.rows(0..cache.keys.len() / model.config.index_head_dim),
        }
    }

    pub(crate) fn check_model(&self, model: &Model) -> Result<()> {
        if self.model == model.fingerprint() { Ok(()) } else { Err(DecoderError::OtherModel) }
    }

    /// Makes room for this many more tokens at once. Rows that are moved when a sequence grows, and memory that is
    /// touched anew, cost as much as restoring them.
    pub fn reserve(&mut self, model: &Model, tokens: usize) {
        for (cache, indexed) in self.layers.iter_mut().zip(&model.config.has_indexer) {
            cache.rows.reserve(tokens * model.config.row_width());
            if *indexed {
                cache.keys.reserve(tokens);
            }
        }
    }

    /// Takes one chunk through all layers. Gives the residual stream, `[tokens, hidden]`.
    fn forward(&mut self, model: &Model, tokens: &[usize]) -> Vec<f32> {
        let hidden = model.config.hidden_size;
        let angles: Angles = model.rope.angles(self.tokens, tokens.len());
        let mut selection = vec![Vec::new(); tokens.len()];
        let mut x = Vec::with_capacity(tokens.len() * hidden);
        for &token in tokens {
            x.extend_from_slice(&model.embedding[token * hidden..][..hidden]);
        }
        for (index, layer) in model.layers.iter().enumerate() {
            let normed = layer.input_norm.apply(&x);
            let cache = &mut self.layers[index];
            let attended =
                layer.attention.forward(&normed, &angles, self.tokens, model.format, cache, &mut selection);
            add_scaled(&mut x, &attended, 1.0);
            let transformed = layer.mlp.forward(&layer.post_norm.apply(&x));
            add_scaled(&mut x, &transformed, 1.0);
            if let Some(recorded) = self.recorded.as_mut().filter(|_| model.config.has_indexer[index]) {
                recorded[index].extend_from_slice(&selection);
            }
        }
        self.tokens += tokens.len();
        self.restored = None;
        x
    }
}

impl KvFormat {
    /// Rounds rows to what a block can hold, before their first use.
    pub(crate) fn round(self, rows: &mut [f32]) {
        if self == Self::Bf16 {
            rows.iter_mut().for_each(|value| *value = half::bf16::from_f32(*value).to_f32());
        }
    }
}
