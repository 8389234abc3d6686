//! DeepSeek V4: windows and compressed rows instead of a row per token, a residual of several streams, and experts
//! that the first layers choose by a table.
//!
//! What grows with a sequence is compressed rows, which blocks hold; what continues it is a state of fixed size, the
//! windows and the overlap of the compressors, which state objects hold. Both are values like the blocks of V3.2.

mod attention;
pub(crate) mod cache;
mod compressor;
pub(crate) mod config;
mod hyper;
mod indexer;
mod moe;
mod tail;

use crate::checkpoint::Checkpoint;
use crate::norm::RmsNorm;
use crate::rope::{Angles, Rope};
use crate::{DecoderError, KvFormat, ModelConfig, Result, StateField};
use attention::{Attention, Chunk};
use cache::Cache;
use config::V4Config;
use hyper::{HyperConnection, HyperHead, Streams};
use moe::Moe;

/// The layers of a model.
pub(crate) struct Layers {
    main_rope: Rope,
    compress_rope: Rope,
    layers: Vec<Layer>,
    head: HyperHead,
    streams: usize,
}

/// One layer: attention, then experts, each inside a hyper-connection.
struct Layer {
    around_attention: HyperConnection,
    attention_norm: RmsNorm,
    attention: Attention,
    around_experts: HyperConnection,
    experts_norm: RmsNorm,
    experts: Moe,
    compressed: bool,
}

impl Layers {
    pub(crate) fn take(checkpoint: &mut Checkpoint, config: &ModelConfig, v4: &V4Config) -> Result<Self> {
        let rope = |rope| {
            Rope::new(rope, v4.qk_rope_head_dim, config.max_position_embeddings).map_err(DecoderError::Config)
        };
        let streams = Streams {
            count: v4.hc_mult,
            hidden: config.hidden_size,
            sinkhorn_iters: v4.hc_sinkhorn_iters,
            hc_eps: v4.hc_eps,
            rms_eps: config.rms_norm_eps,
        };
        let mut layers = Vec::new();
        for index in 0..config.num_hidden_layers {
            layers.push(Layer::take(checkpoint, index, config, v4, streams)?);
        }
        Ok(Self {
            main_rope: rope(&v4.main_rope)?,
            compress_rope: rope(&v4.compress_rope)?,
            layers,
            head: HyperHead::take(checkpoint, "hc_head", streams)?,
            streams: v4.hc_mult,
        })
    }

    pub(crate) fn parameters(&self) -> usize {
        self.layers.iter().map(Layer::parameters).sum::<usize>() + self.head.parameters()
    }

    /// Takes one chunk, which starts at position `first`, through all layers. `embedded` and the result are
    /// `[tokens, hidden]`, `tokens` the ids; selections go to `recorded` by layer.
    pub(crate) fn forward(
        &self,
        embedded: &[f32],
        tokens: &[usize],
        first: usize,
        format: KvFormat,
        cache: &mut Cache,
        recorded: Option<&mut Vec<Vec<Vec<u32>>>>,
    ) -> Vec<f32> {
        let [main, compress]: [Angles; 2] =
            [&self.main_rope, &self.compress_rope].map(|rope| rope.angles(first, tokens.len()));
        let mut x: Vec<f32> = Vec::with_capacity(embedded.len() * self.streams);
        for row in embedded.chunks_exact(embedded.len() / tokens.len()) {
            (0..self.streams).for_each(|_| x.extend_from_slice(row));
        }
        let mut recorded = recorded;
        for (index, layer) in self.layers.iter().enumerate() {
            let (rope, angles) = match layer.compressed {
                true => (&self.compress_rope, &compress),
                false => (&self.main_rope, &main),
            };
            let chunk = Chunk { first, rope, angles, format };
            let (input, mixing) = layer.around_attention.enter(&x);
            let normed = layer.attention_norm.apply(&input);
            let (attended, selection) = layer.attention.forward(&normed, &chunk, &mut cache.layers[index]);
            layer.around_attention.leave(&mut x, &attended, &mixing);
            let (input, mixing) = layer.around_experts.enter(&x);
            let transformed = layer.experts.forward(&layer.experts_norm.apply(&input), tokens);
            layer.around_experts.leave(&mut x, &transformed, &mixing);
            if let (Some(recorded), Some(selection)) = (&mut recorded, selection) {
                recorded[index].extend(selection);
            }
        }
        cache.trim(first + tokens.len());
        self.head.apply(&x)
    }

    /// A field of a layer's state after `tokens` tokens, which the cache holds.
    pub(crate) fn field(&self, cache: &Cache, layer: usize, field: StateField, tokens: usize) -> Vec<f32> {
        let attention = &self.layers[layer].attention;
        let ape = |which: usize, position: usize| {
            let compressor = match which {
                0 => attention.compressor.as_ref(),
                _ => attention.indexer.as_ref().map(|indexer| &indexer.compressor),
            };
            compressor.map_or(&[][..], |compressor| compressor.ape(position))
        };
        cache.field(layer, field, tokens, ape)
    }
}

impl Layer {
    fn take(
        checkpoint: &mut Checkpoint,
        index: usize,
        config: &ModelConfig,
        v4: &V4Config,
        streams: Streams,
    ) -> Result<Self> {
        let name = format!("layers.{index}");
        let (hidden, vocab, eps) = (config.hidden_size, config.vocab_size, config.rms_norm_eps);
        let (hash, sizes) = (v4.is_hash[index], [hidden, vocab]);
        Ok(Self {
            around_attention: HyperConnection::take(checkpoint, &format!("{name}.hc_attn"), streams)?,
            attention_norm: RmsNorm::take(checkpoint, &format!("{name}.attn_norm"), hidden, eps)?,
            attention: Attention::take(checkpoint, &format!("{name}.attn"), index, config, v4)?,
            around_experts: HyperConnection::take(checkpoint, &format!("{name}.hc_ffn"), streams)?,
            experts_norm: RmsNorm::take(checkpoint, &format!("{name}.ffn_norm"), hidden, eps)?,
            experts: Moe::take(checkpoint, &format!("{name}.ffn"), sizes, hash, v4)?,
            compressed: v4.compression[index].is_some(),
        })
    }

    fn parameters(&self) -> usize {
        self.around_attention.parameters()
            + self.attention_norm.parameters()
            + self.attention.parameters()
            + self.around_experts.parameters()
            + self.experts_norm.parameters()
            + self.experts.parameters()
    }
}
