//! DeepSeek V4: windows and compressed rows instead of a row per token, a residual of several streams, and experts
//! that the first layers choose by a table.
//!
//! What grows with a sequence is compressed rows, which blocks hold; what continues it is a state of fixed size, the
//! windows and the overlap of the compressors, which state objects hold. Both are values like the blocks of V3.2.

mod attention;
pub(crate) mod cache;
mod compressor;
pub(crate) mod config;
pub(crate) mod draft;
mod hyper;
mod indexer;
mod moe;
pub(crate) mod names;
mod tail;

use crate::arrival::Supply;
use crate::checkpoint::Checkpoint;
use crate::norm::RmsNorm;
use crate::rope::{Angles, Rope};
use crate::{DecoderError, Model, ModelConfig, Result, StateField};
use attention::{Attention, Chunk};
use cache::{Cache, LayerCache};
use config::{Compression, V4Config};
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

/// A run of a sequence's tokens.
pub(crate) struct Passage<'a> {
    /// Their ids.
    pub(crate) tokens: &'a [usize],
    /// Position of the first.
    pub(crate) first: usize,
    /// The model that they go through.
    pub(crate) model: &'a Model,
}

impl Passage<'_> {
    fn end(&self) -> usize {
        self.first + self.tokens.len()
    }
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
        let mut layers = Vec::new();
        for index in 0..config.num_hidden_layers {
            let kind = (v4.compression[index], v4.is_hash[index]);
            layers.push(Layer::take(checkpoint, &format!("layers.{index}"), kind, config, v4)?);
        }
        Ok(Self {
            main_rope: rope(&v4.main_rope)?,
            compress_rope: rope(&v4.compress_rope)?,
            layers,
            head: HyperHead::take(checkpoint, "hc_head", Streams::of(config, v4))?,
            streams: v4.hc_mult,
        })
    }

    pub(crate) fn parameters(&self) -> usize {
        self.layers.iter().map(Layer::parameters).sum::<usize>() + self.head.parameters()
    }

    /// Takes one chunk through all layers. `embedded` and the result are `[tokens, hidden]`; selections go to `recorded`
    /// by layer, the residual to `kept`.
    pub(crate) fn forward(
        &self,
        embedded: &[f32],
        passage: &Passage<'_>,
        cache: &mut Cache,
        supply: &mut Supply,
        recorded: Option<&mut Vec<Vec<Vec<u32>>>>,
        kept: Option<&mut Vec<f32>>,
    ) -> Result<Vec<f32>> {
        let x = self.run(embedded, passage, cache, &[], supply, recorded)?;
        cache.trim(passage.end());
        if let Some(kept) = kept {
            kept.extend_from_slice(&x);
        }
        Ok(self.head.apply(&x))
    }

    /// Takes one chunk of tokens whose compressed rows the cache holds through the layers, as far as `plan` wants it, to
    /// rebuild windows and inputs of the compressors.
    pub(crate) fn replay(
        &self,
        embedded: &[f32],
        passage: &Passage<'_>,
        cache: &mut Cache,
        plan: &[usize],
        supply: &mut Supply,
    ) -> Result<()> {
        self.run(embedded, passage, cache, plan, supply, None)?;
        cache.drop_windows(passage.end());
        Ok(())
    }

    /// The streams of a chunk after all layers. Layer `l` is wanted from position `wanted[l]` on only, if that is given.
    fn run(
        &self,
        embedded: &[f32],
        passage: &Passage<'_>,
        cache: &mut Cache,
        wanted: &[usize],
        supply: &mut Supply,
        mut recorded: Option<&mut Vec<Vec<Vec<u32>>>>,
    ) -> Result<Vec<f32>> {
        let tokens = passage.tokens;
        let [main, compress]: [Angles; 2] =
            [&self.main_rope, &self.compress_rope].map(|rope| rope.angles(passage.first, tokens.len()));
        let mut x: Vec<f32> = Vec::with_capacity(embedded.len() * self.streams);
        for row in embedded.chunks_exact(embedded.len() / tokens.len()) {
            (0..self.streams).for_each(|_| x.extend_from_slice(row));
        }
        let mut skipped = 0;
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some(keys) = supply.keys(index)? {
                cache.layers[index].admit_keys(keys);
            }
            let (rope, angles) = match layer.compressed {
                true => (&self.compress_rope, &compress),
                false => (&self.main_rope, &main),
            };
            let mut chunk = Chunk::new(passage, rope, angles);
            if skipped > 0 {
                chunk.skip(skipped, tokens.len());
            }
            let skip = wanted.get(index + 1).map_or(0, |&wanted| wanted.saturating_sub(chunk.first));
            let tokens = &tokens[skipped..];
            let skip = skip.min(tokens.len());
            let supply = Some((passage.model, index, &mut *supply));
            let selection = layer.forward(&mut x, tokens, chunk, &mut cache.layers[index], skip, supply)?;
            if let (Some(recorded), Some(selection)) = (&mut recorded, selection) {
                recorded[index].extend(selection);
            }
            skipped += skip;
            if x.is_empty() {
                break;
            }
        }
        Ok(x)
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
        name: &str,
        (compression, hash): (Option<Compression>, bool),
        config: &ModelConfig,
        v4: &V4Config,
    ) -> Result<Self> {
        let streams = Streams::of(config, v4);
        let (hidden, vocab, eps) = (config.hidden_size, config.vocab_size, config.rms_norm_eps);
        let sizes = [hidden, vocab];
        Ok(Self {
            around_attention: HyperConnection::take(checkpoint, &format!("{name}.hc_attn"), streams)?,
            attention_norm: RmsNorm::take(checkpoint, &format!("{name}.attn_norm"), hidden, eps)?,
            attention: Attention::take(checkpoint, &format!("{name}.attn"), compression, config, v4)?,
            around_experts: HyperConnection::take(checkpoint, &format!("{name}.hc_ffn"), streams)?,
            experts_norm: RmsNorm::take(checkpoint, &format!("{name}.ffn_norm"), hidden, eps)?,
            experts: Moe::take(checkpoint, &format!("{name}.ffn"), sizes, hash, v4)?,
            compressed: compression.is_some(),
        })
    }

    /// Takes a chunk through the layer. The cache gets all of its rows; the output of the first `skip` tokens is not
    /// wanted: `x` is without them after. With them comes what the indexer selected, if there is one.
    fn forward(
        &self,
        x: &mut Vec<f32>,
        tokens: &[usize],
        mut chunk: Chunk<'_>,
        cache: &mut LayerCache,
        skip: usize,
        supply: Option<(&Model, usize, &mut Supply)>,
    ) -> Result<Option<Vec<Vec<u32>>>> {
        let (input, mut mixing) = self.around_attention.enter(x);
        let mut normed = self.attention_norm.apply(&input);
        self.attention.append(&normed, &chunk, cache);
        if skip > 0 {
            x.drain(..x.len() / tokens.len() * skip);
            normed.drain(..normed.len() / tokens.len() * skip);
            mixing.skip(skip, tokens.len());
            chunk.skip(skip, tokens.len());
        }
        if x.is_empty() {
            return Ok(None);
        }
        let (attended, selection) = self.attention.forward(&normed, &chunk, cache, supply)?;
        self.around_attention.leave(x, &attended, &mixing);
        let (input, mixing) = self.around_experts.enter(x);
        let transformed = self.experts.forward(&self.experts_norm.apply(&input), &tokens[skip..]);
        self.around_experts.leave(x, &transformed, &mixing);
        Ok(selection)
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
