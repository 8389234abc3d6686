//! V4 files that are bad are refused with the facts.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use esker_decoder::{DecoderError, KvFormat, ModelBuilder, ModelConfig};
use serde_json::{Value, json};
use support::{Checkpoint, Random, v4, with};

#[test]
fn a_missing_tensor_is_named_whichever_it_is() {
    let whole = Checkpoint::random(v4(), 1);
    for name in whole.tensors.keys() {
        let mut checkpoint = whole.clone();
        let shape = checkpoint.tensors.remove(name).unwrap().0;
        match checkpoint.try_load(KvFormat::F32, 16).map(drop) {
            Err(DecoderError::MissingTensor { tensor, expected }) => {
                assert_eq!((&tensor, expected), (name, shape));
            }
            other => panic!("without {name}: {other:?}"),
        }
    }
}

#[test]
fn a_table_that_names_no_expert_or_holds_no_integers_is_refused() {
    let name = "layers.1.ffn.gate.tid2eid";
    for wrong in [6.0, -1.0] {
        let mut checkpoint = Checkpoint::random(v4(), 1);
        checkpoint.tensors.get_mut(name).unwrap().1[7] = wrong;
        match checkpoint.try_load(KvFormat::F32, 16).map(drop) {
            Err(DecoderError::ExpertTable { tensor, got, experts: 6 }) => {
                assert_eq!((tensor.as_str(), got as f32), (name, wrong));
            }
            other => panic!("{wrong}: {other:?}"),
        }
    }
    let mut checkpoint = Checkpoint::random(v4(), 1);
    let (shape, values) = checkpoint.tensors.remove(name).unwrap();
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let floats = support::serialise(&[(name, &shape, safetensors::Dtype::F32, bytes)]);
    let mut builder = ModelBuilder::new(&checkpoint.config_text(), KvFormat::F32, 16).unwrap();
    builder.shard("a", checkpoint.shard()).unwrap();
    builder.shard("b", floats).unwrap();
    let refused = builder.finish().map(drop).unwrap_err();
    assert!(matches!(&refused, DecoderError::TensorDtype { tensor, .. } if tensor == name), "{refused}");
    assert!(refused.to_string().contains("I64"), "{refused}");
}

/// Whatever numbers a file holds, it is refused or its model asks for its first tensor: nothing panics or allocates.
#[test]
fn absurd_numbers_are_no_danger() {
    let mut random = Random(1);
    let edges = [0_u64, 1, 2, 3, 4, 5, 64, 4096, 4097, 65_535, 65_536, 1 << 20, 1 << 30, 1 << 40, u64::MAX];
    let numbers: Vec<String> = {
        let base = v4();
        let fields = base.as_object().unwrap().iter();
        fields.filter(|(_, value)| value.is_number()).map(|(name, _)| name.clone()).collect()
    };
    let mut asked = 0;
    for _ in 0..3000 {
        let mut config = v4();
        for _ in 0..1 + random.below(3) {
            let edge = edges[random.below(edges.len())];
            match random.below(6) {
                0 => config["compress_ratios"][random.below(6)] = edge.into(),
                1 => config["rope_scaling"]["factor"] = edge.into(),
                _ => config[&numbers[random.below(numbers.len())]] = edge.into(),
            }
        }
        let format = [KvFormat::F32, KvFormat::Bf16, KvFormat::Deployed][random.below(3)];
        let Ok(builder) = ModelBuilder::new(&config.to_string(), format, 1 << random.below(12)) else {
            continue;
        };
        asked += 1;
        assert!(builder.finish().is_err(), "{config}: there are no tensors");
    }
    assert!(asked > 100, "only {asked} were not refused at once");
}

#[test]
fn bad_configurations_are_refused() {
    let with_fields = |changes: Value| ModelConfig::from_json(&with(v4(), changes).to_string());
    let named = |rates: Value| {
        let types = ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"];
        let cycle: Vec<&str> = types.iter().cycle().take(5).copied().collect();
        json!({"compress_ratios": null, "layer_types": cycle, "compress_rates": rates})
    };
    for (changes, word) in [
        (json!({"compress_ratios": [0, 4]}), "schedule"),
        (json!({"compress_ratios": null}), "compress_ratios"),
        (json!({"compress_ratios": [0, 16, 4, 3, 4]}), "ratio 3"),
        (named(json!({"compressed_sparse_attention": 1})), "ratio 1"),
        (named(json!({"heavily_compressed_attention": 0})), "ratio 0"),
        (json!({"layer_types": ["sliding_attention"]}), "schedule"),
        (json!({"layer_types": vec!["full_attention"; 5]}), "full_attention"),
        (json!({"mlp_layer_types": ["moe"]}), "mlp_layer_types"),
        (json!({"mlp_layer_types": ["moe", "moe", "moe", "moe", "dense"]}), "dense"),
        (json!({"head_dim": 8}), "head_dim"),
        (json!({"qk_rope_head_dim": 7}), "even"),
        (json!({"qk_rope_head_dim": null}), "qk_rope_head_dim"),
        (json!({"o_groups": 3}), "o_groups"),
        (json!({"hc_mult": 0}), "hc_mult"),
        (json!({"hc_sinkhorn_iters": 0}), "hc_sinkhorn_iters"),
        (json!({"hc_eps": -1.0}), "hc_eps"),
        (json!({"num_experts_per_tok": 7}), "experts"),
        (json!({"num_key_value_heads": 2}), "num_key_value_heads"),
        (json!({"scoring_func": "softmax"}), "softmax"),
        (json!({"attention_bias": true}), "attention_bias"),
        (json!({"sliding_window": 0}), "sliding_window"),
        (json!({"rope_scaling": {"type": "linear", "factor": 2}}), "linear"),
        (json!({"hidden_size": 1 << 20, "n_routed_experts": 1 << 20}), "parameters"),
    ] {
        let refused = with_fields(changes.clone()).unwrap_err().to_string();
        assert!(refused.contains(word), "{changes}: {refused}");
    }
}
