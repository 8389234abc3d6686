//! Compression of runs of tokens into single rows, and what it needs of the tokens before they are compressed.
//!
//! Every token gives values and gates. A row is, per channel, the values of its run weighted by the softmax of the
//! gates, normed and rotated at the run's first position. In a sparse layer a row also spans the run before: a token's
//! channels are two halves, the second for its own run, the first for the next one.

use std::ops::Range;

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::kernel::shared::gated_sum;
use crate::linear::Linear;
use crate::norm::RmsNorm;
use crate::rope::Rope;
use crate::v4::config::Compression;
use crate::v4::tail::Tail;

/// Compressor of one layer, for its rows or for its indexer's keys.
pub(super) struct Compressor {
    /// Values and gates, one above the other.
    wkv_gate: Linear,
    /// Added to the gate of the token at a place of its run, `[ratio, channels]`.
    ape: Vec<f32>,
    norm: RmsNorm,
    compression: Compression,
    /// Width of a row.
    width: usize,
    /// Rotated channels, the last of a row.
    rope: usize,
}

impl Compressor {
    pub(super) fn take(
        checkpoint: &mut Checkpoint,
        name: &str,
        [hidden, width, rope]: [usize; 3],
        compression: Compression,
        eps: f32,
    ) -> Result<Self> {
        let channels = compression.channels(width);
        let mut rows = checkpoint.take(&format!("{name}.wkv.weight"), &[channels, hidden])?;
        rows.extend(checkpoint.take(&format!("{name}.wgate.weight"), &[channels, hidden])?);
        Ok(Self {
            wkv_gate: Linear::from_rows(&rows, 2 * channels, hidden),
            ape: checkpoint.take(&format!("{name}.ape"), &[compression.ratio, channels])?,
            norm: RmsNorm::take(checkpoint, &format!("{name}.norm"), width, eps)?,
            compression,
            width,
            rope,
        })
    }

    pub(super) fn parameters(&self) -> usize {
        self.wkv_gate.parameters() + self.ape.len() + self.norm.parameters()
    }

    /// Appends to `inputs` what they do not hold yet of a chunk that starts at position `first`.
    pub(super) fn extend(&self, inputs: &mut Tail, x: &[f32], first: usize) {
        let hidden = self.wkv_gate.inputs();
        let skipped = inputs.end().saturating_sub(first);
        if skipped * hidden < x.len() {
            inputs.extend(&self.inputs(&x[skipped * hidden..], first + skipped));
        }
    }

    /// Values and gates of a chunk that starts at position `first`, `[tokens, values | gates]`.
    fn inputs(&self, x: &[f32], first: usize) -> Vec<f32> {
        let channels = self.compression.channels(self.width);
        let mut inputs = self.wkv_gate.apply(x);
        for (position, row) in (first..).zip(inputs.chunks_exact_mut(2 * channels)) {
            let ape = &self.ape[position % self.compression.ratio * channels..][..channels];
            row[channels..].iter_mut().zip(ape).for_each(|(gate, ape)| *gate += ape);
        }
        inputs
    }

    /// What [`Compressor::inputs`] added to the gates of the token at `position`.
    pub(super) fn ape(&self, position: usize) -> &[f32] {
        let channels = self.compression.channels(self.width);
        &self.ape[position % self.compression.ratio * channels..][..channels]
    }

    /// Rows `rows` of the sequence, `[rows, width]`, from inputs that are held as far back as they reach.
    pub(super) fn rows(&self, rows: Range<usize>, inputs: &Tail, rope: &Rope) -> Vec<f32> {
        let Self { compression: Compression { ratio, .. }, width, .. } = *self;
        let channels = self.compression.channels(width);
        let mut out = vec![0.0; rows.len() * width];
        let (mut values, mut gates, mut summed) = (Vec::new(), Vec::new(), vec![0.0; width]);
        for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
            let first = row * ratio;
            values.clear();
            gates.clear();
            // The first row has no run before it: nothing is weighted in for that half.
            let before = if channels > width && row > 0 { first - ratio..first } else { first..first };
            let halves = [(before, 0), (first..first + ratio, channels - width)];
            for (position, offset) in halves.into_iter().flat_map(|(run, at)| run.map(move |p| (p, at))) {
                let input = inputs.row(position);
                values.extend_from_slice(&input[offset..offset + width]);
                gates.extend_from_slice(&input[channels + offset..channels + offset + width]);
            }
            gated_sum(&values, &gates, &mut summed);
            self.norm.row(&summed, out);
            rope.angles(first, 1).rotate(0, true, &mut out[width - self.rope..]);
        }
        out
    }
}

impl Compression {
    /// Channels that a token gives for rows of `width`.
    pub(super) fn channels(self, width: usize) -> usize {
        if self.sparse { 2 * width } else { width }
    }

    /// Tokens before a boundary between runs that the next row still needs.
    pub(super) fn overlap(self) -> usize {
        if self.sparse { self.ratio } else { 0 }
    }

    /// Tokens at the end of a sequence that the next row still needs.
    pub(super) fn kept(self, tokens: usize) -> usize {
        (tokens % self.ratio + self.overlap()).min(tokens)
    }
}
