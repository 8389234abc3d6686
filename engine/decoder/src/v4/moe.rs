//! Routing of V4: `sqrt(softplus)` scores, as released. A token's experts are the best by score and bias or, in the first layers,
//! what a table says of the token; the bias and the table only choose, the weights are scores.

use crate::checkpoint::Checkpoint;
use crate::kernel::vector::sigmoid;
use crate::linear::Linear;
use crate::moe::{Assigned, Experts, MlpNames, best};
use crate::v4::config::{Scoring, V4Config};
use crate::{DecoderError, Result};

const NAMES: MlpNames = MlpNames { gate: "w1", up: "w3", down: "w2" };

/// Mixture of experts of one layer.
pub(super) struct Moe {
    gate: Linear,
    choice: Choice,
    experts: Experts,
    chosen: usize,
    scoring: Scoring,
    factor: f32,
}

enum Choice {
    /// Added to the scores.
    Bias(Vec<f32>),
    /// Experts by token, `[vocab, chosen]`.
    Table(Vec<u32>),
}

impl Moe {
    pub(super) fn take(
        checkpoint: &mut Checkpoint,
        name: &str,
        [hidden, vocab]: [usize; 2],
        hash: bool,
        v4: &V4Config,
    ) -> Result<Self> {
        let (experts, chosen) = (v4.n_routed_experts, v4.num_experts_per_tok);
        let choice = match hash {
            false => Choice::Bias(checkpoint.take(&format!("{name}.gate.bias"), &[experts])?),
            true => Choice::Table(take_table(checkpoint, name, [vocab, chosen], experts)?),
        };
        let width = v4.moe_intermediate_size;
        Ok(Self {
            gate: Linear::take(checkpoint, &format!("{name}.gate"), experts, hidden, false)?,
            choice,
            experts: Experts::take(
                checkpoint,
                name,
                NAMES,
                [hidden, experts, width, width],
                v4.swiglu_limit,
            )?,
            chosen,
            scoring: v4.scoring,
            factor: v4.routed_scaling_factor,
        })
    }

    pub(super) fn parameters(&self) -> usize {
        let choice = match &self.choice {
            Choice::Bias(bias) => bias.len(),
            Choice::Table(table) => table.len(),
        };
        self.gate.parameters() + choice + self.experts.parameters()
    }

    /// `x` and the result are `[tokens, hidden]`; `tokens` are their ids.
    pub(super) fn forward(&self, x: &[f32], tokens: &[usize]) -> Vec<f32> {
        self.experts.forward(x, &self.assign(x, tokens))
    }

    fn assign(&self, x: &[f32], tokens: &[usize]) -> Assigned {
        let experts = self.gate.outputs();
        let mut assigned = vec![Vec::new(); experts];
        let mut scores = self.gate.apply(x);
        match self.scoring {
            Scoring::SqrtSoftplus => scores.iter_mut().for_each(|score| *score = softplus(*score).sqrt()),
            Scoring::Sigmoid => sigmoid(&mut scores),
        }
        for (row, (scores, &token)) in scores.chunks_exact(experts).zip(tokens).enumerate() {
            let chosen: Vec<usize> = match &self.choice {
                Choice::Bias(bias) => {
                    let choice: Vec<f32> =
                        scores.iter().zip(bias).map(|(score, bias)| score + bias).collect();
                    best(&choice, &(0..experts).collect::<Vec<_>>(), self.chosen)
                }
                Choice::Table(table) => table[token * self.chosen..][..self.chosen]
                    .iter()
                    .map(|&expert| expert as usize)
                    .collect(),
            };
            let norm = chosen.iter().map(|&expert| scores[expert]).sum::<f32>() + 1e-20;
            for expert in chosen {
                assigned[expert].push((row, scores[expert] / norm * self.factor));
            }
        }
        assigned
    }
}

/// `{name}.gate.tid2eid`, checked: every entry is an expert.
fn take_table(
    checkpoint: &mut Checkpoint,
    name: &str,
    [vocab, chosen]: [usize; 2],
    experts: usize,
) -> Result<Vec<u32>> {
    let tensor = format!("{name}.gate.tid2eid");
    let entry = |got: i64| match u32::try_from(got) {
        Ok(expert) if (expert as usize) < experts => Ok(expert),
        _ => Err(DecoderError::ExpertTable { tensor: tensor.clone(), got, experts }),
    };
    checkpoint.take_integers(&tensor, &[vocab, chosen])?.into_iter().map(entry).collect()
}

/// `ln(1 + e^x)`, from crate `libm` so that no system library decides its bits.
fn softplus(x: f32) -> f32 {
    x.max(0.0) + libm::log1pf(libm::expf(-x.abs()))
}
