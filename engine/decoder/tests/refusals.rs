//! Bad files and bad requests are refused with the facts, and nothing panics.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use esker_decoder::{DecoderError, ErrorKind, KvFormat, Logits, ModelBuilder, ModelConfig, Sequence};
use esker_prefix::TokenId;
use safetensors::Dtype;
use serde_json::{Value, json};
use support::{Checkpoint, Random, rows, serialise, v32, with};

#[test]
fn a_missing_tensor_is_named_whichever_it_is() {
    let whole = Checkpoint::random(with(v32(), json!({"attention_bias": true})), 1);
    for name in whole.tensors.keys() {
        let mut checkpoint = whole.clone();
        let shape = checkpoint.tensors.remove(name).unwrap().0;
        match checkpoint.try_load(KvFormat::F32, 16).map(drop) {
            Err(DecoderError::MissingTensor { tensor, expected }) => {
                assert_eq!((&tensor, expected), (name, shape))
            }
            other => panic!("without {name}: {other:?}"),
        }
    }
}

#[test]
fn a_tensor_of_another_shape_or_format_is_named() {
    let whole = Checkpoint::random(v32(), 1);
    let name = "model.layers.1.self_attn.kv_b_proj.weight";
    let (shape, values) = whole.tensors[name].clone();
    for wrong in [vec![shape[1], shape[0]], vec![1, shape[0], shape[1]], vec![values.len()], vec![0, 7]] {
        let mut checkpoint = whole.clone();
        let values = values[..wrong.iter().product()].to_vec();
        checkpoint.tensors.insert(name.into(), (wrong.clone(), values));
        match checkpoint.try_load(KvFormat::F32, 16).map(drop) {
            Err(DecoderError::TensorShape { tensor, expected, got }) => {
                assert_eq!((tensor.as_str(), &expected, got), (name, &shape, wrong));
            }
            other => panic!("{wrong:?}: {other:?}"),
        }
    }
    for (dtype, bytes) in [(Dtype::I32, 4), (Dtype::F64, 8), (Dtype::F8_E5M2, 1)] {
        let mut checkpoint = whole.clone();
        checkpoint.tensors.remove(name);
        let odd = serialise(&[(name, &shape, dtype, vec![0; values.len() * bytes])]);
        let mut builder = ModelBuilder::new(&checkpoint.config_text(), KvFormat::F32, 16).unwrap();
        builder.shard("a", checkpoint.shard()).unwrap();
        builder.shard("b", odd).unwrap();
        assert!(
            matches!(builder.finish().map(drop), Err(DecoderError::TensorDtype { tensor, .. }) if tensor == name)
        );
    }
}

#[test]
fn damaged_shards_are_refused() {
    let checkpoint = Checkpoint::random(v32(), 1);
    let bytes = checkpoint.shard();
    let mut random = Random(2);
    let add = |bytes: Vec<u8>| {
        let mut builder = ModelBuilder::new(&checkpoint.config_text(), KvFormat::F32, 16).unwrap();
        builder.shard("cut.safetensors", bytes).map(|()| builder.finish().map(drop))
    };
    for length in (0..40).chain((0..100).map(|_| random.below(bytes.len()))) {
        let refused = add(bytes[..length].to_vec()).unwrap_err();
        assert!(refused.to_string().contains("cut.safetensors"), "{refused}");
        assert_eq!(refused.kind(), ErrorKind::Model);
    }
    for _ in 0..200 {
        let mut damaged = bytes.to_vec();
        damaged[random.below(2000)] ^= 1 << random.below(8);
        let _ = add(damaged); // an error or, in a name that no model asks for, none: never a panic
    }
    let mut builder = ModelBuilder::new(&checkpoint.config_text(), KvFormat::F32, 16).unwrap();
    builder.shard("one", bytes.clone()).unwrap();
    assert!(matches!(builder.shard("two", bytes), Err(DecoderError::DuplicateTensor { .. })));
}

