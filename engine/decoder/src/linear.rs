//! Linear maps.

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::kernel::packed::{Packed, Rows};

/// `y = x W^T + b`.
pub(crate) struct Linear {
    weight: Packed,
    bias: Option<Vec<f32>>,
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
        Self { weight: Packed::from_outputs(rows, outputs, inputs), bias: None }
    }

    /// Numbers per input row.
    pub(crate) fn inputs(&self) -> usize {
        self.weight.inputs()
    }

    /// Numbers per output row.
    pub(crate) fn outputs(&self) -> usize {
        self.weight.outputs()
    }

    /// Weights and biases.
    pub(crate) fn parameters(&self) -> usize {
        self.weight.parameters() + self.bias.as_ref().map_or(0, Vec::len)
    }

    /// `x` is `[rows, inputs]`; gives `[rows, outputs]`.
    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        let (inputs, outputs) = (self.inputs(), self.outputs());
        let rows = x.len() / inputs;
        let mut y = self.weight.product(Rows::new(x, rows, inputs));
        if let Some(bias) = &self.bias {
            for row in y.chunks_exact_mut(outputs) {
                row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
        y
    }
}
