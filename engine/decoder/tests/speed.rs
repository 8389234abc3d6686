//! How fast a model of the bundled size is; run by hand:
//! `cargo test --release -p esker-decoder --test speed -- --ignored --nocapture`.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use std::time::Instant;

use esker_decoder::{KvFormat, Logits, Sequence};
use serde_json::json;
use support::{Checkpoint, Random, identity, v32, with};

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
    let model = Checkpoint::random(with(v32(), bundled), 1).load(KvFormat::Bf16, BLOCK);
    let tokens = Random(2).tokens(PREFIX + REST + 64, 4096);
    println!("{:.1} M parameters, {} threads", model.parameters() as f64 / 1e6, rayon::current_num_threads());

    // The best of some rounds: other work on the machine only ever adds.
    let timed = |what: &str, tokens: usize, rounds: usize, run: &mut dyn FnMut()| {
        let round = |_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        };
        let seconds = (0..rounds).map(round).fold(f64::INFINITY, f64::min);
        println!(
            "{what}: {tokens} tokens in {:.1} ms, {:.0} tokens/s",
            seconds * 1e3,
            tokens as f64 / seconds
        );
        seconds
    };
    let mut cold = Sequence::new(&model);
    let cold_seconds = timed("cold prefill", PREFIX + REST, 3, &mut || {
        cold = Sequence::new(&model);
        cold.prefill(&model, &tokens[..PREFIX + REST], Logits::Last).unwrap();
    });
    let mut blocks = Vec::new();
    timed("take blocks", PREFIX, 3, &mut || {
        let count = PREFIX / BLOCK as usize;
        blocks = (0..count).map(|i| cold.block(&model, i, identity(0, i)).unwrap()).collect();
    });
    let mut warm = Sequence::new(&model);
    let restore_seconds = timed("restore", PREFIX, 10, &mut || {
        warm = Sequence::new(&model);
        blocks.iter().for_each(|block| warm.restore(&model, block).unwrap());
    });
    let rest_seconds = timed("prefill the rest", REST, 20, &mut || {
        warm.truncate(PREFIX);
        warm.prefill(&model, &tokens[PREFIX..PREFIX + REST], Logits::Last).unwrap();
    });
    println!("cold / warm: {:.1}", cold_seconds / (restore_seconds + rest_seconds));
    timed("decode", 64, 10, &mut || {
        warm.truncate(PREFIX + REST);
        for token in &tokens[PREFIX + REST..] {
            warm.prefill(&model, &[*token], Logits::Last).unwrap();
        }
    });
}
