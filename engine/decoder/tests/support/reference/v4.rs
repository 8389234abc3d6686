//! V4 in F64: every query against every position and every compressed row, each computed from the whole sequence.

use esker_prefix::TokenId;

use super::{Outcome, Reference, Rows, best, dot};

impl Reference<'_> {
    pub(super) fn run_v4(&self, tokens: &[TokenId]) -> Outcome {
        let (x, selections, margin) = self.streams(tokens);
        Outcome { logits: self.logits(&x, "hc_head", "norm"), selections, margin }
    }

    /// Logits of the draft block: row `t` joins the streams after token `t` with `next[t]`. With them the margin.
    pub fn draft(&self, tokens: &[TokenId], next: &[TokenId]) -> (Rows, f64) {
        let (mut x, _, mut margin) = self.streams(tokens);
        let embedding = self.matrix("embed");
        let next_rows: Rows = next.iter().map(|token| embedding[token.0 as usize].clone()).collect();
        let joined = self.linear(&self.norm(&next_rows, "mtp.0.enorm", self.eps()), "mtp.0.e_proj");
        for (x, joined) in x.iter_mut().zip(&joined) {
            *x = self.linear(&self.norm(x, "mtp.0.hnorm", self.eps()), "mtp.0.h_proj");
            for x in x.iter_mut() {
                x.iter_mut().zip(joined).for_each(|(x, joined)| *x += joined);
            }
        }
        self.layer(&mut x, "mtp.0", (0, false), next, &mut Vec::new(), &mut margin);
        (self.logits(&x, "mtp.0.hc_head", "mtp.0.norm"), margin)
    }

    /// The streams after all layers, what the indexers selected, and the margin.
    fn streams(&self, tokens: &[TokenId]) -> (Vec<Rows>, Vec<Vec<Vec<u32>>>, f64) {
        let embedding = self.matrix("embed");
        let streams = self.int("hc_mult");
        let mut x: Vec<Rows> =
            tokens.iter().map(|token| vec![embedding[token.0 as usize].clone(); streams]).collect();
        let (mut margin, mut selections) = (f64::INFINITY, Vec::new());
        for layer in 0..self.int("num_hidden_layers") {
            let mut selected = Vec::new();
            let (name, kind) = (format!("layers.{layer}"), self.compression(layer));
            self.layer(&mut x, &name, kind, tokens, &mut selected, &mut margin);
            selections.push(selected);
        }
        (x, selections, margin)
    }

    fn layer(
        &self,
        x: &mut [Rows],
        name: &str,
        kind: (usize, bool),
        tokens: &[TokenId],
        selected: &mut Vec<Vec<u32>>,
        margin: &mut f64,
    ) {
        self.around(x, &format!("{name}.hc_attn"), |input| {
            let h = self.norm(input, &format!("{name}.attn_norm"), self.eps());
            self.attention_v4(&h, name, kind, selected, margin)
        });
        self.around(x, &format!("{name}.hc_ffn"), |input| {
            let h = self.norm(input, &format!("{name}.ffn_norm"), self.eps());
            self.moe_v4(&h, name, tokens, margin)
        });
    }

    fn logits(&self, x: &[Rows], head: &str, norm: &str) -> Rows {
        let mixes = self.mixes(x, head);
        let (scale, base) = (self.vector(&format!("{head}_scale")), self.vector(&format!("{head}_base")));
        let combine = |(x, mixes): (&Rows, &Vec<f64>)| {
            let weight = |i: usize| sigmoid(mixes[i] * scale[0] + base[i]) + self.float("hc_eps", 0.0);
            weighted(x, &(0..self.int("hc_mult")).map(weight).collect::<Vec<_>>())
        };
        let h: Rows = x.iter().zip(&mixes).map(combine).collect();
        self.linear(&self.norm(&h, norm, self.eps()), "head")
    }

    /// One sublayer inside its hyper-connection.
    fn around(&self, x: &mut [Rows], name: &str, sublayer: impl FnOnce(&Rows) -> Rows) {
        let (n, eps) = (self.int("hc_mult"), self.float("hc_eps", 0.0));
        let mixes = self.mixes(x, name);
        let (scale, base) = (self.vector(&format!("{name}_scale")), self.vector(&format!("{name}_base")));
        let pre = |m: &[f64], i: usize| sigmoid(m[i] * scale[0] + base[i]) + eps;
        let input: Rows = x
            .iter()
            .zip(&mixes)
            .map(|(x, m)| weighted(x, &(0..n).map(|i| pre(m, i)).collect::<Vec<_>>()))
            .collect();
        let output = sublayer(&input);
        for ((x, m), y) in x.iter_mut().zip(&mixes).zip(&output) {
            let raw = |i: usize, j: usize| {
                let at = 2 * n + i * n + j;
                m[at] * scale[2] + base[at]
            };
            let mut c: Rows = (0..n)
                .map(|i| {
                    let total: f64 = (0..n).map(|j| raw(i, j).exp()).sum();
                    (0..n).map(|j| raw(i, j).exp() / total + eps).collect()
                })
                .collect();
            for round in 0..2 * self.int("hc_sinkhorn_iters") - 1 {
                let old = c.clone();
                for i in 0..n {
                    for j in 0..n {
                        let by_column = round % 2 == 0;
                        let sum: f64 = (0..n).map(|k| if by_column { old[k][j] } else { old[i][k] }).sum();
                        c[i][j] = old[i][j] / (sum + eps);
                    }
                }
            }
            let old = x.clone();
            for (j, x) in x.iter_mut().enumerate() {
                let post = 2.0 * sigmoid(m[n + j] * scale[1] + base[n + j]);
                for (channel, x) in x.iter_mut().enumerate() {
                    *x = post * y[channel] + (0..n).map(|i| c[i][j] * old[i][channel]).sum::<f64>();
                }
            }
        }
    }

    fn mixes(&self, x: &[Rows], name: &str) -> Rows {
        let function = self.plain_matrix(&format!("{name}_fn"));
        x.iter()
            .map(|x| {
                let flat = x.concat();
                let inverse = 1.0 / (dot(&flat, &flat) / flat.len() as f64 + self.eps()).sqrt();
                function.iter().map(|w| dot(w, &flat) * inverse).collect()
            })
            .collect()
    }

    fn attention_v4(
        &self,
        h: &Rows,
        name: &str,
        (ratio, sparse): (usize, bool),
        selections: &mut Vec<Vec<u32>>,
        margin: &mut f64,
    ) -> Rows {
        let a = format!("{name}.attn");
        let (heads, width, window) =
            (self.int("num_attention_heads"), self.int("head_dim"), self.int("sliding_window"));
        let latents = self.norm(&self.linear(h, &format!("{a}.wq_a")), &format!("{a}.q_norm"), self.eps());
        let queries = self.linear(&latents, &format!("{a}.wq_b"));
        let kv = self.norm(&self.linear(h, &format!("{a}.wkv")), &format!("{a}.kv_norm"), self.eps());
        let kv: Rows = kv.iter().enumerate().map(|(t, row)| self.turn(row, t as f64, ratio)).collect();
        let compressed = match ratio {
            0 => Vec::new(),
            _ => self.compress(h, &format!("{a}.compressor"), width, ratio, sparse),
        };
        if sparse {
            *selections = self.select_v4(h, &latents, &a, ratio, margin);
        }
        let sinks = self.vector(&format!("{a}.attn_sink"));
        let mut out: Rows = Vec::new();
        for t in 0..h.len() {
            let mut keys: Vec<&Vec<f64>> = (0..=t).filter(|s| s + window > t).map(|s| &kv[s]).collect();
            match ratio {
                0 => {}
                _ if sparse => keys.extend(selections[t].iter().map(|&i| &compressed[i as usize])),
                _ => keys.extend((0..(t + 1) / ratio).map(|i| &compressed[i])),
            }
            let mut row = Vec::new();
            for head in 0..heads {
                let q = &queries[t][head * width..][..width];
                let inverse = 1.0 / (dot(q, q) / width as f64 + self.eps()).sqrt();
                let q: Vec<f64> = q.iter().map(|x| x * inverse).collect();
                let q = self.turn(&q, t as f64, ratio);
                let weights: Vec<f64> =
                    keys.iter().map(|key| (dot(&q, key) / (width as f64).sqrt()).exp()).collect();
                let total = weights.iter().sum::<f64>() + sinks[head].exp();
                let sum = |channel: usize| {
                    weights.iter().zip(&keys).map(|(w, key)| w / total * key[channel]).sum::<f64>()
                };
                row.extend(self.turn(&(0..width).map(sum).collect::<Vec<_>>(), -(t as f64), ratio));
            }
            out.push(row);
        }
        let (groups, o_lora) = (self.int("o_groups"), self.int("o_lora_rank"));
        let weight = self.matrix(&format!("{a}.wo_a"));
        let size = heads / groups * width;
        let grouped = out
            .iter()
            .map(|row| {
                (0..groups * o_lora).map(|o| dot(&weight[o], &row[o / o_lora * size..][..size])).collect()
            })
            .collect();
        self.linear(&grouped, &format!("{a}.wo_b"))
    }

    /// Rows of a compressor whose windows the sequence completes.
    fn compress(&self, h: &Rows, name: &str, width: usize, ratio: usize, sparse: bool) -> Rows {
        let (kv, gate) = (self.linear(h, &format!("{name}.wkv")), self.linear(h, &format!("{name}.wgate")));
        let ape = self.plain_matrix(&format!("{name}.ape"));
        let rows: Rows = (0..h.len() / ratio)
            .map(|row| {
                (0..width)
                    .map(|channel| {
                        let mut slots = Vec::new();
                        let own = if sparse { channel + width } else { channel };
                        for t in row * ratio..(row + 1) * ratio {
                            slots.push((kv[t][own], gate[t][own] + ape[t % ratio][own]));
                            if sparse && row > 0 {
                                let t = t - ratio;
                                slots.push((kv[t][channel], gate[t][channel] + ape[t % ratio][channel]));
                            }
                        }
                        let total: f64 = slots.iter().map(|(_, gate)| gate.exp()).sum();
                        slots.iter().map(|(value, gate)| value * gate.exp() / total).sum()
                    })
                    .collect()
            })
            .collect();
        let rows = self.norm(&rows, &format!("{name}.norm"), self.eps());
        rows.iter().enumerate().map(|(i, row)| self.turn(row, (i * ratio) as f64, ratio)).collect()
    }

    fn select_v4(&self, h: &Rows, latents: &Rows, a: &str, ratio: usize, margin: &mut f64) -> Vec<Vec<u32>> {
        let (heads, width) = (self.int("index_n_heads"), self.int("index_head_dim"));
        let queries = self.linear(latents, &format!("{a}.indexer.wq_b"));
        let weights = self.linear(h, &format!("{a}.indexer.weights_proj"));
        let keys = self.compress(h, &format!("{a}.indexer.compressor"), width, ratio, true);
        let select = |t: usize| {
            let of_head = |key: &[f64], head: usize| {
                let query = self.turn(&queries[t][head * width..][..width], t as f64, ratio);
                weights[t][head] / ((width * heads) as f64).sqrt() * dot(&query, key).max(0.0)
            };
            let visible = keys.iter().take((t + 1) / ratio);
            let scores: Vec<f64> =
                visible.map(|key| (0..heads).map(|head| of_head(key, head)).sum()).collect();
            let (mut best, gap) = best(&scores, self.int("index_topk"));
            *margin = margin.min(gap);
            best.sort_unstable();
            best.into_iter().map(|row| u32::try_from(row).unwrap()).collect()
        };
        (0..h.len()).map(select).collect()
    }

    fn moe_v4(&self, h: &Rows, name: &str, tokens: &[TokenId], margin: &mut f64) -> Rows {
        let k = self.int("num_experts_per_tok");
        let mut out = self.mlp_v4(h, &format!("{name}.ffn.shared_experts"));
        let table = self.checkpoint.tensors.get(&format!("{name}.ffn.gate.tid2eid"));
        // Not `linear`: the tensor called bias is for the choice only.
        let gate = self.matrix(&format!("{name}.ffn.gate"));
        for (t, h) in h.iter().enumerate() {
            let score = |gate: &Vec<f64>| match self.checkpoint.config["scoring_func"] == "sigmoid" {
                true => sigmoid(dot(gate, h)),
                false => dot(gate, h).exp().ln_1p().sqrt(),
            };
            let scores: Vec<f64> = gate.iter().map(score).collect();
            let chosen: Vec<usize> = match table {
                Some((_, table)) => {
                    table[tokens[t].0 as usize * k..][..k].iter().map(|&expert| expert as usize).collect()
                }
                None => {
                    let bias = self.vector(&format!("{name}.ffn.gate.bias"));
                    let choice: Vec<f64> = scores.iter().zip(&bias).map(|(s, b)| s + b).collect();
                    let (chosen, gap) = best(&choice, k);
                    *margin = margin.min(gap);
                    chosen
                }
            };
            let total: f64 = chosen.iter().map(|&expert| scores[expert]).sum();
            for expert in chosen {
                let weight = scores[expert] / total * self.float("routed_scaling_factor", 1.0);
                let result = self.mlp_v4(&vec![h.clone()], &format!("{name}.ffn.experts.{expert}"));
                out[t].iter_mut().zip(&result[0]).for_each(|(out, value)| *out += weight * value);
            }
        }
        out
    }

    fn mlp_v4(&self, h: &Rows, name: &str) -> Rows {
        let limit = match self.float("swiglu_limit", 0.0) {
            0.0 => f64::INFINITY,
            limit => limit,
        };
        let (gate, up) = (self.linear(h, &format!("{name}.w1")), self.linear(h, &format!("{name}.w3")));
        let inner = |(g, u): (&f64, &f64)| {
            let g = g.min(limit);
            g * sigmoid(g) * u.max(-limit).min(limit)
        };
        let inner: Rows = gate.iter().zip(&up).map(|(g, u)| g.iter().zip(u).map(inner).collect()).collect();
        self.linear(&inner, &format!("{name}.w2"))
    }

    /// Rotates the last channels of a row by the angles of a position, interleaved.
    fn turn(&self, row: &[f64], position: f64, ratio: usize) -> Vec<f64> {
        let rope = self.int("qk_rope_head_dim");
        let first = row.len() - rope;
        let mut out = row.to_vec();
        for pair in 0..rope / 2 {
            let (i, j) = (first + 2 * pair, first + 2 * pair + 1);
            let (sin, cos) = (position * self.frequency_v4(pair, rope, ratio)).sin_cos();
            let scaling = self.rope_scaling_v4(ratio);
            out[i] = (row[i] * cos - row[j] * sin) * scaling;
            out[j] = (row[j] * cos + row[i] * sin) * scaling;
        }
        out
    }

    /// Only the nested form can ask for it, by leaving `attention_factor` out.
    fn rope_scaling_v4(&self, ratio: usize) -> f64 {
        let named = &self.checkpoint.config["rope_parameters"][if ratio == 0 { "main" } else { "compress" }];
        match (named["factor"].as_f64(), named["attention_factor"].as_f64()) {
            (Some(factor), None) => 0.1 * factor.ln() + 1.0,
            (_, given) => given.unwrap_or(1.0),
        }
    }

    fn frequency_v4(&self, pair: usize, dim: usize, ratio: usize) -> f64 {
        let config = &self.checkpoint.config;
        let named = &config["rope_parameters"][if ratio == 0 { "main" } else { "compress" }];
        let old = if ratio == 0 { "rope_theta" } else { "compress_rope_theta" };
        let theta = named["rope_theta"].as_f64().or(config[old].as_f64()).unwrap();
        let flat = ["rope_parameters", "rope_scaling"].iter().find(|name| config[**name].is_object());
        let yarn = match flat {
            Some(flat) if ratio > 0 && !named.is_object() => &config[*flat],
            _ => named,
        };
        self.yarn(pair, dim, theta, |field| yarn[field].as_f64())
    }

    /// Tokens per row, 0 for window only, and whether an indexer selects rows.
    fn compression(&self, layer: usize) -> (usize, bool) {
        let config = &self.checkpoint.config;
        let Some(kind) = config["layer_types"][layer].as_str() else {
            let ratio = usize::try_from(config["compress_ratios"][layer].as_u64().unwrap()).unwrap();
            return (ratio, ratio == 4);
        };
        let sparse = kind == "compressed_sparse_attention";
        let default = if sparse { 4 } else { 128 };
        match kind {
            "sliding_attention" => (0, false),
            _ => {
                let rate = config["compress_rates"][kind].as_u64().unwrap_or(default);
                (usize::try_from(rate).unwrap(), sparse)
            }
        }
    }

    fn eps(&self) -> f64 {
        self.float("rms_norm_eps", 1e-6)
    }

    fn plain_matrix(&self, name: &str) -> Rows {
        let (shape, values) = &self.checkpoint.tensors[name];
        values.chunks(shape[1]).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect()
    }
}

fn weighted(x: &Rows, weights: &[f64]) -> Vec<f64> {
    (0..x[0].len()).map(|channel| x.iter().zip(weights).map(|(x, w)| w * x[channel]).sum()).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
