//! The dense products of one layer of each kind at V4-Flash's own dimensions, beside what the machine can do at most.

use std::time::Instant;

use esker_decoder::ModelConfig;
use esker_decoder::products::{DenseProducts, busiest};
use serde_json::{Map, Value, json};

const ROUNDS: usize = 9;
/// Some 10 ms of multiply-adds.
const BUSY_ROUNDS: u32 = 500_000;

/// The best round of each product counts, as the best of the peak does: both are met by the same company.
pub(super) fn run(figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    let products = DenseProducts::random(&v4_flash()?)?;
    let (mut peak, mut done, mut seconds) = (0.0_f64, 0.0, 0.0);
    for index in 0..products.count() {
        let mut best = 0.0_f64;
        for _ in 0..ROUNDS {
            peak = peak.max(rate(|| busiest(BUSY_ROUNDS)));
            best = best.max(rate(|| products.run(index)));
        }
        let all = (products.run(index) * products.times(index)) as f64;
        done += all;
        seconds += all / best;
    }
    let reached = done / seconds;
    figures.insert("peak_gflop_s".into(), json!(2e-9 * peak));
    figures.insert("gemm_gflop_s".into(), json!(2e-9 * reached));
    figures.insert("gemm_efficiency".into(), json!(reached / peak));
    Ok(())
}

/// Multiply-adds a second.
fn rate(work: impl FnOnce() -> u64) -> f64 {
    let started = Instant::now();
    let done = work();
    done as f64 / started.elapsed().as_secs_f64()
}

/// One layer of each kind, with 8 experts instead of 256.
fn v4_flash() -> anyhow::Result<ModelConfig> {
    let config = json!({
        "model_type": "deepseek_v4", "vocab_size": 129_280, "hidden_size": 4096, "num_hidden_layers": 3,
        "num_attention_heads": 64, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1024, "o_groups": 8,
        "o_lora_rank": 1024, "sliding_window": 128, "compress_ratios": [0, 4, 128], "index_n_heads": 64,
        "index_head_dim": 128, "index_topk": 512, "n_routed_experts": 8, "num_experts_per_tok": 6,
        "moe_intermediate_size": 2048, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "num_hash_layers": 0,
        "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 65_536, "rope_theta": 10_000, "compress_rope_theta": 160_000,
    });
    Ok(ModelConfig::from_json(&config.to_string())?)
}
