//! Feed-forward layers: the gated MLP, and the mixture of experts with grouped sigmoid routing.
//!
//! Tokens of a chunk are gathered per expert, so each expert runs one product over its tokens. A token's result adds
//! its experts in ascending order, whatever else is in the chunk.

use rayon::prelude::*;

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::config::MoeConfig;
use crate::kernel::vector::{add_scaled, sigmoid, silu_mul};
use crate::linear::Linear;

/// `down(silu(gate x) * up x)`.
pub(crate) struct Mlp {
    /// Gate and up projection, one above the other.
    gate_up: Linear,
    down: Linear,
    width: usize,
}

impl Mlp {
    pub(crate) fn take(checkpoint: &mut Checkpoint, name: &str, hidden: usize, width: usize) -> Result<Self> {
        let mut rows = checkpoint.take(&format!("{name}.gate_proj.weight"), &[width, hidden])?;
        rows.extend(checkpoint.take(&format!("{name}.up_proj.weight"), &[width, hidden])?);
        let gate_up = Linear::from_rows(&rows, 2 * width, hidden);
        let down = Linear::take(checkpoint, &format!("{name}.down_proj"), hidden, width, false)?;
        Ok(Self { gate_up, down, width })
    }

    pub(crate) fn parameters(&self) -> usize {
        self.gate_up.parameters() + self.down.parameters()
    }

    /// `x` and the result are `[tokens, hidden]`.
    pub(crate) fn forward(&self, x: &[f32]) -> Vec<f32> {
        let both = self.gate_up.apply(x);
        let mut inner = vec![0.0; both.len() / 2];
        for (inner, both) in inner.chunks_exact_mut(self.width).zip(both.chunks_exact(2 * self.width)) {
            let (gate, up) = both.split_at(self.width);
            silu_mul(gate, up, inner);
        }
        self.down.apply(&inner)
    }
}

/// Mixture of experts.
pub(crate) struct Moe {
    router: Router,
    experts: Vec<Mlp>,
    shared: Option<Mlp>,
    hidden: usize,
}

impl Moe {
    pub(crate) fn take(
        checkpoint: &mut Checkpoint,
        name: &str,
        hidden: usize,
        config: &MoeConfig,
    ) -> Result<Self> {
        let width = config.moe_intermediate_size;
        let router = Router::take(checkpoint, &format!("{name}.gate"), hidden, config)?;
        let mut experts = Vec::new();
        for expert in 0..config.n_routed_experts {
            experts.push(Mlp::take(checkpoint, &format!("{name}.experts.{expert}"), hidden, width)?);
        }
        let shared = match config.n_shared_experts {
            0 => None,
            count => Some(Mlp::take(checkpoint, &format!("{name}.shared_experts"), hidden, width * count)?),
        };
        Ok(Self { router, experts, shared, hidden })
    }

    pub(crate) fn parameters(&self) -> usize {
        let experts: usize = self.experts.iter().chain(&self.shared).map(Mlp::parameters).sum();
        experts + self.router.gate.parameters() + self.router.bias.len()
    }

    /// `x` and the result are `[tokens, hidden]`.
    pub(crate) fn forward(&self, x: &[f32]) -> Vec<f32> {
        let assigned = self.router.assign(x);
        let run = |(expert, tokens): (&Mlp, &Vec<(usize, f32)>)| {
            let mut gathered = Vec::with_capacity(tokens.len() * self.hidden);
            for &(token, _) in tokens {
                gathered.extend_from_slice(&x[token * self.hidden..][..self.hidden]);
            }
            if tokens.is_empty() { Vec::new() } else { expert.forward(&gathered) }
        };
        let results: Vec<Vec<f32>> = self.experts.par_iter().zip(&assigned).map(run).collect();

        let mut out = vec![0.0; x.len()];
        for (result, tokens) in results.iter().zip(&assigned) {
            for (row, &(token, weight)) in result.chunks_exact(self.hidden).zip(tokens) {
                add_scaled(&mut out[token * self.hidden..][..self.hidden], row, weight);
            }
        }
        if let Some(shared) = &self.shared {
            add_scaled(&mut out, &shared.forward(x), 1.0);
        }
        out
    }
}

/// Chooses experts: `sigmoid` scores, a bias that counts for the choice only, groups first, then experts.
struct Router {
    gate: Linear,
    bias: Vec<f32>,
    config: MoeConfig,
}

impl Router {
    fn take(checkpoint: &mut Checkpoint, name: &str, hidden: usize, config: &MoeConfig) -> Result<Self> {
        let experts = config.n_routed_experts;
        Ok(Self {
            gate: Linear::take(checkpoint, name, experts, hidden, false)?,
            bias: checkpoint.take(&format!("{name}.e_score_correction_bias"), &[experts])?,
            config: config.clone(),
        })
    }

    /// For each expert, its tokens of the chunk, ascending, with their weights.
    fn assign(&self, x: &[f32]) -> Vec<Vec<(usize, f32)>> {
        let experts = self.gate.outputs();
        let mut assigned = vec![Vec::new(); experts];
        let mut scores = self.gate.apply(x);
        sigmoid(&mut scores);
        for (token, scores) in scores.chunks_exact(experts).enumerate() {
            for (expert, weight) in self.choose(scores) {
                assigned[expert].push((token, weight));
            }
        }
        assigned
    }

    /// The experts of one token with their weights, ascending.
    fn choose(&self, scores: &[f32]) -> Vec<(usize, f32)> {
        let MoeConfig { n_group, topk_group, num_experts_per_tok, norm_topk_prob, .. } = self.config;
        let choice: Vec<f32> = scores.iter().zip(&self.bias).map(|(score, bias)| score + bias).collect();
        let group = choice.len() / n_group;
        let mut allowed: Vec<usize> = (0..choice.len()).collect();
        if topk_group < n_group {
            let best_two = |group: &[f32]| {
                let best = best(group, &(0..group.len()).collect::<Vec<_>>(), 2);
                best.iter().map(|&i| group[i]).sum()
            };
            let group_scores: Vec<f32> = choice.chunks_exact(group).map(best_two).collect();
            let groups = best(&group_scores, &(0..n_group).collect::<Vec<_>>(), topk_group);
            allowed.retain(|expert| groups.contains(&(expert / group)));
        }
        let chosen = best(&choice, &allowed, num_experts_per_tok);
        let norm = match norm_topk_prob {
            true => chosen.iter().map(|&expert| scores[expert]).sum::<f32>() + 1e-20,
            false => 1.0,
        };
        let factor = self.config.routed_scaling_factor;
        chosen.into_iter().map(|expert| (expert, scores[expert] / norm * factor)).collect()
    }
}

/// The `k` best of the `allowed` indices: higher score first, then lower index; returned ascending.
fn best(scores: &[f32], allowed: &[usize], k: usize) -> Vec<usize> {
    let mut order = allowed.to_vec();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate(k);
    order.sort_unstable();
    order
}
