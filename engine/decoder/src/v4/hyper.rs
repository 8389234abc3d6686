//! Manifold-constrained hyper-connections (arXiv 2512.24880): a residual of several streams.
//!
//! Before a sublayer the streams are summed with weights `pre`; after it they are mixed by a doubly stochastic
//! matrix and its output is added to each with weights `post`. All weights come from the streams themselves. Sums
//! over streams run in ascending order.

use rayon::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::kernel::vector::{exp, sum_squares};
use crate::linear::Linear;
use crate::v4::config::V4Config;
use crate::{ModelConfig, Result};

/// Tokens that one task mixes.
const TILE_TOKENS: usize = 16;

/// Dimensions of the residual and its constants.
#[derive(Clone, Copy)]
pub(super) struct Streams {
    pub(super) count: usize,
    pub(super) hidden: usize,
    pub(super) sinkhorn_iters: usize,
    pub(super) hc_eps: f32,
    pub(super) rms_eps: f32,
}

/// The connections around one sublayer.
pub(super) struct HyperConnection {
    function: Linear,
    base: Vec<f32>,
    scale: Vec<f32>,
    streams: Streams,
}

/// How a sublayer's output joins the streams, per token.
pub(super) struct Mixing {
    /// `[tokens, streams]`.
    post: Vec<f32>,
    /// `[tokens, from stream, to stream]`.
    matrix: Vec<f32>,
}

impl Mixing {
    /// Leaves out the first `count` of `tokens` tokens.
    pub(super) fn skip(&mut self, count: usize, tokens: usize) {
        self.post.drain(..self.post.len() / tokens * count);
        self.matrix.drain(..self.matrix.len() / tokens * count);
    }
}

impl HyperConnection {
    /// Takes `{name}_fn`, `{name}_base` and `{name}_scale`.
    pub(super) fn take(checkpoint: &mut Checkpoint, name: &str, streams: Streams) -> Result<Self> {
        let (count, mixes) = (streams.count, (2 + streams.count) * streams.count);
        Ok(Self {
            function: take_function(checkpoint, name, mixes, count * streams.hidden)?,
            base: checkpoint.take(&format!("{name}_base"), &[mixes])?,
            scale: checkpoint.take(&format!("{name}_scale"), &[3])?,
            streams,
        })
    }

    pub(super) fn parameters(&self) -> usize {
        self.function.parameters() + self.base.len() + self.scale.len()
    }

    /// The sublayer's input, `[tokens, hidden]`, and how its output is to join. `x` is `[tokens, streams, hidden]`.
    pub(super) fn enter(&self, x: &[f32]) -> (Vec<f32>, Mixing) {
        let Streams { count, hidden, hc_eps, .. } = self.streams;
        let mixes = (2 + count) * count;
        let mut raw = self.function.apply(&self.streams.norm(x));
        let tokens = raw.len() / mixes;
        let mut input = vec![0.0; tokens * hidden];
        let mut mixing =
            Mixing { post: vec![0.0; tokens * count], matrix: vec![0.0; tokens * count * count] };
        raw.par_chunks_mut(TILE_TOKENS * mixes)
            .zip(x.par_chunks(TILE_TOKENS * count * hidden))
            .zip(input.par_chunks_mut(TILE_TOKENS * hidden))
            .zip(mixing.post.par_chunks_mut(TILE_TOKENS * count))
            .zip(mixing.matrix.par_chunks_mut(TILE_TOKENS * count * count))
            .for_each(|((((raw, x), input), post), matrix)| {
                let tokens = raw
                    .chunks_exact_mut(mixes)
                    .zip(x.chunks_exact(count * hidden))
                    .zip(input.chunks_exact_mut(hidden))
                    .zip(post.chunks_exact_mut(count))
                    .zip(matrix.chunks_exact_mut(count * count));
                for ((((raw, x), input), post), matrix) in tokens {
                    let parts = [0..count, count..2 * count, 2 * count..mixes];
                    for (part, scale) in parts.into_iter().zip(&self.scale) {
                        for (raw, base) in raw[part.clone()].iter_mut().zip(&self.base[part]) {
                            *raw = *raw * scale + base;
                        }
                    }
                    let pre = &mut raw[..count];
                    pre.iter_mut().for_each(|pre| *pre = sigmoid(*pre) + hc_eps);
                    self.streams.sum(x, pre, input);
                    for (post, raw) in post.iter_mut().zip(&raw[count..]) {
                        *post = 2.0 * sigmoid(*raw);
                    }
                    matrix.copy_from_slice(&raw[2 * count..]);
                    self.streams.sinkhorn(matrix);
                }
            });
        (input, mixing)
    }

