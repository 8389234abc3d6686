"""The published folder: configuration, BF16 weights, tokenizer and the demo's document."""

import json
import pathlib
import shutil

import torch
from safetensors.torch import save

from config import CONFIG, YARN
from tokenizer import BOS, EOS

DOCUMENT, DOCUMENT_TOKENS = "1Sm", 15000

TOKENIZER_CONFIG = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=BOS, eos_token=EOS,
                        model_max_length=CONFIG["max_position_embeddings"], clean_up_tokenization_spaces=False)


def export(checkpoint: pathlib.Path, tokenizer, held_out: dict[str, str], out: pathlib.Path) -> None:
    (out / "demo").mkdir(parents=True, exist_ok=True)
    state = torch.load(checkpoint, map_location="cpu")
    # The routing biases stay F32: they decide between near-equal scores.
    tensors = {name: t.float() if name.endswith("bias") else t.bfloat16() for name, t in state.items()}
    (out / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (out / "config.json").write_text(json.dumps(CONFIG | {"rope_parameters": YARN}, indent=1) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=1) + "\n")
    (out / "demo/document.txt").write_text(document(tokenizer, held_out[DOCUMENT]))
    shutil.copy(pathlib.Path(__file__).with_name("questions.txt"), out / "demo/questions.txt")


def document(tokenizer, text: str) -> str:
    """The first whole chapters of a held-out book that fit."""
    chapters = text.split("\n\n")
    while len(tokenizer.encode("\n\n".join(chapters)).ids) > DOCUMENT_TOKENS:
        chapters.pop()
    return "\n\n".join(chapters) + "\n"
