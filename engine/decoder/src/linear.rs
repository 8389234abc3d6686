//! Linear maps.

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::kernel::gemm::{View, gemm_parallel};

/// `y = x W^T + b`, with `W` kept as `[inputs, outputs]`: the order in which both kernels read it fastest.
pub(crate) struct Linear {
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    inputs: usize,
    outputs: usize,
}

impl Linear {
    /// Takes `{name}.weight`, published as `[outputs, inputs]`, and its bias where there is one.
    pub(crate) fn take(
        checkpoint: &mut Checkpoint,
        name: &str,
        outputs: usize,
        inputs: usize,
        bias: bool,
    ) -> Result<Self> {
        let weight = checkpoint.take(&format!("{name}.weight"), &[outputs, inputs])?;
        let mut linear = Self::from_rows(&weight, outputs, inputs);
        if bias {
            linear.bias = Some(checkpoint.take(&format!("{name}.bias"), &[outputs])?);
        }
        Ok(linear)
    }

    /// From `[outputs, inputs]`.
    pub(crate) fn from_rows(rows: &[f32], outputs: usize, inputs: usize) -> Self {
        Self { weight: transpose(rows, outputs, inputs), bias: None, inputs, outputs }
    }

    /// Numbers per input row.
    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    /// Numbers per output row.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Weights and biases.
    pub(crate) fn parameters(&self) -> usize {
        self.weight.len() + self.bias.as_ref().map_or(0, Vec::len)
    }

    /// `x` is `[rows, inputs]`; gives `[rows, outputs]`.
    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.inputs;
        let mut y = vec![0.0; rows * self.outputs];
        let weight = View::new(&self.weight, self.inputs, self.outputs, self.outputs);
        gemm_parallel(View::new(x, rows, self.inputs, self.inputs), weight, &mut y);
        if let Some(bias) = &self.bias {
            for row in y.chunks_exact_mut(self.outputs) {
                row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
        y
    }
}

/// `[rows, cols]` to `[cols, rows]`, in tiles so that neither side strides through memory.
pub(crate) fn transpose(matrix: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    const TILE: usize = 32;
    let mut out = vec![0.0; matrix.len()];
    for first_row in (0..rows).step_by(TILE) {
        for first_col in (0..cols).step_by(TILE) {
            for i in first_row..rows.min(first_row + TILE) {
                for j in first_col..cols.min(first_col + TILE) {
                    out[j * rows + i] = matrix[i * cols + j];
                }
            }
        }
    }
    out
}
