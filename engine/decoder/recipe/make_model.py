"""Text, tokenizer, training, export and evaluation of the bundled model. See README.md."""

import argparse
import pathlib
import shutil

import torch
from tokenizers import Tokenizer

import check_golden
import corpus
import evaluate
import export
import sample
import tokenizer as bpe
from config import CONFIG
from train import PHASES, Budget, checkpoint, train

CACHE = pathlib.Path.home() / ".cache/esker"


def main():
    args = arguments()
    if args.check_golden:
        return check_golden.check(args.check_golden)
    if args.write_golden:
        return write_golden(args)
    if args.sample:
        return sample.sample(args.out, args.sample, args.temperature, args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    books, held_out = corpus.load(CACHE)
    tokenizer = load_tokenizer(args.work, books, args.start)
    if not args.evaluate:
        if args.fresh:
            for phase in PHASES:
                checkpoint(args.work, phase).unlink(missing_ok=True)
        ids = encode(tokenizer, books.values())
        print(f"{len(ids)} training tokens in {len(books)} books")
        last = train(ids, args.work, Budget(args.minutes, args.tokens), args.seed, args.start)
        export.export(last, tokenizer, held_out, args.out)
    evaluate.evaluate(args.out, held_out)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=72, help="training time")
    parser.add_argument("--tokens", type=int, default=0, help="train on this many tokens instead, reproducibly")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=pathlib.Path, metavar="DIR", help="begin with the weights of this V3.2 model")
    parser.add_argument("--fresh", action="store_true", help="forget the phases that an earlier run finished")
    parser.add_argument("--evaluate", action="store_true", help="only measure what is in --out")
    parser.add_argument("--sample", type=int, default=0, metavar="TOKENS", help="only continue the demo's questions")
    parser.add_argument("--temperature", type=float, default=0, help="of --sample; 0 takes the likeliest token")
    parser.add_argument("--check-golden", type=pathlib.Path, metavar="DIR", help="only check the architecture")
    parser.add_argument("--write-golden", type=pathlib.Path, metavar="DIR",
                        help="only write what --out computes on the demo's document, for the decoder to be compared with")
    parser.add_argument("--work", type=pathlib.Path, default=CACHE / "recipe", help="for checkpoints")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent / "model")
    return parser.parse_args()


GOLDEN_TOKENS = 1500


def write_golden(args):
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    ids = tokenizer.encode((args.out / "demo/document.txt").read_text()).ids[:GOLDEN_TOKENS]
    check_golden.write(args.out, torch.tensor(ids), args.write_golden)


def load_tokenizer(work, books, start):
    path = work / "tokenizer.json"
    if start:
        shutil.copy(start / "tokenizer.json", path)
    elif not path.exists():
        bpe.train(books.values(), CONFIG["vocab_size"]).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    bpe.check_round_trip(tokenizer, next(iter(books.values())))
    return tokenizer


def encode(tokenizer, texts):
    """All texts as one row of ids, each between a beginning and an end of text."""
    return torch.tensor([i for text in texts for i in [*tokenizer.encode(text).ids, CONFIG["eos_token_id"]]])


if __name__ == "__main__":
    main()
