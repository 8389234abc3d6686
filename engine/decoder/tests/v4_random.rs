//! Random V4 models of any schedule, computed in random chunks: logits and selections equal the naive F64 implementation.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use esker_decoder::{KvFormat, Logits, Sequence};
use serde_json::{Value, json};
use support::reference::{Outcome, Reference};
use support::{Checkpoint, Random, v4, with};

/// Models to draw, of which those that are too close to a tie to compare are passed over.
const MODELS: u64 = 60;
const LEAST_COMPARED: u64 = 25;

/// A configuration with every dimension, the schedule and its naming drawn.
fn draw(random: &mut Random) -> Value {
    let mut one_of = |values: &[usize]| values[random.below(values.len())];
    let (rope, hc_mult, layers) = (one_of(&[2, 4, 8]), one_of(&[1, 2, 4]), 1 + one_of(&[0, 1, 2, 3]));
    let (groups, per_group) = (one_of(&[1, 2, 3]), one_of(&[1, 2]));
    let experts = one_of(&[2, 5, 8]);
    let [sparse, heavy] = [one_of(&[2, 4, 4, 4, 8]), one_of(&[2, 4, 8, 16, 32])];
    let kinds: Vec<usize> = (0..layers).map(|_| one_of(&[0, 1, 2])).collect();
    let changes = json!({
        "hidden_size": one_of(&[16, 30, 48]), "num_hidden_layers": layers, "hc_mult": hc_mult,
        "num_attention_heads": groups * per_group, "o_groups": groups, "o_lora_rank": one_of(&[4, 7]),
        "head_dim": rope + one_of(&[1, 8, 18]), "qk_rope_head_dim": rope, "q_lora_rank": one_of(&[6, 20]),
        "sliding_window": one_of(&[1, 2, 5, 8, 33, 64]), "index_n_heads": one_of(&[1, 2, 5]),
        "index_head_dim": rope + one_of(&[0, 6]), "index_topk": one_of(&[1, 2, 5, 40]),
        "num_hash_layers": one_of(&[0, 1, 2]), "n_routed_experts": experts,
        "num_experts_per_tok": 1 + one_of(&[0, 1]),
        "routed_scaling_factor": one_of(&[1, 2]), "hc_sinkhorn_iters": one_of(&[1, 3, 20]),
        "swiglu_limit": one_of(&[0, 1, 10]),
    });
    // The released naming knows one sparse ratio, the other any.
    let schedule = if one_of(&[0, 1]) == 0 {
        let ratios: Vec<usize> = kinds.iter().map(|&kind| [0, 4, heavy.max(8)][kind]).collect();
        json!({"compress_ratios": ([ratios, vec![0]].concat())})
    } else {
        let names = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"];
        let types: Vec<&str> = kinds.iter().map(|&kind| names[kind]).collect();
        json!({"compress_ratios": null, "layer_types": types, "compress_rates": {(names[1]): sparse, (names[2]): heavy}})
    };
    with(with(v4(), changes), schedule)
}

#[test]
fn any_schedule_in_any_chunks_equals_the_reference() {
    let mut compared = 0;
    for seed in 0..MODELS {
        let mut random = Random(seed);
        let config = draw(&mut random);
        let checkpoint = Checkpoint::random(config.clone(), seed);
        let count = 1 + random.below(70);
        let tokens = random.tokens(count, 61);
        let Outcome { logits: expected, selections, margin } = Reference::new(&checkpoint).run(&tokens);
        if margin < 2e-5 {
            continue;
        }
        compared += 1;
        let model = checkpoint.load(KvFormat::F32, 32);
        let mut sequence = Sequence::new(&model);
        sequence.record_selections();
        let mut rest = &tokens[..];
        let mut at = 0;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(1 + random.below(rest.len().min(20)));
            for row in sequence.prefill(&model, now, Logits::All).unwrap().rows() {
                for (got, expected) in row.iter().zip(&expected[at]) {
                    let apart = (f64::from(*got) - expected).abs();
                    assert!(apart < 1e-4, "seed {seed}, token {at}: {got} is not {expected}, {config}");
                }
                at += 1;
            }
            rest = later;
        }
        for (layer, expected) in selections.iter().enumerate() {
            assert_eq!(sequence.selections(layer), expected, "seed {seed}, layer {layer}, {config}");
        }
    }
    assert!(compared >= LEAST_COMPARED, "only {compared} models were clear of ties");
}
