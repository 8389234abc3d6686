"""DeepSeek V3.2 in PyTorch, for training: expanded MLA, the sparse-attention indexer, and MoE.

Parameter names are those of the published checkpoints, so `state_dict()` is the checkpoint. Two
kinds of attention, chosen by `Run.attention`:

* `dense`: causal attention over everything (the backbone is trained this way);
* `sparse`: over the indexer's `index_topk` best tokens (how the model is deployed).

With `Run.index_queries` the indexer is trained as well: `Run.index_loss` collects, layer by layer, the
KL divergence from the attention distribution (summed over heads, L1-normalised) to the softmax of the
index scores, for that many query rows drawn at random. Its inputs are detached, so this loss never
reaches the backbone. Under `sparse` attention the divergence is over the selected tokens only.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

LATENT_EPS = 1e-6  # of the norms inside attention, whatever `rms_norm_eps` says
QUERY_CHUNK = 1024  # rows of the score matrix that exist at once in sparse attention


@dataclass
class Run:
    """What one forward pass computes, and what it leaves behind."""

    attention: str = "dense"
    index_queries: int = 0
    index_loss: list[torch.Tensor] = field(default_factory=list)
    observe: object = None  # under `sparse`, called with (attention, q, k, scale, selected, first query) per chunk


class Model(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(config, n) for n in range(config["num_hidden_layers"]))
        self.model.norm = RmsNorm(config["hidden_size"], config["rms_norm_eps"])
        self.lm_head = Linear(config["hidden_size"], config["vocab_size"])

    def forward(self, ids: torch.Tensor, run: Run) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden] before the head, for ids [batch, tokens] from position 0."""
        x = self.model.embed_tokens(ids)
        rope = rope_tables(self.config, ids.shape[1], ids.device)
        for layer in self.model.layers:
            x = layer(x, rope, run)
        return self.model.norm(x)

    def loss(self, ids: torch.Tensor, run: Run, reduction: str = "mean") -> torch.Tensor:
        """Cross-entropy of ids[:, 1:] given what precedes them."""
        logits = self.lm_head(self(ids[:, :-1], run)).float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)

    def indexer_parameters(self):
        return [p for n, p in self.named_parameters() if ".indexer." in n]


