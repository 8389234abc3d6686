"""A vLLM engine in a process of its own, told what to do line by line: what the test of the connector drives.

    python vllm_engine.py '{"model": ..., "kv_transfer_config": {...} or null, ...}'

Each line on standard input is a JSON object with `op`; each answer is one line on standard output that starts with `ANSWER `.
"""

import hashlib
import json
import os
import pathlib
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def make_model(folder: pathlib.Path, seed: int, sliding: int = 0) -> None:
    """A small llama whose random weights have the scale of trained ones: its keys and values differ from token to token."""
    import torch
    from safetensors.torch import save_file

    hidden, layers, heads, kv_heads, size, ffn, vocab = 256, 4, 4, 2, 64, 512, 1024
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if sliding:
        # Layers with and without a window, in turn: two groups of KV cache.
        config |= {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "sliding_window": sliding,
            "query_pre_attn_scalar": size,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "hidden_activation": "gelu_pytorch_tanh",
        }
    torch.manual_seed(seed)
    tensors = {}

    def weight(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        tensors[name] = torch.randn(rows, columns) * scale / columns**0.5

    tensors["model.embed_tokens.weight"] = torch.randn(vocab, hidden) * (hidden**-0.5 if sliding else 1.0)
    if not sliding:
        weight("lm_head.weight", vocab, hidden, 3.0)
    norm = torch.zeros if sliding else torch.ones
    tensors["model.norm.weight"] = norm(hidden)
    for layer in range(layers):
        base = f"model.layers.{layer}."
        weight(base + "self_attn.q_proj.weight", heads * size, hidden, 2.0)
        weight(base + "self_attn.k_proj.weight", kv_heads * size, hidden, 2.0)
        weight(base + "self_attn.v_proj.weight", kv_heads * size, hidden)
        weight(base + "self_attn.o_proj.weight", hidden, heads * size)
        weight(base + "mlp.gate_proj.weight", ffn, hidden)
        weight(base + "mlp.up_proj.weight", ffn, hidden)
        weight(base + "mlp.down_proj.weight", hidden, ffn)
        names = ["input_layernorm", "post_attention_layernorm"]
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if sliding else []
        for name in names:
            tensors[f"{base}{name}.weight"] = norm(hidden)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, str(folder / "model.safetensors"))


def main() -> None:
    arguments = json.loads(sys.argv[1])
    if arguments.get("make"):
        make_model(pathlib.Path(arguments["make"]), arguments["seed"], arguments.get("sliding", 0))
        return
    import torch
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    transfer = arguments.pop("kv_transfer_config")
    engine = LLM(
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        disable_log_stats=False,
        seed=0,
        kv_transfer_config=KVTransferConfig(**transfer) if transfer else None,
        **arguments,
    )
    worker = get_kv_transfer_group()._worker if has_kv_transfer_group() else None
    tampering = [False]
    # Of each page: its bytes in the engine's memory when it was saved, and the block that it was loaded into.
    saved: dict[str, str] = {}
    loaded: dict[str, tuple[int, int]] = {}

    def name(group: int, page: bytes) -> str:
        return f"{group}/{page.hex()}"

    def digest(page) -> str:  # type: ignore[no-untyped-def]
        return hashlib.blake2b(page.numpy().tobytes(), digest_size=16).hexdigest()

    if worker is not None:
        scatter, save, load = worker._scatter, worker._save, worker._load

        def scattered(group, chunks):  # type: ignore[no-untyped-def]
            if tampering[0]:
                for chunk in chunks.values():
                    chunk.view(dtype=torch.float32).mul_(-1)
            scatter(group, chunks)

        def saving(pages, chunks, size):  # type: ignore[no-untyped-def]
            saved.update((name(pages.group, pages.hashes[page]), digest(chunk)) for page, chunk in chunks.items())
            save(pages, chunks, size)

        def loading(asked):  # type: ignore[no-untyped-def]
            for pages in asked.pages:
                loaded.update((name(pages.group, pages.hashes[page]), (pages.group, block)) for page, block in pages.blocks.items())
            load(asked)

        worker._scatter, worker._save, worker._load = scattered, saving, loading

    def generate(prompt: list[int], count: int) -> dict:
        sampling = SamplingParams(temperature=0.0, max_tokens=count, logprobs=5, detokenize=False, ignore_eos=True)
        output = engine.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0]
        chosen = output.outputs[0]
        logprobs = [{str(token): item.logprob for token, item in step.items()} for step in chosen.logprobs]
        return {"tokens": list(chosen.token_ids), "logprobs": logprobs, "cached": output.num_cached_tokens}

    def restored() -> dict[str, str]:
        """Pages that the last generation loaded, as they lie in the engine's memory now."""
        groups = worker._shape.groups
        return {page: digest(worker._gather(groups[group], block)) for page, (group, block) in loaded.items()}

    def answer(request: dict):  # type: ignore[no-untyped-def]
        op = request["op"]
        if op == "generate":
            loaded.clear()
            return generate(request["prompt"], request["count"])
        if op == "flush":
            worker._saving.submit(lambda: None).result(timeout=60)
            return True
        if op == "saved":
            return saved
        if op == "restored":
            return restored()
        if op == "metrics":
            return [
                {"name": metric.name, "labels": dict(metric.labels), "value": getattr(metric, "value", None)}
                for metric in engine.get_metrics()
                if "cache" in metric.name
            ]
        if op == "tamper":
            tampering[0] = request["on"]
            return True
        if op == "reset":
            return engine.llm_engine.reset_prefix_cache(reset_connector=True)
        raise ValueError(op)

    print("ANSWER " + json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print("ANSWER " + json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