    /// `x'_j = post_j * y + sum_i matrix[i, j] * x_i`, in place. `y` is the sublayer's output, `[tokens, hidden]`.
    pub(super) fn leave(&self, x: &mut [f32], y: &[f32], mixing: &Mixing) {
        let Streams { count, hidden, .. } = self.streams;
        x.par_chunks_mut(count * hidden)
            .zip(y.par_chunks(hidden))
            .zip(mixing.post.par_chunks(count))
            .zip(mixing.matrix.par_chunks(count * count))
            .with_min_len(TILE_TOKENS)
            .for_each_init(Vec::new, |old, (((x, y), post), matrix)| {
                old.clear();
                old.extend_from_slice(x);
                for (to, (x, post)) in x.chunks_exact_mut(hidden).zip(post).enumerate() {
                    x.iter_mut().zip(y).for_each(|(x, y)| *x = post * y);
                    for (from, old) in old.chunks_exact(hidden).enumerate() {
                        let weight = matrix[from * count + to];
                        x.iter_mut().zip(old).for_each(|(x, old)| *x += weight * old);
                    }
                }
            });
    }
}

/// Sums the streams after the last layer.
pub(super) struct HyperHead {
    function: Linear,
    base: Vec<f32>,
    scale: Vec<f32>,
    streams: Streams,
}

impl HyperHead {
    pub(super) fn take(checkpoint: &mut Checkpoint, name: &str, streams: Streams) -> Result<Self> {
        Ok(Self {
            function: take_function(checkpoint, name, streams.count, streams.count * streams.hidden)?,
            base: checkpoint.take(&format!("{name}_base"), &[streams.count])?,
            scale: checkpoint.take(&format!("{name}_scale"), &[1])?,
            streams,
        })
    }

    pub(super) fn parameters(&self) -> usize {
        self.function.parameters() + self.base.len() + self.scale.len()
    }

    /// `[tokens, streams, hidden]` to `[tokens, hidden]`.
    pub(super) fn apply(&self, x: &[f32]) -> Vec<f32> {
        let Streams { count, hidden, hc_eps, .. } = self.streams;
        let mut weights = self.function.apply(&self.streams.norm(x));
        let mut out = vec![0.0; x.len() / count];
        let tokens = out.chunks_exact_mut(hidden).zip(x.chunks_exact(count * hidden));
        for ((out, x), weights) in tokens.zip(weights.chunks_exact_mut(count)) {
            for (weight, base) in weights.iter_mut().zip(&self.base) {
                *weight = sigmoid(*weight * self.scale[0] + base) + hc_eps;
            }
            self.streams.sum(x, weights, out);
        }
        out
    }
}

impl Streams {
    pub(super) fn of(config: &ModelConfig, v4: &V4Config) -> Self {
        Self {
            count: v4.hc_mult,
            hidden: config.hidden_size,
            sinkhorn_iters: v4.hc_sinkhorn_iters,
            hc_eps: v4.hc_eps,
            rms_eps: config.rms_norm_eps,
        }
    }

    /// Root-mean-square norm over all streams of a token, without a weight.
    fn norm(&self, x: &[f32]) -> Vec<f32> {
        let width = self.count * self.hidden;
        let mut out = vec![0.0; x.len()];
        out.par_chunks_mut(width).zip(x.par_chunks(width)).with_min_len(TILE_TOKENS).for_each(|(out, x)| {
            let inverse = 1.0 / (sum_squares(x) / width as f32 + self.rms_eps).sqrt();
            out.iter_mut().zip(x).for_each(|(out, x)| *out = x * inverse);
        });
        out
    }

    /// `out = sum_i weights_i x_i`, out zero before.
    fn sum(&self, x: &[f32], weights: &[f32], out: &mut [f32]) {
        for (x, weight) in x.chunks_exact(self.hidden).zip(weights) {
            out.iter_mut().zip(x).for_each(|(out, x)| *out += weight * x);
        }
    }

    /// Softmax over the last index, then columns and rows divided by their sums in turn, columns first and last.
    fn sinkhorn(&self, matrix: &mut [f32]) {
        let (count, eps) = (self.count, self.hc_eps);
        for row in matrix.chunks_exact_mut(count) {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter_mut().for_each(|value| *value = exp(*value - max));
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|value| *value = *value / sum + eps);
        }
        for round in 0..self.sinkhorn_iters {
            if round > 0 {
                for row in matrix.chunks_exact_mut(count) {
                    let sum: f32 = row.iter().sum();
                    row.iter_mut().for_each(|value| *value /= sum + eps);
                }
            }
            for column in 0..count {
                let sum: f32 = matrix[column..].iter().step_by(count).sum();
                matrix[column..].iter_mut().step_by(count).for_each(|value| *value /= sum + eps);
            }
        }
    }
}

fn take_function(checkpoint: &mut Checkpoint, name: &str, outputs: usize, inputs: usize) -> Result<Linear> {
    let rows = checkpoint.take(&format!("{name}_fn"), &[outputs, inputs])?;
    Ok(Linear::from_rows(&rows, outputs, inputs))
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}
