//! Checkpoints of V4 as they are published, and as `transformers` names them, give what their values give.

// A test fails by panicking; codes are drawn from ranges that their types hold.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod support;

use std::collections::BTreeMap;

use esker_decoder::{DecoderError, KvFormat, Logits, Model, ModelBuilder, Sequence};
use safetensors::Dtype;
use serde_json::json;
use support::{Checkpoint, Random, row_bits, serialise, v4, with};

type Part = (Vec<usize>, Dtype, Vec<u8>);

fn finish(checkpoint: &Checkpoint, parts: &BTreeMap<String, Part>) -> esker_decoder::Result<Model> {
    let parts: Vec<_> = parts
        .iter()
        .map(|(name, (shape, dtype, bytes))| (name.as_str(), &shape[..], *dtype, bytes.clone()))
        .collect();
    let mut builder = ModelBuilder::new(&checkpoint.config_text(), KvFormat::F32, 16)?;
    // A weight and its scales may lie in different files.
    let (first, second) = parts.split_at(parts.len() / 2);
    builder.shard("model-00002-of-00002.safetensors", serialise(second))?;
    builder.shard("model-00001-of-00002.safetensors", serialise(first))?;
    builder.finish()
}

fn logits(model: &Model) -> Vec<Vec<u32>> {
    let tokens = Random(4).tokens(40, 61);
    Sequence::new(model).prefill(model, &tokens, Logits::All).unwrap().rows().map(row_bits).collect()
}

/// Writes a checkpoint as it is published: FP8 matrices, FP4 experts, BF16 and F32 for the rest; in `checkpoint` stays
/// what the bytes mean.
fn narrow(checkpoint: &mut Checkpoint) -> BTreeMap<String, Part> {
    let mut random = Random(3);
    let mut parts = BTreeMap::new();
    for (name, (shape, values)) in &mut checkpoint.tensors {
        if name.ends_with("tid2eid") {
            let bytes = values.iter().flat_map(|&value| (value as i64).to_le_bytes()).collect();
            parts.insert(name.clone(), (shape.clone(), Dtype::I64, bytes));
            continue;
        }
        let scale_name = name.replace(".weight", ".scale");
        let mut powers =
            |count: usize| -> Vec<u8> { (0..count).map(|_| 122 + random.below(4) as u8).collect() };
        let matrix = ["wq_a", "wq_b", "wkv", "wo_a", "wo_b"]
            .iter()
            .any(|part| name.contains(&format!("attn.{part}.")));
        if name.contains(".experts.") {
            let (rows, cols) = (shape[0], shape[1]);
            let columns = cols.div_ceil(32);
            let scales = powers(rows * columns);
            let codes: Vec<u8> = values.iter().map(|_| random.below(16) as u8).collect();
            for (i, (value, code)) in values.iter_mut().zip(&codes).enumerate() {
                let size = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
                let scale = 2.0_f32.powi(i32::from(scales[i / cols * columns + i % cols / 32]) - 127);
                *value = if *code < 8 { size * scale } else { -size * scale };
            }
            let packed = codes.chunks(2).map(|pair| pair[0] | pair[1] << 4).collect();
            parts.insert(scale_name, (vec![rows, columns], Dtype::F8_E8M0, scales));
            parts.insert(name.clone(), (vec![rows, cols / 2], Dtype::I8, packed));
        } else if matrix || name.contains("shared_experts") {
            let (rows, cols) = (shape[0], shape[1]);
            let columns = cols.div_ceil(16);
            let scales = powers(rows.div_ceil(8) * columns);
            let codes: Vec<u8> =
                values.iter().map(|_| random.below(0x38) as u8 | (random.below(2) << 7) as u8).collect();
            for (i, (value, code)) in values.iter_mut().zip(&codes).enumerate() {
                let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
                let size = match exponent {
                    0 => mantissa / 512.0,
                    _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
                };
                let scale = 2.0_f32.powi(i32::from(scales[i / cols / 8 * columns + i % cols / 16]) - 127);
                *value = if *code < 128 { size * scale } else { -size * scale };
            }
            parts.insert(scale_name, (vec![rows.div_ceil(8), columns], Dtype::F8_E8M0, scales));
            parts.insert(name.clone(), (shape.clone(), Dtype::F8_E4M3, codes));
        } else if name.contains("compressor.w") || name.contains("weights_proj") {
            values.iter_mut().for_each(|value| *value = half::bf16::from_f32(*value).to_f32());
            let bytes = values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect();
            parts.insert(name.clone(), (shape.clone(), Dtype::BF16, bytes));
        } else {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            parts.insert(name.clone(), (shape.clone(), Dtype::F32, bytes));
        }
    }
    parts
}

