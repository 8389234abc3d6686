//! The published mathematics in F64, written naively from its description: no cache, no absorbed projections, no
//! tiles, every query against every earlier position. It shares no code with the decoder.

mod v4;

use std::cmp::Ordering;
use std::f64::consts::PI;

use esker_prefix::TokenId;

use super::Checkpoint;

pub struct Reference<'a> {
    checkpoint: &'a Checkpoint,
}

/// What the reference computed.
pub struct Outcome {
    /// `[tokens][vocab]`.
    pub logits: Vec<Vec<f64>>,
    /// `[layer][token]`: ascending; empty for layers that share.
    pub selections: Vec<Vec<Vec<u32>>>,
    /// Smallest distance between a chosen and a passed-over score, of rows or experts, exact ties aside: below the
    /// rounding of F32 a comparison would be meaningless.
    pub margin: f64,
}

type Rows = Vec<Vec<f64>>;

impl<'a> Reference<'a> {
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint }
    }

    pub fn run(&self, tokens: &[TokenId]) -> Outcome {
        if self.checkpoint.config["model_type"] == "deepseek_v4" {
            return self.run_v4(tokens);
        }
        let (layers, eps) = (self.int("num_hidden_layers"), self.float("rms_norm_eps", 1e-6));
        let embedding = self.matrix("model.embed_tokens");
        let mut x: Rows = tokens.iter().map(|token| embedding[token.0 as usize].clone()).collect();
        let mut margin = f64::INFINITY;
        let mut selections = Vec::new();
        let mut selection = Vec::new();
        for layer in 0..layers {
            let name = format!("model.layers.{layer}");
            let h = self.norm(&x, &format!("{name}.input_layernorm"), eps);
            let own = self.checkpoint.tensors.contains_key(&format!("{name}.self_attn.indexer.wk.weight"));
            if own {
                selection = self.select(&h, &name, &mut margin);
            }
            selections.push(if own { selection.clone() } else { Vec::new() });
            add(&mut x, &self.attention(&h, &name, &selection));
            let h = self.norm(&x, &format!("{name}.post_attention_layernorm"), eps);
            let sparse = self.checkpoint.tensors.contains_key(&format!("{name}.mlp.gate.weight"));
            let out =
                if sparse { self.moe(&h, &name, &mut margin) } else { self.mlp(&h, &format!("{name}.mlp")) };
            add(&mut x, &out);
        }
        let x = self.norm(&x, "model.norm", eps);
        let tied = self.checkpoint.config["tie_word_embeddings"] == true;
        let logits = self.linear(&x, if tied { "model.embed_tokens" } else { "lm_head" });
        Outcome { logits, selections, margin }
    }

    fn attention(&self, h: &Rows, name: &str, selection: &[Vec<u32>]) -> Rows {
        let a = format!("{name}.self_attn");
        let (heads, nope, rope) =
            (self.int("num_attention_heads"), self.int("qk_nope_head_dim"), self.int("qk_rope_head_dim"));
        let (latent, value) = (self.int("kv_lora_rank"), self.int("v_head_dim"));
        let queries = self.linear(&self.query_latents(h, &a), &format!("{a}.q_b_proj"));
        let down = self.linear(h, &format!("{a}.kv_a_proj_with_mqa"));
        let latents: Rows = down.iter().map(|row| row[..latent].to_vec()).collect();
        let up = self
            .linear(&self.norm(&latents, &format!("{a}.kv_a_layernorm"), 1e-6), &format!("{a}.kv_b_proj"));
        let scale = self.softmax_factor() / ((nope + rope) as f64).sqrt();

        let mut out = vec![vec![0.0; heads * value]; h.len()];
        for (t, out) in out.iter_mut().enumerate() {
            for head in 0..heads {
                let query = &queries[t][head * (nope + rope)..][..nope + rope];
                let query_rope = self.rotate(&query[nope..], t, true);
                let scores: Vec<f64> = selection[t]
                    .iter()
                    .map(|&s| {
                        let s = s as usize;
                        let key = &up[s][head * (nope + value)..][..nope];
                        let key_rope = self.rotate(&down[s][latent..], s, true);
                        (dot(&query[..nope], key) + dot(&query_rope, &key_rope)) * scale
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                for (&s, score) in selection[t].iter().zip(&scores) {
                    let weight = (score - max).exp() / total;
                    let values = &up[s as usize][head * (nope + value) + nope..][..value];
                    for (out, v) in out[head * value..].iter_mut().zip(values) {
                        *out += weight * v;
                    }
                }
            }
        }
        self.linear(&out, &format!("{a}.o_proj"))
    }

    fn query_latents(&self, h: &Rows, a: &str) -> Rows {
        self.norm(&self.linear(h, &format!("{a}.q_a_proj")), &format!("{a}.q_a_layernorm"), 1e-6)
    }

    fn select(&self, h: &Rows, name: &str, margin: &mut f64) -> Vec<Vec<u32>> {
        let a = format!("{name}.self_attn");
        let (heads, width) = (self.int("index_n_heads"), self.int("index_head_dim"));
        let (rope, topk) = (self.int("qk_rope_head_dim"), self.int("index_topk"));
        let glm = self.checkpoint.config["model_type"] == "glm_moe_dsa";
        let interleave = self.checkpoint.config["indexer_rope_interleave"].as_bool().unwrap_or(glm);
        let rotated =
            |row: &[f64], t: usize| [self.rotate(&row[..rope], t, interleave), row[rope..].to_vec()].concat();
        let queries = self.linear(&self.query_latents(h, &a), &format!("{a}.indexer.wq_b"));
        let weights = self.linear(h, &format!("{a}.indexer.weights_proj"));
        let (gain, bias) = (
            self.vector(&format!("{a}.indexer.k_norm.weight")),
            self.vector(&format!("{a}.indexer.k_norm.bias")),
        );
        let keys: Rows = self
            .linear(h, &format!("{a}.indexer.wk"))
            .iter()
            .enumerate()
            .map(|(t, k)| {
                let mean = k.iter().sum::<f64>() / width as f64;
                let variance = k.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / width as f64;
                let normed: Vec<f64> = (0..width)
                    .map(|i| (k[i] - mean) / (variance + 1e-6).sqrt() * gain[i] + bias[i])
                    .collect();
                rotated(&normed, t)
            })
            .collect();
        let select = |t: usize| {
            let scores: Vec<f64> = (0..=t)
                .map(|s| {
                    let of_head = |head: usize| {
                        let query = rotated(&queries[t][head * width..][..width], t);
                        let product = dot(&query, &keys[s]) / (width as f64).sqrt();
                        weights[t][head] / (heads as f64).sqrt() * product.max(0.0)
                    };
                    (0..heads).map(of_head).sum()
                })
                .collect();
            let (mut best, gap) = best(&scores, topk);
            *margin = margin.min(gap);
            best.sort_unstable();
            best.into_iter().map(|s| u32::try_from(s).unwrap()).collect()
        };
        (0..h.len()).map(select).collect()
    }

    fn moe(&self, h: &Rows, name: &str, margin: &mut f64) -> Rows {
        let (groups, kept) = (self.int("n_group"), self.int("topk_group"));
        let factor = self.float("routed_scaling_factor", 1.0);
        let normalise = self.checkpoint.config["norm_topk_prob"] == true;
        let bias = self.vector(&format!("{name}.mlp.gate.e_score_correction_bias"));
        let mut out = match self.int("n_shared_experts") {
            0 => vec![vec![0.0; h[0].len()]; h.len()],
            _ => self.mlp(h, &format!("{name}.mlp.shared_experts")),
        };
        for (t, logits) in self.linear(h, &format!("{name}.mlp.gate")).iter().enumerate() {
            let scores: Vec<f64> = logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
            let mut choice: Vec<f64> = scores.iter().zip(&bias).map(|(s, b)| s + b).collect();
            let size = choice.len() / groups;
            if groups > 1 {
                let group_scores: Vec<f64> = choice
                    .chunks(size)
                    .map(|group| {
                        let mut sorted = group.to_vec();
                        sorted.sort_by(|a, b| b.partial_cmp(a).unwrap());
                        sorted[0] + sorted[1]
                    })
                    .collect();
                let (chosen, gap) = best(&group_scores, kept);
                *margin = margin.min(gap);
                for (expert, choice) in choice.iter_mut().enumerate() {
                    if !chosen.contains(&(expert / size)) {
                        *choice = f64::NEG_INFINITY;
                    }
                }
            }
            let (chosen, gap) = best(&choice, self.int("num_experts_per_tok"));
            *margin = margin.min(gap);
            let total: f64 = chosen.iter().map(|&e| scores[e]).sum::<f64>() + 1e-20;
            for expert in chosen {
                let weight = scores[expert] / if normalise { total } else { 1.0 } * factor;
                let result = self.mlp(&vec![h[t].clone()], &format!("{name}.mlp.experts.{expert}"));
                for (out, value) in out[t].iter_mut().zip(&result[0]) {
                    *out += weight * value;
                }
            }
        }
        out
    }

    fn mlp(&self, h: &Rows, name: &str) -> Rows {
        let (gate, up) =
            (self.linear(h, &format!("{name}.gate_proj")), self.linear(h, &format!("{name}.up_proj")));
        let inner = gate
            .iter()
            .zip(&up)
            .map(|(gate, up)| gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect())
            .collect();
        self.linear(&inner, &format!("{name}.down_proj"))
    }

    fn rotate(&self, row: &[f64], t: usize, interleave: bool) -> Vec<f64> {
        let half = row.len() / 2;
        let mut out = row.to_vec();
        for pair in 0..half {
            let (i, j) = if interleave { (2 * pair, 2 * pair + 1) } else { (pair, pair + half) };
            let (sin, cos) = (t as f64 * self.frequency(pair, row.len())).sin_cos();
            let scaling = self.rope_scaling();
            out[i] = (row[i] * cos - row[j] * sin) * scaling;
            out[j] = (row[i] * sin + row[j] * cos) * scaling;
        }
        out
    }

    fn frequency(&self, pair: usize, dim: usize) -> f64 {
        let theta = self.rope("rope_theta").or(self.checkpoint.config["rope_theta"].as_f64()).unwrap();
        self.yarn(pair, dim, theta, |field| self.rope(field))
    }

    fn yarn(&self, pair: usize, dim: usize, theta: f64, rope: impl Fn(&str) -> Option<f64>) -> f64 {
        let plain = theta.powf(-2.0 * pair as f64 / dim as f64);
        let Some(factor) = rope("factor") else { return plain };
        let original = rope("original_max_position_embeddings").unwrap();
        let corr = |turns: f64| dim as f64 * (original / (2.0 * PI * turns)).ln() / (2.0 * theta.ln());
        let low = corr(rope("beta_fast").unwrap()).floor().max(0.0);
        let mut high = corr(rope("beta_slow").unwrap()).ceil().min(dim as f64 - 1.0);
        if low == high {
            high += 0.001;
        }
        let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
        plain * (1.0 - ramp) + plain / factor * ramp
    }

    fn softmax_factor(&self) -> f64 {
        let (Some(factor), Some(all)) = (self.rope("factor"), self.rope("mscale_all_dim")) else {
            return 1.0;
        };
        (0.1 * all * factor.ln() + 1.0).powi(2)
    }

    fn rope_scaling(&self) -> f64 {
        let Some(factor) = self.rope("factor") else { return 1.0 };
        let mscale = |m: f64| 0.1 * m * factor.ln() + 1.0;
        match (self.rope("mscale"), self.rope("mscale_all_dim")) {
            (Some(one), Some(all)) => mscale(one) / mscale(all),
            _ => mscale(1.0),
        }
    }

    fn rope(&self, field: &str) -> Option<f64> {
        let config = &self.checkpoint.config;
        ["rope_parameters", "rope_scaling"].iter().find_map(|section| config[section][field].as_f64())
    }

    fn linear(&self, x: &Rows, name: &str) -> Rows {
        let weight = self.matrix(name);
        let bias = self.checkpoint.tensors.get(&format!("{name}.bias"));
        x.iter()
            .map(|x| {
                let output =
                    |(o, w): (usize, &Vec<f64>)| dot(w, x) + bias.map_or(0.0, |bias| f64::from(bias.1[o]));
                weight.iter().enumerate().map(output).collect()
            })
            .collect()
    }

    fn norm(&self, x: &Rows, name: &str, eps: f64) -> Rows {
        let gain = self.vector(&format!("{name}.weight"));
        x.iter()
            .map(|x| {
                let mean = dot(x, x) / x.len() as f64;
                x.iter().zip(&gain).map(|(x, g)| x / (mean + eps).sqrt() * g).collect()
            })
            .collect()
    }

    fn matrix(&self, name: &str) -> Rows {
        let (shape, values) = &self.checkpoint.tensors[&format!("{name}.weight")];
        values.chunks(shape[1]).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect()
    }

    fn vector(&self, name: &str) -> Vec<f64> {
        self.checkpoint.tensors[name].1.iter().map(|&x| f64::from(x)).collect()
    }

    fn int(&self, name: &str) -> usize {
        usize::try_from(self.checkpoint.config[name].as_u64().unwrap()).unwrap()
    }

    fn float(&self, name: &str, default: f64) -> f64 {
        self.checkpoint.config[name].as_f64().unwrap_or(default)
    }
}

/// The `k` best, ties to the lower index, and the distance to the best that is left out (infinite for an exact tie
/// or if none is).
fn best(scores: &[f64], k: usize) -> (Vec<usize>, f64) {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap_or(Ordering::Equal).then(a.cmp(&b)));
    let gap = match order.get(k) {
        Some(&next) if scores[next] != scores[order[k - 1]] => scores[order[k - 1]] - scores[next],
        _ => f64::INFINITY,
    };
    order.truncate(k);
    (order, gap)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut Rows, y: &Rows) {
    for (x, y) in x.iter_mut().zip(y) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}
