//! A model: its configuration and its weights, immutable and shared by all sequences.

use blake3::Hasher;
use bytes::Bytes;
use esker_prefix::{KvLayout, TokenId};

use crate::checkpoint::Checkpoint;
use crate::config::eos_token_ids;
use crate::kernel;
use crate::linear::Linear;
use crate::mla::Mla;
use crate::moe::{Mlp, Moe};
use crate::norm::RmsNorm;
use crate::rope::Rope;
use crate::{DecoderError, KvFormat, ModelConfig, Result};

/// Raised with every change of this crate that changes a bit of any row: kernels, order of sums, rounding,
/// tie-break. It is part of the fingerprint, so rows of different arithmetic never share a namespace.
const NUMERICS_VERSION: u32 = 1;
const FINGERPRINT_CONTEXT: &str = "esker 2026-11 decoder fingerprint v1";

/// A loaded model.
pub struct Model {
    pub(crate) config: ModelConfig,
    pub(crate) format: KvFormat,
    pub(crate) rope: Rope,
    /// `[vocab, hidden]`.
    pub(crate) embedding: Vec<f32>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: RmsNorm,
    pub(crate) head: Linear,
    layout: KvLayout,
    fingerprint: [u8; 32],
}

/// One decoder layer: `x += attention(norm(x)); x += mlp(norm(x))`.
pub(crate) struct Layer {
    pub(crate) input_norm: RmsNorm,
    pub(crate) attention: Mla,
    pub(crate) post_norm: RmsNorm,
    pub(crate) mlp: FeedForward,
}

pub(crate) enum FeedForward {
    Dense(Mlp),
    Sparse(Moe),
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

    /// Weights and biases.
    pub fn parameters(&self) -> usize {
        let layer = |layer: &Layer| {
            let mlp = match &layer.mlp {
                FeedForward::Dense(mlp) => mlp.parameters(),
                FeedForward::Sparse(moe) => moe.parameters(),
            };
            mlp + layer.attention.parameters() + layer.input_norm.parameters() + layer.post_norm.parameters()
        };
        self.embedding.len()
            + self.layers.iter().map(layer).sum::<usize>()
            + self.norm.parameters()
            + self.head.parameters()
    }

    /// Memory that the weights take: four bytes each, whatever the checkpoint's format.
    pub fn memory_bytes(&self) -> usize {
        self.parameters() * size_of::<f32>()
    }

    pub(crate) fn check_token(&self, token: TokenId) -> Result<usize> {
        let vocab_size = self.config.vocab_size;
        match usize::try_from(token.0) {
            Ok(row) if row < vocab_size => Ok(row),
            _ => Err(DecoderError::UnknownToken { token, vocab_size }),
        }
    }
}

impl FeedForward {
    pub(crate) fn forward(&self, x: &[f32]) -> Vec<f32> {
        match self {
            Self::Dense(mlp) => mlp.forward(x),
            Self::Sparse(moe) => moe.forward(x),
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
    rope: Rope,
    checkpoint: Checkpoint,
    digests: Vec<(String, blake3::Hash)>,
}

impl ModelBuilder {
    /// Starts from the text of `config.json`. `block_tokens` is a power of two.
    pub fn new(config_json: &str, format: KvFormat, block_tokens: u32) -> Result<Self> {
        let config = ModelConfig::from_json(config_json)?;
        let layout = config.layout(config_json, format, block_tokens)?;
        Ok(Self {
            text: config_json.to_owned(),
            rope: Rope::new(&config).map_err(DecoderError::Config)?,
            checkpoint: Checkpoint::new(config.weight_block),
            config,
            format,
            layout,
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
        let Self { config, rope, mut checkpoint, .. } = self;
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embedding = checkpoint.take("model.embed_tokens.weight", &[vocab, hidden])?;
        let mut layers = Vec::new();
        for index in 0..config.num_hidden_layers {
            layers.push(Layer::take(&mut checkpoint, index, &config, &rope)?);
        }
        let norm = RmsNorm::take(&mut checkpoint, "model.norm", hidden, config.rms_norm_eps)?;
        let head = match config.tie_word_embeddings {
            true => Linear::from_rows(&embedding, vocab, hidden),
            false => Linear::take(&mut checkpoint, "lm_head", vocab, hidden, false)?,
        };
        Ok(Model {
            config,
            format: self.format,
            rope,
            embedding,
            layers,
            norm,
            head,
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

impl Layer {
    fn take(checkpoint: &mut Checkpoint, index: usize, config: &ModelConfig, rope: &Rope) -> Result<Self> {
        let name = format!("model.layers.{index}");
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        let mlp = match config.moe.as_ref().filter(|_| config.is_sparse[index]) {
            Some(moe) => FeedForward::Sparse(Moe::take(checkpoint, &format!("{name}.mlp"), hidden, moe)?),
            None => {
                let width = config.intermediate_size;
                FeedForward::Dense(Mlp::take(checkpoint, &format!("{name}.mlp"), hidden, width)?)
            }
        };
        let indexed = config.has_indexer[index];
        Ok(Self {
            input_norm: RmsNorm::take(checkpoint, &format!("{name}.input_layernorm"), hidden, eps)?,
            attention: Mla::take(checkpoint, &format!("{name}.self_attn"), config, rope, indexed)?,
            post_norm: RmsNorm::take(checkpoint, &format!("{name}.post_attention_layernorm"), hidden, eps)?,
            mlp,
        })
    }
}
