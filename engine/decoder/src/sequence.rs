//! One conversation's cache, and the one path by which tokens enter it.
//!
//! Prefill and decode are the same call: decode is a prefill of one token. A long prefill is cut into chunks to
//! bound memory; where it is cut changes no bit.

use std::ops::ControlFlow;

use esker_prefix::{BlockHash, NamespaceId, TokenId};

use crate::arrival::Supply;
use crate::config::Family;
use crate::model::Layers;
use crate::residency::{Parked, Residency};
use crate::v4::Passage;
use crate::v4::draft::Residual;
use crate::{DecoderError, Model, Result, v4, v32};

/// Tokens that go through the layers together: enough rows for the products to run at full rate, few enough that
/// the intermediates stay in cache.
pub(crate) const CHUNK_TOKENS: usize = 256;
/// The same where rows are parked: what so many queries pick of a layer is gathered at once.
const PARKED_CHUNK_TOKENS: usize = 32;

/// The cache of one sequence: what its model's layers keep of its tokens. Rows are F32 in memory, rounded already where the model's format is narrower; [`Sequence::len_bytes`]
/// says what it takes. It grows with its tokens, up to the model's `max_position_embeddings`.
pub struct Sequence {
    pub(crate) cache: Cache,
    pub(crate) tokens: usize,
    pub(crate) model: [u8; 32],
    /// Hash of the block restored last, while nothing else has been appended.
    pub(crate) restored: Option<BlockHash>,
    /// Namespace of what was restored first; the decoder knows no other name of it than its objects'.
    pub(crate) namespace: Option<NamespaceId>,
    /// Rows that are not here yet, or stay elsewhere.
    pub(crate) supply: Supply,
    /// What parked rows have cost that it lost.
    pub(crate) spent: Option<Residency>,
    layers: usize,
    pub(crate) recorded: Option<Vec<Vec<Vec<u32>>>>,
    pub(crate) residual: Option<Residual>,
}

/// What the layers keep, by family.
pub(crate) enum Cache {
    Mla(v32::Cache),
    V4(v4::cache::Cache),
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

impl Logits {
    /// Of a chunk's rows, of `width` numbers, those that logits are wanted of.
    pub(crate) fn of_chunk(self, rows: &[f32], width: usize, is_last: bool) -> &[f32] {
        match self {
            Self::None => &[],
            Self::Last if !is_last => &[],
            Self::Last => &rows[rows.len() - width..],
            Self::All => rows,
        }
    }
}

/// Logits, one row per position asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitsOut {
    vocab_size: usize,
    values: Vec<f32>,
}

impl LogitsOut {
    pub(crate) fn new(vocab_size: usize, values: Vec<f32>) -> Self {
        Self { vocab_size, values }
    }

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

/// A field of the cached state, by its published name. The first two are of V3.2 and GLM-5, the third of both
/// families, the others of V4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateField {
    /// Normed latent, `[tokens, kv_lora_rank]`.
    Latent,
    /// Rotated rope key, `[tokens, qk_rope_head_dim]`.
    RopeKey,
    /// Indexer key after norm and rotation, `[tokens, index_head_dim]`; in V4 one per compressed row.
    IndexKey,
    /// Rotated window rows, `[up to sliding_window, head_dim]`.
    Window,
    /// Rotated compressed rows, `[tokens / ratio, head_dim]`.
    Compressed,
    /// Values of the last complete run that the next compressed row needs, `[4, head_dim]`.
    OverlapKv,
    /// Their gates, position bias included.
    OverlapGate,
    /// The same for the indexer's key, `[4, index_head_dim]`.
    IndexOverlapKv,
    /// Their gates, position bias included.
    IndexOverlapGate,
    /// Values of the open run, `[tokens % ratio, channels]`.
    TailKv,
    /// Their gates, without position bias.
    TailGate,
    /// The same for the indexer's key.
    IndexTailKv,
    /// Their gates, without position bias.
    IndexTailGate,
}

impl Sequence {
    /// An empty sequence of this model.
    pub fn new(model: &Model) -> Self {
        let block_tokens = model.layout().block_tokens() as usize;
        let cache = match &model.config.family {
            Family::Mla(mla) => Cache::Mla(v32::Cache::new(&model.config, mla)),
            Family::V4(v4) => Cache::V4(v4::cache::Cache::new(&model.config, v4, block_tokens)),
        };
        let layers = model.config.num_hidden_layers;
        Self {
            cache,
            tokens: 0,
            model: model.fingerprint(),
            restored: None,
            namespace: None,
            supply: Supply::default(),
            spent: None,
            layers,
            recorded: None,
            residual: None,
        }
    }

    /// Tokens in the cache.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Memory that the rows take, and the pool of parked ones.
    pub fn len_bytes(&self) -> usize {
        let numbers = match &self.cache {
            Cache::Mla(cache) => cache.len(),
            Cache::V4(cache) => cache.len(),
        };
        numbers * size_of::<f32>() + self.supply.parked.as_ref().map_or(0, Parked::pool_bytes)
    }

