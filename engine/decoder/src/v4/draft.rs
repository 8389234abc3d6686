//! The draft block (multi-token prediction): from what the model knows after token `t` and from token `t + 1`, it guesses
//! token `t + 2`.
//!
//! It is one more layer with a window of its own, between an entry that joins the embedding of the next token with each
//! stream of the residual, and a head of its own; embedding and output matrix are the model's. What is lost of its
//! window costs good guesses, never correctness, so it may begin anywhere, and blocks and states do not hold it.

use esker_prefix::TokenId;

use crate::checkpoint::Checkpoint;
use crate::linear::Linear;
use crate::norm::RmsNorm;
use crate::rope::Rope;
use crate::sequence::{CHUNK_TOKENS, LogitsOut};
use crate::v4::attention::Chunk;
use crate::v4::cache::LayerCache;
use crate::v4::config::V4Config;
use crate::v4::hyper::{HyperHead, Streams};
use crate::v4::{Layer, Passage};
use crate::{DecoderError, Logits, Model, ModelConfig, Result};

/// The weights of a draft block.
pub(crate) struct DraftBlock {
    embedding_norm: RmsNorm,
    embedding_projection: Linear,
    streams_norm: RmsNorm,
    streams_projection: Linear,
    rope: Rope,
    layer: Layer,
    head: HyperHead,
    norm: RmsNorm,
    streams: usize,
    width: usize,
    window: usize,
}

impl DraftBlock {
    /// Takes what lies below `mtp.0.`.
    pub(crate) fn take(checkpoint: &mut Checkpoint, config: &ModelConfig, v4: &V4Config) -> Result<Self> {
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        let rope = Rope::new(&v4.main_rope, v4.qk_rope_head_dim, config.max_position_embeddings);
        Ok(Self {
            embedding_norm: RmsNorm::take(checkpoint, "mtp.0.enorm", hidden, eps)?,
            embedding_projection: Linear::take(checkpoint, "mtp.0.e_proj", hidden, hidden, false)?,
            streams_norm: RmsNorm::take(checkpoint, "mtp.0.hnorm", hidden, eps)?,
            streams_projection: Linear::take(checkpoint, "mtp.0.h_proj", hidden, hidden, false)?,
            rope: rope.map_err(DecoderError::Config)?,
            layer: Layer::take(checkpoint, "mtp.0", (None, false), config, v4)?,
            head: HyperHead::take(checkpoint, "mtp.0.hc_head", Streams::of(config, v4))?,
            norm: RmsNorm::take(checkpoint, "mtp.0.norm", hidden, eps)?,
            streams: v4.hc_mult,
            width: v4.head_dim,
            window: v4.sliding_window,
        })
    }

    pub(crate) fn parameters(&self) -> usize {
        self.embedding_norm.parameters()
            + self.embedding_projection.parameters()
            + self.streams_norm.parameters()
            + self.streams_projection.parameters()
            + self.layer.parameters()
            + self.head.parameters()
            + self.norm.parameters()
    }

    /// The block's output of one chunk, normed, `[tokens, hidden]`. `embedded` are the embeddings of the next tokens,
    /// `[tokens, hidden]`, `streams` the residual, `[tokens, streams, hidden]`.
    fn forward(
        &self,
        embedded: &[f32],
        streams: &[f32],
        passage: &Passage<'_>,
        cache: &mut LayerCache,
    ) -> Result<Vec<f32>> {
        let hidden = embedded.len() / passage.tokens.len();
        let embedded = self.embedding_projection.apply(&self.embedding_norm.apply(embedded));
        let mut x = self.streams_projection.apply(&self.streams_norm.apply(streams));
        for (x, embedded) in x.chunks_exact_mut(self.streams * hidden).zip(embedded.chunks_exact(hidden)) {
            for x in x.chunks_exact_mut(hidden) {
                x.iter_mut().zip(embedded).for_each(|(x, embedded)| *x += embedded);
            }
        }
        let angles = self.rope.angles(passage.first, passage.tokens.len());
        let chunk = Chunk::new(passage, &self.rope, &angles);
        self.layer.forward(&mut x, passage.tokens, chunk, cache, 0, None)?;
        Ok(self.norm.apply(&self.head.apply(&x)))
    }
}

