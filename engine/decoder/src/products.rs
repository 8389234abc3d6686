//! The dense products of a prefill alone, and what the machine could do at most: what `esker bench decoder` compares.

use rayon::prelude::*;

use crate::config::Family;
use crate::kernel::peak;
use crate::linear::Linear;
use crate::sequence::CHUNK_TOKENS;
use crate::{DecoderError, ModelConfig, Result};

/// The dense products that one chunk of a prefill asks of a model's layers, on random weights: the same maps in the same
/// division as [`Sequence::prefill`](crate::Sequence::prefill) applies them.
pub struct DenseProducts {
    products: Vec<Product>,
}

/// Maps that are applied side by side, each to its own rows.
struct Product {
    maps: Vec<Linear>,
    x: Vec<f32>,
    /// Layers that apply them.
    times: u64,
}

impl DenseProducts {
    /// Those of a V4 model's layers. Maps of equal shape share their weights from layer to layer, so it takes less memory
    /// than the model.
    pub fn random(config: &ModelConfig) -> Result<Self> {
        let Family::V4(v4) = &config.family else {
            return Err(DecoderError::Config("dense products are counted for deepseek_v4 only".into()));
        };
        let mut products = Vec::new();
        let mut add = |[inputs, outputs]: [usize; 2], maps: usize, rows: usize, times: usize| {
            if times > 0 && rows > 0 {
                let seed = products.len() as u64;
                products.push(Product::random([inputs, outputs], maps, rows, times as u64, seed));
            }
        };
        let (hidden, heads, tokens) = (config.hidden_size, config.num_attention_heads, CHUNK_TOKENS);
        let (width, latent, layers) = (v4.head_dim, config.q_lora_rank, config.num_hidden_layers);
        let of_kind = |sparse| v4.compression.iter().flatten().filter(|kind| kind.sparse == sparse).count();
        let (sparse, dense) = (of_kind(true), of_kind(false));
        let mixes = (2 + v4.hc_mult) * v4.hc_mult;
        add([v4.hc_mult * hidden, mixes], 1, tokens, 2 * layers);
        add([hidden, latent], 1, tokens, layers);
        add([latent, heads * width], 1, tokens, layers);
        add([hidden, width], 1, tokens, layers);
        add([heads / v4.o_groups * width, v4.o_lora_rank], v4.o_groups, tokens, layers);
        add([v4.o_groups * v4.o_lora_rank, hidden], 1, tokens, layers);
        add([hidden, 4 * width], 1, tokens, sparse);
        add([hidden, 2 * width], 1, tokens, dense);
        add([latent, config.index_n_heads * config.index_head_dim], 1, tokens, sparse);
        add([hidden, config.index_n_heads], 1, tokens, sparse);
        add([hidden, 4 * config.index_head_dim], 1, tokens, sparse);
        let (experts, inner) = (v4.n_routed_experts, v4.moe_intermediate_size);
        let of_expert = tokens * v4.num_experts_per_tok / experts;
        add([hidden, experts], 1, tokens, layers);
        add([hidden, 2 * inner], experts, of_expert, layers);
        add([inner, hidden], experts, of_expert, layers);
        add([hidden, 2 * inner], 1, tokens, layers);
        add([inner, hidden], 1, tokens, layers);
        Ok(Self { products })
    }

    /// How many different ones there are.
    pub fn count(&self) -> usize {
        self.products.len()
    }

    /// Computes one of them once. Gives the multiply-adds that it took.
    pub fn run(&self, index: usize) -> u64 {
        let Product { maps, x, .. } = &self.products[index];
        maps.par_iter().for_each(|map| drop(std::hint::black_box(map.apply(x))));
        // A map of `inputs` numbers a row takes each number of `x` once for every output.
        maps.iter().map(|map| (x.len() * map.outputs()) as u64).sum()
    }

    /// How often a chunk needs it: in how many layers.
    pub fn times(&self, index: usize) -> u64 {
        self.products[index].times
    }
}

impl Product {
    fn random([inputs, outputs]: [usize; 2], maps: usize, rows: usize, times: u64, seed: u64) -> Self {
        let mut state = seed;
        let mut numbers = |count: usize| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            };
            (0..count).map(|_| next()).collect()
        };
        let x = numbers(rows * inputs);
        let maps =
            (0..maps).map(|_| Linear::from_rows(&numbers(inputs * outputs), outputs, inputs)).collect();
        Self { maps, x, times }
    }
}

/// Fused multiply-adds in registers on every thread of the current pool, `rounds` of the widest kind that the machine has:
/// nothing dense can be faster. Gives their number.
pub fn busiest(rounds: u32) -> u64 {
    rayon::broadcast(|_| peak::multiply_adds(rounds)).into_iter().sum()
}