#[test]
fn bad_configurations_are_refused() {
    let with_fields = |changes: Value| ModelConfig::from_json(&with(v32(), changes).to_string());
    for (changes, word) in [
        (json!({"model_type": "llama"}), "llama"),
        (json!({"hidden_size": 0}), "hidden_size"),
        (json!({"hidden_size": -4}), "invalid value"),
        (json!({"hidden_size": 1_u64 << 40}), "hidden_size"),
        (json!({"kv_lora_rank": null}), "invalid type"),
        (json!({"q_lora_rank": null}), "q_lora_rank"),
        (json!({"qk_rope_head_dim": 7}), "even"),
        (json!({"qk_rope_head_dim": 18}), "index_head_dim"),
        (json!({"num_hidden_layers": 5000}), "num_hidden_layers"),
        (
            json!({"hidden_size": 1 << 20, "n_routed_experts": 1 << 20, "moe_intermediate_size": 1 << 20}),
            "parameters",
        ),
        (json!({"n_group": 4}), "groups"),
        (json!({"n_group": 3, "topk_group": 4}), "groups"),
        (json!({"n_group": 3, "topk_group": 1, "num_experts_per_tok": 3}), "experts"),
        (json!({"num_experts_per_tok": null}), "num_experts_per_tok"),
        (json!({"mlp_layer_types": ["dense", "sparse"]}), "mlp_layer_types"),
        (json!({"mlp_layer_types": ["dense", "sparse", "hash_moe"]}), "hash_moe"),
        (json!({"indexer_types": ["full", "full"]}), "schedule"),
        (json!({"indexer_types": ["shared", "full", "full"]}), "layer 0"),
        (json!({"hidden_act": "gelu"}), "gelu"),
        (json!({"scoring_func": "softmax"}), "softmax"),
        (json!({"rope_scaling": {"type": "linear", "factor": 2}}), "linear"),
        (json!({"rope_scaling": {"type": "yarn", "factor": 2}}), "original_max_position_embeddings"),
        (
            json!({"rope_scaling": {"type": "yarn", "factor": 0, "original_max_position_embeddings": 4}}),
            "positive",
        ),
        (json!({"rope_theta": 0}), "rope_theta"),
        (json!({"quantization_config": {"quant_method": "awq"}}), "awq"),
        (json!({"quantization_config": {"weight_block_size": [0, 128]}}), "weight_block_size"),
    ] {
        let refused = with_fields(changes.clone()).unwrap_err().to_string();
        assert!(refused.contains(word), "{changes}: {refused}");
    }
    for text in ["", "{", "[]", "null", "{\"model_type\": \"deepseek_v32\"}"] {
        assert!(ModelConfig::from_json(text).is_err());
    }
    assert!(ModelBuilder::new(&v32().to_string(), KvFormat::F32, 100).is_err(), "not a power of two");
}

