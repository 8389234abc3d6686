//! A model: its configuration and its weights, immutable and shared by all sequences.

use blake3::Hasher;
use bytes::Bytes;
use esker_prefix::{KvLayout, TokenId};

use crate::checkpoint::Checkpoint;
use crate::config::{Family, eos_token_ids};
use crate::linear::Linear;
use crate::norm::RmsNorm;
use crate::row_codec::RowFormats;
use crate::v4::draft::DraftBlock;
use crate::{DecoderError, KvFormat, ModelConfig, Result};
use crate::{kernel, v4, v32};

/// Raised with every change of this crate that changes a bit of any row: kernels, order of sums, rounding,
/// tie-break. It is part of the fingerprint, so rows of different arithmetic never share a namespace.
const NUMERICS_VERSION: u32 = 1;
const FINGERPRINT_CONTEXT: &str = "esker 2026-11 decoder fingerprint v1";

/// A loaded model.
pub struct Model {
    pub(crate) config: ModelConfig,
    format: KvFormat,
    pub(crate) formats: RowFormats,
    /// `[vocab, hidden]`.
    pub(crate) embedding: Vec<f32>,
    pub(crate) layers: Layers,
    pub(crate) norm: RmsNorm,
    pub(crate) head: Linear,
    pub(crate) draft: Option<DraftBlock>,
    layout: KvLayout,
    fingerprint: [u8; 32],
}

/// The layers, by family.
pub(crate) enum Layers {
    Mla(v32::Layers),
    V4(v4::Layers),
}

impl Model {
    /// Its configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The layout of its blocks.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// The number format of its rows.
    pub fn kv_format(&self) -> KvFormat {
        self.format
    }

    /// Everything besides tokens that decides the bytes of a row: configuration text, weights, row format, and this
    /// crate's arithmetic on this machine. Two models with one fingerprint may share blocks.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// Tokens that [`Sequence::replay`](crate::Sequence::replay) computes to rebuild the state after `tokens` tokens:
    /// up to `layers * (sliding_window - 1) + 1`, and never more than `tokens`. None for a model without state groups.
    pub fn replay_tokens(&self, tokens: usize) -> usize {
        match &self.config.family {
            Family::Mla(_) => 0,
            Family::V4(v4) => tokens - v4.replay_plan(tokens)[0],
        }
    }

    /// What [`Sequence::replay`](crate::Sequence::replay) costs after `tokens` tokens, in tokens of a prefill: layers drop out one
    /// window after the other, so that it is about half of the tokens that it computes.
    pub fn replay_cost(&self, tokens: usize) -> usize {
        match &self.config.family {
            Family::Mla(_) => 0,
            Family::V4(v4) => {
                let of_layers = v4.replay_plan(tokens).into_iter().map(|first| tokens - first);
                of_layers.sum::<usize>().div_ceil(self.config.num_hidden_layers)
            }
        }
    }

    /// Weights and biases.
    pub fn parameters(&self) -> usize {
        let layers = match &self.layers {
            Layers::Mla(layers) => layers.parameters(),
            Layers::V4(layers) => layers.parameters(),
        };
        let draft = self.draft.as_ref().map_or(0, DraftBlock::parameters);
        self.embedding.len() + layers + self.norm.parameters() + self.head.parameters() + draft
    }

    /// Memory that the weights take: four bytes each, whatever the checkpoint's format.
    pub fn memory_bytes(&self) -> usize {
        self.parameters() * size_of::<f32>()
    }

    /// Embeddings, `[tokens, hidden]`, of tokens of the vocabulary.
    pub(crate) fn embed(&self, tokens: &[usize]) -> Vec<f32> {
        let hidden = self.config.hidden_size;
        let mut x = Vec::with_capacity(tokens.len() * hidden);
        for &token in tokens {
            x.extend_from_slice(&self.embedding[token * hidden..][..hidden]);
        }
        x
    }

    pub(crate) fn check_token(&self, token: TokenId) -> Result<usize> {
        let vocab_size = self.config.vocab_size;
        match usize::try_from(token.0) {
            Ok(row) if row < vocab_size => Ok(row),
            _ => Err(DecoderError::UnknownToken { token, vocab_size }),
        }
    }
}

