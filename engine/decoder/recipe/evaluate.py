"""Perplexity on held-out books by context length, dense against sparse, and the indexer's recall."""

import json
import pathlib
from concurrent.futures import ProcessPoolExecutor

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from model import Model, Run, attention_mass

CONTEXTS = (1024, 4096, 16384)
TOKENS = 16384  # of each held-out book, the same at every context length
RECALL_ROWS = 32  # queries sampled per chunk of 1024


def evaluate(folder: pathlib.Path, held_out: dict[str, str]) -> None:
    """Prints a table; each book is measured by a process of its own."""
    model, _ = load(folder)
    total, active = parameters(model)
    print(f"{total} parameters, {active} active for a token, counting embedding and head\n")
    print("| held-out book | context | dense | sparse | sparse, second half of each window "
          "| attention mass of the selected | of the best possible | of the latest |")
    print("|---|---|---|---|---|---|---|---|")
    with ProcessPoolExecutor(mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        for rows in pool.map(measure, [folder] * len(held_out), held_out.keys(), held_out.values()):
            print(rows)


@torch.no_grad()
def measure(folder: pathlib.Path, title: str, text: str) -> str:
    model, tokenizer = load(folder)
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)[:TOKENS]
    rows = []
    for context in CONTEXTS:
        recall = Recall(model.config["index_topk"])
        dense, _ = perplexity(model, ids, context, Run("dense"))
        sparse, late = perplexity(model, ids, context, Run("sparse", observe=recall))
        rows.append(f"| {title} | {context} | {dense:.2f} | {sparse:.2f} | {late:.2f} | {recall} |")
    return "\n".join(rows)


def load(folder: pathlib.Path) -> tuple[Model, Tokenizer]:
    """The exported model on the CPU, its BF16 weights widened to F32 for the arithmetic."""
    torch.set_num_threads(1)
    model = Model(json.loads((folder / "config.json").read_text())).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.float(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def perplexity(model: Model, ids: torch.Tensor, context: int, run: Run) -> tuple[float, float]:
    """Over consecutive windows of `context` tokens, each read from its start behind a beginning of text;
    of all tokens, and of those in the second half of their window."""
    bos = torch.tensor([model.config["bos_token_id"]])
    windows = ids[:len(ids) // context * context].view(-1, context)
    losses = torch.stack([model.loss(torch.cat([bos, window])[None], run, "none") for window in windows])
    return losses.mean().exp().item(), losses[:, context // 2:].mean().exp().item()


class Recall:
    """How much of the dense attention (mean over heads) falls on the tokens selected, for queries that
    have more than `k` to choose from; beside it the best any k tokens could do, and the last k tokens."""

    def __init__(self, k: int):
        self.k, self.sums, self.count = k, torch.zeros(3), 0

    def __call__(self, _attention, q, k, scale, selected, start):
        rows = torch.arange(q.shape[2] - 1, 0, -max(q.shape[2] // RECALL_ROWS, 1))
        rows = rows[start + rows >= self.k]
        keys = torch.arange(k.shape[2])
        age = (start + rows)[:, None] - keys
        mass = attention_mass(q[:, :, rows], k, scale, age.unsqueeze(0) >= 0)[0]
        chosen = (mass * selected[0, rows]).sum(-1)
        best = mass.topk(min(self.k, mass.shape[-1])).values.sum(-1)
        last = (mass * ((age >= 0) & (age < self.k))).sum(-1)
        self.sums += torch.stack([chosen.sum(), best.sum(), last.sum()])
        self.count += len(rows)

    def __str__(self):
        return " | ".join(f"{s:.3f}" for s in (self.sums / max(self.count, 1)).tolist())


def parameters(model: Model) -> tuple[int, int]:
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    idle = 1 - model.config["num_experts_per_tok"] / model.config["n_routed_experts"]
    return total, int(total - experts * idle)
