"""Times `transformers` on a model folder: prefill of a prompt, then single tokens. One JSON object on standard output.

    transformers --model DIR --tokens IDS.json --decode N --threads T

DIR is a published folder (`config.json`, one `model.safetensors`); FP8 weights are widened to F32 first. IDS.json is a
list of token ids: all but the last N are the prompt. The last token's logits are given as well, so that the caller can
tell that both computed the same.
"""

import argparse
import json
import pathlib
import tempfile
import time

import torch
import transformers
from safetensors.torch import load_file, save_file


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", type=pathlib.Path, required=True)
    parser.add_argument("--decode", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ids = torch.tensor([json.loads(args.tokens.read_text())])
    with torch.no_grad():
        print(json.dumps(measure(load(args.model), ids, args.decode)))


def load(folder):
    """The model in F32, eager in attention and experts."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    quantised = config.pop("quantization_config", None)
    wide = {}
    for name, tensor in tensors.items():
        if name.startswith("mtp.") or name.endswith(".scale"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            rows, columns = quantised["weight_block_size"]
            scale = tensors[name.removesuffix("weight") + "scale"].float()
            scale = scale.repeat_interleave(rows, 0)[:tensor.shape[0]].repeat_interleave(columns, 1)[:, :tensor.shape[1]]
            tensor = tensor.float() * scale
        wide[name] = tensor.long() if name.endswith("tid2eid") else tensor.float()
    config["num_nextn_predict_layers"] = 0
    with tempfile.TemporaryDirectory() as plain:
        plain = pathlib.Path(plain)
        (plain / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
        save_file(wide, plain / "model.safetensors", metadata={"format": "pt"})
        return transformers.AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()


def measure(model, ids, decode):
    prompt, rest = ids[:, :-decode], ids[:, -decode:]
    prefill = []
    for _ in range(2):
        cache = transformers.DynamicCache(config=model.config)
        started = time.perf_counter()
        out = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        prefill.append(time.perf_counter() - started)
    steps = []
    for at in range(decode):
        started = time.perf_counter()
        out = model(input_ids=rest[:, at:at + 1], past_key_values=cache, use_cache=True)
        steps.append(time.perf_counter() - started)
    return {
        "prefill_s": min(prefill), "decode_step_s": sorted(steps)[len(steps) // 2], "logits": out.logits[0, -1].tolist(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


if __name__ == "__main__":
    main()