fn quantised() -> (Checkpoint, BTreeMap<String, Part>) {
    let config = json!({
        "expert_dtype": "fp4", "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic",
            "weight_block_size": [8, 16],
        },
    });
    let mut checkpoint = Checkpoint::random(with(v4(), config), 1);
    let parts = narrow(&mut checkpoint);
    (checkpoint, parts)
}

#[test]
fn published_formats_load() {
    let (checkpoint, mut parts) = quantised();
    // What belongs to other modules is ignored.
    parts.insert("mtp.0.e_proj.weight".into(), (vec![2, 2], Dtype::I64, vec![0; 32]));
    let of = |dtype: Dtype| parts.values().filter(|part| part.1 == dtype).count();
    assert!(of(Dtype::F8_E4M3) > 20 && of(Dtype::I8) > 50 && of(Dtype::BF16) > 5);
    assert!(logits(&finish(&checkpoint, &parts).unwrap()) == logits(&checkpoint.load(KvFormat::F32, 16)));
}

#[test]
fn what_is_odd_about_a_narrow_tensor_is_named() {
    let (checkpoint, parts) = quantised();
    let weight = "layers.3.ffn.experts.2.w2.weight";
    let scale = "layers.3.ffn.experts.2.w2.scale";
    let refused = |change: &dyn Fn(&mut BTreeMap<String, Part>)| {
        let mut parts = parts.clone();
        change(&mut parts);
        finish(&checkpoint, &parts).map(drop).unwrap_err()
    };
    let error = refused(&|parts| drop(parts.remove(scale)));
    assert!(error.to_string().contains("layers.3.ffn.experts.2.w2"), "{error}");
    let error = refused(&|parts| {
        let part = parts.get_mut(scale).unwrap();
        (part.0, part.2) = (vec![1, 1], vec![127]);
    });
    match error {
        DecoderError::TensorShape { tensor, expected, got } => {
            assert_eq!((tensor.as_str(), expected, got), (scale, vec![40, 1], vec![1, 1]));
        }
        other => panic!("{other}"),
    }
    let error = refused(&|parts| {
        let part = parts.get_mut(weight).unwrap();
        (part.0, part.2) = (vec![40, 24], vec![0; 960]);
    });
    match error {
        DecoderError::TensorShape { tensor, expected, got } => {
            assert_eq!((tensor.as_str(), expected, got), (weight, vec![40, 12], vec![40, 24]));
        }
        other => panic!("{other}"),
    }
    let error = refused(&|parts| {
        let part = parts.get_mut(scale).unwrap();
        (part.1, part.2) = (Dtype::I16, vec![0; 80]);
    });
    assert!(matches!(&error, DecoderError::TensorDtype { tensor, .. } if tensor == scale), "{error}");
}

/// A damaged file is refused, or damaged where no tensor is: nothing panics.
#[test]
fn damaged_narrow_shards_are_no_danger() {
    let (checkpoint, parts) = quantised();
    let parts: Vec<_> = parts
        .iter()
        .map(|(name, (shape, dtype, bytes))| (&name[..], &shape[..], *dtype, bytes.clone()))
        .collect();
    let bytes = serialise(&parts);
    let header = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let mut random = Random(9);
    for _ in 0..300 {
        let mut damaged = bytes.to_vec();
        damaged[8 + random.below(header - 8)] ^= 1 << random.below(8);
        let mut builder = ModelBuilder::new(&checkpoint.config_text(), KvFormat::F32, 16).unwrap();
        if builder.shard("damaged.safetensors", damaged).is_ok() {
            let _ = builder.finish();
        }
    }
}

