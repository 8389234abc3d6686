"""Where training starts: from nothing, or from a trained V3.2 model of the same hidden width.

Latent attention in its absorbed form is V4's: one row per token serves all heads as key and as value, queries are taken
into the latent space by half of `kv_b_proj`, outputs out of it by the other half, which is `wo_a` with one group per two
heads. So the sublayers carry over, except what V3.2 has no counterpart of:

* norms of whole rows and of query heads: V3.2's scale of rows and logits is met on average;
* compressed rows begin as the mean of the tokens' rows, and sinks near nothing;
* the experts of the hash-routed layer are slices of the dense MLP, each token's those that its embedding drives most;
* hyper-connections begin as a plain residual in every stream.
"""

import json
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from model import Model, is_hash

SINK = -2.0


@torch.no_grad()
def initialise(model: Model) -> None:
    """Normal, narrower where a matrix writes into the residual; hyper-connections begin as a plain residual."""
    config = model.config
    streams = config["hc_mult"]
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf.startswith("hc_"):
            start_mixing(parameter, leaf, streams)
        elif leaf == "attn_sink":
            parameter.fill_(SINK)
        elif parameter.dim() == 2 and leaf != "ape":
            std = config["initializer_range"]
            if name.endswith(("wo_b.weight", "w2.weight")):
                std /= (2 * config["num_hidden_layers"]) ** 0.5
            parameter.normal_(0, std)
    for layer in model.layers:
        if hasattr(layer.ffn.gate, "tid2eid"):
            layer.ffn.gate.tid2eid.copy_(hashed(config))
    for draft in model.mtp:
        draft.h_proj.weight.copy_(torch.eye(config["hidden_size"]))
        draft.e_proj.weight.copy_(torch.eye(config["hidden_size"]))


def start_mixing(parameter, leaf, streams):
    """Each stream reads and writes alike, so all of them start as the plain residual; small differences let them part."""
    if leaf.endswith("_fn"):
        parameter.normal_(0, 0.02 / streams)
    elif leaf.endswith("_scale"):
        parameter.fill_(0.1)
    elif leaf.startswith("hc_head"):
        parameter.zero_()
    else:
        pre, post, comb = parameter.split([streams, streams, streams * streams])
        pre.normal_(-1, 0.5)
        post.normal_(0, 0.1)
        comb.copy_((4 * torch.eye(streams)).flatten())