/// The residual after the last layer, of a run of a sequence's tokens: what a draft starts from.
#[derive(Clone, Debug, PartialEq)]
pub struct Residual {
    /// Position of the first token.
    pub(crate) first: usize,
    /// `[tokens, streams, hidden]`.
    pub(crate) values: Vec<f32>,
}

impl Residual {
    /// Position of the first token.
    pub fn first(&self) -> usize {
        self.first
    }

    /// Forgets the last token.
    pub fn pop(&mut self, model: &Model) {
        let tokens = self.tokens(model);
        self.values.truncate(self.values.len() / tokens.max(1) * tokens.saturating_sub(1));
    }

    /// Rows, one per token.
    pub fn tokens(&self, model: &Model) -> usize {
        let streams = model.draft.as_ref().map_or(1, |block| block.streams);
        self.values.len() / (streams * model.config.hidden_size)
    }
}

/// What a draft block keeps of one sequence: the last rows of its window.
pub struct Draft {
    cache: LayerCache,
    model: [u8; 32],
}

impl Draft {
    /// A draft that has seen nothing yet.
    pub fn new(model: &Model) -> Result<Self> {
        let block = model.draft.as_ref().ok_or(DecoderError::NoDraft)?;
        Ok(Self { cache: LayerCache::window_only(block.width), model: model.fingerprint() })
    }

    /// Tokens of the sequence that the draft has gone past, or 0 if none.
    pub fn tokens(&self) -> usize {
        self.cache.window.end()
    }

    /// Logits of the token after the next one, for the rows of `residual` that are asked for: those of tokens `residual.first()`
    /// on, with `next` the token that came, or was drawn, after each. A row stands at the position of its residual. Where the
    /// draft does not continue at that position (it is new, or the sequence was cut or restored), it begins anew there. Neither
    /// chunks nor threads change a bit.
    pub fn guess(
        &mut self,
        model: &Model,
        residual: &Residual,
        next: &[TokenId],
        want: Logits,
    ) -> Result<LogitsOut> {
        let block = model.draft.as_ref().ok_or(DecoderError::NoDraft)?;
        if self.model != model.fingerprint() {
            return Err(DecoderError::OtherModel);
        }
        let expected = residual.tokens(model);
        if next.is_empty() || next.len() != expected {
            return Err(DecoderError::DraftTokens { expected, got: next.len() });
        }
        let rows: Vec<usize> = next.iter().map(|&token| model.check_token(token)).collect::<Result<_>>()?;
        self.cut(residual.first);
        let wide = residual.values.len() / rows.len();
        let (mut values, mut done) = (Vec::new(), 0);
        for (tokens, streams) in rows.chunks(CHUNK_TOKENS).zip(residual.values.chunks(CHUNK_TOKENS * wide)) {
            let passage = Passage { tokens, first: self.tokens(), model };
            let out = block.forward(&model.embed(tokens), streams, &passage, &mut self.cache)?;
            done += tokens.len();
            // A row of logits is as wide as the vocabulary: none is made that nobody looks at.
            let wanted = want.of_chunk(&out, model.config.hidden_size, done == rows.len());
            if !wanted.is_empty() {
                values.extend(model.head.apply(wanted));
            }
            // A cut goes back by some guessed tokens; twice the window leaves whole windows for as many.
            self.cache.window.drop_before(self.tokens().saturating_sub(2 * block.window));
        }
        Ok(LogitsOut::new(model.config.vocab_size, values))
    }

    /// Forgets what lies from position `first` on, and everything if the draft does not reach to it.
    fn cut(&mut self, first: usize) {
        let window = &mut self.cache.window;
        if (window.first()..=window.end()).contains(&first) {
            window.truncate(first);
        } else {
            window.restart(first, &[]);
        }
    }
}

impl Model {
    /// Whether the draft block was loaded.
    pub fn has_draft(&self) -> bool {
        self.draft.is_some()
    }
}