class Layer(nn.Module):
    def __init__(self, config: dict, n: int):
        super().__init__()
        self.n = n
        self.input_layernorm = RmsNorm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config, n)
        self.post_attention_layernorm = RmsNorm(config["hidden_size"], config["rms_norm_eps"])
        dense = n < config["first_k_dense_replace"]
        self.mlp = Mlp(config["hidden_size"], config["intermediate_size"]) if dense else Moe(config)

    def forward(self, x, rope, run):
        x = x + self.self_attn(self.input_layernorm(x), rope, run)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Multi-head latent attention. It materialises keys and values per head, which trains faster."""

    def __init__(self, config: dict, layer: int):
        super().__init__()
        self.layer, self.config, self.heads = layer, config, config["num_attention_heads"]
        self.nope, self.rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        self.v_dim, self.kv_lora, hidden = config["v_head_dim"], config["kv_lora_rank"], config["hidden_size"]
        self.q_a_proj = Linear(hidden, config["q_lora_rank"])
        self.q_a_layernorm = RmsNorm(config["q_lora_rank"], LATENT_EPS)
        self.q_b_proj = Linear(config["q_lora_rank"], self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = Linear(hidden, self.kv_lora + self.rope)
        self.kv_a_layernorm = RmsNorm(self.kv_lora, LATENT_EPS)
        self.kv_b_proj = Linear(self.kv_lora, self.heads * (self.nope + self.v_dim))
        self.o_proj = Linear(self.heads * self.v_dim, hidden)
        self.indexer = Indexer(config)

    def forward(self, x, rope, run):
        batch, tokens, _ = x.shape
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q_nope, q_pe = per_head(self.q_b_proj(q_latent), self.heads).split([self.nope, self.rope], -1)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split([self.kv_lora, self.rope], -1)
        k_nope, v = per_head(self.kv_b_proj(self.kv_a_layernorm(latent)), self.heads).split([self.nope, self.v_dim], -1)
        k_pe = rotate_interleaved(k_pe.unsqueeze(1), rope).expand(-1, self.heads, -1, -1)
        q = torch.cat([q_nope, rotate_interleaved(q_pe, rope)], -1)
        k = torch.cat([k_nope, k_pe], -1)
        scale = softmax_scale(self.config)
        if run.attention == "dense":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            index = self.indexer(x, q_latent, rope)
            out = self.sparse(q, k, v, scale, index, run)
        if run.index_queries:
            index = self.indexer(x.detach(), q_latent.detach(), rope)
            run.index_loss.append(self.indexer_loss(q.detach(), k.detach(), scale, index, run))
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))

    def sparse(self, q, k, v, scale, index, run):
        parts = []
        for start in range(0, q.shape[2], QUERY_CHUNK):
            end = min(start + QUERY_CHUNK, q.shape[2])
            with torch.no_grad():
                scores = index.scores(torch.arange(start, end, device=q.device))[..., :end]
                selected = top_k(scores, self.config["index_topk"])
            if run.observe:
                run.observe(self, q[:, :, start:end], k[:, :, :end], scale, selected, start)
            parts.append(F.scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, :end], v[:, :, :end], attn_mask=selected.unsqueeze(1), scale=scale))
        return torch.cat(parts, 2)

    def indexer_loss(self, q, k, scale, index, run):
        rows = torch.randperm(q.shape[2], device=q.device)[:run.index_queries]
        scores = index.scores(rows)
        visible = scores.detach() > -torch.inf
        if run.attention == "sparse":
            visible = top_k(scores.detach(), self.config["index_topk"])
        with torch.no_grad():
            target = attention_mass(q[:, :, rows], k, scale, visible)
        log_p = scores.masked_fill(~visible, -torch.inf).log_softmax(-1).masked_fill(~visible, 0)
        return (torch.xlogy(target, target) - target * log_p).sum(-1).mean()


def attention_mass(q, k, scale, visible):
    """Attention probabilities [batch, queries, keys], averaged over the heads."""
    logits = (q @ k.transpose(-1, -2)).float() * scale
    return logits.masked_fill(~visible.unsqueeze(1), -torch.inf).softmax(-1).mean(1)


class Indexer(nn.Module):
    """The cheap scorer that decides which tokens attention may see."""

    def __init__(self, config: dict):
        super().__init__()
        self.heads, self.dim, self.rope = config["index_n_heads"], config["index_head_dim"], config["qk_rope_head_dim"]
        self.wq_b = Linear(config["q_lora_rank"], self.heads * self.dim)
        self.wk = Linear(config["hidden_size"], self.dim)
        self.k_norm = nn.LayerNorm(self.dim, eps=LATENT_EPS)
        self.weights_proj = Linear(config["hidden_size"], self.heads)

    def forward(self, x, q_latent, rope):
        q = self.rotate(per_head(self.wq_b(q_latent), self.heads), rope)
        k = self.rotate(self.k_norm(self.wk(x)).unsqueeze(1), rope)
        return IndexRows(q, k, self.weights_proj(x) * self.heads**-0.5, self.dim**-0.5)

    def rotate(self, x, rope):
        """Here the rope channels come first and are paired half-split, unlike in attention."""
        return torch.cat([rotate_half_split(x[..., :self.rope], rope), x[..., self.rope:]], -1)


@dataclass
class IndexRows:
    q: torch.Tensor  # [batch, heads, tokens, dim]
    k: torch.Tensor  # [batch, 1, tokens, dim]
    weights: torch.Tensor  # [batch, tokens, heads]
    scale: float

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """[batch, rows, tokens], -inf where a row may not look."""
        total = 0.0
        for head in range(self.q.shape[1]):
            dots = (self.q[:, head, rows] @ self.k[:, 0].transpose(-1, -2)).float() * self.scale
            total = total + self.weights[:, rows, head, None].float() * dots.relu()
        future = torch.arange(self.k.shape[2], device=rows.device) > rows[:, None]
        return total.masked_fill(future, -torch.inf)


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k best visible tokens of each row as booleans; of equal scores the lower index wins."""
    visible = scores > -torch.inf
    if scores.shape[-1] <= k:
        return visible
    worst = scores.topk(k).values.min(-1, keepdim=True).values
    chosen = (scores >= worst) & visible
    if chosen.sum(-1).max() <= k:
        return chosen
    above, level = scores > worst, (scores == worst) & visible
    return above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj, self.up_proj = Linear(hidden, width), Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Moe(nn.Module):
    """Routed experts and a shared one. Every expert is computed for every token and weighted, mostly by
    zero: at this size one large matrix product is faster than gathering tokens for eight small ones."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        hidden, width = config["hidden_size"], config["moe_intermediate_size"]
        self.gate = Router(hidden, config["n_routed_experts"])
        self.experts = nn.ModuleList(Mlp(hidden, width) for _ in range(config["n_routed_experts"]))
        self.shared_experts = Mlp(hidden, width * config["n_shared_experts"])

    def forward(self, x):
        gates = self.gate(x, self.config)
        stacked = lambda name, dim: torch.cat([getattr(e, name).weight for e in self.experts], dim)  # noqa: E731
        h = F.silu(F.linear(x, stacked("gate_proj", 0))) * F.linear(x, stacked("up_proj", 0))
        h = h.unflatten(-1, (len(self.experts), -1)) * gates.unsqueeze(-1).to(h.dtype)
        return F.linear(h.flatten(-2), stacked("down_proj", 1)) + self.shared_experts(x)


class Router(nn.Module):
    def __init__(self, hidden: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.load = None  # tokens per expert in the last pass, for `balance`

    def forward(self, x, config):
        """Weights [batch, tokens, experts], zero for those not chosen."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        with torch.no_grad():
            choice = scores + self.e_score_correction_bias
            groups = choice.unflatten(-1, (config["n_group"], -1))
            best = groups.topk(min(2, groups.shape[-1])).values.sum(-1).topk(config["topk_group"]).indices
            kept = torch.zeros_like(groups[..., 0]).scatter(-1, best, 1).bool().unsqueeze(-1)
            choice = groups.masked_fill(~kept, -torch.inf).flatten(-2)
            chosen = torch.zeros_like(choice).scatter(-1, choice.topk(config["num_experts_per_tok"]).indices, 1)
            self.load = chosen.flatten(0, -2).sum(0)
        weights = scores * chosen
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * config["routed_scaling_factor"]

    @torch.no_grad()
    def balance(self, step: float):
        """Nudge the biases towards an even load; they steer the choice but get no gradient."""
        self.e_score_correction_bias += step * (self.load.mean() - self.load).sign()


class RmsNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)


def per_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rope_tables(config: dict, tokens: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [tokens, qk_rope_head_dim / 2] of positions 0..tokens; YaRN bends the frequencies."""
    rope, dim = config["rope_parameters"], config["qk_rope_head_dim"]
    i = torch.arange(dim // 2, dtype=torch.float64)
    frequency = rope["rope_theta"] ** (-2 * i / dim)
    if rope["rope_type"] == "yarn":
        def pair_with(rotations):  # the pair that turns this often within the original context
            original = rope["original_max_position_embeddings"]
            return dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(rope["rope_theta"]))

        low = max(math.floor(pair_with(rope["beta_fast"])), 0)
        high = min(math.ceil(pair_with(rope["beta_slow"])), dim - 1)
        ramp = ((i - low) / (high - low or 0.001)).clamp(0, 1)
        frequency = frequency * (1 - ramp) + frequency / rope["factor"] * ramp
    angle = torch.outer(torch.arange(tokens, dtype=torch.float64), frequency)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def softmax_scale(config: dict) -> float:
    rope, scale = config["rope_parameters"], (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    if rope["rope_type"] == "yarn":
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2
    return scale


def rotate_interleaved(x, rope):
    cos, sin = (t.to(x.dtype) for t in rope)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def rotate_half_split(x, rope):
    cos, sin = (t.to(x.dtype) for t in rope)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
