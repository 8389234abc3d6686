//! What is read from a model's folder, fed with the fuzzers' corpus and random mutations of it: no panic, and some of it is
//! accepted, so that the mutations get past the first check. `make fuzz` goes further.
//!
//! `ESKER_WRITE_CORPUS=1` writes the sound examples to the corpus.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a test fails by panicking; tables of experts are drawn as F32

mod support;
#[path = "support/loading.rs"]
mod targets;

use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Value, json};
use support::{Checkpoint, Random, serialise, v4, v32, with};

/// Of each file of the corpus.
const MUTATIONS: usize = 300;

#[test]
fn loaders_stand_the_corpus_and_mutations_of_it() {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    if std::env::var_os("ESKER_WRITE_CORPUS").is_some() {
        write(&corpus);
    }
    let seed = std::env::var("ESKER_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 0x5EED);
    println!("ESKER_SEED={seed}");
    let mut random = Random(seed);
    type Accepts = fn(&[u8]) -> bool;
    let targets: [(&str, Accepts); 3] = [
        ("model_config", targets::config),
        ("checkpoint", targets::checkpoint),
        ("tokenizer", targets::tokenizer),
    ];
    for (name, target) in targets {
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(corpus.join(name)).unwrap().map(|file| file.unwrap().path()).collect();
        files.sort();
        let (mut fed, mut accepted) = (0, 0);
        for file in files {
            let sound = std::fs::read(&file).unwrap();
            assert!(target(&sound), "{} is refused", file.display());
            for _ in 0..MUTATIONS {
                fed += 1;
                accepted += usize::from(target(&mutate(&sound, &mut random)));
            }
        }
        println!("{name}: {fed} fed, {accepted} accepted");
        assert!(accepted > 0 && accepted < fed, "{name}: {accepted} of {fed} were accepted");
    }
}

/// Flips bits, cuts, moves pieces, and puts other numbers where numbers are.
fn mutate(sound: &[u8], random: &mut Random) -> Vec<u8> {
    const NUMBERS: [&str; 12] = [
        "0",
        "1",
        "2",
        "-1",
        "3.5",
        "1e400",
        "255",
        "65536",
        "4294967296",
        "18446744073709551615",
        "null",
        "[]",
    ];
    let mut bytes = sound.to_vec();
    for _ in 0..1 + random.below(3) {
        let at = random.below(bytes.len().max(1));
        match random.below(8) {
            _ if bytes.is_empty() => bytes.push(0),
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = [0, 1, 0x7F, 0x80, 0xFF][random.below(5)],
            2 if random.below(4) == 0 => bytes.truncate(at),
            3 => {
                let (from, len) = (random.below(bytes.len()), random.below(40));
                let piece = bytes[from..(from + len).min(bytes.len())].to_vec();
                drop(bytes.splice(at..at, piece));
            }
            _ => {
                let digit = |byte: &u8| byte.is_ascii_digit();
                let Some(from) = bytes[at..].iter().position(digit).map(|digits| at + digits) else {
                    continue;
                };
                let len = bytes[from..].iter().take_while(|byte| digit(byte)).count();
                drop(bytes.splice(from..from + len, NUMBERS[random.below(NUMBERS.len())].bytes()));
            }
        }
    }
    bytes
}

/// As small as models get, in each family, and a tokenizer of each kind.
fn write(corpus: &Path) {
    let save = |target: &str, name: &str, bytes: &[u8]| {
        std::fs::create_dir_all(corpus.join(target)).unwrap();
        std::fs::write(corpus.join(target).join(name), bytes).unwrap();
    };
    let glm = json!({
        "model_type": "glm_moe_dsa", "indexer_types": ["full", "full", "shared"], "mlp_layer_types": ["dense", "sparse", "sparse"],
    });
    let named = json!({
        "compress_ratios": null, "num_hash_layers": null, "rope_scaling": null, "compress_rope_theta": null,
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["hash_moe", "moe", "moe"], "num_hidden_layers": 3,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 7000.0},
            "compress": {"rope_type": "yarn", "rope_theta": 90000.0, "factor": 8.0, "original_max_position_embeddings": 32},
        },
    });
    for (name, config) in
        [("v32", v32()), ("v4", v4()), ("glm", with(v32(), glm)), ("v4-named", with(v4(), named))]
    {
        save("model_config", name, config.to_string().as_bytes());
    }
    let tiny = json!({
        "vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "q_lora_rank": 4, "index_n_heads": 1, "index_head_dim": 4,
        "index_topk": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4,
    });
    let tiny_v32 = json!({
        "num_hidden_layers": 2, "intermediate_size": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2,
        "v_head_dim": 2,
    });
    let tiny_v4 = json!({
        "num_hidden_layers": 2, "compress_ratios": [4, 8, 0], "num_hash_layers": 1, "head_dim": 4, "qk_rope_head_dim": 2,
        "o_groups": 1, "o_lora_rank": 2, "hc_mult": 2, "sliding_window": 4, "num_nextn_predict_layers": 1,
    });
    for (name, config) in
        [("v32", with(with(v32(), tiny.clone()), tiny_v32)), ("v4", with(with(v4(), tiny), tiny_v4))]
    {
        let checkpoint = Checkpoint::random(config, 1);
        save("checkpoint", name, &in_one(&checkpoint.config, &checkpoint.shard()));
        save("checkpoint", &format!("{name}-bf16"), &in_one(&checkpoint.config, &narrow(&checkpoint)));
    }
    let special = json!({
        "id": 3, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true,
    });
    let file = |model: Value, pre_tokenizer: Value, decoder: Value| {
        json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            "padding": {
                "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0,
                "pad_token": "a",
            },
            "added_tokens": [special], "normalizer": {"type": "NFC"}, "pre_tokenizer": pre_tokenizer, "post_processor": null,
            "decoder": decoder, "model": model,
        })
        .to_string()
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let split = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}|\\s+(?!\\S)"}, "behavior": "Isolated", "invert": false}, byte_level,
    ]});
    let vocab = json!({"a": 0, "b": 1, "ab": 2});
    let bpe = json!({"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "byte_fallback": true, "unk_token": "a"});
    save("tokenizer", "bpe", file(bpe, split, byte_level).as_bytes());
    let unigram =
        json!({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["ab", -1.5]]});
    let metaspace =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    save("tokenizer", "unigram", file(unigram, metaspace.clone(), metaspace).as_bytes());
    let pieces = json!({
        "type": "WordPiece", "vocab": vocab, "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9,
    });
    let word_piece = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    save("tokenizer", "word-piece", file(pieces, json!({"type": "Whitespace"}), word_piece).as_bytes());
}

fn in_one(config: &Value, shard: &[u8]) -> Vec<u8> {
    let config = config.to_string();
    [&u32::try_from(config.len()).unwrap().to_le_bytes()[..], config.as_bytes(), shard].concat()
}

/// The same weights in BF16.
fn narrow(checkpoint: &Checkpoint) -> Vec<u8> {
    let parts: Vec<(&str, &[usize], Dtype, Vec<u8>)> = checkpoint
        .tensors
        .iter()
        .map(|(name, (shape, values))| {
            let bytes = match name.ends_with("tid2eid") {
                true => values.iter().flat_map(|&value| (value as i64).to_le_bytes()).collect(),
                false => values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect(),
            };
            let dtype = if name.ends_with("tid2eid") { Dtype::I64 } else { Dtype::BF16 };
            (name.as_str(), shape.as_slice(), dtype, bytes)
        })
        .collect();
    serialise(&parts).to_vec()
}