def hashed(config) -> torch.Tensor:
    """Experts by token: different ones, spread evenly."""
    experts, chosen = config["n_routed_experts"], config["num_experts_per_tok"]
    token = torch.arange(config["vocab_size"]).unsqueeze(1)
    return (token * 5 + token // experts + torch.arange(chosen) * (1 + token // 64 % (experts // chosen))) % experts


@torch.no_grad()
def convert(model: Model, folder: pathlib.Path) -> None:
    """Takes over what a V3.2 model of the same hidden width knows."""
    old_config = json.loads((folder / "config.json").read_text())
    old = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    model.embed.weight.copy_(old["model.embed_tokens.weight"])
    model.head.weight.copy_(old["lm_head.weight"])
    model.norm.weight.copy_(old["model.norm.weight"])
    for n, layer in enumerate(model.layers):
        part = {name.removeprefix(f"model.layers.{n}."): tensor for name, tensor in old.items()
                if name.startswith(f"model.layers.{n}.")}
        layer.attn_norm.weight.copy_(part["input_layernorm.weight"])
        layer.ffn_norm.weight.copy_(part["post_attention_layernorm.weight"])
        convert_attention(layer.attn, part, old_config)
        if layer.attn.indexer:
            convert_indexer(layer.attn.indexer, part)
        if is_hash(model.config, n):
            slice_mlp(layer.ffn, part, model.embed.weight)
        else:
            convert_experts(layer.ffn, part)
    for draft in model.mtp:
        last = {name: tensor for name, tensor in model.layers[-1].state_dict().items()
                if "compressor" not in name and "indexer" not in name and "hc_" not in name}
        draft.load_state_dict(last, strict=False)
        draft.norm.weight.copy_(model.norm.weight)


def convert_attention(attn, part, old):
    heads, nope, rope, value = old["num_attention_heads"], old["qk_nope_head_dim"], old["qk_rope_head_dim"], old["v_head_dim"]
    latent = old["kv_lora_rank"]
    attn.wq_a.weight.copy_(part["self_attn.q_a_proj.weight"])
    attn.q_norm.weight.copy_(part["self_attn.q_a_layernorm.weight"])
    up = part["self_attn.kv_b_proj.weight"].view(heads, nope + value, latent)
    to_key, to_value = up[:, :nope], up[:, nope:]
    q = part["self_attn.q_b_proj.weight"].view(heads, nope + rope, -1)
    q = torch.cat([torch.einsum("hnl,hnq->hlq", to_key, q[:, :nope]), q[:, nope:]], 1)  # [heads, latent + rope, q latent]

    # A query has norm sqrt(width) in V4 and logits are divided by it: rows are stretched by what V3.2's logits had.
    yarn = old["rope_parameters"]
    scale = (nope + rope) ** -0.5 * (0.1 * yarn["mscale_all_dim"] * torch.tensor(yarn["factor"]).log().item() + 1) ** 2
    latent_q_weight = part["self_attn.q_a_layernorm.weight"]
    stretch = (q * latent_q_weight).pow(2).sum((1, 2)).sqrt().mean().item() * scale
    attn.wq_b.weight.copy_(q.flatten(0, 1))

    # Its norm is over the latent alone; here the rope key takes part, small, and is stretched back by the weight.
    row = part["self_attn.kv_a_proj_with_mqa.weight"].clone()
    size = lambda w: (w * part["input_layernorm.weight"]).pow(2).sum(-1).mean().sqrt().item()  # noqa: E731
    latent_size = size(row[:latent])
    shrink = 0.3 * latent_size / size(row[latent:])
    row[latent:] *= shrink
    whole = ((latent * latent_size**2 + rope * (0.3 * latent_size) ** 2) / (latent + rope)) ** 0.5
    weight = torch.cat([part["self_attn.kv_a_layernorm.weight"] * whole / latent_size, torch.full((rope,), whole / shrink)])
    attn.wkv.weight.copy_(row)
    attn.kv_norm.weight.copy_(weight * stretch)
    if attn.compressor:
        convert_compressor(attn.compressor, row, weight * stretch)

    # Groups of two heads: their values side by side are the group's output.
    out = torch.zeros(attn.groups, heads // attn.groups * value, heads // attn.groups * attn.width)
    for head in range(heads):
        group, place = divmod(head, heads // attn.groups)
        out[group, place * value:][:value, place * attn.width:][:, :latent] = to_value[head] / stretch
    attn.wo_a.weight.copy_(out.flatten(0, 1))
    attn.wo_b.weight.copy_(part["self_attn.o_proj.weight"])


def convert_compressor(compressor, row, weight):
    compressor.wkv.weight.copy_(row.repeat(1 + compressor.overlap, 1))
    compressor.norm.weight.copy_(weight)


def convert_indexer(indexer, part):
    """Rotated channels go last and pair neighbours; the norm's mean moves into the matrix, its bias is lost."""
    rope, width = indexer.rope, indexer.width
    order = torch.cat([torch.arange(rope, width), torch.arange(rope).view(2, -1).t().flatten()])
    q = part["self_attn.indexer.wq_b.weight"].unflatten(0, (indexer.heads, width))
    indexer.wq_b.weight.copy_(q[:, order].flatten(0, 1))
    k = part["self_attn.indexer.wk.weight"]
    convert_compressor(indexer.compressor, (k - k.mean(0))[order], part["self_attn.indexer.k_norm.weight"][order])
    indexer.weights_proj.weight.copy_(part["self_attn.indexer.weights_proj.weight"])


PARTS = (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))


def convert_experts(moe, part):
    moe.gate.weight.copy_(part["mlp.gate.weight"])
    moe.gate.bias.copy_(part["mlp.gate.e_score_correction_bias"])
    for new, old in PARTS:
        for n, expert in enumerate(moe.experts):
            getattr(expert, new).weight.copy_(part[f"mlp.experts.{n}.{old}.weight"])
        getattr(moe.shared_experts, new).weight.copy_(part[f"mlp.shared_experts.{old}.weight"])


def slice_mlp(moe, part, embedding):
    """The channels that most tokens drive become the shared expert, the others the routed ones."""
    gate, up, down = (part[f"mlp.{name}.weight"] for _, name in PARTS)
    x = F.rms_norm(embedding, (embedding.shape[1],)) * part["post_attention_layernorm.weight"]
    driven = (F.silu(x @ gate.t()) * (x @ up.t()) * down.norm(dim=0)) ** 2  # [tokens, channels]
    width = moe.shared_experts.w1.weight.shape[0]
    order = driven.mean(0).argsort(descending=True)
    slices = order[:width * (1 + len(moe.experts))].view(-1, width)
    for expert, channels in zip([moe.shared_experts, *moe.experts], slices):
        expert.w1.weight.copy_(gate[channels])
        expert.w3.weight.copy_(up[channels])
        expert.w2.weight.copy_(down[:, channels])
    chosen = moe.gate.tid2eid.shape[1]
    energy = torch.stack([driven[:, channels].sum(-1) for channels in slices[1:]], -1)
    moe.gate.tid2eid.copy_((energy / energy.mean(0)).topk(chosen).indices)