/// The name that `transformers` gives a tensor; its experts are joined below.
fn module_name(name: &str) -> String {
    let mut name = match name {
        "embed.weight" => "model.embed_tokens.weight".to_owned(),
        "head.weight" => "lm_head.weight".to_owned(),
        name => format!("model.{name}").replace("model.hc_head_", "model.hc_head.hc_"),
    };
    for (released, module) in [
        (".attn_norm.", ".input_layernorm."),
        (".ffn_norm.", ".post_attention_layernorm."),
        (".hc_attn_", ".attn_hc."),
        (".hc_ffn_", ".ffn_hc."),
        (".attn.attn_sink", ".self_attn.sinks"),
        (".attn.indexer.wq_b.", ".self_attn.compressor.indexer.q_b_proj."),
        (".attn.indexer.weights_proj.", ".self_attn.compressor.indexer.scorer.weights_proj."),
        (".attn.indexer.compressor.", ".self_attn.compressor.indexer."),
        (".attn.", ".self_attn."),
        (".ape", ".position_bias"),
        (".wgate.", ".gate_proj."),
        (".wkv.", ".kv_proj."),
        ("compressor.norm.", "compressor.kv_norm."),
        ("indexer.norm.", "indexer.kv_norm."),
        (".wq_a.", ".q_a_proj."),
        (".q_norm.", ".q_a_norm."),
        (".wq_b.", ".q_b_proj."),
        (".wo_a.", ".o_a_proj."),
        (".wo_b.", ".o_b_proj."),
        (".ffn.gate.bias", ".mlp.gate.e_score_correction_bias"),
        (".ffn.", ".mlp."),
        (".w1.", ".gate_proj."),
        (".w3.", ".up_proj."),
        (".w2.", ".down_proj."),
    ] {
        name = name.replace(released, module);
    }
    name
}

#[test]
fn names_of_modules_and_joint_experts_load() {
    let checkpoint = Checkpoint::random(v4(), 1);
    let bytes = |name: &str| -> Vec<u8> {
        checkpoint.tensors[name].1.iter().flat_map(|value| value.to_le_bytes()).collect()
    };
    let mut parts: BTreeMap<String, Part> = BTreeMap::new();
    for (name, (shape, values)) in &checkpoint.tensors {
        if name.ends_with("tid2eid") {
            let bytes = values.iter().flat_map(|&value| (value as i64).to_le_bytes()).collect();
            parts.insert(module_name(name), (shape.clone(), Dtype::I64, bytes));
        } else if !name.contains(".experts.") {
            parts.insert(module_name(name), (shape.clone(), Dtype::F32, bytes(name)));
        }
    }
    let single = parts.clone();
    for layer in 0..5 {
        let expert =
            |expert: usize, part: &str| bytes(&format!("layers.{layer}.ffn.experts.{expert}.{part}.weight"));
        let gate_up = (0..6).flat_map(|e| [expert(e, "w1"), expert(e, "w3")].concat()).collect();
        let down = (0..6).flat_map(|e| expert(e, "w2")).collect();
        let name = format!("model.layers.{layer}.mlp.experts");
        parts.insert(format!("{name}.gate_up_proj"), (vec![6, 48, 40], Dtype::F32, gate_up));
        parts.insert(format!("{name}.down_proj"), (vec![6, 40, 24], Dtype::F32, down));
    }
    let expected = logits(&checkpoint.load(KvFormat::F32, 16));
    assert!(logits(&finish(&checkpoint, &parts).unwrap()) == expected);
    // Experts that have tensors of their own may be named as modules are, too.
    let mut separate = single;
    for name in checkpoint.tensors.keys().filter(|name| name.contains(".experts.")) {
        separate.insert(module_name(name), (checkpoint.tensors[name].0.clone(), Dtype::F32, bytes(name)));
    }
    assert!(logits(&finish(&checkpoint, &separate).unwrap()) == expected);

    let mut twice = parts.clone();
    twice.insert("embed.weight".into(), parts["model.embed_tokens.weight"].clone());
    match finish(&checkpoint, &twice).map(drop) {
        Err(DecoderError::DuplicateTensor { tensor, .. }) => assert_eq!(tensor, "embed.weight"),
        other => panic!("{other:?}"),
    }
    parts.remove("model.layers.2.mlp.experts.gate_up_proj");
    match finish(&checkpoint, &parts).map(drop) {
        Err(DecoderError::MissingTensor { tensor, .. }) => {
            assert_eq!(tensor, "layers.2.ffn.experts.0.w1.weight");
        }
        other => panic!("{other:?}"),
    }
}