/// Assembles a model from the bytes of its files. The caller reads (or maps) them:
///
/// ```no_run
/// # use esker_decoder::*;
/// # fn load(config: &str, shard: bytes::Bytes) -> Result<Model> {
/// let mut builder = ModelBuilder::new(config, KvFormat::Bf16, 128)?;
/// builder.shard("model.safetensors", shard)?;
/// builder.finish()
/// # }
/// ```
pub struct ModelBuilder {
    text: String,
    config: ModelConfig,
    format: KvFormat,
    layout: KvLayout,
    checkpoint: Checkpoint,
    draft: bool,
    draft_if_present: bool,
    digests: Vec<(String, blake3::Hash)>,
}

impl ModelBuilder {
    /// Starts from the text of `config.json`. `block_tokens` is a power of two.
    pub fn new(config_json: &str, format: KvFormat, block_tokens: u32) -> Result<Self> {
        let config = ModelConfig::from_json(config_json)?;
        let layout = config.layout(config_json, format, block_tokens)?;
        Ok(Self {
            text: config_json.to_owned(),
            checkpoint: Checkpoint::new(config.weight_block),
            config,
            format,
            layout,
            draft: false,
            draft_if_present: false,
            digests: Vec::new(),
        })
    }

    /// Takes the end-of-sequence tokens from the text of `generation_config.json`, if it names any.
    pub fn generation_config(&mut self, json: &str) -> Result<()> {
        if let Some(tokens) = eos_token_ids(json)? {
            self.config.eos_token_ids = tokens;
        }
        Ok(())
    }

    /// Also loads the draft block, which a checkpoint of V4 may hold below `mtp.0.`. It shares nothing with the rows of a
    /// sequence, so the fingerprint does not depend on it.
    pub fn draft(&mut self) {
        self.draft = true;
    }

    /// As [`ModelBuilder::draft`], if the checkpoint holds one.
    pub fn draft_if_present(&mut self) {
        self.draft_if_present = true;
    }

    /// Adds one safetensors file, in any order. Its bytes are held, not copied, until [`ModelBuilder::finish`].
    pub fn shard(&mut self, name: &str, bytes: impl Into<Bytes>) -> Result<()> {
        let bytes = bytes.into();
        self.checkpoint.add(name, &bytes)?;
        self.digests.push((name.to_owned(), blake3::hash(&bytes)));
        Ok(())
    }

    /// Takes the tensors that the configuration calls for, as F32.
    pub fn finish(mut self) -> Result<Model> {
        let fingerprint = self.fingerprint();
        let Self { config, mut checkpoint, .. } = self;
        let [embedding, norm, head] = match &config.family {
            Family::Mla(_) => ["model.embed_tokens.weight", "model.norm", "lm_head"],
            Family::V4(_) => ["embed.weight", "norm", "head"],
        };
        if let Family::V4(v4) = &config.family {
            v4::names::publish(&mut checkpoint, config.num_hidden_layers, v4)?;
        }
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embedding = checkpoint.take(embedding, &[vocab, hidden])?;
        let layers = match &config.family {
            Family::Mla(mla) => Layers::Mla(v32::Layers::take(&mut checkpoint, &config, mla)?),
            Family::V4(v4) => Layers::V4(v4::Layers::take(&mut checkpoint, &config, v4)?),
        };
        let norm = RmsNorm::take(&mut checkpoint, norm, hidden, config.rms_norm_eps)?;
        let head = match config.tie_word_embeddings {
            true => Linear::from_rows(&embedding, vocab, hidden),
            false => Linear::take(&mut checkpoint, head, vocab, hidden, false)?,
        };
        let wanted = self.draft || (self.draft_if_present && checkpoint.has("mtp.0.e_proj.weight"));
        let draft = match (&config.family, wanted) {
            (_, false) => None,
            (Family::Mla(_), true) if !self.draft => None,
            (Family::V4(v4), true) => Some(DraftBlock::take(&mut checkpoint, &config, v4)?),
            (Family::Mla(_), true) => return Err(DecoderError::NoDraft),
        };
        Ok(Model {
            formats: RowFormats::of(self.layout.groups()).map_err(DecoderError::Config)?,
            config,
            format: self.format,
            embedding,
            layers,
            norm,
            head,
            draft,
            layout: self.layout,
            fingerprint,
        })
    }

    fn fingerprint(&mut self) -> [u8; 32] {
        let mut hasher = Hasher::new_derive_key(FINGERPRINT_CONTEXT);
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        };
        part(&NUMERICS_VERSION.to_le_bytes());
        part(kernel::numerics_class().as_bytes());
        part(format!("{:?}", self.format).as_bytes());
        part(self.text.as_bytes());
        self.digests.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, digest) in &self.digests {
            part(name.as_bytes());
            part(digest.as_bytes());
        }
        *hasher.finalize().as_bytes()
    }
}
