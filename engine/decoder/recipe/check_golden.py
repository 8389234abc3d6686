"""Compare this implementation with stored logits and selections of the published architecture."""

import json
import pathlib

import torch
from safetensors.torch import load_file

from model import Model, Run

TOLERANCE = 1e-4


@torch.no_grad()
def check(directory: pathlib.Path) -> None:
    model = Model(json.loads((directory / "config.json").read_text())).float().eval()
    model.load_state_dict(load_file(directory / "model.safetensors"))
    golden = load_file(directory / "golden.safetensors")
    selections = {}
    run = Run("sparse", observe=lambda attention, _q, _k, _scale, selected, _start: selections.update(
        {attention.layer: selected[0]}))
    logits = model.lm_head(model(golden["input_ids"].view(1, -1), run))[0]
    difference = (logits - golden["logits"]).abs().max().item()
    wrong_rows = sum(
        set(row.nonzero().flatten().tolist()) != set(expected[expected >= 0].tolist())
        for layer, rows in selections.items() for row, expected in zip(rows, golden[f"topk.{layer}"]))
    print(f"{directory.name}: largest logit difference {difference:.1e}, differing selections {wrong_rows}")
    if difference > TOLERANCE or wrong_rows:
        raise SystemExit("the architecture is not the published one")
