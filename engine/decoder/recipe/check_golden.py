"""Compare this implementation with stored logits and selections of the published architecture, and write such a
comparison of a trained model for the decoder (`esker golden DIR`)."""

import json
import pathlib
import shutil

import torch
from safetensors.torch import load_file, save_file

from model import Model, Run

TOLERANCE = 1e-4


def forward(model: Model, ids: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Logits [tokens, vocab], and per CSA layer what each query selects, [tokens, rows] as booleans."""
    selections = {}

    def observe(attention, _mass, selected, _start):
        selections.setdefault(attention.layer, []).append(selected[0])

    logits = model.head(model(ids.view(1, -1), Run("sparse", observe=observe)))[0]
    return logits, {layer: parts for layer, parts in selections.items()}


@torch.no_grad()
def check(directory: pathlib.Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    model = Model(config | {"num_nextn_predict_layers": 0}).float().eval()
    model.load_state_dict(tensors)
    golden = load_file(directory / "golden.safetensors")
    logits, selections = forward(model, golden["input_ids"])
    difference = (logits - golden["logits"]).abs().max().item()
    wrong_rows = sum(
        set(row.nonzero().flatten().tolist()) != set(expected[expected >= 0].tolist())
        for layer, parts in selections.items()
        for row, expected in zip((row for part in parts for row in part), golden[f"topk.{layer}"]))
    print(f"{directory.name}: largest logit difference {difference:.1e}, differing selections {wrong_rows}")
    if difference > TOLERANCE or wrong_rows:
        raise SystemExit("the architecture is not the published one")


@torch.no_grad()
def write(folder: pathlib.Path, ids: torch.Tensor, out: pathlib.Path) -> None:
    """Logits and selections of the model in `folder` on `ids`, beside a copy of it."""
    from evaluate import load
    out.mkdir(parents=True, exist_ok=True)
    model, _ = load(folder)
    logits, selections = forward(model, ids)
    golden = {"input_ids": ids.contiguous(), "logits": logits.contiguous()}
    k = model.config["index_topk"]
    for layer, parts in selections.items():
        rows = [row.nonzero().flatten() for part in parts for row in part][:len(ids)]
        golden[f"topk.{layer}"] = torch.stack([torch.cat([row, row.new_full((k - len(row),), -1)]) for row in rows]).int()
    save_file(golden, out / "golden.safetensors")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, out / name)
