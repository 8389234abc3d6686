"""Continue the demo's document with each of its questions, to see how the model reads.

There is no cache here: every token costs a pass over the whole document. The decoder does it properly.
"""

import pathlib

import torch

from evaluate import load
from model import Run


@torch.no_grad()
def sample(folder: pathlib.Path, tokens: int, temperature: float, seed: int, document: bool = True) -> None:
    model, tokenizer = load(folder)
    torch.manual_seed(seed)
    context = (folder / "demo/document.txt").read_text() if document else ""
    for question in (folder / "demo/questions.txt").read_text().splitlines():
        ids = tokenizer.encode(context + "\n" + question).ids
        prompt = len(ids)
        while len(ids) < prompt + tokens and ids[-1] != model.config["eos_token_id"]:
            hidden = model(torch.tensor([ids]), Run("sparse"))[0, -1]
            logits = model.lm_head(hidden)
            if temperature:
                ids.append(torch.multinomial((logits / temperature).softmax(-1), 1).item())
            else:
                ids.append(logits.argmax().item())
        print(f"[{prompt} tokens] {question}{tokenizer.decode(ids[prompt:])}\n", flush=True)
