//! Normalisation of rows.

use rayon::prelude::*;

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::kernel::vector::{sum, sum_squares};

/// Epsilon of the norms inside the attention (query latent, latent, indexer key), whatever `rms_norm_eps` says.
pub(crate) const LATENT_EPS: f32 = 1e-6;
/// Rows below which a thread is not worth waking.
const ROWS_PER_TASK: usize = 64;

/// Root-mean-square norm with a weight.
pub(crate) struct RmsNorm {
    weight: Vec<f32>,
    eps: f32,
}

impl RmsNorm {
    pub(crate) fn take(checkpoint: &mut Checkpoint, name: &str, width: usize, eps: f32) -> Result<Self> {
        Ok(Self { weight: checkpoint.take(&format!("{name}.weight"), &[width])?, eps })
    }

    pub(crate) fn parameters(&self) -> usize {
        self.weight.len()
    }

    /// `x` is `[rows, width]`.
    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        let width = self.weight.len();
        let mut out = vec![0.0; x.len()];
        out.par_chunks_mut(width)
            .zip(x.par_chunks(width))
            .with_min_len(ROWS_PER_TASK)
            .for_each(|(out, x)| self.row(x, out));
        out
    }

    /// One row.
    pub(crate) fn row(&self, x: &[f32], out: &mut [f32]) {
        let inverse = 1.0 / (sum_squares(x) / x.len() as f32 + self.eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(&self.weight) {
            *out = x * inverse * weight;
        }
    }
}

/// Root-mean-square norm of one row without a weight, in place.
pub(crate) fn rms_norm(x: &mut [f32], eps: f32) {
    let inverse = 1.0 / (sum_squares(x) / x.len() as f32 + eps).sqrt();
    x.iter_mut().for_each(|x| *x *= inverse);
}

/// Norm to mean 0 and variance 1, with weight and bias.
pub(crate) struct LayerNorm {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl LayerNorm {
    pub(crate) fn take(checkpoint: &mut Checkpoint, name: &str, width: usize) -> Result<Self> {
        Ok(Self {
            weight: checkpoint.take(&format!("{name}.weight"), &[width])?,
            bias: checkpoint.take(&format!("{name}.bias"), &[width])?,
        })
    }

    pub(crate) fn parameters(&self) -> usize {
        self.weight.len() + self.bias.len()
    }

    /// One row, in place.
    pub(crate) fn row(&self, x: &mut [f32]) {
        let width = x.len() as f32;
        let mean = sum(x) / width;
        x.iter_mut().for_each(|x| *x -= mean);
        let inverse = 1.0 / (sum_squares(x) / width + LATENT_EPS).sqrt();
        for ((x, weight), bias) in x.iter_mut().zip(&self.weight).zip(&self.bias) {
            *x = *x * inverse * weight + bias;
        }
    }
}
