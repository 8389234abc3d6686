"""The dense products of `esker bench decoder --only gemm` by torch, whose kernels may add in any order: what it costs that ours
give the same bits whatever company a token has. Prints GFLOP/s, the best of nine rounds of each product.

    $XDG_CACHE_HOME/esker/bench-venv/bin/python benches/decoder/products.py --threads 2

The environment is the one that benches/decoder/transformers makes. Shapes and counts are those of engine/decoder/src/products.rs
for V4-Flash's dimensions: a layer of each kind, 8 experts, chunks of 256 tokens.
"""

import argparse
import time

import torch

TOKENS, HIDDEN, LATENT, WIDTH, HEADS, INNER = 256, 4096, 1024, 512, 64, 2048
GROUPS, OUT_RANK, EXPERTS, OF_EXPERT = 8, 1024, 8, 256 * 6 // 8
# Inputs, outputs, maps side by side, rows of each, layers.
PRODUCTS = [
    (4 * HIDDEN, 24, 1, TOKENS, 6),
    (HIDDEN, LATENT, 1, TOKENS, 3),
    (LATENT, HEADS * WIDTH, 1, TOKENS, 3),
    (HIDDEN, WIDTH, 1, TOKENS, 3),
    (HEADS // GROUPS * WIDTH, OUT_RANK, GROUPS, TOKENS, 3),
    (GROUPS * OUT_RANK, HIDDEN, 1, TOKENS, 3),
    (HIDDEN, 4 * WIDTH, 1, TOKENS, 1),
    (HIDDEN, 2 * WIDTH, 1, TOKENS, 1),
    (LATENT, 64 * 128, 1, TOKENS, 1),
    (HIDDEN, 64, 1, TOKENS, 1),
    (HIDDEN, 4 * 128, 1, TOKENS, 1),
    (HIDDEN, EXPERTS, 1, TOKENS, 3),
    (HIDDEN, 2 * INNER, EXPERTS, OF_EXPERT, 3),
    (INNER, HIDDEN, EXPERTS, OF_EXPERT, 3),
    (HIDDEN, 2 * INNER, 1, TOKENS, 3),
    (INNER, HIDDEN, 1, TOKENS, 3),
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    torch.set_num_threads(parser.parse_args().threads)
    done = seconds = 0.0
    with torch.inference_mode():
        for inputs, outputs, maps, rows, layers in PRODUCTS:
            x = torch.randn(rows, inputs)
            weights = [torch.nn.Linear(inputs, outputs, bias=False) for _ in range(maps)]
            best = min(timed(weights, x) for _ in range(9))
            done += 2.0 * inputs * outputs * maps * rows * layers
            seconds += best * layers
    print(f"{done / seconds / 1e9:.0f} GFLOP/s")


def timed(weights, x):
    started = time.perf_counter()
    for weight in weights:
        weight(x)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
