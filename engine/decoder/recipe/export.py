"""The published folder: configuration, weights, tokenizer and the demo's document.

As published, routed experts are FP8 (e4m3) with one power of two per block of 128 x 128, and the rest BF16, except
what decides between near-equal scores or is tiny: routing biases, sinks, position biases and hyper-connections are F32.
"""

import json
import pathlib
import shutil

import torch
from safetensors.torch import save

from config import CONFIG
from tokenizer import BOS, EOS

DOCUMENT, DOCUMENT_TOKENS = "1Sm", 15000
BLOCK, E4M3_MAX = 128, 448.0
F32_LEAVES = ("bias", "attn_sink", "ape")

TOKENIZER_CONFIG = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=BOS, eos_token=EOS,
                        model_max_length=CONFIG["max_position_embeddings"], clean_up_tokenization_spaces=False)
QUANTIZATION = dict(quant_method="fp8", fmt="e4m3", scale_fmt="ue8m0", weight_block_size=[BLOCK, BLOCK],
                    activation_scheme="dynamic")


def export(checkpoint: pathlib.Path, tokenizer, held_out: dict[str, str], out: pathlib.Path) -> None:
    (out / "demo").mkdir(parents=True, exist_ok=True)
    tensors = publish(torch.load(checkpoint, map_location="cpu"))
    (out / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    config = CONFIG | {"quantization_config": QUANTIZATION}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=1) + "\n")
    (out / "demo/document.txt").write_text(document(tokenizer, held_out[DOCUMENT]))
    shutil.copy(pathlib.Path(__file__).with_name("questions.txt"), out / "demo/questions.txt")


def publish(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in state.items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "tid2eid":
            tensors[name] = tensor.int()
        elif ".experts." in name:
            tensors[name], tensors[name.removesuffix("weight") + "scale"] = quantise(tensor.float())
        elif leaf in F32_LEAVES or leaf.startswith("hc_"):
            tensors[name] = tensor.float()
        else:
            tensors[name] = tensor.bfloat16()
    return tensors


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and per block the smallest power of two with which they reach its largest number."""
    scales = torch.tensor([[cell.abs().max() for cell in rows.split(BLOCK, 1)] for rows in weight.split(BLOCK)])
    scales = torch.exp2(torch.ceil(torch.log2(scales.clamp(min=1e-4) / E4M3_MAX)))
    return (weight / spread(scales, weight)).to(torch.float8_e4m3fn), scales.to(torch.float8_e8m0fnu)


def dequantise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a published file as F32, scales applied."""
    out = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name.removesuffix("weight") + "scale")
        if name.endswith(".scale") and name.removesuffix("scale") + "weight" in tensors:
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = tensor.float() * spread(scale.float(), tensor)
        out[name] = tensor.long() if name.endswith("tid2eid") else tensor.float()
    return out


def spread(scales: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One number per block as one per element."""
    rows, columns = like.shape
    return scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def document(tokenizer, text: str) -> str:
    """The first whole chapters of a held-out book that fit."""
    chapters = text.split("\n\n")
    while len(tokenizer.encode("\n\n".join(chapters)).ids) > DOCUMENT_TOKENS:
        chapters.pop()
    return "\n\n".join(chapters) + "\n"
