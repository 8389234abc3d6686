//! The two namings of a V4 checkpoint: that of the released files, which the rest of the decoder uses, and that of the
//! modules in `transformers`, which also keeps all experts of a layer in two tensors.

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::v4::config::V4Config;

/// Gives every tensor the name that the released files use, and every expert its own tensors.
pub(crate) fn publish(checkpoint: &mut Checkpoint, layers: usize, v4: &V4Config) -> Result<()> {
    checkpoint.rename(published)?;
    for layer in 0..layers {
        let experts = format!("layers.{layer}.ffn.experts");
        let (gate_up, down) = (format!("{experts}.gate_up_proj"), format!("{experts}.down_proj"));
        if checkpoint.has(&gate_up) {
            let joint = |expert: usize| format!("{experts}.{expert}.gate_up");
            checkpoint.split(&gate_up, joint)?;
            for expert in 0..v4.n_routed_experts {
                let halves =
                    [format!("{experts}.{expert}.w1.weight"), format!("{experts}.{expert}.w3.weight")];
                checkpoint.halve(&joint(expert), halves)?;
            }
        }
        checkpoint.split(&down, |expert| format!("{experts}.{expert}.w2.weight"))?;
    }
    Ok(())
}

/// The released name of a tensor of either naming.
fn published(name: &str) -> String {
    let name = name.strip_prefix("model.").unwrap_or(name);
    match name {
        "embed_tokens.weight" => return "embed.weight".into(),
        "lm_head.weight" => return "head.weight".into(),
        _ => {}
    }
    if let Some(part) = name.strip_prefix("hc_head.hc_") {
        return format!("hc_head_{part}");
    }
    let mut parts = name.splitn(3, '.');
    match (parts.next(), parts.next(), parts.next()) {
        (Some("layers"), Some(layer), Some(rest)) => format!("layers.{layer}.{}", of_layer(rest)),
        _ => name.to_owned(),
    }
}

/// The released name of a layer's tensor, without the layer.
fn of_layer(name: &str) -> String {
    let Some((module, rest)) = name.split_once('.') else { return name.to_owned() };
    match module {
        "input_layernorm" => format!("attn_norm.{rest}"),
        "post_attention_layernorm" => format!("ffn_norm.{rest}"),
        "attn_hc" => format!("hc_attn_{rest}"),
        "ffn_hc" => format!("hc_ffn_{rest}"),
        "self_attn" => match rest.strip_prefix("compressor.") {
            None => format!("attn.{}", of_attention(rest)),
            Some(part) => match part.strip_prefix("indexer.") {
                None => format!("attn.compressor.{}", of_compressor(part)),
                Some(part) => format!("attn.indexer.{}", of_indexer(part)),
            },
        },
        "mlp" => match rest.strip_prefix("gate.e_score_correction_bias") {
            Some(_) => "ffn.gate.bias".into(),
            None => {
                let of_expert = |part| match part {
                    "gate_proj" => "w1",
                    "up_proj" => "w3",
                    "down_proj" => "w2",
                    part => part,
                };
                // A joint tensor of all experts ends in such a name too, and keeps it.
                let single = !rest.ends_with("_proj");
                let parts = rest.split('.').map(|part| if single { of_expert(part) } else { part });
                format!("ffn.{}", parts.collect::<Vec<_>>().join("."))
            }
        },
        _ => name.to_owned(),
    }
}

fn of_attention(name: &str) -> String {
    let Some((module, rest)) = name.split_once('.') else {
        return if name == "sinks" { "attn_sink".into() } else { name.to_owned() };
    };
    let module = match module {
        "q_a_proj" => "wq_a",
        "q_a_norm" => "q_norm",
        "q_b_proj" => "wq_b",
        "kv_proj" => "wkv",
        "o_a_proj" => "wo_a",
        "o_b_proj" => "wo_b",
        module => module,
    };
    format!("{module}.{rest}")
}

fn of_compressor(name: &str) -> String {
    match name.split_once('.') {
        None if name == "position_bias" => "ape".into(),
        Some(("kv_proj", rest)) => format!("wkv.{rest}"),
        Some(("gate_proj", rest)) => format!("wgate.{rest}"),
        Some(("kv_norm", rest)) => format!("norm.{rest}"),
        _ => name.to_owned(),
    }
}

fn of_indexer(name: &str) -> String {
    match name.strip_prefix("scorer.").unwrap_or(name).split_once('.') {
        Some(("q_b_proj", rest)) => format!("wq_b.{rest}"),
        Some(("weights_proj", rest)) => format!("weights_proj.{rest}"),
        _ => format!("compressor.{}", of_compressor(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_namings_become_the_released_one() {
        for (module, released) in [
            ("model.embed_tokens.weight", "embed.weight"),
            ("lm_head.weight", "head.weight"),
            ("model.norm.weight", "norm.weight"),
            ("model.hc_head.hc_base", "hc_head_base"),
            ("model.layers.3.input_layernorm.weight", "layers.3.attn_norm.weight"),
            ("model.layers.3.ffn_hc.scale", "layers.3.hc_ffn_scale"),
            ("model.layers.12.self_attn.sinks", "layers.12.attn.attn_sink"),
            ("model.layers.3.self_attn.q_a_norm.weight", "layers.3.attn.q_norm.weight"),
            ("model.layers.3.self_attn.kv_norm.weight", "layers.3.attn.kv_norm.weight"),
            ("model.layers.3.self_attn.compressor.kv_norm.weight", "layers.3.attn.compressor.norm.weight"),
            ("model.layers.3.self_attn.compressor.position_bias", "layers.3.attn.compressor.ape"),
            (
                "model.layers.3.self_attn.compressor.indexer.gate_proj.weight",
                "layers.3.attn.indexer.compressor.wgate.weight",
            ),
            (
                "model.layers.3.self_attn.compressor.indexer.q_b_proj.weight",
                "layers.3.attn.indexer.wq_b.weight",
            ),
            (
                "model.layers.3.self_attn.compressor.indexer.scorer.weights_proj.weight",
                "layers.3.attn.indexer.weights_proj.weight",
            ),
            ("model.layers.3.mlp.gate.weight", "layers.3.ffn.gate.weight"),
            ("model.layers.3.mlp.gate.e_score_correction_bias", "layers.3.ffn.gate.bias"),
            ("model.layers.3.mlp.gate.tid2eid", "layers.3.ffn.gate.tid2eid"),
            ("model.layers.3.mlp.shared_experts.down_proj.weight", "layers.3.ffn.shared_experts.w2.weight"),
            ("model.layers.3.mlp.experts.7.up_proj.weight", "layers.3.ffn.experts.7.w3.weight"),
            (
                "model.layers.3.mlp.experts.7.gate_proj.weight_scale_inv",
                "layers.3.ffn.experts.7.w1.weight_scale_inv",
            ),
            ("model.layers.3.mlp.experts.gate_up_proj", "layers.3.ffn.experts.gate_up_proj"),
            ("model.layers.3.mlp.experts.down_proj", "layers.3.ffn.experts.down_proj"),
        ] {
            assert_eq!(published(module), released);
            assert_eq!(published(released), released);
        }
        assert_eq!(published("mtp.0.attn.wkv.weight"), "mtp.0.attn.wkv.weight");
    }
}
