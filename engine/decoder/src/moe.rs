//! Feed-forward layers: the gated MLP, and the mixture of experts with the grouped sigmoid routing of V3.2.
//!
//! Tokens of a chunk are gathered per expert, so each expert runs one product over its tokens. A token's result adds
//! its experts in ascending order, whatever else is in the chunk.

use rayon::prelude::*;

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::config::MoeConfig;
use crate::kernel::vector::{add_scaled, sigmoid, silu_mul, silu_mul_clamped};
use crate::linear::Linear;

/// What the three matrices of an MLP are called.
#[derive(Clone, Copy)]
pub(crate) struct MlpNames {
    pub(crate) gate: &'static str,
    pub(crate) up: &'static str,
    pub(crate) down: &'static str,
}

const NAMES: MlpNames = MlpNames { gate: "gate_proj", up: "up_proj", down: "down_proj" };

/// For each expert, its tokens of the chunk, ascending, with their weights.
pub(crate) type Assigned = Vec<Vec<(usize, f32)>>;

/// `down(silu(gate x) * up x)`, gate and up bounded if there is a limit.
pub(crate) struct Mlp {
    /// Gate and up projection, one above the other.
    gate_up: Linear,
    down: Linear,
    width: usize,
    limit: Option<f32>,
}

impl Mlp {
    pub(crate) fn take(checkpoint: &mut Checkpoint, name: &str, hidden: usize, width: usize) -> Result<Self> {
        Self::take_named(checkpoint, name, NAMES, [hidden, width], None)
    }

    fn take_named(
        checkpoint: &mut Checkpoint,
        name: &str,
        names: MlpNames,
        [hidden, width]: [usize; 2],
        limit: Option<f32>,
    ) -> Result<Self> {
        let mut rows = checkpoint.take(&format!("{name}.{}.weight", names.gate), &[width, hidden])?;
        rows.extend(checkpoint.take(&format!("{name}.{}.weight", names.up), &[width, hidden])?);
        let gate_up = Linear::from_rows(&rows, 2 * width, hidden);
        let down = Linear::take(checkpoint, &format!("{name}.{}", names.down), hidden, width, false)?;
        Ok(Self { gate_up, down, width, limit })
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
            match self.limit {
                None => silu_mul(gate, up, inner),
                Some(limit) => silu_mul_clamped(gate, up, limit, inner),
            }
        }
        self.down.apply(&inner)
    }
}

/// Mixture of experts.
pub(crate) struct Moe {
    router: Router,
    experts: Experts,
}

impl Moe {
    pub(crate) fn take(
        checkpoint: &mut Checkpoint,
        name: &str,
        hidden: usize,
        config: &MoeConfig,
    ) -> Result<Self> {
        let (width, experts) = (config.moe_intermediate_size, config.n_routed_experts);
        let sizes = [hidden, experts, width, width * config.n_shared_experts];
        Ok(Self {
            router: Router::take(checkpoint, &format!("{name}.gate"), hidden, config)?,
            experts: Experts::take(checkpoint, name, NAMES, sizes, None)?,
        })
    }

    pub(crate) fn parameters(&self) -> usize {
        self.experts.parameters() + self.router.gate.parameters() + self.router.bias.len()
    }

    /// `x` and the result are `[tokens, hidden]`.
    pub(crate) fn forward(&self, x: &[f32]) -> Vec<f32> {
        self.experts.forward(x, &self.router.assign(x))
    }
}

/// The experts of a layer, without what chooses among them.
pub(crate) struct Experts {
    experts: Vec<Mlp>,
    shared: Option<Mlp>,
    hidden: usize,
}

impl Experts {
    /// `sizes` are the hidden width, the number of experts, the width of one, and the width of the shared one.
    pub(crate) fn take(
        checkpoint: &mut Checkpoint,
        name: &str,
        names: MlpNames,
        [hidden, count, width, shared]: [usize; 4],
        limit: Option<f32>,
    ) -> Result<Self> {
        let mut take = |part: String, width: usize| {
            Mlp::take_named(checkpoint, &format!("{name}.{part}"), names, [hidden, width], limit)
        };
        let mut experts = Vec::new();
        for expert in 0..count {
            experts.push(take(format!("experts.{expert}"), width)?);
        }
        let shared = match shared {
            0 => None,
            width => Some(take("shared_experts".into(), width)?),
        };
        Ok(Self { experts, shared, hidden })
    }

    pub(crate) fn parameters(&self) -> usize {
        self.experts.iter().chain(&self.shared).map(Mlp::parameters).sum()
    }

    /// Each token through its experts and the shared one. `x` and the result are `[tokens, hidden]`.
    pub(crate) fn forward(&self, x: &[f32], assigned: &Assigned) -> Vec<f32> {
        let run = |(expert, tokens): (&Mlp, &Vec<(usize, f32)>)| {
            let mut gathered = Vec::with_capacity(tokens.len() * self.hidden);
            for &(token, _) in tokens {
                gathered.extend_from_slice(&x[token * self.hidden..][..self.hidden]);
            }
            if tokens.is_empty() { Vec::new() } else { expert.forward(&gathered) }
        };
        let results: Vec<Vec<f32>> = self.experts.par_iter().zip(assigned).map(run).collect();

        let mut out = vec![0.0; x.len()];
        for (result, tokens) in results.iter().zip(assigned) {
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

    fn assign(&self, x: &[f32]) -> Assigned {
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
pub(crate) fn best(scores: &[f32], allowed: &[usize], k: usize) -> Vec<usize> {
    let mut order = allowed.to_vec();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate(k);
    order.sort_unstable();
    order
}
