//! How fast a model of the bundled size is; run by hand:
//! `cargo test --release -p esker-decoder --test speed -- --ignored --nocapture`.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use std::time::Instant;

use esker_decoder::{KvFormat, Logits, Model, Sequence};
use esker_prefix::ObjectKind;
use serde_json::json;
use support::{Checkpoint, Random, identity, v4, v32, with};

const PREFIX: usize = 8_192;
const REST: usize = 160;
const BLOCK: u32 = 128;

#[test]
#[ignore = "a measurement"]
fn cold_prefill_restore_and_decode() {
    let bundled = json!({
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "moe_intermediate_size": 80,
        "num_hidden_layers": 6, "num_attention_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 64,
        "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64, "index_n_heads": 4, "index_head_dim": 32,
        "index_topk": 256, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "max_position_embeddings": 16384,
    });
    measure(&Checkpoint::random(with(v32(), bundled), 1).load(KvFormat::Bf16, BLOCK));
}

/// V4 of about the same size, with the published ratios and window.
#[test]
#[ignore = "a measurement"]
fn v4_cold_prefill_restore_replay_and_decode() {
    let alike = json!({
        "vocab_size": 4096, "hidden_size": 256, "moe_intermediate_size": 80, "num_hidden_layers": 6,
        "num_attention_heads": 4, "head_dim": 128, "qk_rope_head_dim": 16, "q_lora_rank": 128, "o_groups": 2,
        "o_lora_rank": 64, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 256, "n_routed_experts": 8,
        "hc_mult": 4, "sliding_window": 128, "compress_ratios": [0, 0, 4, 128, 4, 128],
        "max_position_embeddings": 16384,
    });
    measure(&Checkpoint::random(with(v4(), alike), 1).load(KvFormat::Bf16, BLOCK));
}

fn measure(model: &Model) {
    let tokens = Random(2).tokens(PREFIX + REST + 64, 4096);
    println!("{:.1} M parameters, {} threads", model.parameters() as f64 / 1e6, rayon::current_num_threads());
    let last = PREFIX / BLOCK as usize - 1;

    let mut cold = Sequence::new(model);
    let cold_seconds = timed("cold prefill", PREFIX + REST, 3, &mut || {
        cold = Sequence::new(model);
        cold.prefill(model, &tokens[..PREFIX + REST], Logits::Last).unwrap();
    });
    let mut whole = Sequence::new(model);
    whole.prefill(model, &tokens[..PREFIX], Logits::None).unwrap();
    let state = whole.state(model, last, identity(0, last)).unwrap();
    println!(
        "a block has {} bytes, a state {}",
        model.layout().object_bytes(ObjectKind::Block),
        state.len_bytes()
    );
    let mut blocks = Vec::new();
    timed("take blocks", PREFIX, 3, &mut || {
        blocks = (0..=last).map(|i| cold.block(model, i, identity(0, i)).unwrap()).collect();
    });
    let mut warm = Sequence::new(model);
    let restore_seconds = timed("restore", PREFIX, 10, &mut || {
        warm = Sequence::new(model);
        blocks.iter().for_each(|block| warm.restore(model, block).unwrap());
        warm.restore_state(model, &state).unwrap();
    });
    if model.replay_tokens(PREFIX) > 0 {
        timed("restore and replay", model.replay_tokens(PREFIX), 3, &mut || {
            let mut replayed = Sequence::new(model);
            blocks.iter().for_each(|block| replayed.restore(model, block).unwrap());
            replayed.replay(model, &tokens[..PREFIX]).unwrap();
        });
    }
    let mut rest_seconds = f64::INFINITY;
    for _ in 0..10 {
        warm.truncate(PREFIX);
        warm.restore_state(model, &state).unwrap();
        let rest = &tokens[PREFIX..PREFIX + REST];
        let mut run = || drop(warm.prefill(model, rest, Logits::Last).unwrap());
        rest_seconds = rest_seconds.min(seconds(&mut run));
    }
    println!("prefill the rest: {REST} tokens in {:.1} ms", rest_seconds * 1e3);
    println!("cold / warm: {:.1}", cold_seconds / (restore_seconds + rest_seconds));
    timed("decode", 64, 10, &mut || {
        warm.truncate(PREFIX + REST);
        for token in &tokens[PREFIX + REST..] {
            warm.prefill(model, &[*token], Logits::Last).unwrap();
        }
    });
}

/// Prints and gives the best of some rounds: other work on the machine only ever adds.
fn timed(what: &str, tokens: usize, rounds: usize, run: &mut dyn FnMut()) -> f64 {
    let best = (0..rounds).map(|_| seconds(run)).fold(f64::INFINITY, f64::min);
    println!("{what}: {tokens} tokens in {:.1} ms, {:.0} tokens/s", best * 1e3, tokens as f64 / best);
    best
}

fn seconds(run: &mut dyn FnMut()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}