#[test]
fn end_tokens_come_as_one_or_many_and_generation_config_wins() {
    let of =
        |eos: Value| ModelConfig::from_json(&with(v32(), json!({"eos_token_id": eos})).to_string()).unwrap();
    assert_eq!(of(json!(5)).eos_token_ids, [TokenId(5)]);
    assert_eq!(of(Value::Null).eos_token_ids, []);
    let checkpoint = Checkpoint::random(with(v32(), json!({"eos_token_id": [7, 9]})), 1);
    for (generation, expected) in [("{}", vec![7, 9]), (r#"{"eos_token_id": 3}"#, vec![3])] {
        let mut builder = ModelBuilder::new(&checkpoint.config_text(), KvFormat::F32, 16).unwrap();
        builder.shard("model.safetensors", checkpoint.shard()).unwrap();
        builder.generation_config(generation).unwrap();
        let expected: Vec<TokenId> = expected.into_iter().map(TokenId).collect();
        assert_eq!(builder.finish().unwrap().config().eos_token_ids, expected);
    }
}

#[test]
fn bad_requests_leave_the_sequence_as_it_was() {
    let model =
        Checkpoint::random(with(v32(), json!({"max_position_embeddings": 10})), 1).load(KvFormat::F32, 4);
    let mut sequence = Sequence::new(&model);
    let tokens = |ids: &[u32]| ids.iter().map(|&id| TokenId(id)).collect::<Vec<_>>();
    sequence.prefill(&model, &tokens(&[1, 2, 3]), Logits::None).unwrap();

    let unknown = sequence.prefill(&model, &tokens(&[4, 61, 5]), Logits::Last).unwrap_err();
    assert!(
        matches!(unknown, DecoderError::UnknownToken { token: TokenId(61), vocab_size: 61 }),
        "{unknown}"
    );
    let long = sequence.prefill(&model, &tokens(&[1; 8]), Logits::Last).unwrap_err();
    assert!(matches!(long, DecoderError::TooLong { tokens: 11, limit: 10 }), "{long}");
    assert!(matches!(sequence.prefill(&model, &[], Logits::Last), Err(DecoderError::NoTokens)));
    assert_eq!(sequence.tokens(), 3);

    let logits = sequence.prefill(&model, &tokens(&[1; 7]), Logits::All).unwrap();
    assert_eq!((logits.rows().len(), sequence.tokens()), (7, 10));
    assert_eq!(logits.last().map(<[f32]>::len), Some(61));
}

/// Weights in the formats of published checkpoints give what their values give.
#[test]
fn narrow_weights_and_extra_layers_load() {
    let config = json!({"quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 8],
    }});
    let mut checkpoint = Checkpoint::random(with(v32(), config), 1);
    let mut narrow: Vec<(String, Vec<usize>, Dtype, Vec<u8>)> = Vec::new();
    let mut random = Random(3);
    for (index, (name, (shape, values))) in checkpoint.tensors.iter_mut().enumerate() {
        let (dtype, bytes) = match index % 3 {
            0 if shape.len() == 2 && name.contains("proj") => {
                let bytes: Vec<u8> = values.iter().map(|_| random.below(0x50).to_le_bytes()[0]).collect();
                let columns = shape[1].div_ceil(8);
                let scales: Vec<f32> = (0..shape[0].div_ceil(16) * columns)
                    .map(|_| (1 + random.below(9)) as f32 / 64.0)
                    .collect();
                for (i, (value, byte)) in values.iter_mut().zip(&bytes).enumerate() {
                    let (exponent, mantissa) = (i32::from(byte >> 3), f32::from(byte & 7));
                    let plain = match exponent {
                        0 => mantissa / 512.0,
                        _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
                    };
                    *value = plain * scales[i / shape[1] / 16 * columns + i % shape[1] / 8];
                }
                let scale_bytes = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
                let scale_shape = vec![shape[0].div_ceil(16), columns];
                narrow.push((format!("{name}_scale_inv"), scale_shape, Dtype::F32, scale_bytes));
                (Dtype::F8_E4M3, bytes)
            }
            1 => {
                values.iter_mut().for_each(|value| *value = half::f16::from_f32(*value).to_f32());
                let bytes =
                    values.iter().flat_map(|&value| half::f16::from_f32(value).to_le_bytes()).collect();
                (Dtype::F16, bytes)
            }
            _ => {
                values.iter_mut().for_each(|value| *value = half::bf16::from_f32(*value).to_f32());
                let bytes =
                    values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect();
                (Dtype::BF16, bytes)
            }
        };
        narrow.push((name.clone(), shape.clone(), dtype, bytes));
    }
    // The multi-token-prediction layer and anything else that no layer asks for is ignored.
    narrow.push(("model.layers.3.eh_proj.weight".into(), vec![2, 2], Dtype::I64, vec![0; 32]));
    let parts: Vec<_> = narrow.iter().map(|(n, s, d, b)| (n.as_str(), s.as_slice(), *d, b.clone())).collect();

    let mut builder = ModelBuilder::new(&checkpoint.config_text(), KvFormat::F32, 16).unwrap();
    // A weight and its scales may lie in different files.
    let (first, second) = parts.split_at(parts.len() / 2);
    builder.shard("model-00002-of-00002.safetensors", serialise(second)).unwrap();
    builder.shard("model-00001-of-00002.safetensors", serialise(first)).unwrap();
    let model = builder.finish().unwrap();
    assert!(narrow.iter().filter(|part| part.2 == Dtype::F8_E4M3).count() > 5);
    assert_eq!(model.memory_bytes(), 4 * checkpoint.tensors.values().map(|(_, v)| v.len()).sum::<usize>());

    let tokens = Random(4).tokens(20, 61);
    let wide = checkpoint.load(KvFormat::F32, 16);
    let logits = |model| rows(&Sequence::new(model).prefill(model, &tokens, Logits::All).unwrap());
    assert!(logits(&model) == logits(&wide));
}