    /// Appends `tokens` and gives the logits asked for. On an error that is not [`DecoderError::Cancelled`] the
    /// sequence is unchanged, or empty if it is [`DecoderError::RowsMissing`]. Computes on the current rayon pool; call it from a thread that may block.
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
        if self.needs_state() {
            return Err(DecoderError::StateMissing { tokens: self.tokens });
        }
        let (end, limit) = (self.tokens + tokens.len(), model.config.max_position_embeddings);
        if end > limit {
            return Err(DecoderError::TooLong { tokens: end, limit });
        }
        let rows: Vec<usize> = tokens.iter().map(|&token| model.check_token(token)).collect::<Result<_>>()?;
        self.reserve(model, tokens.len());

        let mut values = Vec::new();
        let mut done = 0;
        for chunk in rows.chunks(self.chunk_tokens()) {
            let x = rayon::scope(|_| self.forward(model, chunk)).inspect_err(|_| self.clear(model))?;
            done += chunk.len();
            let wanted = want.of_chunk(&x, model.config.hidden_size, done == rows.len());
            if !wanted.is_empty() {
                values.extend(rayon::scope(|_| model.head.apply(&model.norm.apply(wanted))));
            }
            if observer(Progress { done, total: rows.len() }).is_break() && done < rows.len() {
                return Err(DecoderError::Cancelled { tokens: self.tokens });
            }
        }
        Ok(LogitsOut { vocab_size: model.config.vocab_size, values })
    }

    /// Whether the sequence was left without the state that continues it: after blocks alone, or cut back beyond
    /// what is held. Never so for a model without state groups.
    pub fn needs_state(&self) -> bool {
        match &self.cache {
            Cache::Mla(_) => false,
            Cache::V4(cache) => !cache.is_resumable(),
        }
    }

    /// Whether the state after `tokens` tokens can be taken.
    pub fn holds_state(&self, tokens: usize) -> bool {
        tokens <= self.tokens
            && match &self.cache {
                Cache::Mla(_) => true,
                Cache::V4(cache) => cache.holds_state(tokens),
            }
    }

    /// Tokens that [`Sequence::replay`] would compute now; 0 if the sequence does not [need a
    /// state](Sequence::needs_state).
    pub fn replay_tokens(&self, model: &Model) -> usize {
        if self.needs_state() { model.replay_tokens(self.tokens) } else { 0 }
    }

    /// Rebuilds the state that the sequence needs from its last tokens and the rows that it holds: bit for bit the state
    /// that [`Sequence::restore_state`] would put back. `tokens` are the last of the sequence,
    /// [`Sequence::replay_tokens`] of them or more. Rows are read, never written. Does nothing if no state is needed.
    pub fn replay(&mut self, model: &Model, tokens: &[TokenId]) -> Result<()> {
        self.replay_observed(model, tokens, &mut |_| ControlFlow::Continue(()))
    }

    /// [`Sequence::replay`] that reports after each chunk; after a break the state is still needed.
    pub fn replay_observed(
        &mut self,
        model: &Model,
        tokens: &[TokenId],
        observer: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<()> {
        self.check_model(model)?;
        let (needed, got) = (self.replay_tokens(model), tokens.len());
        let chunk_tokens = self.chunk_tokens();
        if got < needed || got > self.tokens {
            return Err(DecoderError::ReplayTokens { needed, tokens: self.tokens, got });
        }
        let rows: Vec<usize> =
            tokens[got - needed..].iter().map(|&token| model.check_token(token)).collect::<Result<_>>()?;
        let (Family::V4(v4), Layers::V4(layers), Cache::V4(cache)) =
            (&model.config.family, &model.layers, &mut self.cache)
        else {
            return Ok(());
        };
        if rows.is_empty() {
            return Ok(());
        }
        let plan = v4.replay_plan(self.tokens);
        cache.begin_replay(&plan, self.tokens);
        let mut done = 0;
        for chunk in rows.chunks(chunk_tokens) {
            let passage = Passage { tokens: chunk, first: plan[0] + done, model };
            let supply = &mut self.supply;
            let replayed =
                rayon::scope(|_| layers.replay(&model.embed(chunk), &passage, cache, &plan, supply));
            if let Err(missing) = replayed {
                self.clear(model);
                return Err(missing);
            }
            done += chunk.len();
            if observer(Progress { done, total: rows.len() }).is_break() && done < rows.len() {
                cache.drop_state(self.tokens);
                return Err(DecoderError::Cancelled { tokens: self.tokens });
            }
        }
        cache.resume(self.tokens);
        self.end_arrivals();
        Ok(())
    }

    /// Drops every token from `tokens` on and gives the length that is left. Exact: rows never depend on later ones.
    /// With state groups the last block boundary is always within reach, and everything after it; a cut to before it
    /// leaves whole blocks only, without their state ([`Sequence::needs_state`]).
    pub fn truncate(&mut self, tokens: usize) -> usize {
        if tokens >= self.tokens {
            return self.tokens;
        }
        // Of rows that have still to come none is kept.
        let tokens = if self.supply.arriving.take().is_some() { 0 } else { tokens };
        self.tokens = match &mut self.cache {
            Cache::Mla(cache) => {
                cache.truncate(tokens);
                tokens
            }
            Cache::V4(cache) => cache.truncate(tokens),
        };
        if let Some(parked) = &mut self.supply.parked {
            parked.truncate(self.tokens);
        }
        for layer in self.recorded.iter_mut().flatten() {
            layer.truncate(self.tokens);
        }
        self.restored = None;
        self.namespace.take_if(|_| self.tokens == 0);
        self.keep_from_here();
        self.tokens
    }

    /// From now on keeps the selection of every query, see [`Sequence::selections`].
    pub fn record_selections(&mut self) {
        self.recorded.get_or_insert_with(|| vec![Vec::new(); self.layers]);
    }

    /// From now on keeps the residual of every token after the last layer, see [`Sequence::take_residual`]. Only V4 has
    /// one to keep; it takes `hc_mult * hidden_size` numbers per token, so it ends where rows are found missing: what is
    /// computed again then may be a whole context.
    pub fn keep_residual(&mut self) {
        self.residual.get_or_insert(Residual { first: self.tokens, values: Vec::new() });
    }

    /// The residual of the tokens appended since it was kept or taken last: what a [`Draft`](crate::Draft) starts from.
    /// A cut or a restored block forgets what was not taken.
    pub fn take_residual(&mut self) -> Option<Residual> {
        let next = Residual { first: self.tokens, values: Vec::new() };
        self.residual.as_mut().map(|residual| std::mem::replace(residual, next))
    }

    /// The tokens whose residual was not taken are no longer the last of the sequence.
    pub(crate) fn keep_from_here(&mut self) {
        if let Some(residual) = &mut self.residual {
            *residual = Residual { first: self.tokens, values: Vec::new() };
        }
    }

    /// The rows that `layer`'s indexer selected for each query since recording began, ascending. Empty for a layer
    /// without an indexer.
    pub fn selections(&self, layer: usize) -> &[Vec<u32>] {
        self.recorded.as_ref().and_then(|layers| layers.get(layer)).map_or(&[], Vec::as_slice)
    }

    /// A field of `layer`'s state now, row after row; empty where the layer has no such field, or where the sequence
    /// [needs its state](Sequence::needs_state).
    pub fn state_rows(&self, model: &Model, layer: usize, field: StateField) -> Vec<f32> {
        match (&self.cache, &model.layers) {
            (Cache::Mla(cache), _) => cache.field(layer, field),
            (Cache::V4(cache), Layers::V4(layers)) if cache.is_resumable() => {
                layers.field(cache, layer, field, self.tokens)
            }
            _ => Vec::new(),
        }
    }

    pub(crate) fn check_model(&self, model: &Model) -> Result<()> {
        if self.model == model.fingerprint() { Ok(()) } else { Err(DecoderError::OtherModel) }
    }

    /// Makes room for this many more tokens at once. Rows that are moved when a sequence grows, and memory that is
    /// touched anew, cost as much as restoring them.
    pub fn reserve(&mut self, model: &Model, tokens: usize) {
        if self.supply.arriving.is_some() {
            // The rows that come bring their room along.
            return;
        }
        let tokens = tokens.min(model.config.max_position_embeddings.saturating_sub(self.tokens));
        match &mut self.cache {
            Cache::Mla(cache) => cache.reserve(tokens),
            Cache::V4(cache) => cache.reserve(tokens),
        }
    }

    fn chunk_tokens(&self) -> usize {
        if self.supply.parked.is_some() { PARKED_CHUNK_TOKENS } else { CHUNK_TOKENS }
    }

    fn end_arrivals(&mut self) {
        self.supply.arriving.take_if(|arriving| arriving.is_over());
    }

    /// Takes one chunk through all layers. Gives the residual stream, `[tokens, hidden]`.
    fn forward(&mut self, model: &Model, tokens: &[usize]) -> Result<Vec<f32>> {
        let x = model.embed(tokens);
        let (first, recorded) = (self.tokens, self.recorded.as_mut());
        let supply = &mut self.supply;
        let x = match (&model.layers, &mut self.cache) {
            (Layers::Mla(layers), Cache::Mla(cache)) => {
                layers.forward(model, x, first, cache, supply, recorded)?
            }
            (Layers::V4(layers), Cache::V4(cache)) => {
                let kept = self.residual.as_mut().map(|residual| &mut residual.values);
                let passage = Passage { tokens, first, model };
                layers.forward(&x, &passage, cache, supply, recorded, kept)?
            }
            _ => unreachable!("a sequence is used with the model that it was made for"),
        };
        self.tokens += tokens.len();
        self.restored = None;
        self.end_arrivals();
        Ok(x)
    }
}
