"""Perplexity on held-out books by context length, dense against sparse; the indexer's recall; the draft's luck."""

import json
import pathlib
from concurrent.futures import ProcessPoolExecutor

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from export import dequantise
from model import Model, Run

CONTEXTS = (1024, 8192, 32768)
TOKENS = 32768  # of each held-out book, the same at every context length


def evaluate(folder: pathlib.Path, held_out: dict[str, str]) -> None:
    """Prints tables; each book is measured by a process of its own."""
    model, _ = load(folder)
    total, active = parameters(model)
    print(f"{total} parameters, {active} active for a token, counting embedding and head\n")
    with ProcessPoolExecutor(mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        measured = list(pool.map(measure, [folder] * len(held_out), held_out.keys(), held_out.values()))
    print("| held-out book | context | dense | sparse | sparse, second half of each window "
          "| of the dense top-k selected | attention mass of the selected | of the best possible | of the latest |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(row for rows, _ in measured for row in rows))
    print("\n| held-out book | draft block: perplexity | guesses that are the model's own next but one |\n|---|---|---|")
    print("\n".join(row for _, row in measured))


@torch.no_grad()
def measure(folder: pathlib.Path, title: str, text: str) -> tuple[list[str], str]:
    model, tokenizer = load(folder)
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)[:TOKENS]
    rows = []
    for context in CONTEXTS:
        recall = Recall(model.config["index_topk"])
        dense, _ = perplexity(model, ids, context, Run("dense"))
        sparse, late = perplexity(model, ids, context, Run("sparse"))
        perplexity(model, ids, context, Run("dense", observe=recall, index_loss=True))
        rows.append(f"| {title} | {context} | {dense:.2f} | {sparse:.2f} | {late:.2f} | {recall} |")
    windows = torch.stack([torch.cat([bos(model), window]) for window in windowed(ids, 1024)])
    loss, agreed = model.draft_loss(windows)
    return rows, f"| {title} | {loss.exp().item():.2f} | {agreed.item():.2f} |"


def load(folder: pathlib.Path) -> tuple[Model, Tokenizer]:
    """The exported model on the CPU, its weights widened to F32 for the arithmetic."""
    torch.set_num_threads(1)
    model = Model(json.loads((folder / "config.json").read_text())).eval()
    model.load_state_dict(dequantise(load_file(folder / "model.safetensors")))
    return model.float(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def bos(model):
    return torch.tensor([model.config["bos_token_id"]])


def windowed(ids, context):
    return ids[:len(ids) // context * context].view(-1, context)


def perplexity(model: Model, ids: torch.Tensor, context: int, run: Run) -> tuple[float, float]:
    """Over consecutive windows of `context` tokens, each read from its start behind a beginning of text; of all tokens,
    and of those in the second half of their window."""
    losses = torch.stack([model.loss(torch.cat([bos(model), window])[None], run, "none") for window in windowed(ids, context)])
    return losses.mean().exp().item(), losses[:, context // 2:].mean().exp().item()


class Recall:
    """For queries of CSA layers that have more than `k` compressed rows to choose from: which share of the `k` rows that
    dense attention weighs most (mean over heads) is selected, how much of the attention on compressed rows the selected
    hold, and for comparison how much the best k and the last k rows hold."""

    def __init__(self, k: int):
        self.k, self.sums, self.count = k, torch.zeros(4), 0

    def __call__(self, attention, mass, selected, start):
        mass, selected = mass[0], selected[0]
        seen = (start + torch.arange(len(mass)) + 1) // attention.ratio
        rows = (seen > self.k).nonzero().flatten()
        if not len(rows):
            return
        mass, selected, seen = mass[rows], selected[rows], seen[rows]
        mass = mass / mass.sum(-1, keepdim=True)
        best = mass.topk(self.k)
        age = seen[:, None] - 1 - torch.arange(mass.shape[1])
        self.sums += torch.stack([
            selected.gather(-1, best.indices).float().mean(-1).sum(), (mass * selected).sum(),
            best.values.sum(), (mass * ((age >= 0) & (age < self.k))).sum()])
        self.count += len(rows)

    def __str__(self):
        return " | ".join(f"{s:.3f}" for s in (self.sums / max(self.count, 1)).tolist())


def parameters(model: Model) -> tuple[int, int]:
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    idle = 1 - model.config["num_experts_per_tok"] / model.config["n_routed_experts"]
    return total, int(total - experts * idle)
