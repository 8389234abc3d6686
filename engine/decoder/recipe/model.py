"""DeepSeek V4 in PyTorch, for training: windows, compressed rows (CSA, HCA), the indexer, hyper-connections, MoE by
score and by table, and the draft block.

Parameter names are those of the published checkpoints, so `state_dict()` is the checkpoint. `Run` says what one pass
does:

* `attention="dense"`: a CSA layer attends to all compressed rows that a query may see (the backbone learns this way);
* `attention="sparse"`: to the indexer's `index_topk` best of them (how the model is deployed);
* `index_loss`: the indexer is trained as well. `Run.losses` collects, layer by layer, the KL divergence from the
  attention that falls on compressed rows (mean over heads, normalised) to the softmax of the index scores. Its inputs
  are detached, so this loss never reaches the backbone. Under `sparse` it is over the selected rows only.

Attention is computed for groups of queries, each against two windows' worth of rows and the compressed rows that its
last query sees. Under long contexts the insides of layers and groups are computed again in the backward pass, not kept.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

GROUP = 512  # queries, about, whose scores exist at once
KEPT_TOKENS = 4096  # of a sequence, up to which everything is kept for the backward pass


@dataclass
class Run:
    """What one forward pass computes, and what it leaves behind."""

    attention: str = "dense"
    index_loss: bool = False
    compiled: bool = False  # run the layers through `torch.compile`: worth it for many passes of one shape
    losses: list[torch.Tensor] = field(default_factory=list)
    observe: object = None  # called per CSA layer and group with (layer, probabilities on rows, selected, first query)


class Model(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        hidden, streams = config["hidden_size"], config["hc_mult"]
        self.embed = nn.Embedding(config["vocab_size"], hidden)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config["num_hidden_layers"]))
        self.compiled = [torch.compile(layer.forward, dynamic=False) for layer in self.layers]  # when first called
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = mixing(streams, streams * hidden, 1)
        self.norm = RmsNorm(hidden, config["rms_norm_eps"])
        self.head = Linear(hidden, config["vocab_size"])
        self.mtp = nn.ModuleList(Draft(config) for _ in range(config.get("num_nextn_predict_layers", 0)))

    def streams(self, ids: torch.Tensor, run: Run) -> torch.Tensor:
        """The residual [batch, tokens, streams, hidden] after the layers, for ids [batch, tokens] from position 0."""
        x = self.embed(ids)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = x.unsqueeze(2).expand(-1, -1, self.config["hc_mult"], -1).contiguous()
        ropes = self.ropes(ids)
        for layer, compiled in zip(self.layers, self.compiled):
            arguments = (x, ids, ropes[layer.attn.ratio > 0], run)
            call = compiled if run.compiled else layer
            x = checkpoint(call, *arguments, use_reentrant=False) if long(ids) else call(*arguments)
        return x

    def ropes(self, ids):
        """Of the layers that have only the window, and of the others."""
        parameters = self.config["rope_parameters"]
        dim = rope_dim(self.config)
        return [rope_tables(parameters[kind], dim, ids.shape[1], ids.device) for kind in ("main", "compress")]

    def forward(self, ids: torch.Tensor, run: Run) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden] before the head."""
        return self.norm(sum_streams(self.streams(ids, run), self, "hc_head", self.config))

    def loss(self, ids: torch.Tensor, run: Run, reduction: str = "mean") -> torch.Tensor:
        """Cross-entropy of ids[:, 1:] given what precedes them."""
        return self.cross_entropy(self(ids[:, :-1], run), ids[:, 1:], reduction)

    def draft_loss(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the draft block: cross-entropy of ids[:, 2:], and how often its guess is the model's own; the model itself
        gets no gradient."""
        with torch.no_grad():
            x = self.streams(ids[:, :-1], Run("sparse"))
            own = self.head(self.norm(sum_streams(x, self, "hc_head", self.config))).argmax(-1)
        x, following = x[:, :-1], ids[:, 1:-1]
        block = self.mtp[0]
        out = block(x, self.embed(following).detach(), following, self.ropes(following)[0])
        with torch.no_grad():
            agreed = (self.head(out).argmax(-1) == own[:, 1:]).float().mean()
        return self.cross_entropy(out, ids[:, 2:], "mean", self.head.weight.detach()), agreed

    def cross_entropy(self, hidden, targets, reduction, weight=None):
        weight = self.head.weight if weight is None else weight

        def part(hidden, targets):
            return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")

        pairs = zip(hidden.flatten(0, 1).split(KEPT_TOKENS), targets.flatten().split(KEPT_TOKENS))
        losses = torch.cat([checkpoint(part, *pair, use_reentrant=False) if long(targets) else part(*pair) for pair in pairs])
        return losses if reduction == "none" else losses.mean()

    def draft_parameters(self):
        return list(self.mtp.parameters())

    def indexer_parameters(self):
        return [p for n, p in self.named_parameters() if ".indexer." in n]


class Layer(nn.Module):
    def __init__(self, config: dict, n: int | None):
        """`n` is None for the layer of a draft block."""
        super().__init__()
        self.config = config
        hidden, streams, eps = config["hidden_size"], config["hc_mult"], config["rms_norm_eps"]
        mixes = (2 + streams) * streams
        self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale = mixing(mixes, streams * hidden, 3)
        self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale = mixing(mixes, streams * hidden, 3)
        self.attn_norm, self.ffn_norm = RmsNorm(hidden, eps), RmsNorm(hidden, eps)
        self.attn = Attention(config, n)
        self.ffn = Moe(config, n is not None and is_hash(config, n))

    def forward(self, x, ids, rope, run):
        y, post, comb = enter(x, self, "hc_attn", self.config)
        x = leave(x, self.attn(self.attn_norm(y), rope, run), post, comb)
        y, post, comb = enter(x, self, "hc_ffn", self.config)
        return leave(x, self.ffn(self.ffn_norm(y), ids), post, comb)


class Draft(Layer):
    """Multi-token prediction: one more layer, with a window of its own, between an entry and a head of its own."""

    def __init__(self, config: dict):
        super().__init__(config, None)
        hidden, streams, eps = config["hidden_size"], config["hc_mult"], config["rms_norm_eps"]
        self.enorm, self.hnorm, self.norm = (RmsNorm(hidden, eps) for _ in range(3))
        self.e_proj, self.h_proj = Linear(hidden, hidden), Linear(hidden, hidden)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = mixing(streams, streams * hidden, 1)

    def forward(self, x, embedded, ids, rope):
        """`x` is the residual at each token, `embedded` and `ids` are the token after it."""
        x = self.e_proj(self.enorm(embedded)).unsqueeze(2) + self.h_proj(self.hnorm(x))
        x = super().forward(x, ids, rope, Run())
        return self.norm(sum_streams(x, self, "hc_head", self.config))


def long(tokens: torch.Tensor) -> bool:
    """Whether what lies between layers is computed again in the backward pass, not kept; `tokens` is [batch, tokens]."""
    return tokens.shape[1] > KEPT_TOKENS and torch.is_grad_enabled()


def mixing(outputs: int, inputs: int, scales: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(*shape)) for shape in ((outputs, inputs), (outputs,), (scales,))]


def mixes(x, module, name, config):
    """`fn x_normed` of a site, [batch, tokens, outputs], in F32."""
    fn = getattr(module, f"{name}_fn")
    with torch.autocast(x.device.type, enabled=False):
        flat = x.flatten(2)
        mean = (flat.float() ** 2).mean(-1, keepdim=True) if flat.dtype == torch.float32 else \
            torch.linalg.vector_norm(flat, dim=-1, keepdim=True, dtype=torch.float32) ** 2 / flat.shape[-1]
        return F.linear(flat, fn.to(flat.dtype)).float() * (mean + config["rms_norm_eps"]).rsqrt()


def enter(x, module, name, config):
    """The input of a sublayer, and how its output joins the streams: `post` and the mixing matrix."""
    n, eps = config["hc_mult"], config["hc_eps"]
    pre, post, comb = mixes(x, module, name, config).split([n, n, n * n], -1)
    base = getattr(module, f"{name}_base").split([n, n, n * n])
    scale = getattr(module, f"{name}_scale")
    pre = (pre * scale[0] + base[0]).sigmoid() + eps
    post = 2 * (post * scale[1] + base[1]).sigmoid()
    comb = sinkhorn(comb * scale[2] + base[2], n, config["hc_sinkhorn_iters"], eps)
    return weighted_sum(x, pre), post, comb


def sinkhorn(comb, n, iterations, eps):
    """Doubly stochastic matrices [batch, tokens, n, n] of logits [batch, tokens, n * n]. Tokens lie side by side while it
    computes, which is many times faster than matrices of n by n."""
    shape = comb.shape[:-1]
    comb = comb.flatten(0, -2).t().reshape(n, n, -1)
    comb = comb.softmax(1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return comb.flatten(0, 1).t().unflatten(0, shape).unflatten(-1, (n, n))


def leave(x, y, post, comb):
    """`x'_j = post_j y + sum_i comb[i, j] x_i`."""
    weights = torch.cat([post.unsqueeze(-2), comb], -2).transpose(-1, -2).to(x.dtype)
    rows = torch.cat([y.unsqueeze(2).to(x.dtype), x], 2)
    return torch.bmm(weights.flatten(0, 1), rows.flatten(0, 1)).view_as(x)


def weighted_sum(x, weights):
    return torch.bmm(weights.flatten(0, 1).unsqueeze(1).to(x.dtype), x.flatten(0, 1)).view(*x.shape[:2], -1)


def sum_streams(x, module, name, config):
    """What a head makes of the streams, [batch, tokens, hidden]."""
    pre = mixes(x, module, name, config) * getattr(module, f"{name}_scale") + getattr(module, f"{name}_base")
    return weighted_sum(x, pre.sigmoid() + config["hc_eps"])


class Attention(nn.Module):
    def __init__(self, config: dict, layer: int | None):
        super().__init__()
        self.layer, self.config = layer, config
        self.heads, self.width, self.rope = config["num_attention_heads"], config["head_dim"], rope_dim(config)
        self.groups, self.eps = config["o_groups"], config["rms_norm_eps"]
        self.ratio, sparse = compression(config, layer)
        hidden, latent = config["hidden_size"], config["q_lora_rank"]
        self.wq_a, self.q_norm = Linear(hidden, latent), RmsNorm(latent, self.eps)
        self.wq_b = Linear(latent, self.heads * self.width)
        self.wkv, self.kv_norm = Linear(hidden, self.width), RmsNorm(self.width, self.eps)
        self.attn_sink = nn.Parameter(torch.zeros(self.heads))
        self.wo_a = Linear(self.heads // self.groups * self.width, self.groups * config["o_lora_rank"])
        self.wo_b = Linear(self.groups * config["o_lora_rank"], hidden)
        self.compressor = Compressor(config, self.width, self.ratio, sparse) if self.ratio else None
        self.indexer = Indexer(config, self.ratio) if sparse else None

    def forward(self, x, rope, run):
        batch, tokens, _ = x.shape
        latent = self.q_norm(self.wq_a(x))
        q = self.wq_b(latent).unflatten(-1, (self.heads, self.width))
        q = F.rms_norm(q.float(), (self.width,), eps=self.eps).to(q.dtype)
        q = rotate(q, self.rope, rope, 1)
        kv = rotate(self.kv_norm(self.wkv(x)).to(q.dtype), self.rope, rope)
        rows = self.compressor(x, rope) if self.ratio else None
        index = None
        if self.indexer and (run.index_loss or run.attention == "sparse"):
            index = self.indexer(x.detach(), latent.detach(), rope)
        out = self.attend(q, kv, rows, index, run)[:, :tokens]
        out = rotate(out, self.rope, (rope[0], -rope[1]), 1)
        out = out.reshape(batch, tokens, self.groups, -1)
        weight = self.wo_a.weight.unflatten(0, (self.groups, -1))
        out = torch.cat([F.linear(out[:, :, g], weight[g]) for g in range(self.groups)], -1)
        return self.wo_b(out)

    def attend(self, q, kv, rows, index, run):
        """[batch, tokens, heads, width], where tokens are rounded up to whole windows."""
        window = self.config["sliding_window"]
        pad = -q.shape[1] % window
        q, kv = F.pad(q, (0, 0, 0, 0, 0, pad)), F.pad(kv, (0, 0, 0, pad))
        tokens = q.shape[1]
        step = max(GROUP // window, 1) * window
        outs, losses = [], []
        for start in range(0, tokens, step):
            end = min(start + step, tokens)
            local = F.pad(kv[:, max(start - window, 0):end], (0, 0, max(window - start, 0), 0))
            visible = 0 if rows is None else min(end // self.ratio, rows.shape[1])
            some = rows[:, :visible] if visible else None
            part = index.slice(start, end, visible) if index and visible else None
            if long(q[..., 0, 0]):
                out, loss = checkpoint(self.group, q[:, start:end], local, some, part, run, start, use_reentrant=False)
            else:
                out, loss = self.group(q[:, start:end], local, some, part, run, start)
            outs.append(out)
            losses.append(loss)
        if run.index_loss and self.indexer:
            run.losses.append(sum(losses) / tokens)
        return torch.cat(outs, 1)

    def group(self, q, local, rows, index, run, start):
        """Attention of the queries `q` from position `start` on; `local` are the window rows from one window before it, and
        `rows` the compressed ones that the last query sees. Also the indexer's loss, summed over queries."""
        batch, tokens, heads, width = q.shape
        window, scale = self.config["sliding_window"], self.width**-0.5
        count = tokens // window
        q = q.unflatten(1, (count, window)).transpose(2, 3)  # [batch, windows, heads, window, width]
        windows = local.unflatten(1, (count + 1, window))
        keys = torch.cat([windows[:, :-1], windows[:, 1:]], 2)  # [batch, windows, 2 * window, width]
        near = (q.flatten(2, 3) @ keys.transpose(-1, -2)).float() * scale
        near = near.unflatten(2, (heads, window)) + window_mask(window, start == 0, count, q.device)
        sink = self.attn_sink.float().view(heads, 1, 1).expand(batch, count, heads, window, 1)
        loss = q.new_zeros((), dtype=torch.float32)
        if rows is None:
            p = torch.cat([near, sink], -1).softmax(-1)[..., :-1].to(q.dtype)
            return (p.flatten(2, 3) @ keys).view_as(q).transpose(2, 3).flatten(1, 2), loss
        seen = (start + torch.arange(tokens, device=q.device) + 1) // self.ratio  # rows that each query sees
        allowed = torch.arange(rows.shape[1], device=q.device) < seen[:, None]
        scores = None
        if index is not None:
            scores = index.scores().masked_fill(~allowed, -torch.inf)
            if run.attention == "sparse":
                allowed = top_k(scores.detach(), self.config["index_topk"])
        mask = torch.zeros(allowed.shape, device=q.device).masked_fill(~allowed, -torch.inf)
        mask = mask.view(-1, count, 1, window, rows.shape[1])
        far = (q.flatten(1, 3) @ rows.transpose(-1, -2)).float() * scale
        far = far.view(batch, count, heads, window, -1) + mask
        p = torch.cat([near, far, sink], -1).softmax(-1)
        p_far = p[..., 2 * window:-1]
        if scores is not None:
            mass = p_far.detach().mean(2).flatten(1, 2)  # [batch, tokens, rows]
            if run.observe:
                run.observe(self, mass, top_k(scores.detach(), self.config["index_topk"]), start)
            if run.index_loss:
                loss = divergence(mass, scores, allowed)
        p_far, p_near = p_far.to(q.dtype), p[..., :2 * window].to(q.dtype)
        out = p_near.flatten(2, 3) @ keys
        out = out.flatten(1, 2) + p_far.flatten(1, 3) @ rows
        return out.view_as(q).transpose(2, 3).flatten(1, 2), loss


def window_mask(window, at_start, count, device):
    """0 where query i of a window may see key j of the two windows that end with its own, else -inf."""
    i, j = torch.arange(window, device=device)[:, None], torch.arange(2 * window, device=device)
    allowed = ((j > i) & (j <= i + window)).repeat(count, 1, 1, 1)
    if at_start:
        allowed[0, 0, :, :window] = False
    return torch.zeros(allowed.shape, device=device).masked_fill(~allowed, -torch.inf)


def divergence(mass, scores, allowed):
    """KL from the attention on compressed rows to the softmax of the scores, summed over queries, batch mean."""
    allowed = allowed.expand(scores.shape)
    some = allowed.any(-1)
    target = mass * allowed
    target = target / (target.sum(-1, keepdim=True) + 1e-9)
    log_p = scores.masked_fill(~allowed, -torch.inf)
    log_p = log_p.masked_fill(~some.unsqueeze(-1), 0).log_softmax(-1).masked_fill(~allowed, 0)
    return ((torch.xlogy(target, target) - target * log_p).sum(-1) * some).sum() / scores.shape[0]


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k best visible rows of each query as booleans; of equal scores the lower index wins."""
    visible = scores > -torch.inf
    if scores.shape[-1] <= k:
        return visible
    worst = scores.topk(k).values.min(-1, keepdim=True).values
    chosen = (scores >= worst) & visible
    if chosen.sum(-1).max() <= k:
        return chosen
    above, level = scores > worst, (scores == worst) & visible
    return above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


class Compressor(nn.Module):
    """Rows of `ratio` tokens; with overlap a row spans the run before it too, which fills other channels."""

    def __init__(self, config: dict, width: int, ratio: int, overlap: bool):
        super().__init__()
        self.ratio, self.overlap, self.width, self.rope = ratio, overlap, width, rope_dim(config)
        channels = width * (1 + overlap)
        self.wkv, self.wgate = Linear(config["hidden_size"], channels), Linear(config["hidden_size"], channels)
        self.ape = nn.Parameter(torch.zeros(ratio, channels))
        self.norm = RmsNorm(width, config["rms_norm_eps"])

    def forward(self, x, rope):
        count = x.shape[1] // self.ratio
        if count == 0:
            return None
        x = x[:, :count * self.ratio]
        kv = self.wkv(x).float().unflatten(1, (count, self.ratio))
        gate = self.wgate(x).float().unflatten(1, (count, self.ratio)) + self.ape
        if self.overlap:
            kv, gate = (torch.cat([F.pad(t[:, :-1, :, :self.width], (0, 0, 0, 0, 1, 0), value=fill), t[..., self.width:]], 2)
                        for t, fill in ((kv, 0.0), (gate, -torch.inf)))
        rows = self.norm((gate.softmax(2) * kv).sum(2))
        rows = rows.to(torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else rows.dtype)
        return rotate(rows, self.rope, tuple(t[::self.ratio][:count] for t in rope))


class Indexer(nn.Module):
    """The cheap scorer that decides which compressed rows a query may see."""

    def __init__(self, config: dict, ratio: int):
        super().__init__()
        self.heads, self.width, self.rope = config["index_n_heads"], config["index_head_dim"], rope_dim(config)
        self.wq_b = Linear(config["q_lora_rank"], self.heads * self.width)
        self.weights_proj = Linear(config["hidden_size"], self.heads)
        self.compressor = Compressor(config, self.width, ratio, True)

    def forward(self, x, latent, rope):
        q = rotate(self.wq_b(latent).unflatten(-1, (self.heads, self.width)), self.rope, rope, 1)
        k = self.compressor(x, rope)
        return k if k is None else IndexRows(q, k, self.weights_proj(x).float() * (self.heads * self.width) ** -0.5)


@dataclass
class IndexRows:
    q: torch.Tensor  # [batch, tokens, heads, width]
    k: torch.Tensor  # [batch, rows, width]
    weights: torch.Tensor  # [batch, tokens, heads]

    def slice(self, start: int, end: int, rows: int) -> "IndexRows":
        """Queries `start..end`, padded to that many, and the first `rows` rows."""
        pad = end - start - self.q[:, start:end].shape[1]
        return IndexRows(F.pad(self.q[:, start:end], (0, 0, 0, 0, 0, pad)), self.k[:, :rows],
                         F.pad(self.weights[:, start:end], (0, 0, 0, pad)))

    def scores(self) -> torch.Tensor:
        """[batch, queries, rows]."""
        k = self.k.transpose(-1, -2)
        return sum((self.q[:, :, h] @ k).float().relu() * self.weights[:, :, h, None] for h in range(self.q.shape[2]))


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.w1, self.w3, self.w2 = Linear(hidden, width), Linear(hidden, width), Linear(width, hidden)


class Moe(nn.Module):
    """Routed experts and a shared one. Every expert is computed for every token and weighted, mostly by zero: at this
    size one large matrix product is faster than gathering tokens for eight small ones."""

    def __init__(self, config: dict, by_table: bool):
        super().__init__()
        self.config = config
        hidden, width = config["hidden_size"], config["moe_intermediate_size"]
        self.gate = Router(config, by_table)
        self.experts = nn.ModuleList(Mlp(hidden, width) for _ in range(config["n_routed_experts"]))
        self.shared_experts = Mlp(hidden, width)

    def forward(self, x, ids):
        mlps = [*self.experts, self.shared_experts]
        gates = F.pad(self.gate(x, ids), (0, 1), value=1.0)
        stacked = lambda name, dim: torch.cat([getattr(mlp, name).weight for mlp in mlps], dim)  # noqa: E731
        limit = self.config.get("swiglu_limit") or math.inf
        h = F.linear(x, torch.cat([stacked("w1", 0), stacked("w3", 0)]))
        gate, up = h.chunk(2, -1)
        h = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
        h = h.unflatten(-1, (len(mlps), -1)) * gates.unsqueeze(-1).to(h.dtype)
        return F.linear(h.flatten(-2), stacked("w2", 1))


class Router(nn.Module):
    def __init__(self, config: dict, by_table: bool):
        super().__init__()
        self.config, experts = config, config["n_routed_experts"]
        self.weight = nn.Parameter(torch.empty(experts, config["hidden_size"]))
        if by_table:
            self.register_buffer("tid2eid", torch.zeros(config["vocab_size"], config["num_experts_per_tok"], dtype=torch.int64))
        else:
            self.register_buffer("bias", torch.zeros(experts))
        self.load = None  # tokens per expert in the last pass, for `balance`

    def forward(self, x, ids):
        """Weights [batch, tokens, experts], zero for those not chosen."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.softplus(F.linear(x.float(), self.weight.float())).sqrt()
        with torch.no_grad():
            if hasattr(self, "tid2eid"):
                index = self.tid2eid[ids].to(torch.int64)
            else:
                index = (scores + self.bias).topk(self.config["num_experts_per_tok"]).indices
            chosen = torch.zeros_like(scores).scatter(-1, index, 1)
            self.load = chosen.flatten(0, -2).sum(0)
        weights = scores * chosen
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.config["routed_scaling_factor"]

    @torch.no_grad()
    def balance(self, step: float):
        """Nudge the biases towards an even load; they steer the choice but get no gradient."""
        if hasattr(self, "bias") and self.load is not None:
            self.bias += step * (self.load.mean() - self.load).sign()


class RmsNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)


def rope_dim(config: dict) -> int:
    return config.get("qk_rope_head_dim") or round(config["head_dim"] * config["rope_parameters"]["main"]["partial_rotary_factor"])


def is_hash(config: dict, layer: int) -> bool:
    return config["mlp_layer_types"][layer] == "hash_moe"


def compression(config: dict, layer: int | None) -> tuple[int, bool]:
    """Tokens per compressed row of a layer, 0 if it has the window alone, and whether it selects among its rows."""
    kind = "sliding_attention" if layer is None else config["layer_types"][layer]
    return config["compress_rates"].get(kind, 0), kind == "compressed_sparse_attention"


def rope_tables(rope: dict, dim: int, tokens: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [tokens, dim / 2] of positions 0..tokens; YaRN bends the frequencies, and nothing else."""
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


def rotate(x, dim, rope, heads=0):
    """Turns the last `dim` channels, in pairs of neighbours; tokens are dimension 1, with or without heads behind."""
    cos, sin = (t.to(x.dtype).view(t.shape[0], *[1] * heads, -1) for t in rope)
    still, turned = x.split([x.shape[-1] - dim, dim], -1)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    return torch.cat([still, torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)], -1)
